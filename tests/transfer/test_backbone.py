import pytest
import torch

from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES
from transfer.backbone import DenseViT, merge_windows, partition_windows
from transfer.weights import load_pretrained


def twin(vit: DenseViT, **options) -> DenseViT:
    other = DenseViT("nano", image_size=vit.grid.image_size, patch_size=8, **options)
    other.load_state_dict(vit.state_dict())
    return other.eval()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return DenseViT("nano", image_size=(32, 48), patch_size=8).eval()


@pytest.mark.parametrize("height, width", [(32, 48), (40, 24), (33, 50), (8, 200)])
def test_any_image_size_gives_the_rounded_up_grid(vit, height, width):
    maps = vit(torch.randn(2, 3, height, width))
    assert [tuple(x.shape) for x in maps] == [(2, 128, -(-height // 8), -(-width // 8))] * 4
    assert [level.channels for level in vit.levels] == [128] * 4
    assert {level.stride for level in vit.levels} == {8}


def test_a_window_that_covers_the_grid_is_global_attention(vit):
    images = torch.randn(2, 3, 32, 32)
    windowed = twin(vit, window=4, global_blocks=())
    for one, other in zip(vit(images), windowed(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_smaller_windows_are_not_global_attention(vit):
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(vit(images)[0], twin(vit, window=2, global_blocks=())(images)[0], atol=1e-3)


def test_a_window_sees_only_itself(vit):
    windowed = twin(vit, window=2, global_blocks=())
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 16:, 16:] += 1.0
    before, after = windowed(images)[-1], windowed(changed)[-1]
    assert torch.equal(before[..., :2, :], after[..., :2, :])
    assert not torch.allclose(before[..., 2:, 2:], after[..., 2:, 2:])


@pytest.mark.parametrize("grid, window", [((4, 6), 2), ((5, 7), 3), ((3, 2), 4)])
def test_windows_are_put_back_where_they_came_from(grid, window):
    x = torch.randn(2, grid[0] * grid[1], 5)
    windows, padded = partition_windows(x, grid, window)
    assert windows.shape[1:] == (window * window, 5)
    assert all(side % window == 0 for side in padded)
    assert torch.equal(merge_windows(windows, grid, window, padded), x)


def test_taps_are_the_quarters_and_come_before_the_final_norm(vit):
    encoder = ViTEncoder("nano", image_size=(32, 48), patch_size=8).eval()
    dense = DenseViT("nano", image_size=(32, 48), patch_size=8, cls_token=True).eval()
    encoder_state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("norm.")}
    dense.load_state_dict(encoder_state)
    images = torch.randn(1, 3, 32, 48)
    _, intermediates = encoder.forward_intermediates(images, indices=list(dense.taps), norm=False)
    assert dense.taps == SIZES["nano"].quarter_taps
    for one, other in zip(dense(images), intermediates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_checkpointing_gives_the_same_gradients(vit):
    images = torch.randn(1, 3, 32, 48)
    plain, sparing = twin(vit).train(), twin(vit, checkpointing=True).train()
    for model in (plain, sparing):
        sum(x.sum() for x in model(images)).backward()
    for one, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_pretrained_encoder_loads_and_its_positions_are_resized(pretrained):
    vit = DenseViT("nano", image_size=64, patch_size=8)
    report = load_pretrained(vit, pretrained)
    assert report.resized == {"pos_embed": "4x4 -> 8x8"}
    assert report.share == 1.0
    assert "cls_token" in report.unused
    assert not report.refused and not report.new
