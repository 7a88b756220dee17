"""Top-1 and top-5 accuracy, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.data.labelled import LabelledBatch
from mae_core.training.distributed import sum_over_ranks
from mae_core.training.run import Run


class Accuracy(NamedTuple):
    """Counts, not means, so that parts add up: confusion (classes, classes) int64 [truth, prediction]; hits among the
    top 5."""

    confusion: Tensor
    top5_hits: int

    @classmethod
    def sum_of(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """The counts of several sets of images together."""
        return cls(torch.stack([part.confusion for part in parts]).sum(dim=0), sum(part.top5_hits for part in parts))

    @property
    def images(self) -> int:
        """Images counted."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose best guess is right."""
        return float(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five best guesses."""
        return self.top5_hits / max(self.images, 1)

    def as_dict(self, classes: list[str]) -> dict[str, Any]:
        """For metrics.json, in per cent."""
        totals = self.confusion.sum(dim=1)
        right = self.confusion.diagonal()
        per_class = {
            name: round(100 * right[index].item() / totals[index].item(), 3) if totals[index] else None
            for index, name in enumerate(classes)
        }
        return {
            "top1": round(100 * self.top1, 3),
            "top5": round(100 * self.top5, 3),
            "images": self.images,
            "per_class": per_class,
        }


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[LabelledBatch], run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (B, C) float32, labels) of this rank's batches, on the run's device; unreadable images are noted."""
    model.eval()
    for batch in batches:
        run.note_unreadable(batch.unreadable)
        if len(batch):
            moved = batch.to(run.device)
            with run.autocast():
                logits = model(moved.pixels)
            yield logits.float(), moved.labels


class Tally:
    """Counts right and wrong answers of this rank; ``total`` adds those of all."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, C), labels (B,) int64."""
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        places = labels * self.num_classes + best[:, 0]
        self._confusion.view(-1).index_add_(0, places, torch.ones_like(places))
        self._top5 += (best == labels[:, None]).any(dim=1).sum()

    def mine(self) -> Accuracy:
        """Over what this rank added."""
        return Accuracy(self._confusion.cpu(), int(self._top5))

    def total(self) -> Accuracy:
        """Over all ranks, which must all call it."""
        return Accuracy(sum_over_ranks(self._confusion).cpu(), int(sum_over_ranks(self._top5)))


def evaluate_classifier(model: nn.Module, batches: Iterable[LabelledBatch], run: Run, num_classes: int) -> Accuracy:
    """Run ``model`` (in eval mode) over this rank's batches; the counts of all ranks are added."""
    tally = Tally(num_classes, run.device)
    for logits, labels in predict(model, batches, run):
        tally.add(logits, labels)
    return tally.total()
