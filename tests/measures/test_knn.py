"""The k-NN vote against scikit-learn's, and against its formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_core.errors import UserError
from mae_core.measures import knn
from mae_core.measures.knn import knn_accuracy, knn_scores

KNeighborsClassifier = pytest.importorskip("sklearn.neighbors", reason="the independent reference").KNeighborsClassifier


def problem(queries: int = 37, bank: int = 90, width: int = 6, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)

    def draw(count: int):
        labels = torch.randint(classes, (count,), generator=generator)
        spread = torch.rand(count, 1, generator=generator) * 5 + 0.1  # lengths must not matter
        return (centres[labels] + torch.randn(count, width, generator=generator)) * spread, labels

    return (*draw(queries), *draw(bank), classes)


@pytest.mark.parametrize("k", [1, 10, 20])
def test_the_vote_is_scikit_learns(k):
    queries, query_labels, bank, bank_labels, classes = problem()
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.numpy(), bank_labels.numpy())
    votes = knn_scores(queries, bank, bank_labels, classes, neighbours=(k,))[k]
    share = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(share, reference.predict_proba(queries.numpy()), atol=1e-4)
    accuracy = knn_accuracy(queries, query_labels, bank, bank_labels, classes, neighbours=(k,))[k]
    assert accuracy == pytest.approx(reference.score(queries.numpy(), query_labels.numpy()))


def test_the_vote_is_the_formula():
    queries, _, bank, bank_labels, classes = problem(queries=3, bank=12)
    votes = knn_scores(queries, bank, bank_labels, classes, neighbours=(5,), temperature=0.5)[5]
    for place, query in enumerate(queries):
        cosines = torch.stack([query @ other / (query.norm() * other.norm()) for other in bank])
        expected = torch.zeros(classes)
        for neighbour in cosines.argsort(descending=True)[:5]:
            expected[bank_labels[neighbour]] += torch.exp(cosines[neighbour] / 0.5)
        torch.testing.assert_close(votes[place], expected)


def test_several_k_at_once_and_in_parts_are_the_same_as_each_alone(monkeypatch):
    queries, query_labels, bank, bank_labels, classes = problem()
    both = knn_scores(queries, bank, bank_labels, classes)
    assert set(both) == {10, 20} and both[10].shape == (37, 4)
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 5)
    for k in (10, 20):
        torch.testing.assert_close(knn_scores(queries, bank, bank_labels, classes, neighbours=(k,))[k], both[k])
    accuracy = knn_accuracy(queries, query_labels, bank, bank_labels, classes)
    assert 0.25 < accuracy[10] < 1 and accuracy[20] == float((both[20].argmax(1) == query_labels).float().mean())


def test_the_bank_finds_itself():
    _, _, bank, bank_labels, classes = problem()
    assert knn_accuracy(bank, bank_labels, bank, bank_labels, classes, neighbours=(1,)) == {1: 1.0}


def test_half_precision_features_do_not_overflow():
    queries, _, bank, bank_labels, classes = problem()
    votes = knn_scores(queries.half(), bank.half(), bank_labels, classes)[20]
    assert votes.dtype == torch.float32 and votes.isfinite().all()


def test_what_cannot_be_answered_is_refused():
    queries, _, bank, bank_labels, classes = problem(bank=12)
    with pytest.raises(UserError, match="20 nearest neighbours were asked for, but the bank holds 12 images"):
        knn_scores(queries, bank, bank_labels, classes)
    with pytest.raises(UserError, match="but there are 2 classes"):
        knn_scores(queries, bank, bank_labels, 2, neighbours=(1,))
