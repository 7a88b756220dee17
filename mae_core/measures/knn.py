"""Weighted k-nearest-neighbour classification of frozen features: how good they are, without training anything.

The protocol of Wu et al. 2018 (arXiv 1805.01978, section 3.4), which self-supervised work reports since: cosine
similarity s, each neighbour votes for its class with exp(s / 0.07).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mae_core.errors import UserError

TEMPERATURE = 0.07
NEIGHBOURS = (10, 20)
QUERIES_AT_ONCE = 1024
"""Bounds the (queries, bank) similarity matrix."""


def check_neighbours(neighbours: Sequence[int], bank: int) -> None:
    """Raise ``UserError`` where a bank of so many images has too few for the largest k."""
    if bank < max(neighbours):
        raise UserError(
            f"{max(neighbours)} nearest neighbours were asked for, but the bank holds {bank} images; lower k"
        )


def _similarities(queries: Tensor, bank: Tensor) -> Iterator[Tensor]:
    """Cosine similarities (Q, N), float32 on the bank's device, ``QUERIES_AT_ONCE`` rows at a time."""
    bank = functional.normalize(bank.float(), dim=1)
    for part in queries.split(QUERIES_AT_ONCE):
        yield functional.normalize(part.to(bank.device).float(), dim=1) @ bank.T


def nearest_others(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, D) -> for each row its ``k`` nearest other rows: cosine similarities (N, k), falling, and indices (N, k).

    Raises ``UserError`` where there are fewer than ``k`` others.
    """
    check_neighbours([k], len(features) - 1)
    values, indices, first = [], [], 0
    for similarity in _similarities(features, features):
        itself = torch.arange(first, first + len(similarity), device=similarity.device)
        nearest = similarity.scatter(1, itself[:, None], -torch.inf).topk(k, dim=1)
        values.append(nearest.values)
        indices.append(nearest.indices)
        first += len(similarity)
    return torch.cat(values), torch.cat(indices)


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """(Q, D) queries, (N, D) bank and its (N,) int64 labels -> for each k of ``neighbours``, (Q, num_classes) float32
    votes.

    Features need no normalisation; the computation is float32 on the bank's device, and the votes come back there.
    Raises ``UserError`` where the bank holds fewer than the largest k, or a label is not in 0..num_classes - 1.
    """
    check_neighbours(neighbours, len(bank))
    most = max(neighbours)
    if len(bank_labels) and not (0 <= int(bank_labels.min()) and int(bank_labels.max()) < num_classes):
        found = f"{int(bank_labels.min())} to {int(bank_labels.max())}"
        raise UserError(f"the bank's labels reach from {found}, but there are {num_classes} classes")
    bank_labels = bank_labels.to(bank.device)
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for similarity in _similarities(queries, bank):
        nearest = similarity.topk(most, dim=1)
        weights = (nearest.values / temperature).exp()
        classes = bank_labels[nearest.indices]
        for k in neighbours:
            empty = torch.zeros(len(similarity), num_classes, device=bank.device)
            votes[k].append(empty.scatter_add_(1, classes[:, :k], weights[:, :k]))
    return {k: torch.cat(parts) if parts else torch.zeros(0, num_classes) for k, parts in votes.items()}


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Share of right queries for each k of ``neighbours``; ``query_labels`` (Q,), the rest as for ``knn_scores``."""
    scores = knn_scores(queries, bank, bank_labels, num_classes, neighbours=neighbours, temperature=temperature)
    wanted = query_labels.to(bank.device)
    return {k: float((votes.argmax(dim=1) == wanted).float().mean()) for k, votes in scores.items()}
