"""One encoder on three real data sets, each task against scratch with the same budget and seeds; writes a report.

    python benchmarks/real_sets.py --imagenette DIR --nuclei DIR --camvid DIR --out runs/real

Pre-trains a ViT-Tiny on the training photos of imagenette (labels unused), then fine-tunes on imagenette, trains
Mask R-CNN on nuclei and UperNet on camvid. The scratch arm trains without layer-wise decay, as the paper's scratch
recipe does. Layouts: train/<class>/* and val/<class>/*; {train,val}/ with annotations/instances_{train,val}.json;
images/{training,validation} with annotations/{training,validation}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_core.errors import user_errors
from transfer.chain import Task, run_chain

PRETRAIN = "mae pretrain configs/pretrain/tiny_96.yaml"
FINETUNE = "configs/finetune/tiny_96.yaml optim.epochs=6 optim.warmup_epochs=1"
DETECT = "transfer/detection/train_net.py --config-file configs/detection/small_data.yaml optim.epochs=4"
SEGMENT = "transfer/segmentation/train_net.py configs/segmentation/small_data.py"
STEPS = "iterations=300"


def real_tasks(imagenette: Path, nuclei: Path, camvid: Path) -> tuple[Task, ...]:
    """The three tasks, with the budgets of the small-data configurations."""
    return (
        Task(
            name="classification",
            metric="top-1 accuracy (%)",
            metric_path=("top1",),
            data=imagenette,
            command=f"mae finetune {FINETUNE} data.path={{data}} output={{output}} seed={{seed}}",
            from_scratch="from_scratch=true optim.layer_decay=1",
            from_encoder="weights={encoder}",
        ),
        Task(
            name="detection",
            metric="COCO mask AP",
            metric_path=("segm", "AP"),
            data=nuclei,
            command=f"python {DETECT} data.path={{data}} output={{output}} seed={{seed}}",
            from_scratch="from_scratch=true optim.layer_decay=1",
            from_encoder="weights={encoder}",
        ),
        Task(
            name="segmentation",
            metric="mIoU (%)",
            metric_path=("mIoU",),
            data=camvid,
            command=f"python {SEGMENT} --work-dir {{output}} "
            f"--cfg-options {STEPS} num_classes=11 reduce_zero_label=True data_root={{data}} randomness.seed={{seed}}",
            from_scratch="optim_wrapper.paramwise_cfg.layer_decay_rate=1.0",
            from_encoder="--weights {encoder}",
        ),
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("imagenette", "nuclei", "camvid"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm of each task")
    given = parser.parse_args()
    with user_errors():
        run_chain(
            given.out,
            title="MAE transfer on imagenette, nuclei and camvid",
            pretrain=(*PRETRAIN.split(), f"data.path={given.imagenette.resolve() / 'train'}", "output={output}"),
            tasks=real_tasks(given.imagenette.resolve(), given.nuclei.resolve(), given.camvid.resolve()),
            seeds=range(given.seeds),
        )


if __name__ == "__main__":
    main()
