import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.pos_embed import resize_pos_embed, sincos_2d

side = st.integers(1, 9)


@given(st.integers(1, 8), side, side)
def test_table_is_the_written_formula_column_first(quarter, rows, cols):
    width = 4 * quarter
    table = sincos_2d(width, rows, cols)
    assert table.shape == (1, 1 + rows * cols, width) and table.dtype == torch.float32
    assert not table[0, 0].any()
    expected = np.zeros((rows * cols, width))
    for row in range(rows):
        for col in range(cols):
            for k in range(quarter):
                omega = 10000 ** (-k / (width / 4))
                values = (math.sin(col * omega), math.cos(col * omega), math.sin(row * omega), math.cos(row * omega))
                for block, value in enumerate(values):
                    expected[row * cols + col, block * quarter + k] = value
    np.testing.assert_allclose(table[0, 1:].numpy(), expected, atol=1e-7)


def test_width_must_split_into_four():
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(30, 2, 2)


@given(side, side, side, side, st.integers(0, 3), st.booleans())
def test_resize_keeps_prefix_rows_and_constants(rows, cols, new_rows, new_cols, prefix, antialias):
    table = torch.full((1, prefix + rows * cols, 5), 0.25)
    table[:, :prefix] = torch.arange(prefix)[:, None] + 7.0
    resized = resize_pos_embed(table, (rows, cols), (new_rows, new_cols), prefix=prefix, antialias=antialias)
    assert resized.shape == (1, prefix + new_rows * new_cols, 5)
    assert torch.equal(resized[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(resized[:, prefix:], torch.full((1, new_rows * new_cols, 5), 0.25))


@given(side, side, side, side)
def test_resize_does_not_mix_up_rows_and_columns(rows, cols, new_rows, new_cols):
    by_row = torch.arange(rows * cols).div(cols, rounding_mode="floor")
    by_col = torch.arange(rows * cols) % cols
    table = torch.stack([by_row, by_col], dim=1)[None].float()
    body = resize_pos_embed(table, (rows, cols), (new_rows, new_cols), prefix=0).unflatten(1, (new_rows, new_cols))[0]
    assert torch.allclose(body[:, :, 0], body[:, :1, 0].expand(-1, new_cols), atol=1e-5)
    assert torch.allclose(body[:, :, 1], body[:1, :, 1].expand(new_rows, -1), atol=1e-5)
    assert (body[1:, :, 0] >= body[:-1, :, 0] - 0.2).all()  # bicubic overshoots a little at the borders
    assert (body[:, 1:, 1] >= body[:, :-1, 1] - 0.2).all()


def test_equal_counts_in_another_shape_are_resized():
    table = sincos_2d(16, 14, 14)
    resized = resize_pos_embed(table, (14, 14), (7, 28))
    assert resized.shape == table.shape
    assert not torch.allclose(resized, table, atol=0.1)
    assert resize_pos_embed(table, (14, 14), (14, 14)) is table


def test_resize_is_bicubic_at_pixel_centres_without_antialias():
    """The convention of the official code: doubling a grid, a new point lies a quarter cell beside an old one."""
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0, -9.0])
    resized = resize_pos_embed(values[None, :, None], (1, 6), (1, 12), prefix=0)[0, :, 0]

    def weight(distance: float, a: float = -0.75) -> float:
        d = abs(distance)
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    for new in range(12):
        place = (new + 0.5) / 2 - 0.5
        taps = range(math.floor(place) - 1, math.floor(place) + 3)
        expected = sum(weight(place - tap) * values[min(max(tap, 0), 5)].item() for tap in taps)
        assert resized[new].item() == pytest.approx(expected, abs=1e-5)


def test_antialias_is_off_unless_asked_for():
    table = torch.randn(1, 1 + 64, 4, generator=torch.Generator().manual_seed(0))
    plain, smooth = (resize_pos_embed(table, (8, 8), (3, 3), antialias=antialias) for antialias in (False, True))
    assert torch.equal(resize_pos_embed(table, (8, 8), (3, 3)), plain)
    assert not torch.allclose(plain, smooth, atol=0.05)


def test_a_table_that_is_not_of_the_old_grid_is_refused():
    with pytest.raises(ValueError, match="needs 17 positions, the table has 16"):
        resize_pos_embed(torch.zeros(1, 16, 8), (4, 4), (2, 2))
