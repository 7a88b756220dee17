"""Top-1 and top-5 accuracy as counts, which add up exactly over batches, files and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


class Tally:
    """Counts right and wrong answers."""

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

    def counts(self) -> Accuracy:
        """What was added so far; the counts of several tallies add up (``Accuracy.sum_of``)."""
        return Accuracy(self._confusion.cpu(), int(self._top5))
