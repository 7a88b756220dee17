"""A classifier's answers on this rank's images, and its measures over the images of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mae_core.data.labelled import LabelledBatch
from mae_core.measures.accuracy import Accuracy, Tally
from mae_core.measures.average_precision import MultiLabelScores, average_precision
from mae_core.training.distributed import gather
from mae_core.training.run import Run


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


def total_of(tally: Tally) -> Accuracy:
    """The counts of all ranks together, on every rank; all must call it."""
    return Accuracy.sum_of(gather(tally.counts()))


def evaluate_classifier(model: nn.Module, batches: Iterable[LabelledBatch], run: Run, num_classes: int) -> Accuracy:
    """Run ``model`` (in eval mode) over this rank's batches; the counts of all ranks are added."""
    tally = Tally(num_classes, run.device)
    for logits, labels in predict(model, batches, run):
        tally.add(logits, labels)
    return total_of(tally)


def evaluate_multi_label(model: nn.Module, batches: Iterable[LabelledBatch], run: Run) -> MultiLabelScores:
    """Run ``model`` (in eval mode) over this rank's batches; the scores of all ranks are ranked together."""
    found = [(logits.cpu(), targets.cpu()) for logits, targets in predict(model, batches, run)]
    scores, targets = zip(*(pair for part in gather(found) for pair in part), strict=True)
    all_scores = torch.cat(scores)
    return MultiLabelScores(average_precision(all_scores, torch.cat(targets)), len(all_scores))
