"""Partial fine-tuning on a small set of photos: the paper's Figure 9 at a small scale; writes a table and one figure.

    python benchmarks/partial_curve.py --data DIR --encoder FILE --out runs/partial_curve

DIR holds train/<class>/* and val/<class>/*, FILE is an encoder pre-trained at 96 pixels by the recipe in
configs/pretrain/tiny_96.yaml. For each number of blocks the last blocks of the encoder are tuned, with several seeds;
0 is the linear probe, all blocks are full fine-tuning. Beside the curve: the same network from scratch, and the k-NN
classification of the frozen encoder. All trainings but the linear probe have the same epochs and batch; from scratch
there is no layer-wise decay and half the learning rate. Finished runs in the folder are used again, interrupted ones
continue.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.errors import UserError, user_errors
from mae_core.training.progress import clock
from mae_core.weights.load import read_encoder
from transfer.chain import Job, Stage, read_metric

FINETUNE = (
    "mae finetune configs/finetune/tiny_96.yaml data.workers=0 evaluate_every=1000 log.checkpoint_every=50 "
    "optim.batch_size=32"
)
RATE, SCRATCH_RATE = "optim.base_lr=1.6e-2", "optim.base_lr=8e-3"
"""A small batch makes the most of few epochs. From scratch all layers learn at the full rate, so it is half of it."""
LINEAR = "mae linprobe configs/linprobe/one_gpu.yaml data.workers=0 evaluate_every=1000"
"""At the batch of the recipe for one GPU; on some thousand images its 90 epochs take seconds."""
KNN = "mae knn data.workers=0 model.pooling=cls"
NEIGHBOURS = (10, 20)
GREYS = ("tab:gray", "tab:olive")
WARMUP_SHARE = 0.1
ABREAST = 2


class Arm(NamedTuple):
    """A point of the figure: a command without output and seed, its runs, and where its number is in metrics.json."""

    name: str
    command: str
    seeds: Sequence[int]
    metric: tuple[str, ...] = ("top1",)


class Point(NamedTuple):
    """Top-1 of an arm in per cent, each seed's."""

    name: str
    top1: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single run."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def arms_of(data: Path, encoder: Path, out: Path, *, blocks: Sequence[float], epochs: float, seeds: int) -> list[Arm]:
    """All points, the quick ones first."""
    schedule = f"data.path={data} optim.epochs={epochs:g} optim.warmup_epochs={epochs * WARMUP_SHARE:g}"
    every = range(seeds)
    frozen = f"weights={encoder} data.path={data} cache={out / 'features'}"
    return [
        *(Arm(f"{k}-NN", f"{KNN} {frozen} k=[{k}]", range(1), ("top1", str(k))) for k in NEIGHBOURS),
        Arm("linear", f"{LINEAR} {frozen}", every),
        *(
            Arm(
                f"{count:g} blocks", f"{FINETUNE} {schedule} {RATE} weights={encoder} trainable_blocks={count:g}", every
            )
            for count in blocks
        ),
        Arm("scratch", f"{FINETUNE} {schedule} {SCRATCH_RATE} from_scratch=true optim.layer_decay=1", every),
    ]


def run_of(out: Path, arm: Arm, seed: int) -> Path:
    """The folder of one run."""
    return out / arm.name.replace(" ", "_") / f"seed_{seed}"


def jobs_of(arms: Sequence[Arm], out: Path) -> list[Job]:
    """All runs, seed by seed."""
    jobs = []
    for seed in range(max(len(arm.seeds) for arm in arms)):
        for arm in arms:
            if seed in arm.seeds:
                run = run_of(out, arm, seed)
                seeded = [] if arm.command.startswith(KNN) else [f"seed={seed}"]
                jobs.append(Job(f"{arm.name} seed {seed}", [*arm.command.split(), f"output={run}", *seeded], run))
    return jobs


def draw(points: dict[str, Point], blocks: Sequence[float], file: Path, title: str) -> None:
    """The curve over the number of tuned blocks as in the paper's Figure 9, with every seed and the standard deviation;
    scratch and k-NN as lines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8))
    plot = figure.add_subplot()
    counts = [0, *blocks]
    curve = [points["linear"], *(points[f"{count:g} blocks"] for count in blocks)]
    places = range(len(counts))
    spreads = [point.spread or 0.0 for point in curve]
    means = [point.mean for point in curve]
    plot.errorbar(places, means, yerr=spreads, marker="o", capsize=3, color="tab:blue", label="pre-trained (MAE)")
    for place, point in zip(places, curve, strict=True):
        plot.scatter([place] * len(point.top1), point.top1, s=10, color="tab:blue", alpha=0.5, linewidths=0, zorder=3)
        above = (place, point.mean + (point.spread or 0.0))
        plot.annotate(f"{point.mean:.1f}", above, (0, 6), textcoords="offset points", ha="center")
    others = [("scratch", "from scratch, all blocks", "tab:red")]
    others += [(f"{k}-NN", f"{k}-NN, frozen", colour) for k, colour in zip(NEIGHBOURS, GREYS, strict=True)]
    for name, label, colour in others:
        point = points[name]
        plot.axhline(point.mean, color=colour, linestyle="--", linewidth=1, label=f"{label}: {point.mean:.1f}")
        if point.spread:
            plot.axhspan(point.mean - point.spread, point.mean + point.spread, color=colour, alpha=0.12, linewidth=0)
    plot.set_xticks(list(places), ["0\n(linear)", *(f"{count:g}" for count in blocks)])
    plot.set(xlabel="blocks fine-tuned", ylabel="top-1 accuracy (%)", title=title)
    plot.legend(frameon=False, fontsize=9)
    plot.margins(y=0.1)
    plot.spines[["top", "right"]].set_visible(False)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")


def table_of(points: dict[str, Point], figure: Path, told: str, command: str) -> str:
    """The report in Markdown."""
    rows = []
    for point in points.values():
        spread = "-" if point.spread is None else f"{point.spread:.2f}"
        each = ", ".join(f"{value:.1f}" for value in point.top1)
        rows.append(f"| {point.name} | **{point.mean:.1f}** | {spread} | {each} |")
    header = "| point | top-1, % | standard deviation | each seed |\n|---|---|---|---|"
    return (
        f"# Partial fine-tuning\n\n```console\n$ {command}\n```\n\n{told}\n\n{header}\n"
        + "\n".join(rows)
        + (f"\n\n![top-1 over the number of tuned blocks]({figure.name})\n")
    )


def partial_curve(
    data: Path, encoder: Path, out: Path, *, blocks: Sequence[float], epochs: float, seeds: int, command: str
) -> Path:
    """Run what is not finished, two runs abreast of one thread each, and write partial_curve.{png,md,json}."""
    depth = read_encoder(encoder).shape.depth
    wrong = [count for count in blocks if count > depth]
    if wrong:
        raise UserError(f"--blocks {wrong[0]:g} was asked for, but the encoder in {encoder} has {depth}")
    arms = arms_of(data, encoder, out, blocks=blocks, epochs=epochs, seeds=seeds)
    jobs = jobs_of(arms, out)
    print(f"{len(jobs)} runs, {ABREAST} abreast, in {out}", flush=True)
    started = time.perf_counter()
    frozen = [job for job in jobs if not job.command[1].startswith("finetune")]
    Stage(out, parallel=1, threads=1).run(frozen[:1])  # fills the cache that the others read
    Stage(out, parallel=ABREAST, threads=1).run([job for job in jobs if job not in frozen[:1]])
    seconds = time.perf_counter() - started
    points = {
        arm.name: Point(arm.name, [read_metric(run_of(out, arm, seed), arm.metric) for seed in arm.seeds])
        for arm in arms
    }
    figure = out / "partial_curve.png"
    draw(points, blocks, figure, f"Partial fine-tuning, {epochs:g} epochs, {seeds} seeds")
    told = (
        f"{epochs:g} epochs for every number of blocks and from scratch, seeds 0 to {seeds - 1} of each; the spread is "
        "the standard deviation over them. 0.5 blocks are the MLP of the last one. The linear probe is the best of a "
        "sweep of learning rates on features without augmentation. k-NN has nothing random."
    )
    write_text(out / "partial_curve.md", table_of(points, figure, told, command))
    values = {name: {"top1": p.top1, "mean": p.mean, "standard_deviation": p.spread} for name, p in points.items()}
    write_json(out / "partial_curve.json", {"epochs": epochs, "command": command, "points": values})
    print(f"done in {clock(seconds)}; open {figure}", flush=True)
    return figure


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train/<class>/* and val/<class>/*")
    parser.add_argument("--encoder", type=Path, required=True, help="an encoder, or a run that has one")
    parser.add_argument("--out", type=Path, default=Path("runs/partial_curve"))
    parser.add_argument("--blocks", type=float, nargs="+", default=[0.5, 1, 2, 4, 6, 12])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    blocks = sorted(set(given.blocks))
    command = (
        f"python benchmarks/partial_curve.py --data {given.data.name} --encoder {given.encoder.name} "
        f"--blocks {' '.join(f'{count:g}' for count in blocks)} --epochs {given.epochs:g} --seeds {given.seeds}"
    )
    with user_errors():
        partial_curve(
            given.data.resolve(),
            given.encoder.resolve(),
            given.out.resolve(),
            blocks=blocks,
            epochs=given.epochs,
            seeds=given.seeds,
            command=command,
        )


if __name__ == "__main__":
    main()
