"""What pre-training is worth with few labels: each arm's score over the number of labels; a table and a curve.

    python benchmarks/label_efficiency.py detection --data nuclei --unlabelled nuclei_unlabelled \
        --fractions 0.05 0.1 0.25 1 --arms scratch pretrained warm frozen --seeds 3

TASK is classification (train/<class>/* and val/<class>/*), detection (COCO: train/, val/ and annotations/) or
segmentation (images/ and annotations/{training,validation}). Subsets of the labels are drawn from the seed and nested.
Every arm trains for the same steps. Its learning rate (in multiples of the recipe's) and its layer decay are the best
of the same grid: there, a share of the subset's own labels is kept out and scored; the validation set is looked at by
the final trainings alone. An encoder that is not given is pre-trained on the unlabelled images, by arm:

    scratch     nothing
    pretrained  the unlabelled images
    warm        the unlabelled images, from the weights in --warm-from
    frozen      the encoder of pretrained, whose trunk stays as it is (classification: the attentive probe)
    linear, knn of classification: as frozen, with the linear probe on the cls token, and its nearest neighbours

What is finished stays finished: the same command continues, and more fractions, arms and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from labelled_subsets import TASKS, Budget, Choice, Start, Task

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.config.load import load_config
from mae_core.errors import UserError, user_errors
from mae_core.layout import ENCODER
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.progress import clock
from mae_core.training.run import environment

ROOT = Path(__file__).resolve().parents[1]
ARMS = SCRATCH, PRETRAINED, WARM, FROZEN, LINEAR, KNN = ("scratch", "pretrained", "warm", "frozen", "linear", "knn")
READERS: dict[str, Literal["attentive", "linear", "knn"]] = {FROZEN: "attentive", LINEAR: "linear", KNN: "knn"}
"""Arms whose trunk is frozen, and what reads it in classification."""
PRETRAIN = ROOT / "configs" / "pretrain" / "tiny_96.yaml"
CONTINUE = ROOT / "configs" / "pretrain" / "continue.yaml"
COLOURS = dict(zip(ARMS, ("tab:red", "tab:blue", "tab:green", "tab:olive", "tab:cyan", "tab:gray"), strict=True))


@dataclass(frozen=True)
class Plan:
    """What the command was asked for; ``settings`` are what all cells of a folder have in common."""

    task: Task
    budget: Budget
    out: Path
    fractions: tuple[float, ...]
    arms: tuple[str, ...]
    seeds: int
    grid: tuple[Choice, ...]
    holdout: float
    settings: dict[str, Any]


def check_settings(plan: Plan) -> None:
    """Note the settings in the folder. Raises ``UserError`` where its cells were made with other ones."""
    file = plan.out / "settings.json"
    if not file.is_file():
        write_json(file, plan.settings)
    before = json.loads(file.read_text(encoding="utf-8"))
    other = [f"{key}: {before.get(key)} there" for key, value in plan.settings.items() if before.get(key) != value]
    if other:
        raise UserError(f"{plan.out} was begun with other settings ({'; '.join(other)}); give these, or another --out")


def grid_of(words: Sequence[str]) -> tuple[Choice, ...]:
    """``rate=0.5,1 decay=1,0.75`` -> every pair; a name that is left out stands for 1. Raises ``UserError`` for other
    words."""
    axes: dict[str, list[float]] = {"rate": [1.0], "decay": [1.0]}
    for word in words:
        name, _, values = word.partition("=")
        try:
            axes[name] = sorted({float(value) for value in values.split(",")}, reverse=name == "decay")
        except ValueError:
            axes["?"] = []
        if set(axes) != {"rate", "decay"} or min(axes[name]) <= 0:
            raise UserError(f"--grid {word} cannot be read; write rate=0.5,1,2 and decay=1,0.75, numbers above 0")
    return tuple(Choice(*point) for point in product(axes["rate"], axes["decay"]))


def shown(word: str) -> str:
    """A word of the command line with the last part of a path alone."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if "/" in value else word


def encoder_of(arm: str, given: argparse.Namespace, out: Path) -> Path | None:
    """The encoder an arm starts from, pre-trained where it is not given; None from scratch."""
    encoders = dict(entry.split("=", 1) for entry in given.encoder)
    if arm == SCRATCH:
        return None
    if arm in encoders:
        return Path(encoders[arm]).resolve()
    if arm in READERS:
        return encoder_of(PRETRAINED, given, out)
    if given.unlabelled is None:
        raise UserError(f"arm {arm} needs --unlabelled IMAGES to pre-train on, or --encoder {arm}=FILE")
    run = out / "encoders" / arm
    if (run / ENCODER).is_file():
        return run
    words = [f"data.path={given.unlabelled.resolve()}", f"output={run}", *given.pretrain]
    if arm == WARM:
        if given.warm_from is None:
            raise UserError("arm warm needs --warm-from FILE, the weights to continue from, or --encoder warm=FILE")
        words.append(f"weights={given.warm_from.resolve()}")
    pretrain(load_config(PretrainConfig, CONTINUE if arm == WARM else PRETRAIN, words), resume="auto")
    return run


def cell(plan: Plan, name: str, train: Sequence[Any], scored: Sequence[Any] | None, start: Start, choice: Choice,
         seed: int) -> dict[str, Any]:  # fmt: skip
    """The finished training ``name``, done now where it was not; its folder is removed once its score is written.

    The score is None, with the reason, where the training did not end: a rate too high is a result of the grid.
    """
    file = plan.out / "cells" / f"{name}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    data, run = (plan.out / kind / name for kind in ("subsets", "runs"))
    if not data.is_dir():
        plan.task.write(data, train, scored)
    began = time.perf_counter()
    found: dict[str, Any] = {"score": None, "labels": len(train), "seed": seed, **choice._asdict()}
    try:
        found["score"] = plan.task.train(data, len(train), run, start, choice, plan.budget, seed)
    except UserError as error:
        if scored is None or "not finite" not in str(error):
            raise
        found["reason"] = str(error)
    write_json(file, {**found, "seconds": round(time.perf_counter() - began, 1)})
    for folder in (data, run):
        shutil.rmtree(folder, ignore_errors=True)
    return found


def subset(plan: Plan, fraction: float, seed: int) -> list[Any]:
    """The labelled images of a fraction: a prefix of the seed's order."""
    order = plan.task.order(seed)
    return order[: max(2, round(fraction * len(order)))]


Cells = Callable[[Sequence[tuple[Any, ...]]], list[dict[str, Any]]]
"""Runs ``cell`` once for each of its arguments after the plan, some of them at once."""


def choose(plan: Plan, fraction: float, arm: str, start: Start, cells: Cells) -> tuple[Choice, list[dict[str, Any]]]:
    """The best point of the grid for an arm at a fraction, and all of them: trained on the first seed's subset without
    a share of it, scored on that share."""
    images = subset(plan, fraction, 0)
    kept = max(1, round(plan.holdout * len(images)))
    grid = start.grid(plan.grid)
    if len(grid) == 1:
        return grid[0], []
    stem = f"grid_{fraction:g}_{arm}"
    tried = cells(
        [(f"{stem}_rate_{p.rate:g}_decay_{p.decay:g}", images[:-kept], images[-kept:], start, p, 0) for p in grid]
    )
    ended = [entry for entry in tried if entry["score"] is not None]
    if not ended:
        raise UserError(
            f"no training of the grid ended for arm {arm} with {fraction:g} of the labels; lower the rates of --grid"
        )
    best = max(ended, key=lambda entry: float(entry["score"]))
    return Choice(best["rate"], best["decay"]), tried


def measure(plan: Plan, starts: dict[str, Start], jobs: int) -> Iterator[dict[str, Any]]:
    """Every arm at every fraction, as its record; the fewest labels first. ``jobs`` trainings run at once."""

    def record(pair: tuple[float, str], cells: Cells) -> dict[str, Any]:
        fraction, arm = pair
        choice, tried = choose(plan, fraction, arm, starts[arm], cells)
        found = cells(
            [
                (f"{fraction:g}_{arm}_seed_{seed}", subset(plan, fraction, seed), None, starts[arm], choice, seed)
                for seed in range(plan.seeds)
            ]
        )
        return {
            "fraction": fraction,
            "arm": arm,
            "labels": found[0]["labels"],
            **choice._asdict(),
            "scores": [entry["score"] for entry in found],
            "grid": [{key: entry.get(key) for key in ("rate", "decay", "score", "reason")} for entry in tried],
        }

    pairs = list(product(plan.fractions, plan.arms))
    if jobs == 1:
        yield from (record(pair, lambda calls: [cell(plan, *call) for call in calls]) for pair in pairs)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    with (
        ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as processes,
        ThreadPoolExecutor(len(pairs)) as waiting,
    ):
        run: Cells = lambda calls: list(processes.map(partial(cell, plan), *zip(*calls, strict=True)))  # noqa: E731
        yield from waiting.map(partial(record, cells=run), pairs)


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


def write_results(plan: Plan, records: Sequence[dict[str, Any]], name: str, results: Path, command: str) -> None:
    """label_efficiency_<task>.{json,md,png} with what is finished."""
    stem = f"label_efficiency_{name}"
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {**environment(torch.device("cpu")), "commit": commit.stdout.strip() or "unknown"}
    metric = plan.task.metric
    content = {"command": command, "metric": metric, "settings": plan.settings, "environment": facts}
    write_json(results / f"{stem}.json", {**content, "results": list(records)})
    draw(records, results / f"{stem}.png", metric, f"{name.capitalize()}, {plan.budget.steps} steps")
    told = (
        f"{plan.budget.steps} steps for every arm; means over seeds 0 to {plan.seeds - 1}, which draw the labels too. "
        f"Rate (times the recipe's) and layer decay: the best of {len(plan.grid)} tried on {plan.holdout:.0%} of the "
        "labels of seed 0, kept out for that; all of them are in the JSON. The larger range is that between the best "
        "and the worst seed, of the arm or of scratch."
    )
    machine = f"Commit {facts['commit']}; {facts['processor']}, {facts['threads']} thread; torch {facts['torch']}."
    write_text(
        results / f"{stem}.md",
        f"# Label efficiency: {name}\n\n```console\n$ {command}\n```\n\n{told}\n\n{table_of(records, metric)}\n"
        f"![{metric} over the number of labels]({stem}.png)\n\n{machine}\n",
    )


def label_efficiency(given: argparse.Namespace, command: str) -> Path:
    """Run what is not finished; returns the table's path. Raises ``UserError`` for what a user can get wrong."""
    unknown = [entry for entry in given.encoder if entry.partition("=")[0] not in ARMS[1:] or "=" not in entry]
    if unknown:
        raise UserError(f"--encoder {unknown[0]} is not ARM=FILE, with an arm of {', '.join(ARMS[1:])}")
    if bad := [fraction for fraction in given.fractions if not 0 < fraction <= 1]:
        raise UserError(f"--fractions {bad[0]:g} is no share of the labels; give numbers above 0 and up to 1")
    if given.task != "classification" and (other := {LINEAR, KNN} & {*given.arms}):
        raise UserError(f"arm {min(other)} is for classification; a frozen trunk of {given.task} is the arm {FROZEN}")
    grid = grid_of(given.grid)
    out = (given.out or Path("runs/label_efficiency") / given.task).resolve()
    task = TASKS[given.task](given.data.resolve())
    recipe = (given.recipe or task.recipe).resolve()
    settings = {
        "data": given.data.resolve().name,
        "steps": given.steps,
        "recipe": recipe.name,
        "options": list(given.options),
        "grid": [list(point) for point in grid],
        "holdout": given.holdout,
    }
    plan = Plan(
        task=task,
        budget=Budget(given.steps, recipe, tuple(given.options)),
        out=out,
        fractions=tuple(sorted(set(given.fractions))),
        arms=tuple(arm for arm in ARMS if arm in given.arms),
        seeds=given.seeds,
        grid=grid,
        holdout=given.holdout,
        settings=settings,
    )
    check_settings(plan)
    began = time.perf_counter()
    starts = {
        arm: Start(encoder_of(arm, given, out), arm in READERS, READERS.get(arm, "attentive")) for arm in plan.arms
    }
    records = []
    for record in measure(plan, starts, given.jobs):
        records.append(record)
        write_results(plan, records, given.task, given.results, command)
        print(f"{record['arm']}, {record['labels']} labels: {record['scores']}", flush=True)
    table = Path(given.results / f"label_efficiency_{given.task}.md")
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
