import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mae_core.errors import UserError
from mae_core.masking import MASKERS, PatchMask, RandomMasking, num_visible
from mae_core.patches import PatchGrid

PAPER_GRID = PatchGrid(14, 14, 16)
KEPT_OF_196 = {0.1: 176, 0.2: 156, 0.3: 137, 0.4: 117, 0.5: 98, 0.6: 78, 0.7: 58, 0.75: 49, 0.8: 39, 0.9: 19}
"""What the official code keeps, int(196 * (1 - ratio))."""


@pytest.mark.parametrize("kind", MASKERS)
@given(batch=st.integers(1, 5), rows=st.integers(1, 8), cols=st.integers(1, 8), ratio=st.floats(0.05, 0.95))
def test_hidden_and_visible_partition_the_patches(kind, batch, rows, cols, ratio):
    grid = PatchGrid(rows, cols, 4)
    kept = int(grid.num_patches * (1 - ratio))
    assume(0 < kept < grid.num_patches)
    mask = MASKERS[kind](ratio)(batch, grid, torch.Generator().manual_seed(0))
    assert mask.hidden.shape == (batch, grid.num_patches) and mask.hidden.dtype == torch.bool
    assert mask.visible_ids.shape == (batch, kept)
    for hidden, visible_ids, hidden_ids in zip(mask.hidden, mask.visible_ids, mask.hidden_ids, strict=True):
        assert hidden_ids.tolist() == hidden.nonzero()[:, 0].tolist()
        assert visible_ids.tolist() == (~hidden).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("ratio, kept", KEPT_OF_196.items())
def test_exact_counts_of_the_paper_grid(ratio, kept):
    assert num_visible(196, ratio) == kept
    mask = RandomMasking(ratio)(2, PAPER_GRID, torch.Generator().manual_seed(1))
    assert (~mask.hidden).sum(dim=1).tolist() == [kept, kept]


def test_a_generator_per_sample_makes_a_mask_independent_of_its_batch():
    masker = RandomMasking(0.75)

    def one(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = masker(4, PAPER_GRID, [one(seed) for seed in range(4)])
    alone = [masker(1, PAPER_GRID, [one(seed)]).hidden[0] for seed in range(4)]
    assert torch.equal(together.hidden, torch.stack(alone))
    assert torch.equal(masker(2, PAPER_GRID, [one(3), one(1)]).hidden, together.hidden[[3, 1]])
    assert len({tuple(row.tolist()) for row in together.hidden}) == 4


def test_one_generator_decides_a_batch_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    one, two = (RandomMasking(0.5)(3, PAPER_GRID, torch.Generator().manual_seed(seed)) for seed in (5, 5))
    assert torch.equal(one.hidden, two.hidden)
    assert torch.equal(torch.get_rng_state(), before)


def test_as_many_generators_as_samples():
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        RandomMasking(0.5)(3, PAPER_GRID, [torch.Generator(), torch.Generator()])


def test_masks_are_uniform():
    """Each patch, and each pair of patches, is hidden as often as any other (chi-square, 10000 draws)."""
    draws, rows, cols, ratio = 10_000, 3, 4, 0.75
    hidden = RandomMasking(ratio)(draws, PatchGrid(rows, cols, 1), torch.Generator().manual_seed(2)).hidden.double()
    expected = draws * 0.75
    # Sampling without replacement: counts of the 12 patches have covariance draws * p(1-p) * (12/11) * (I - 1/12).
    chi = ((hidden.sum(dim=0) - expected) ** 2).sum() / (draws * 0.75 * 0.25 * 12 / 11)
    assert 2.6 < chi < 31.3  # chi-square with 11 degrees of freedom, 0.5 % and 99.9 %
    pairs = (hidden.T @ hidden)[torch.triu_indices(12, 12, 1).unbind()] / draws
    probability = (9 * 8) / (12 * 11)
    assert ((pairs - probability).abs() < 5 * (probability * (1 - probability) / draws) ** 0.5).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_outside_0_1_is_refused(ratio):
    with pytest.raises(UserError, match=r"outside \(0, 1\)"):
        RandomMasking(ratio)


def test_a_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="keeps 0 of 4 patches"):
        RandomMasking(0.9)(1, PatchGrid(2, 2, 8))


@pytest.mark.parametrize(
    "hidden, message",
    [
        (torch.zeros(2, 4), "float32"),
        (torch.zeros(4, dtype=torch.bool), r"\(4,\)"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), r"\(1, 2, 2\)"),
        (torch.tensor([[True, False, False], [True, True, False]]), r"different numbers of patches \(\[1, 2\]\)"),
        (torch.zeros(2, 4, dtype=torch.bool), "0 of 4 patches hidden"),
        (torch.ones(2, 4, dtype=torch.bool), "4 of 4 patches hidden"),
        (torch.zeros(0, 4, dtype=torch.bool), "0 of 4 patches hidden"),
    ],
)
def test_from_hidden_refuses_what_is_no_mask(hidden, message):
    with pytest.raises(UserError, match=message):
        PatchMask.from_hidden(hidden)
