"""Is pre-training on the few hundred images at hand worth it? Mask R-CNN on nuclei, against scratch; writes a report.

    python benchmarks/nuclei.py --nuclei DIR --out runs/nuclei

DIR holds train/, val/ and annotations/instances_{train,val}.json. A ViT-Tiny is pre-trained on the training images (the
annotations unused), then the detector trains from it and from scratch with the same budget and seeds. The scratch arm
trains without layer-wise decay, as the paper's scratch recipe does. A finished pre-training in OUT is used again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_core.errors import user_errors
from transfer.chain import Task, run_chain

PRETRAIN = "mae pretrain configs/pretrain/tiny_96.yaml data.vflip=0.5 data.quarter_turns=true data.workers=0"
DETECT = "transfer/detection/train_net.py --config-file configs/detection/small_data.yaml"


def detection(data: Path, epochs: float) -> Task:
    """The one task: masks of nuclei."""
    return Task(
        name="detection",
        metric="COCO mask AP",
        metric_path=("segm", "AP"),
        data=data,
        command=f"python {DETECT} optim.epochs={epochs:g} data.path={{data}} output={{output}} seed={{seed}}",
        from_scratch="from_scratch=true optim.layer_decay=1",
        from_encoder="weights={encoder}",
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nuclei", type=Path, required=True, help="a COCO folder")
    parser.add_argument("--out", type=Path, default=Path("runs/nuclei"))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--epochs", type=float, default=4, help="of each training, 8 images a step")
    parser.add_argument("--pretrain-epochs", type=float, default=300, help="of the pre-training on the set's images")
    given = parser.parse_args()
    schedule = f"optim.epochs={given.pretrain_epochs:g} optim.warmup_epochs={given.pretrain_epochs / 20:g}"
    with user_errors():
        data = given.nuclei.resolve()
        run_chain(
            given.out,
            title="Mask R-CNN on nuclei, pre-trained on its own images",
            pretrain=(*PRETRAIN.split(), *schedule.split(), f"data.path={data / 'train'}", "output={output}"),
            tasks=(detection(data, given.epochs),),
            seeds=range(given.seeds),
        )


if __name__ == "__main__":
    main()
