"""Top-1 and top-5 accuracy, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def evaluate_classifier(model: nn.Module, batches: Iterable[LabelledBatch], run: Run, num_classes: int) -> Accuracy:
    """Run ``model`` (in eval mode) over this rank's batches; the counts of all ranks are added."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    top5 = torch.zeros((), dtype=torch.int64, device=run.device)
    for logits, labels in predict(model, batches, run):
        best = logits.topk(min(5, num_classes), dim=1).indices
        places = labels * num_classes + best[:, 0]
        confusion += torch.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)
        top5 += (best == labels[:, None]).any(dim=1).sum()
    return Accuracy(sum_over_ranks(confusion).cpu(), int(sum_over_ranks(top5)))
