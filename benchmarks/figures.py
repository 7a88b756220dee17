"""The paper's Figures 5, 7, 8 and 9 at a small scale, each a sweep of ``mae compare``, plotted beside the paper's.

    python benchmarks/figures.py 5 --data DIR --out runs/figure_5        mask ratio: fine-tuned and probed
    python benchmarks/figures.py 7 --data DIR --out runs/figure_7        epochs of pre-training
    python benchmarks/figures.py 8 --data DIR --out runs/figure_8        size of the network, and from scratch
    python benchmarks/figures.py 9 --data DIR --encoder FILE --out runs/figure_9     number of blocks that learn

DIR holds train/<class>/* and val/<class>/*, such as imagenette; its training images are pre-trained on without labels.
``--values`` takes other ratios, epochs, sizes or numbers of blocks. ``--report FILE`` draws again from the report.json
of a sweep. Stopped, the same command continues; more values and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.errors import UserError, user_errors
from transfer.compare.config import CompareConfig
from transfer.compare.run import compare
from transfer.report.results import mean_and_half_range

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, FINETUNE = ROOT / "benchmarks" / "table1.yaml", ROOT / "benchmarks" / "table1_finetune.yaml"
TUNED, PROBED, SCRATCH = "fine-tuned", "linear probe", "from scratch"
COLOURS = {TUNED: "tab:blue", PROBED: "tab:orange", SCRATCH: "tab:red", "MoCo v3": "tab:green"}
Points = dict[float, float]
"""Place on the axis -> top-1 in per cent."""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    values   those of a small sweep, as ``--values`` takes them
    entries  (the command line) -> encoders and tasks of the comparison
    place    (encoder, task, costs of the encoder) -> (series, place on the axis) of a result
    paper    the published numbers: ViT-L/16 on ImageNet-1K, but for Figure 8
    """

    title: str
    axis: str
    values: tuple[str, ...]
    entries: Callable[[argparse.Namespace], dict[str, list[dict[str, Any]]]]
    place: Callable[[str, str, dict[str, Any]], tuple[str, float]]
    paper: dict[str, Points]
    logarithmic: bool = False


def pretraining(given: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """An encoder that is pre-trained here."""
    words = ["mae", "pretrain", str(PRETRAIN), f"data.path={given.data.resolve() / 'train'}"]
    return {"name": name, "command": shlex.join([*words, f"optim.epochs={given.epochs:g}", *given.pretrain, *options])}


def finetuning(given: argparse.Namespace, name: str, *options: str, **more: Any) -> dict[str, Any]:
    """A task that trains all of an encoder, or as much as ``options`` say."""
    data = str(given.data.resolve())
    return {
        **{"kind": "finetune", "name": name, "data": data, "recipe": str(FINETUNE)},
        **{"options": [*given.options, *options], **more},
    }


def probing(given: argparse.Namespace) -> dict[str, Any]:
    """The linear probe."""
    options = ["data.image_size=48", "data.workers=0", *given.probe_options]
    return {"kind": "linprobe", "name": PROBED, "data": str(given.data.resolve()), "options": options}


def both(given: argparse.Namespace, encoders: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Encoders that are fine-tuned and probed."""
    return {"encoders": encoders, "tasks": [finetuning(given, TUNED), probing(given)]}


def of_ratios(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figure 5."""
    ratios = [int(value) for value in given.values]
    return both(given, [pretraining(given, f"{r}", f"masking.ratio={r / 100}") for r in ratios])


def of_epochs(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figure 7."""
    epochs = [float(value) for value in given.values]
    warmups = [f"optim.warmup_epochs={min(2.0, each / 10):g}" for each in epochs]
    return both(
        given,
        [
            pretraining(given, f"{each:g}", f"optim.epochs={each:g}", warm)
            for each, warm in zip(epochs, warmups, strict=True)
        ],
    )


def of_sizes(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figure 8: each size pre-trained, and the same network from scratch."""
    made = [pretraining(given, size, f"model.size={size}") for size in given.values]
    random = [{"name": f"{size} {SCRATCH}", "scratch": True, "like": size} for size in given.values]
    return {"encoders": [*made, *random], "tasks": [finetuning(given, TUNED)]}


def of_blocks(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figure 9: 0 blocks are the linear probe."""
    if given.encoder is None:
        raise UserError("Figure 9 tunes one encoder: give --encoder FILE, such as a run of Figure 7")
    tasks = [finetuning(given, value, f"trainable_blocks={value}") for value in given.values]
    return {"encoders": [{"name": "MAE", "weights": str(given.encoder.resolve())}], "tasks": [probing(given), *tasks]}


def _by_encoder(encoder: str, task: str, cost: dict[str, Any]) -> tuple[str, float]:
    return task, float(encoder)


def _by_size(encoder: str, task: str, cost: dict[str, Any]) -> tuple[str, float]:
    return SCRATCH if encoder.endswith(SCRATCH) else task, cost["parameters"] / 1e6


def _by_task(encoder: str, task: str, cost: dict[str, Any]) -> tuple[str, float]:
    return encoder, 0.0 if task == PROBED else float(task)


def points(places: Sequence[float], scores: Sequence[float]) -> Points:
    """A published curve."""
    return dict(zip(places, scores, strict=True))


RATIOS = (10, 20, 30, 40, 50, 60, 70, 75, 80, 90)
EPOCHS = (100, 200, 400, 800, 1600)
BLOCKS = (0, 1, 2, 4, 6, 12, 18, 24)
FIGURES = {
    "5": Figure(
        "Mask ratio (Figure 5)",
        "mask ratio (%)",
        ("10", "25", "50", "75", "90"),
        of_ratios,
        _by_encoder,
        {
            TUNED: points(RATIOS, (83.2, 83.4, 83.4, 84.7, 84.9, 85.0, 84.9, 84.9, 84.5, 83.0)),
            PROBED: points(RATIOS, (54.6, 58.9, 61.7, 67.0, 69.9, 71.8, 73.2, 73.5, 71.8, 66.1)),
        },
    ),
    "7": Figure(
        "Epochs of pre-training (Figure 7)",
        "epochs",
        ("2", "5", "10", "20"),
        of_epochs,
        _by_encoder,
        {
            TUNED: points(EPOCHS, (82.3, 83.3, 84.3, 84.9, 85.1)),
            PROBED: points(EPOCHS, (57.3, 64.4, 69.7, 73.5, 75.1)),
        },
        logarithmic=True,
    ),
    "8": Figure(
        "Size of the network (Figure 8)",
        "parameters (M)",
        ("nano", "tiny"),
        of_sizes,
        _by_size,
        {TUNED: points((86, 304, 632), (83.6, 85.9, 86.9)), SCRATCH: points((86, 304, 632), (82.3, 82.6, 83.1))},
        logarithmic=True,
    ),
    "9": Figure(
        "Partial fine-tuning (Figure 9)",
        "blocks fine-tuned",
        ("0.5", "1", "2", "4", "6"),
        of_blocks,
        _by_task,
        {
            "MAE": points((0, 0.5, *BLOCKS[1:]), (73.5, 79.1, 81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9)),
            "MoCo v3": points(BLOCKS, (77.6, 79.9, 80.8, 81.6, 81.9, 83.2, 83.8, 84.1)),
        },
    ),
}
"""Number in the paper -> figure. Sources of ``paper``: the labels of the figures in He et al. (CVPR 2022) and, of
Figure 8, Table 3 (ImageNet-1K alone; the curves of the ViT paper have no labels)."""


def configuration(number: str, given: argparse.Namespace) -> CompareConfig:
    """The comparison behind a figure."""
    return CompareConfig.model_validate(
        {
            "title": FIGURES[number].title,
            "output": str(given.out.resolve()),
            **FIGURES[number].entries(given),
            **{"seeds": given.seeds, "steps": given.steps, "rates": [1.0], "layer_decays": [0.75], "jobs": given.jobs},
        }
    )


def series_of(figure: Figure, report: dict[str, Any]) -> dict[str, dict[float, list[float]]]:
    """Series -> place -> scores of the seeds, from the report of a comparison."""
    costs = {encoder["name"]: encoder for encoder in report["encoders"]}
    found: dict[str, dict[float, list[float]]] = {}
    for row in report["results"]:
        name, place = figure.place(row["encoder"], row["task"], costs[row["encoder"]])
        found.setdefault(name, {})[place] = row["scores"]
    return {name: dict(sorted(places.items())) for name, places in found.items()}


def places_of(series: Iterable[Mapping[float, Any]]) -> list[float]:
    """All places of some series, ascending."""
    return sorted({place for places in series for place in places})


def draw(figure: Figure, ours: dict[str, dict[float, list[float]]], file: Path) -> None:
    """Here, with the range over the seeds, and beside it the paper."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9.5, 4))
    left, right = canvas.subplots(1, 2)
    for name, places in ours.items():
        means = [fmean(scores) for scores in places.values()]
        below = [mean - min(scores) for mean, scores in zip(means, places.values(), strict=True)]
        above = [max(scores) - mean for mean, scores in zip(means, places.values(), strict=True)]
        left.errorbar([*places], means, yerr=[below, above], marker="o", capsize=3, color=COLOURS.get(name), label=name)
    for name, published in figure.paper.items():
        right.plot([*published], [*published.values()], marker="o", color=COLOURS.get(name), label=name)
    for plot, title, series in ((left, "here", ours), (right, "the paper", figure.paper)):
        plot.set(xlabel=figure.axis, ylabel="top-1 accuracy (%)", title=title)
        if figure.logarithmic:
            plot.set_xscale("log")
        ticks = places_of(series.values())
        plot.set_xticks(ticks, ["" if place == 0.5 and ticks[-1] > 12 else f"{place:g}" for place in ticks])
        plot.minorticks_off()
        plot.tick_params(axis="x", labelsize=8)
        plot.legend(frameon=False)
        plot.spines[["top", "right"]].set_visible(False)
    with atomic_path(file) as temporary:
        canvas.savefig(temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})


def table_of(figure: Figure, ours: dict[str, dict[float, list[float]]]) -> str:
    """Here and in the paper, in Markdown."""
    names = [*dict.fromkeys([*ours, *figure.paper])]
    columns = [
        (name, where)
        for name in names
        for where in ("here", "paper")
        if name in (ours if where == "here" else figure.paper)
    ]
    places = places_of([*ours.values(), *figure.paper.values()])
    lines = [
        f"| {figure.axis} | {' | '.join(f'{name}, {where}' for name, where in columns)} |",
        "|--:|" + "--:|" * len(columns),
    ]
    for place in places:
        cells = []
        for name, where in columns:
            if where == "here":
                scores = ours[name].get(place)
                cells.append(mean_and_half_range(scores, 1) if scores else "")
            else:
                cells.append(f"{figure.paper[name][place]:.1f}" if place in figure.paper[name] else "")
        lines.append(f"| {place:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_figure(number: str, report: dict[str, Any], results: Path, command: str) -> Path:
    """figure_<number>.{png,md,json} -> the path of the picture."""
    figure, stem = FIGURES[number], f"figure_{number}"
    ours = series_of(figure, report)
    write_json(results / f"{stem}.json", {**report, "command": command})
    draw(figure, ours, results / f"{stem}.png")
    machine = report["environment"]
    told = (
        f"`{command}` at commit {machine['commit']}; {machine['processor']}, {machine['threads']} thread; torch "
        f"{machine['torch']}. {report['trainings']} trainings, {report['seconds'] / 60:.0f} minutes of them together. "
        "Here: images of 48 pixels, the steps and seeds of the command; ± is half the range over the seeds. The paper: "
        "ViT-L/16, 224 pixels, ImageNet-1K."
    )
    write_text(
        results / f"{stem}.md",
        f"# {figure.title}\n\n![{figure.title}]({stem}.png)\n\n{table_of(figure, ours)}\n\n{told}\n",
    )
    return results / f"{stem}.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if arguments is None else [*arguments]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("figure", choices=sorted(FIGURES), help="its number in the paper")
    add("--data", type=Path, help="train/<class>/* and val/<class>/*")
    add("--encoder", type=Path, metavar="FILE", help="Figure 9: the encoder that is tuned")
    add("--values", nargs="+", help="ratios in per cent, epochs, sizes or numbers of blocks; a few when left out")
    add("--epochs", type=float, default=8, help="of pre-training, where they are not what varies")
    add("--steps", type=int, default=100, help="of every fine-tuning and probe")
    add("--seeds", type=int, default=2, help="of every fine-tuning and probe")
    add("--jobs", type=int, default=1, help="trainings at once")
    add("--pretrain", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the pre-training")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the fine-tuning")
    add("--probe-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the probe")
    add("--out", type=Path, help="folder of the trainings; runs/figure_N when left out")
    add("--report", type=Path, metavar="FILE", help="draw again from the report.json of a sweep, and train nothing")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of plot and table")
    given = parser.parse_args(words)
    given.values = given.values or list(FIGURES[given.figure].values)
    given.out = given.out or Path("runs") / f"figure_{given.figure}"
    shown = [Path(word).name if "/" in word and "=" not in word else word for word in words]
    command = shlex.join(["python", "benchmarks/figures.py", *shown])
    with user_errors():
        path = given.report
        if path is None:
            if given.data is None:
                raise UserError("give --data DIR with train/<class>/* and val/<class>/*, or --report FILE of a sweep")
            compare(configuration(given.figure, given), command=command)
            path = given.out.resolve() / "report.json"
        if not path.is_file():
            raise UserError(f"{path} does not exist; a sweep writes report.json into its --out")
        picture = write_figure(given.figure, json.loads(path.read_text(encoding="utf-8")), given.results, command)
        print(f"wrote {picture} and the table beside it")


if __name__ == "__main__":
    main()
