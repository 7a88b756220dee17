import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.errors import UserError
from mae_core.patches import PatchGrid, patchify, unpatchify

few = st.integers(1, 4)


def images_of(batch: int, channels: int, grid: PatchGrid) -> torch.Tensor:
    height, width = grid.image_size
    return torch.arange(batch * channels * height * width, dtype=torch.float64).reshape(batch, channels, height, width)


@given(few, few, few, few, few)
def test_unpatchify_inverts_patchify(batch, channels, rows, cols, patch):
    grid = PatchGrid(rows, cols, patch)
    images = images_of(batch, channels, grid)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * cols, patch * patch * channels)
    assert torch.equal(unpatchify(patches, grid), images)


@given(st.integers(1, 3), few, few, st.integers(1, 3))
def test_patches_are_in_raster_order_and_their_values_in_row_column_channel_order(channels, rows, cols, patch):
    images = images_of(2, channels, PatchGrid(rows, cols, patch))
    patches = patchify(images, patch)
    for row in range(rows):
        for col in range(cols):
            expected = [
                images[1, channel, row * patch + y, col * patch + x].item()
                for y in range(patch)
                for x in range(patch)
                for channel in range(channels)
            ]
            assert patches[1, row * cols + col].tolist() == expected


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20))
def test_a_grid_exists_exactly_where_the_image_splits(rows_or_height, cols_or_width, patch):
    grid = PatchGrid.of((rows_or_height * patch, cols_or_width * patch), patch)
    assert grid == (rows_or_height, cols_or_width, patch)
    assert grid.num_patches == rows_or_height * cols_or_width
    if rows_or_height % patch:
        with pytest.raises(UserError, match="does not split"):
            PatchGrid.of((rows_or_height, cols_or_width * patch), patch)


def test_the_error_names_the_next_size_that_fits():
    with pytest.raises(UserError, match=r"image size 225x224 does not split into 16x16 patches; use 240x224"):
        PatchGrid.of((225, 224), 16)


@pytest.mark.parametrize("shape", [(1, 5, 12), (1, 6, 11)])
def test_unpatchify_refuses_what_does_not_fill_the_grid(shape):
    with pytest.raises(ValueError, match="2x3 grid"):
        unpatchify(torch.zeros(shape), PatchGrid(2, 3, 2))


@pytest.mark.parametrize("patch", [0, -2, 16.0])
def test_a_patch_size_is_a_whole_number_of_pixels(patch):
    with pytest.raises(UserError, match=rf"1 or more whole pixels; patch_size={patch} was asked for"):
        PatchGrid.of(32, patch)


@pytest.mark.parametrize("size", ["224", 32.0, (1, 2, 3), None])
def test_an_image_size_is_a_number_or_two(size):
    with pytest.raises(UserError, match=r"one whole number or \(height, width\); got"):
        PatchGrid.of(size, 16)
