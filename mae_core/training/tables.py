"""The files that an evaluation writes: every prediction, every class, the confusions, optionally all scores."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.data.images import relative_names
from mae_core.data.labelled import LabelledPaths
from mae_core.layout import LOGITS, PER_CLASS, PREDICTIONS
from mae_core.measures.accuracy import Accuracy
from mae_core.measures.average_precision import MultiLabelScores
from mae_core.training.features import Rows
from mae_core.training.plots import confusion_picture
from mae_core.training.run import Run

WORST_SHOWN = 10


class PredictionTable:
    """predictions.csv, a row for each image: file, true class, best guess, its probability, the five best.

    Of a classifier with several labels an image: file, true classes, those with a probability of a half or more, the
    highest probability, the five likeliest. On ranks other than 0 nothing is written.
    """

    HEADER = ("file", "label", "predicted", "probability", "top5")

    def __init__(self, run: Run, root: Path | None) -> None:
        self.run, self.root = run, root
        self._stack = ExitStack()
        self._table: Any = None

    def __enter__(self) -> PredictionTable:
        if self.run.is_main:
            file = self._stack.enter_context(atomic_path(self.run.folder / PREDICTIONS))
            self._table = csv.writer(self._stack.enter_context(file.open("w", newline="", encoding="utf-8")))
            self._table.writerow(self.HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, files: LabelledPaths, found: Rows) -> None:
        """Rows of logits of ``files``."""
        if self._table is None:
            return
        several = isinstance(files.labels[0], tuple)
        chances = found.values.sigmoid() if several else found.values.softmax(dim=1)
        best = chances.topk(min(5, chances.shape[1]), dim=1)
        names = relative_names(files.paths, self.root)
        for row, index in enumerate(found.indices.tolist()):
            guesses = [files.classes[place] for place in best.indices[row].tolist()]
            predicted = _names(files, chances[row] >= 0.5) if several else guesses[0]
            truth = files.target(index)
            label = _names(files, truth > 0) if isinstance(truth, Tensor) else files.classes[truth]
            self._table.writerow(
                [names[index], label, predicted, f"{float(best.values[row, 0]):.6f}", ";".join(guesses)]
            )


def _names(files: LabelledPaths, chosen: Tensor) -> str:
    return ";".join(files.classes[place] for place in chosen.nonzero().flatten().tolist())


def write_per_class(run: Run, scores: Accuracy | MultiLabelScores, classes: list[str]) -> None:
    """per_class.csv, the worst classes on the screen and, with one label an image, pictures/confusion.png."""
    if isinstance(scores, MultiLabelScores):
        each = scores.as_dict(classes)["per_class"]
        rows = [(name, "" if share is None else share) for name, share in each.items()]
        _write_table(run.folder / PER_CLASS, ("class", "average_precision"), rows)
        return
    counts = scores.confusion
    totals, right = counts.sum(dim=1), counts.diagonal()
    wrong = counts - torch.diag(right)
    table = []
    for place, name in enumerate(classes):
        share = round(100 * int(right[place]) / int(totals[place]), 3) if totals[place] else None
        mistaken = classes[int(wrong[place].argmax())] if wrong[place].any() else ""
        table.append((name, int(totals[place]), share, mistaken, int(wrong[place].max())))
    header = ("class", "images", "top1", "most_often_taken_for", "times")
    _write_table(run.folder / PER_CLASS, header, [["" if cell is None else cell for cell in row] for row in table])
    worst = sorted((row for row in table if row[1]), key=lambda row: row[2] or 0.0)[:WORST_SHOWN]
    for name, total, share, mistaken, times in worst:
        often = f", {times} of them predicted as {mistaken}" if times else ""
        run.say(f"  {name}: {share:.2f} % of {total}{often}")
    title = f"top-1 {100 * scores.top1:.2f} % on {scores.images} images"
    run.picture("confusion", confusion_picture(counts, classes, title=title))


def _write_table(file: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with atomic_path(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([header, *rows])


def write_logits(run: Run, files: list[LabelledPaths], rows: list[Rows], root: Path | None) -> None:
    """logits.npz: ``logits`` (N, C) float32, ``files`` and ``classes``; ``numpy.load`` reads it."""
    names: list[str] = []
    for part, found in zip(files, rows, strict=True):
        of_part = relative_names(part.paths, root)
        names += [of_part[index] for index in found.indices.tolist()]
    with atomic_path(run.folder / LOGITS) as temporary:
        logits = torch.cat([found.values for found in rows]).numpy()
        np.savez(temporary, logits=logits, files=np.array(names), classes=np.array(files[0].classes))
