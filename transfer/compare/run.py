"""``mae compare``: the plan, the trainings and the report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae_core.counting import clock
from mae_core.errors import UserError
from mae_core.layout import LOADING, LOG, PICTURES
from mae_core.training.distributed import device_of
from mae_core.training.run import commit, environment
from transfer.chain import loading_line, read_log
from transfer.compare.config import CompareConfig, file_name
from transfer.compare.costs import cost_of
from transfer.compare.encoders import (
    Encoder,
    check_files,
    encoders_of,
    finish_making,
    licence_of,
    making,
)
from transfer.compare.report import Cell, EncoderRow, Results, write_results
from transfer.compare.trainings import Choice, Task, Training, Trainings
from transfer.report import Picture


@dataclass(frozen=True)
class Pair:
    """An encoder on a task with a share of the labels."""

    task: Task
    encoder: Encoder
    share: float

    def grid(self) -> dict[Choice, Training]:
        """The trainings that choose rate and decay; empty where there is one choice."""
        points = self.task.grid()
        if len(points) == 1:
            return {}
        return {point: self.task.training(self.encoder, self.share, 0, point, held_out=True) for point in points}

    def finals(self, choice: Choice) -> dict[int, Training]:
        """Seed -> the training that is scored on the validation set."""
        return {
            seed: self.task.training(self.encoder, self.share, seed, choice, held_out=False)
            for seed in self.task.seeds(self.share)
        }

    def choice(self, trainings: Trainings) -> Choice | None:
        """The best point of the grid; None where not all of it is finished. Raises ``UserError`` where no training of
        it has a score."""
        grid = self.grid()
        if not grid:
            return self.task.grid()[0]
        found = {point: trainings.finished(training) for point, training in grid.items()}
        if None in found.values():
            return None
        scores = {point: entry["score"] for point, entry in found.items() if entry and entry["score"] is not None}
        if not scores:
            raise UserError(
                f"no training of the grid kept finite numbers for {self.encoder.name} on {self.task.spec.title}; lower "
                "the rates"
            )
        return max(scores, key=lambda point: scores[point])


def pairs_of(config: CompareConfig, encoders: dict[str, Encoder]) -> list[Pair]:
    """Task by task, the fewest labels first."""
    return [
        Pair(task, encoders[spec.name], share)
        for task in (Task(spec, config) for spec in config.tasks)
        for share in sorted(set(config.labels))
        for spec in config.encoders_of(task.spec)
    ]


def compare(config: CompareConfig, *, dry_run: bool = False, command: str = "") -> Path | None:
    """Run what is not finished -> the path of the report; None after a dry run, which prints the plan.

    Raises ``UserError`` for what a user can get wrong, before any training starts where that is possible.
    """
    check_files(config)
    encoders = encoders_of(config)
    pairs = pairs_of(config, encoders)
    check_pairs(pairs)
    folder = config.output.resolve()
    trainings = Trainings(folder, config.jobs, max(1, torch.get_num_threads() // config.jobs))
    for line in plan_lines(config, pairs, trainings):
        print(line, flush=True)
    if dry_run:
        print("dry run: nothing was written", flush=True)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    trainings.stage().run(making(config))
    encoders = finish_making(config)
    pairs = pairs_of(config, encoders)
    rows = [row_of(config, encoder, folder) for encoder in encoders.values()]
    cells: list[Cell] = []
    path = None
    for task in config.tasks:
        mine = [pair for pair in pairs if pair.task.spec is task]
        cells += trained(mine, trainings)
        path = write_results(results_of(config, rows, cells, trainings, command), folder)
    print(f"done in {clock(time.perf_counter() - began)}; open {path}", flush=True)
    return path


def check_pairs(pairs: list[Pair]) -> None:
    """Raise ``UserError`` where data, recipe, task options or an encoder's do not fit, a pair at a time."""
    for pair in pairs:
        task, encoder = pair.task, pair.encoder
        task.orders  # noqa: B018  read now, for its errors
        if task.kind.trains:
            task.base  # noqa: B018
        words = encoder.words(task.kind)
        if task.kind.schema:
            task.validate(words)


def plan_lines(config: CompareConfig, pairs: list[Pair], trainings: Trainings) -> Iterator[str]:
    """What will be trained, how much of it is finished, and how long the rest takes by what is known."""
    made = [job for job in making(config) if job.run is not None and not (job.run / job.result).is_file()]
    yield f"{len(config.encoders)} encoders, {len(config.tasks)} tasks, in {config.output}"
    if made:
        yield f"  {len(made)} encoders are made first: {', '.join(job.name.partition(' ')[2] for job in made)}"
    left = seconds = 0.0
    unknown = []
    for task in dict.fromkeys(pair.task.spec for pair in pairs):
        mine = [pair for pair in pairs if pair.task.spec is task]
        grid = [training for pair in mine for training in pair.grid().values()]
        finals = [training for pair in mine for training in pair.finals(pair.choice(trainings) or Choice()).values()]
        waiting = sum(trainings.finished(training) is None for training in (*grid, *finals))
        first = mine[0].task
        budget = f"{first.steps} steps each" if first.kind.trains else "nothing is trained"
        yield (
            f"  {task.title} ({task.kind}, {budget}; {len(first.orders[0])} labelled training images): {len(grid)} "
            f"trainings for the grid and {len(finals)} to score, {waiting} of them left"
        )
        left += waiting
        if waiting and (mean := trainings.mean_seconds([*grid, *finals])) is not None:
            seconds += waiting * mean / trainings.jobs
        elif waiting:
            unknown.append(task.title)
    told = f"about {clock(seconds)} by the trainings that are finished" if seconds else "not known yet"
    more = f", without {', '.join(unknown)}" if unknown and seconds else ""
    yield f"trainings left: {left:.0f}; time: {told}{more}"


def trained(pairs: list[Pair], trainings: Trainings) -> list[Cell]:
    """Run the grid of a task's pairs, then their final trainings."""
    grid = [(training, pair.task.kind) for pair in pairs for training in pair.grid().values()]
    trainings.run(grid, keep=False, tolerant=True)
    chosen = [(pair, pair.choice(trainings) or Choice()) for pair in pairs]
    finals = [(training, pair.task.kind) for pair, choice in chosen for training in pair.finals(choice).values()]
    trainings.run(finals, keep=True)
    return [cell_of(pair, choice, trainings) for pair, choice in chosen]


def cell_of(pair: Pair, choice: Choice, trainings: Trainings) -> Cell:
    """What the report shows of a pair."""
    finals = pair.finals(choice)
    scores = [(trainings.finished(training) or {})["score"] for training in finals.values()]
    tried = {point: trainings.finished(training) or {} for point, training in pair.grid().items()}
    first = trainings.run_folder(finals[0])
    curve = read_log(first, "loss") if pair.task.kind.trains and (first / LOG).is_file() else []
    drawn = sorted((first / PICTURES).glob("step_*.png"))
    loading = loading_line(pair.task.spec.title, first / LOADING) if (first / LOADING).is_file() else ""
    return Cell(
        task=pair.task.spec.title,
        metric=pair.task.kind.metric,
        encoder=pair.encoder.name,
        share=pair.share,
        labels=len(pair.task.images(pair.share, 0)),
        scores=scores,
        choice=choice._asdict() if tried else {},
        grid=[{**point._asdict(), "score": entry.get("score")} for point, entry in tried.items()],
        curve=curve,
        picture=Picture(f"{pair.task.spec.title}, {pair.encoder.name}", "", drawn[-1]) if drawn else None,
        loading=loading,
        command=shlex.join([*finals[0].words, f"output={first}"]),
    )


def row_of(config: CompareConfig, encoder: Encoder, folder: Path) -> EncoderRow:
    """What the report says of an encoder."""
    cache = folder / "costs" / f"{file_name(encoder.name)}.json"
    cost: dict[str, Any] = cost_of(encoder, config.image_size, cache)
    return EncoderRow(
        name=encoder.name,
        source=encoder.spec.command or (str(encoder.file.name) if encoder.file else "random"),
        licence=licence_of(encoder),
        **{name: cost[name] for name in ("parameters", "flops", "images_per_second", "image_size")},
    )


def results_of(
    config: CompareConfig, rows: list[EncoderRow], cells: list[Cell], trainings: Trainings, command: str
) -> Results:
    """What is finished, for the report."""
    known = [entry["seconds"] or 0.0 for entry in trainings.results.values()]
    device = device_of()
    return Results(
        title=config.title,
        encoders=rows,
        cells=cells,
        seconds=sum(known),
        trainings=len(known),
        seeds=config.seeds,
        holdout=config.holdout,
        environment={**environment(device), "commit": commit()},
        command=command,
    )
