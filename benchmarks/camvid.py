"""Is pre-training on the few hundred images at hand worth it? UperNet on CamVid from three starts; writes a report.

    python benchmarks/camvid.py --camvid DIR --encoder runs/imagenette_pretrain --out runs/camvid

The same ViT-Tiny, budget and seeds each time: from random weights, from an MAE pre-trained on CamVid's own training
images without their labels, and from the MAE of ``--encoder``, such as one pre-trained on imagenette with
configs/pretrain/tiny_96.yaml. The scratch arm trains without layer-wise decay, as the paper's scratch recipe does.
What is finished in ``--out`` is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from mae_core.errors import UserError, user_errors
from mae_core.layout import ENCODER, ENVIRONMENT, PICTURES, resolve_weights
from transfer.chain import Job, Stage, Task, read_log, read_metric
from transfer.report import Curve, Picture, Report, TaskResult, write_report

SCRATCH, OWN, OTHER = "scratch", "pre-trained on its own images", "pre-trained on other images"
FOLDERS = {SCRATCH: "scratch", OWN: "own", OTHER: "other"}
PRETRAIN = "mae pretrain configs/pretrain/tiny_96.yaml optim.batch_size=64 optim.warmup_epochs=5"
TRAIN = "python transfer/segmentation/train_net.py configs/segmentation/camvid.py"


def pretraining(images: Path, output: Path, epochs: int) -> Job:
    """The pre-training on the set's own images."""
    options = [f"optim.epochs={epochs}", f"data.path={images}", f"output={output}"]
    return Job("pre-training", [*PRETRAIN.split(), *options], output, ENCODER)


def training(data: Path, steps: int, crop: int) -> Task:
    """One training of the segmenter."""
    options = f"iterations={steps} crop_size={crop} lr=1e-3 workers=1 custom_hooks.0.interval=10"
    return Task(
        name="camvid",
        metric="mIoU (%)",
        metric_path=("mIoU",),
        data=data,
        command=f"{TRAIN} --work-dir {{output}} --cfg-options {options} data_root={{data}} randomness.seed={{seed}}",
        from_scratch="optim_wrapper.paramwise_cfg.layer_decay_rate=1.0",
        from_encoder="--weights {encoder}",
    )


def measure(
    camvid: Path, encoder: Path, out: Path, *, seeds: Sequence[int], steps: int, epochs: int, crop: int, cores: int
) -> Path:
    """Run what is not finished in ``out`` and write its report; returns the report's path."""
    started = time.perf_counter()
    images = camvid / "images" / "training"
    if not images.is_dir():
        raise UserError(f"{camvid} holds no images/training; give the folder with images/ and annotations/")
    resolve_weights(encoder)
    own = out / "pretrain"
    task = training(camvid, steps, crop)
    first = pretraining(images, own, epochs)
    Stage(out, parallel=1, threads=cores).run([first])
    starts = {SCRATCH: None, OWN: own, OTHER: encoder}
    runs = {(arm, seed): out / f"{FOLDERS[arm]}_{seed}" for seed in seeds for arm in starts}
    jobs = {
        key: Job(run.name, task.command_line(encoder=starts[key[0]], output=run, seed=key[1]), run)
        for key, run in runs.items()
    }
    Stage(out, parallel=cores, threads=1).run(list(jobs.values()))
    found = {arm: [read_metric(runs[arm, seed], task.metric_path) for seed in seeds] for arm in starts}
    note = f"{steps} steps of 8 crops of {crop} pixels"
    results = {f"camvid, {arm}": TaskResult(task.metric, found[SCRATCH], found[arm], note=note) for arm in (OWN, OTHER)}
    losses = {f"{arm}, seed {seed}": read_log(run, "loss") for (arm, seed), run in runs.items()}
    report = Report(
        title="UperNet on CamVid, from three starts",
        seconds=time.perf_counter() - started,
        tasks=results,
        curves=[
            Curve("Pre-training on its own images", "loss on hidden patches", {"pre-training": read_log(own, "loss")}),
            Curve("Segmentation", "training loss", losses),
        ],
        pictures=[
            Picture(arm, "Validation images, the truth beside the prediction; the first seed's run.", drawn[-1])
            for arm in starts
            if (drawn := sorted((runs[arm, seeds[0]] / PICTURES).glob("step_*.png")))
        ],
        environment=json.loads((own / ENVIRONMENT).read_text(encoding="utf-8")),
        commands=[(job.name, shlex.join(job.command)) for job in [first, *(jobs[arm, seeds[0]] for arm in starts)]],
    )
    return write_report(report, out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--camvid", type=Path, required=True, help="folder with images/, annotations/ and classes.txt")
    add("--encoder", type=Path, required=True, help="a ViT-Tiny with patches of 12, pre-trained on other images")
    add("--out", type=Path, default=Path("runs/camvid"))
    add("--seeds", type=int, default=2, help="runs of each arm")
    add("--steps", type=int, default=240, help="of each training, 8 images each")
    add("--epochs", type=int, default=100, help="of the pre-training on the set's own images")
    add("--crop", type=int, default=144, help="pixels, a multiple of 12")
    add("--cores", type=int, default=2, help="trainings side by side, one thread each")
    given = parser.parse_args()
    with user_errors():
        path = measure(
            given.camvid.resolve(),
            given.encoder.resolve(),
            given.out.resolve(),
            seeds=range(given.seeds),
            steps=given.steps,
            epochs=given.epochs,
            crop=given.crop,
            cores=given.cores,
        )
        print(f"open {path}")


if __name__ == "__main__":
    main()
