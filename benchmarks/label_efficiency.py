"""What pre-training is worth with few labels: each arm's score over the number of labels; a table and a curve.

    python benchmarks/label_efficiency.py detection --data nuclei --unlabelled nuclei_unlabelled \\
        --fractions 0.05 0.1 0.25 1 --arms scratch pretrained warm frozen --seeds 3

TASK is classification (train/<class>/* and val/<class>/*), detection (COCO: train/, val/ and annotations/) or
segmentation (images/ and annotations/{training,validation}). It is ``mae compare`` with these arms as encoders: subsets
of the labels are drawn from the seed and nested, every arm trains for the same steps, and its learning rate (in
multiples of the recipe's) and layer decay are the best of the same grid on labels that were kept out for it. An encoder
that is not given is pre-trained on the unlabelled images, by arm:

    scratch     nothing
    pretrained  the unlabelled images
    warm        the unlabelled images, from the weights in --warm-from
    frozen      the encoder of pretrained, whose trunk stays as it is (classification: the attentive probe)
    linear, knn of classification: as frozen, with the linear probe on the cls token, and its nearest neighbours

What is finished stays finished: the same command continues, and more fractions, arms and seeds may be added. Scratch
has the size of the first encoder: trained before there was one, it is trained again once there is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.config.schema import leaf_names
from mae_core.counting import clock
from mae_core.errors import UserError, user_errors
from mae_core.training.frozen_config import KnnConfig, LinprobeConfig
from transfer.compare.config import CompareConfig
from transfer.compare.kinds import KINDS
from transfer.compare.run import compare

ROOT = Path(__file__).resolve().parents[1]
TASKS = {"classification": "finetune", "detection": "detection", "segmentation": "segmentation"}
"""Task -> the kind of ``mae compare`` that trains all of an encoder."""
ARMS = SCRATCH, PRETRAINED, WARM, FROZEN, LINEAR, KNN = ("scratch", "pretrained", "warm", "frozen", "linear", "knn")
READERS = {FROZEN: "attentive", LINEAR: "linprobe", KNN: "knn"}
"""Arms whose trunk is frozen, and the kind that reads it in classification."""
STAYS = {"detection": "model.trainable_blocks=0", "segmentation": "model.backbone.trainable_blocks=0"}
"""The option that freezes the trunk in the other tasks."""
COLOURS = dict(zip(ARMS, ("tab:red", "tab:blue", "tab:green", "tab:olive", "tab:cyan", "tab:gray"), strict=True))


def grid_of(words: Sequence[str]) -> dict[str, list[float]]:
    """``rate=0.5,1 decay=1,0.75`` -> the values by name; a name that is left out stands for 1. Raises ``UserError`` for
    other words."""
    axes: dict[str, list[float]] = {"rate": [1.0], "decay": [1.0]}
    for word in words:
        name, _, values = word.partition("=")
        try:
            axes[name] = sorted({float(value) for value in values.split(",")}, reverse=name == "decay")
        except ValueError:
            axes["?"] = []
        if set(axes) != {"rate", "decay"} or min(axes[name]) <= 0:
            raise UserError(f"--grid {word} cannot be read; write rate=0.5,1,2 and decay=1,0.75, numbers above 0")
    return axes


def shown(word: str) -> str:
    """A word of the command line with the last part of a path alone."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if "/" in value else word


def encoder_of(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """The entry of an arm that has an encoder of its own: given, or pre-trained."""
    encoders = dict(entry.split("=", 1) for entry in given.encoder)
    if arm == SCRATCH:
        return {"name": arm, "scratch": True}
    if arm in encoders:
        return {"name": arm, "weights": str(Path(encoders[arm]).resolve())}
    if given.unlabelled is None:
        raise UserError(f"arm {arm} needs --unlabelled IMAGES to pre-train on, or --encoder {arm}=FILE")
    words = ["mae", "pretrain", "continue" if arm == WARM else "tiny_96", f"data.path={given.unlabelled.resolve()}"]
    if arm == WARM:
        if given.warm_from is None:
            raise UserError("arm warm needs --warm-from FILE, the weights to continue from, or --encoder warm=FILE")
        words.append(f"weights={given.warm_from.resolve()}")
    return {"name": arm, "command": shlex.join([*words, *given.pretrain])}


def source_of(arm: str, given: argparse.Namespace) -> str:
    """The arm whose encoder an arm takes."""
    own = any(entry.startswith(f"{arm}=") for entry in given.encoder)
    return PRETRAINED if arm in READERS and not own else arm


def task_of(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """The entry of an arm's training."""
    kind, options = TASKS[given.task], list(given.options)
    recipe = None if given.recipe is None else str(given.recipe.resolve())
    if arm in READERS and given.task == "classification":
        kind, recipe = READERS[arm], None
        known = leaf_names(KnnConfig if arm == KNN else LinprobeConfig)
        options = [option for option in options if option.partition("=")[0] in known]
    elif arm in READERS:
        options.append(STAYS[given.task])
    data = str(given.data.resolve())
    entry = {"kind": kind, "name": arm, "data": data, "options": options, "encoders": [source_of(arm, given)]}
    return entry if recipe is None else {**entry, "recipe": recipe}


def configuration(given: argparse.Namespace) -> CompareConfig:
    """The comparison that the command line asks for. Raises ``UserError`` for what a user can get wrong."""
    unknown = [entry for entry in given.encoder if entry.partition("=")[0] not in ARMS[1:] or "=" not in entry]
    if unknown:
        raise UserError(f"--encoder {unknown[0]} is not ARM=FILE, with an arm of {', '.join(ARMS[1:])}")
    if bad := [fraction for fraction in given.fractions if not 0 < fraction <= 1]:
        raise UserError(f"--fractions {bad[0]:g} is no share of the labels; give numbers above 0 and up to 1")
    if given.task != "classification" and (other := {LINEAR, KNN} & {*given.arms}):
        raise UserError(f"arm {min(other)} is for classification; a frozen trunk of {given.task} is the arm {FROZEN}")
    grid = grid_of(given.grid)
    arms = [arm for arm in ARMS if arm in given.arms]
    return CompareConfig.model_validate(
        {
            "title": f"Label efficiency: {given.task}",
            "output": str((given.out or Path("runs/label_efficiency") / given.task).resolve()),
            "encoders": [encoder_of(arm, given) for arm in dict.fromkeys(source_of(arm, given) for arm in arms)],
            "tasks": [task_of(arm, given) for arm in arms],
            "seeds": given.seeds,
            "steps": given.steps,
            "rates": grid["rate"],
            "layer_decays": grid["decay"],
            "holdout": given.holdout,
            "labels": sorted(set(given.fractions)),
            "jobs": given.jobs,
        }
    )


def records_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a comparison by fraction and arm."""
    return [
        {
            "fraction": entry["share"],
            "arm": entry["task"],
            "labels": entry["labels"],
            "rate": entry["choice"].get("rate", 1.0),
            "decay": entry["choice"].get("decay", 1.0),
            "scores": entry["scores"],
            "grid": entry["grid"],
        }
        for entry in sorted(results, key=lambda entry: (entry["share"], ARMS.index(entry["task"])))
    ]


def table_of(records: Sequence[dict[str, Any]], metric: str) -> str:
    """The records in Markdown: mean, standard deviation, and the distance to scratch beside the larger of the two
    distances between an arm's best and worst seed."""
    lines = [
        f"| labels | arm | {metric} | standard deviation | each seed | over scratch | larger range | rate | decay |",
        "|--:|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for record in records:
        scores = record["scores"]
        base = next((r["scores"] for r in records if (r["fraction"], r["arm"]) == (record["fraction"], SCRATCH)), None)
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else "-"
        ahead = largest = "-"
        if base is not None and record["arm"] != SCRATCH:
            ahead = f"{fmean(scores) - fmean(base):+.1f}"
            largest = f"{max(max(values) - min(values) for values in (scores, base)):.1f}"
        each = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(
            f"| {record['labels']} ({record['fraction']:.0%}) | {record['arm']} | **{fmean(scores):.1f}** | {spread} | "
            f"{each} | {ahead} | {largest} | {record['rate']:g} | {record['decay']:g} |"
        )
    return "\n".join(lines) + "\n"


def draw(records: Sequence[dict[str, Any]], file: Path, metric: str, title: str) -> None:
    """Each arm's mean and range over the number of labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2))
    plot = figure.add_subplot()
    for arm in dict.fromkeys(record["arm"] for record in records):
        mine = sorted((r["labels"], r["scores"]) for r in records if r["arm"] == arm)
        labels, means = [count for count, _ in mine], [fmean(scores) for _, scores in mine]
        below = [mean - min(scores) for mean, (_, scores) in zip(means, mine, strict=True)]
        above = [max(scores) - mean for mean, (_, scores) in zip(means, mine, strict=True)]
        plot.errorbar(labels, means, yerr=[below, above], marker="o", capsize=3, color=COLOURS[arm], label=arm)
    ticks = sorted({record["labels"] for record in records})
    plot.set_xscale("log")
    plot.set_xticks(ticks, [str(count) for count in ticks], minor=False)
    plot.minorticks_off()
    plot.set(xlabel="labelled training images", ylabel=metric, title=title)
    plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})


def write_results(
    config: CompareConfig,
    records: Sequence[dict[str, Any]],
    facts: Mapping[str, str],
    name: str,
    results: Path,
    command: str,
) -> Path:
    """label_efficiency_<task>.{json,md,png} -> the path of the table; ``facts``: the environment of the comparison."""
    stem = f"label_efficiency_{name}"
    metric = KINDS[TASKS[name]].metric
    settings = {name: getattr(config, name) for name in ("steps", "seeds", "rates", "layer_decays", "holdout")}
    content = {"command": command, "metric": metric, "settings": settings, "environment": dict(facts)}
    write_json(results / f"{stem}.json", {**content, "results": list(records)})
    draw(records, results / f"{stem}.png", metric, f"{name.capitalize()}, {config.steps} steps")
    told = (
        f"{config.steps} steps for every arm; means over seeds 0 to {config.seeds - 1}, which draw the labels too. "
        f"Rate (times the recipe's) and layer decay: the best of {len(config.rates) * len(config.layer_decays)} tried "
        f"on {config.holdout:.0%} of the labels of seed 0, kept out for that; all of them are in the JSON. The larger "
        "range is that between the best and the worst seed, of the arm or of scratch."
    )
    where = facts["processor"] if facts["gpu"] == "none" else f"{facts['gpu']}, {config.jobs} trainings at once"
    machine = f"Commit {facts['commit']}; {where}, {facts['threads']} thread; torch {facts['torch']}."
    write_text(
        results / f"{stem}.md",
        f"# Label efficiency: {name}\n\n```console\n$ {command}\n```\n\n{told}\n\n{table_of(records, metric)}\n"
        f"![{metric} over the number of labels]({stem}.png)\n\n{machine}\n",
    )
    return results / f"{stem}.md"


def label_efficiency(given: argparse.Namespace, command: str) -> Path:
    """Run what is not finished; returns the table's path. Raises ``UserError`` for what a user can get wrong."""
    began = time.perf_counter()
    config = configuration(given)
    report = compare(config, command=command)
    assert report is not None
    found = json.loads(report.with_name("report.json").read_text(encoding="utf-8"))
    table = write_results(
        config, records_of(found["results"]), found["environment"], given.task, given.results, command
    )
    print(f"done in {clock(time.perf_counter() - began)}; open {table}", flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("task", choices=sorted(TASKS), help="what the labels are for")
    add("--data", type=Path, required=True, help="the labelled set, in the layout of its task")
    add("--unlabelled", type=Path, help="images to pre-train on, as `mae pretrain` takes them")
    add("--fractions", type=float, nargs="+", default=[0.05, 0.1, 0.25, 1.0], help="of the training labels")
    add("--arms", nargs="+", choices=ARMS, default=[SCRATCH, PRETRAINED])
    add("--seeds", type=int, default=3, help="final trainings of each arm at each fraction")
    add("--jobs", type=int, default=1, help="trainings at once, each a process: as many as the memory holds")
    add("--steps", type=int, default=300, help="optimizer steps of every training of a task")
    add(
        "--grid",
        nargs="+",
        default=["rate=0.5,1,2", "decay=1,0.9,0.75"],
        metavar="NAME=VALUES",
        help="rate: multiples of the recipe's learning rate; decay: layer decays; rate=0.5,1,2 decay=1,0.9,0.75",
    )
    add("--holdout", type=float, default=0.25, help="share of a subset's labels that the grid is scored on")
    add("--encoder", nargs="+", default=[], metavar="ARM=FILE", help="the encoder of an arm, in place of pre-training")
    add("--warm-from", type=Path, metavar="FILE", help="weights that the arm warm continues from")
    add("--recipe", type=Path, metavar="FILE", help="configuration of the task; the small-data one when left out")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the task's recipe, for every arm")
    add("--pretrain", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the pre-training's recipe")
    add("--out", type=Path, help="folder of the cells; runs/label_efficiency/TASK when left out")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the table and the curve")
    given = parser.parse_args(words)
    command = " ".join(["python benchmarks/label_efficiency.py", *map(shown, words)])
    with user_errors():
        label_efficiency(given, command)


if __name__ == "__main__":
    main()
