from collections.abc import Iterable
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.data.loading import StepSampler, steps_for
from mae_core.errors import UserError

lengths, batches, seeds = st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**40)


Place = tuple[int, int]


def joined(batches: Iterable[list[Place]]) -> list[Place]:
    return list(chain.from_iterable(batches))


@given(lengths, st.integers(1, 6), st.integers(1, 4), seeds, st.integers(1, 12))
def test_the_shares_of_all_ranks_are_the_batches_of_one(length, share, world, seed, steps):
    options = {"length": length, "batch_size": share * world, "seed": seed, "total_steps": steps}
    alone = list(StepSampler(**options))
    ranks = [list(StepSampler(**options, rank=rank, world=world)) for rank in range(world)]
    assert [joined(parts) for parts in zip(*ranks, strict=True)] == alone
    assert all(len(part) == share for rank in ranks for part in rank)


@given(lengths, batches, seeds, st.integers(1, 4))
def test_every_index_comes_once_in_each_epoch(length, batch_size, seed, epochs):
    steps = steps_for(length, batch_size, epochs)
    places = joined(StepSampler(length, batch_size, seed, total_steps=steps))
    for epoch in range(epochs):
        assert sorted(index for e, index in places if e == epoch) == list(range(length))
    assert len(places) - length * epochs < batch_size  # what is left reaches into one more epoch, less than a batch
    assert [e for e, _ in places] == sorted(e for e, _ in places)


@given(lengths, batches, seeds, st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_a_resumed_sampler_yields_the_tail(length, share, seed, done, more, world):
    options = {"length": length, "batch_size": share * world, "seed": seed, "total_steps": done + more}
    for rank in range(world):
        whole = list(StepSampler(**options, rank=rank, world=world))
        resumed = StepSampler(**options, start_step=done, rank=rank, world=world)
        assert list(resumed) == whole[done:]
        assert len(resumed) == more


def test_the_order_is_the_seeds_and_changes_with_the_epoch():
    def orders(seed: int) -> list[list[int]]:
        places = joined(StepSampler(30, 10, seed, total_steps=6))
        return [[index for e, index in places if e == epoch] for epoch in range(2)]

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    assert orders(0)[0] != orders(0)[1] != list(range(30))


def test_a_batch_larger_than_the_data_set_spans_epochs():
    places = next(iter(StepSampler(3, 8, 0, total_steps=1)))
    assert [epoch for epoch, _ in places] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_batch_must_divide_among_the_ranks():
    with pytest.raises(UserError, match="batch size 5 does not divide among 2 ranks"):
        StepSampler(10, 5, 0, total_steps=1, rank=0, world=2)


@pytest.mark.parametrize(
    "length, batch_size, epochs, steps",
    [(100, 10, 1, 10), (101, 10, 1, 11), (100, 10, 0.25, 3), (3, 8, 1, 1), (9, 3, 1 / 3, 1)],
)
def test_steps_of_a_run(length, batch_size, epochs, steps):
    assert steps_for(length, batch_size, epochs) == steps


@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds, st.integers(1, 8))
def test_repeats_stand_in_a_row_as_samples_of_as_many_epochs(length, share, repeats, world, seed, steps):
    options = {"length": length, "batch_size": share * repeats * world, "seed": seed, "repeats": repeats}
    options["total_steps"] = steps
    ranks = [joined(StepSampler(**options, rank=rank, world=world)) for rank in range(world)]
    for places in ranks:
        for start in range(0, len(places), repeats):
            epochs, indices = zip(*places[start : start + repeats], strict=True)
            assert len(set(indices)) == 1 and epochs == tuple(range(epochs[0], epochs[0] + repeats))
            assert epochs[0] % repeats == 0
    alone = joined(StepSampler(**options))
    assert sorted(joined(ranks)) == sorted(alone) and len(set(alone)) == len(alone)
    plain = {**options, "batch_size": share * world, "repeats": 1}
    assert [index for _, index in alone[::repeats]] == [index for _, index in joined(StepSampler(**plain))]
    resumed = joined(StepSampler(**options, start_step=steps - 1))
    assert resumed == alone[(steps - 1) * share * repeats * world :]


def test_a_batch_must_divide_among_the_repeats_of_every_rank():
    with pytest.raises(UserError, match=r"batch size 6 does not divide by data.repeats=2 and 2 ranks.*multiple of 4"):
        StepSampler(10, 6, 0, total_steps=1, world=2, repeats=2)
    StepSampler(10, 8, 0, total_steps=1, world=2, repeats=2)
