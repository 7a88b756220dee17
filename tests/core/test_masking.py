import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mae_core.errors import UserError
from mae_core.masking import MASKERS, BlockMasking, GridMasking, PatchMask, RandomMasking, num_visible
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


@pytest.mark.parametrize("kind", MASKERS)
@pytest.mark.parametrize("ratio, kept", KEPT_OF_196.items())
def test_exact_counts_of_the_paper_grid(kind, ratio, kept):
    assert num_visible(196, ratio) == kept
    mask = MASKERS[kind](ratio)(2, PAPER_GRID, torch.Generator().manual_seed(1))
    assert (~mask.hidden).sum(dim=1).tolist() == [kept, kept]


@pytest.mark.parametrize("kind", MASKERS)
def test_a_generator_per_sample_makes_a_mask_independent_of_its_batch(kind):
    masker = MASKERS[kind](0.8)

    def one(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = masker(4, PAPER_GRID, [one(seed) for seed in range(4)])
    alone = [masker(1, PAPER_GRID, [one(seed)]).hidden[0] for seed in range(4)]
    assert torch.equal(together.hidden, torch.stack(alone))
    assert torch.equal(masker(2, PAPER_GRID, [one(3), one(1)]).hidden, together.hidden[[3, 1]])
    assert len({tuple(row.tolist()) for row in together.hidden}) == 4


@pytest.mark.parametrize("kind", MASKERS)
def test_one_generator_decides_a_batch_and_the_global_one_is_left_alone(kind):
    before = torch.get_rng_state()
    one, two = (MASKERS[kind](0.5)(3, PAPER_GRID, torch.Generator().manual_seed(seed)) for seed in (5, 5))
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


def hidden_maps(masker: RandomMasking, count: int = 20, grid: PatchGrid = PAPER_GRID) -> torch.Tensor:
    """(count, rows, cols) bool."""
    return masker(count, grid, torch.Generator().manual_seed(3)).hidden.reshape(count, grid.rows, grid.cols)


@pytest.mark.parametrize("rows, cols", [(14, 14), (4, 6), (2, 2)])
def test_grid_masking_keeps_the_same_one_of_every_four(rows, cols):
    visible = ~hidden_maps(GridMasking(0.75), grid=PatchGrid(rows, cols, 16))
    cells = visible.unflatten(1, (rows // 2, 2)).unflatten(3, (cols // 2, 2)).transpose(2, 3).flatten(3)
    assert (cells.sum(dim=3) == 1).all()
    assert (cells == cells[:, :1, :1]).all(), "regularly: at the same place in every 2x2 cell of an image"
    assert len({tuple(cell.tolist()) for cell in cells[:, 0, 0]}) == 4, "that place is drawn for each image"


def test_grid_masking_thins_and_fills_its_lattice_at_other_ratios():
    board = hidden_maps(GridMasking(0.5))
    assert (board[:, 1:] != board[:, :-1]).all() and (board[:, :, 1:] != board[:, :, :-1]).all(), "a checkerboard"
    rows, cols = (~hidden_maps(GridMasking(15 / 16), grid=PatchGrid(16, 16, 16))).nonzero()[:, 1:].unbind(dim=1)
    assert len(rows) == 20 * 16
    for axis in (rows, cols):
        assert all(len(set((part % 4).tolist())) == 1 for part in axis.split(16)), "one of every 4x4 cell"
    sparse, dense = (hidden_maps(GridMasking(ratio)) for ratio in (0.8, 0.7))
    quarter = ~hidden_maps(GridMasking(0.75))
    assert (quarter >= ~sparse).all() and (~dense >= quarter).all(), "below a quarter thinned, above it filled"


def same_neighbours(hidden: torch.Tensor) -> float:
    """Share of neighbouring patches that are both hidden or both visible."""
    across, down = hidden[:, :, 1:] == hidden[:, :, :-1], hidden[:, 1:] == hidden[:, :-1]
    return torch.cat([across.flatten(), down.flatten()]).float().mean().item()


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_block_masking_hides_blocks(ratio):
    hidden = hidden_maps(BlockMasking(ratio), count=100)
    assert same_neighbours(hidden) > 0.85 > same_neighbours(hidden_maps(RandomMasking(ratio), count=100)) + 0.1
    squares = torch.nn.functional.avg_pool2d(hidden[:, None].float(), 3, stride=1)
    assert (squares.flatten(1).max(dim=1).values == 1).all(), "each image has a block of at least 3x3"
    assert len({tuple(one.flatten().tolist()) for one in hidden}) == 100


def test_block_masking_lays_the_rectangles_of_beits_sampler():
    """With hardly more to hide than its smallest block, most masks are one rectangle and what grew to the exact count:
    16 patches or more of the paper grid, lying and standing alike."""
    boxes = []
    for one in hidden_maps(BlockMasking(17.5 / 196), count=300):
        rows, cols = one.any(dim=1).nonzero()[:, 0], one.any(dim=0).nonzero()[:, 0]
        boxes.append((int(rows[-1] - rows[0]) + 1, int(cols[-1] - cols[0]) + 1))
    compact = [height / width for height, width in boxes if height * width <= 24]
    assert len(compact) > 150
    assert 0.15 < min(compact) < 0.5 and 2 < max(compact) < 1 / 0.15  # 2x10: an aspect of 0.3, rounded, and grown
    assert 0.7 < sum(ratio > 1 for ratio in compact) / sum(ratio < 1 for ratio in compact) < 1.4


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_where_a_mask_lies_is_drawn(kind):
    """Chi-square over 10000 draws against the same counts shifted: no corner is preferred to its mirror image."""
    grid, draws = PatchGrid(4, 4, 1), 10_000
    hidden = MASKERS[kind](0.75)(draws, grid, torch.Generator().manual_seed(4)).hidden.double().reshape(draws, 4, 4)
    counts = hidden.sum(dim=0)
    for mirrored in (counts.flip(0), counts.flip(1), counts.T):
        chi = ((counts - mirrored) ** 2 / (counts + mirrored)).sum() / 2
        assert chi < 31.3  # 8 independent pairs, and negatively correlated counts: far above the 99.9 % of 8 degrees
    if kind == "grid":
        assert ((counts - draws * 0.75) ** 2).sum() / (draws * 0.75 * 0.25) < 39.3  # 16 counts, in four equal groups


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
