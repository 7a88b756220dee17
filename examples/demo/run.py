"""Does one pre-trained encoder help a classifier, a detector and a segmenter? The whole chain on handwritten digits.

    python examples/demo/run.py --out runs/demo        (or: make demo)

It composes scenes of handwritten digits, pre-trains on those without labels, trains each task from scratch and from the
encoder with the same budget and seeds, and writes ``report.html``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_core.errors import UserError, user_errors
from transfer.chain import Job, Task, run_chain, set_aside

DATA_SIZES = "--image-size 48 --clutter 0.5 --unlabelled 4000 --train 1000 --test 300 --workers 2"
PRETRAIN = "mae pretrain configs/pretrain/digits.yaml"
COMMON = "data.path={data} output={output} seed={seed}"
SAME = "one configuration for both arms"


def digit_tasks(data: Path) -> tuple[Task, ...]:
    """The three tasks on the scenes below ``data``."""
    return (
        Task(
            name="classification",
            metric="top-1 accuracy (%)",
            metric_path=("top1",),
            data=data / "classification",
            command=f"mae finetune configs/finetune/digits.yaml {COMMON}",
            note="1000 labelled scenes, 14 epochs; " + SAME,
        ),
        Task(
            name="detection",
            metric="COCO box AP",
            metric_path=("bbox", "AP"),
            data=data / "detection",
            command=f"mae detect train configs/detection/digits.yaml {COMMON}",
            note="200 steps of 8 scenes; " + SAME,
        ),
        Task(
            name="segmentation",
            metric="mIoU (%)",
            metric_path=("mIoU",),
            data=data / "segmentation",
            command=f"mae segment train configs/segmentation/digits.py {COMMON}",
            note="300 steps of 8 scenes; " + SAME,
        ),
    )


OWN_DATA_COMMANDS = (
    (
        "Own data: pre-train on a folder of images",
        "mae pretrain configs/pretrain/tiny_96.yaml data.path=IMAGES output=runs/mine",
    ),
    (
        "Own data: classify, from train/<class>/* and val/<class>/*",
        "mae finetune configs/finetune/tiny_96.yaml weights=runs/mine data.path=LABELLED output=runs/classes",
    ),
    (
        "Own data: detect, from train/, val/ and annotations/instances_{train,val}.json",
        "mae detect train configs/detection/small_data.yaml weights=runs/mine data.path=COCO output=runs/detector",
    ),
    (
        "Own data: segment, from images/{training,validation} and annotations/{training,validation}",
        "mae segment train configs/segmentation/small_data.py weights=runs/mine data.path=LABELMAPS num_classes=N "
        "output=runs/segmenter",
    ),
)


def run_demo(folder: Path, num_seeds: int = 2) -> Path:
    """Run the chain into ``folder`` -> path of the report. Raises ``UserError`` where a stage fails."""
    if num_seeds < 1:
        raise UserError(f"--seeds {num_seeds}: at least one run of each arm is needed, two to see a spread")
    folder = folder.resolve()
    set_aside(folder)
    data = folder / "data"
    return run_chain(
        folder,
        title="MAE transfer demo",
        data=Job("composing scenes of handwritten digits", ["mae", "digits", str(data), *DATA_SIZES.split()]),
        pretrain=(*PRETRAIN.split(), f"data.path={data / 'unlabelled'}", "output={output}"),
        tasks=digit_tasks(data),
        seeds=range(num_seeds),
        commands=OWN_DATA_COMMANDS,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs and the report")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm of each task")
    given = parser.parse_args(arguments)
    with user_errors():
        run_demo(given.out, given.seeds)


if __name__ == "__main__":
    main()
