import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.patches import patchify
from mae_core.targets import TARGETS, NormalizedPixelTarget, PixelTarget


def images_of(seed: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 8, 12, generator=generator) * 3 + 1


@given(st.integers(0, 10_000), st.sampled_from([1, 3]))
def test_normalised_target_has_mean_0_and_unbiased_variance_1_in_each_patch(seed, channels):
    target = NormalizedPixelTarget()(images_of(seed, channels), 4)
    values = target.shape[-1]
    assert values == NormalizedPixelTarget().dim(4, channels) == 16 * channels
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    sums = target.square().sum(dim=-1) / (values - 1)
    torch.testing.assert_close(sums, torch.ones(2, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TARGETS)
@given(seed=st.integers(0, 10_000))
def test_to_pixels_inverts_the_target(name, seed):
    target, images = TARGETS[name](), images_of(seed)
    pixels = target.to_pixels(target(images, 4), images, 4)
    torch.testing.assert_close(pixels, patchify(images, 4), atol=1e-4, rtol=1e-4)


def test_pixels_are_the_pixels_and_need_no_truth():
    images = images_of(0)
    assert torch.equal(PixelTarget()(images, 4), patchify(images, 4))
    prediction = torch.randn(2, 6, 48)
    assert torch.equal(PixelTarget().to_pixels(prediction, images, 4), prediction)
    assert not PixelTarget.shows_truth and NormalizedPixelTarget.shows_truth


def test_a_patch_of_one_colour_is_zero_not_infinite():
    target = NormalizedPixelTarget()(torch.full((1, 3, 4, 4), 0.7), 4)
    assert torch.isfinite(target).all() and target.abs().max() < 1e-3
