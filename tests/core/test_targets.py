import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.models.mae import build_mae
from mae_core.patches import PatchGrid, patchify, unpatchify
from mae_core.targets import TARGETS, NormalizedPixelTarget, PCATarget, PixelTarget, TokenTarget, rebuild_target

GRID = PatchGrid(2, 3, 4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class MeanColour(nn.Module):
    """A tokenizer: the brightness of a 4x4 patch in 16 steps; its decoder paints that grey."""

    vocabulary, stride, channels = 16, 4, 3

    def forward(self, images: Tensor) -> Tensor:
        return (F.avg_pool2d(images.mean(dim=1, keepdim=True), 4).flatten(1) * 16).long().clamp(0, 15)

    def decode(self, ids: Tensor) -> Tensor:
        grey = (ids[:, None].float() + 0.5) / 16
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def images_of(seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 8, 12, generator=generator) * 3 + 1


def full_pca(seed: int, kept: int = 48) -> PCATarget:
    """Rows of a random rotation of the 48 numbers of a 4x4 patch."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator))
    return PCATarget(rotation[:kept], torch.randn(48, generator=generator))


INVERTIBLE = {"pixels": PixelTarget(), "normalized_pixels": NormalizedPixelTarget(), "pca": full_pca(0)}


@given(st.integers(0, 10_000), st.sampled_from([1, 3, 13]))
def test_normalised_target_has_mean_0_and_unbiased_variance_1_in_each_patch(seed, channels):
    target = NormalizedPixelTarget()(images_of(seed, channels), 4)
    values = target.shape[-1]
    assert values == NormalizedPixelTarget().dim(GRID, channels) == 16 * channels
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    sums = target.square().sum(dim=-1) / (values - 1)
    torch.testing.assert_close(sums, torch.ones(2, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", INVERTIBLE)
@given(seed=st.integers(0, 10_000))
def test_to_pixels_inverts_the_target(name, seed):
    target, images = INVERTIBLE[name], images_of(seed)
    pixels = target.to_pixels(target(images, 4), images, 4)
    torch.testing.assert_close(pixels, patchify(images, 4), atol=1e-4, rtol=1e-4)


def test_every_target_is_looked_at_here():
    assert set(TARGETS) == {*INVERTIBLE, "tokens"}


def test_pixels_are_the_pixels_and_need_no_truth():
    images = images_of(0)
    assert torch.equal(PixelTarget()(images, 4), patchify(images, 4))
    prediction = torch.randn(2, 6, 48)
    assert torch.equal(PixelTarget().to_pixels(prediction, images, 4), prediction)
    assert not PixelTarget.shows_truth and NormalizedPixelTarget.shows_truth


def test_a_patch_of_one_colour_is_zero_not_infinite():
    target = NormalizedPixelTarget()(torch.full((1, 3, 4, 4), 0.7), 4)
    assert torch.isfinite(target).all() and target.abs().max() < 1e-3


def test_a_patch_of_one_number_has_no_variance():
    with pytest.raises(UserError, match=r"one pixel and one channel cannot be normalised; use target.kind=pixels"):
        build_mae("nano", image_size=4, patch_size=1, in_chans=1)
    assert build_mae("nano", image_size=4, patch_size=1, in_chans=2).decoder.pred.out_features == 2


def test_pca_keeps_the_first_coefficients_and_projects_back():
    whole, part, images = full_pca(1), full_pca(1, kept=5), images_of(2)
    assert part.dim(GRID, 3) == 5
    coefficients = part(images, 4)
    torch.testing.assert_close(coefficients, whole(images, 4)[:, :, :5])
    expected = torch.zeros(2, 6, 48)
    for number in range(5):
        expected += coefficients[:, :, number, None] * whole.components[number]
    torch.testing.assert_close(part.to_pixels(coefficients, images, 4), expected + part.mean, atol=1e-5, rtol=1e-5)
    assert not part.shows_truth


def test_pca_of_other_patches_is_refused():
    with pytest.raises(
        UserError, match=r"fitted on patches of 48 numbers, but this model's patches have 192 \(8x8 pixels, 3 ch"
    ):
        build_mae("nano", image_size=16, patch_size=8, target=full_pca(0))


@pytest.mark.parametrize(
    "name, message", [("pca", "needs a fitted file: write one with mae fit-pca"), ("tokens", "needs a tokenizer")]
)
def test_what_is_fitted_cannot_be_built_by_its_name(name, message):
    with pytest.raises(UserError, match=message):
        build_mae("nano", image_size=16, patch_size=4, target=name)


def test_the_tokenizer_gets_pixels_as_they_were_read_and_its_ids_are_the_truth():
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(4))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    target = TokenTarget(MeanColour(), mean=MEAN, std=STD)
    assert target.dim(GRID, 3) == 16
    assert torch.equal(target((pixels - mean) / std, 4), MeanColour()(pixels))


def test_token_distance_is_cross_entropy_and_pixels_come_from_the_tokenizers_decoder():
    target = TokenTarget(MeanColour(), mean=MEAN, std=STD)
    logits, ids = torch.randn(2, 6, 16), torch.arange(12).reshape(2, 6)
    expected = -logits.log_softmax(dim=-1).gather(2, ids[:, :, None]).mean()
    torch.testing.assert_close(target.distance(logits, ids), expected)
    certain = F.one_hot(ids, 16).float()
    shown = unpatchify(target.to_pixels(certain, torch.zeros(2, 3, 8, 12), 4), GRID)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(shown * std + mean, MeanColour().decode(ids.reshape(2, 2, 3)))


def test_a_tokenizer_may_see_the_images_at_its_own_size():
    target = TokenTarget(MeanColour(), mean=MEAN, std=STD, image_size=(8, 12))
    grid = PatchGrid(2, 3, 8)
    assert target.dim(grid, 3) == 16
    assert target(torch.zeros(2, 3, 16, 24), 8).shape == (2, 6)
    assert target.to_pixels(torch.randn(2, 6, 16), torch.zeros(2, 3, 16, 24), 8).shape == (2, 6, 192)


def test_a_tokenizer_of_another_grid_is_refused_before_any_image_is_seen():
    target = TokenTarget(MeanColour(), mean=MEAN, std=STD)
    message = r"4x6 of an image of 16x24, and the model has 2x3.*tokenizer_image_size=\[8,12\]"
    with pytest.raises(UserError, match=message):
        build_mae("nano", image_size=(16, 24), patch_size=8, target=target)
    with pytest.raises(UserError, match="takes images of 3 channels, the model's have 13"):
        build_mae("nano", image_size=(8, 12), patch_size=4, in_chans=13, target=target)


class Plain:
    """The whole interface and nothing else: no module, no decoder, no stride."""

    vocabulary = 7

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.count, dtype=torch.int64)


def test_any_callable_with_a_vocabulary_is_a_tokenizer():
    target = TokenTarget(Plain(6), mean=MEAN, std=STD)
    model = build_mae("nano", image_size=(8, 12), patch_size=4, target=target, decoder_depth=1)
    output = model(images_of(0), generator=torch.Generator().manual_seed(0))
    assert output.prediction.shape == (2, 6, 7)
    output.loss.backward()
    assert not target.gives_pixels
    with pytest.raises(UserError, match=r"the tokenizer \(Plain\) has no decoder"):
        model.reconstruct(images_of(0), output)


def test_a_wrong_number_of_tokens_is_refused():
    target = TokenTarget(Plain(5), mean=MEAN, std=STD)
    with pytest.raises(UserError, match=r"gives 5 tokens an image, the model has 6 patches \(2x3\)"):
        target(images_of(0), 4)


def test_a_module_tokenizer_is_frozen_and_stays_in_eval_mode():
    tokenizer = nn.Sequential(nn.Flatten(), nn.Linear(288, 6), nn.Dropout(0.5))
    tokenizer.vocabulary = 4
    model = build_mae("nano", image_size=(8, 12), patch_size=4, target=TokenTarget(tokenizer, mean=MEAN, std=STD))
    assert not any(p.requires_grad for p in model.target.parameters())
    assert not any(module.training for module in model.train().target.modules()) and model.encoder.training


def test_a_stored_target_that_lacks_its_tensors_is_refused():
    with pytest.raises(UserError, match="the target 'pca' of this file is incomplete: components is missing"):
        rebuild_target("pca", {}, {})
    with pytest.raises(UserError, match="tokenizer of kind 'MeanColour' cannot be rebuilt"):
        rebuild_target("tokens", {"tokenizer": {"kind": "MeanColour"}, "image_size": None}, {"mean": torch.zeros(3)})


def test_loss_counts_hidden_patches_only_unless_asked_for_all():
    model = build_mae("nano", image_size=(8, 12), patch_size=4, target="pixels").eval()
    images = images_of(5)
    output = model(images, generator=torch.Generator().manual_seed(0))
    errors = (output.prediction - patchify(images, 4)).square().mean(dim=-1)
    torch.testing.assert_close(output.loss, errors[output.mask.hidden].mean())
    model.loss_on_all_patches = True
    everywhere = model(images, mask=output.mask).loss
    torch.testing.assert_close(everywhere, errors.mean())
    assert not torch.isclose(everywhere, output.loss)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_epsilon_of_the_normalised_target_is_added_to_the_variance(eps):
    target, images = NormalizedPixelTarget(eps), images_of(0, 3)
    images[:, :, :4] *= 1e-3  # near-constant patches
    patches = images.numpy().reshape(-1, 3, GRID.rows, 4, GRID.cols, 4).transpose(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(len(images), GRID.num_patches, -1)
    expected = patches - patches.mean(-1, keepdims=True)
    expected /= np.sqrt(patches.var(-1, ddof=1, keepdims=True) + eps)
    np.testing.assert_allclose(target(images, 4).numpy(), expected, rtol=1e-4, atol=1e-5)
    again = rebuild_target("normalized_pixels", target.describe(), {})
    assert torch.equal(again(images, 4), target(images, 4))
    assert rebuild_target("normalized_pixels", {}, {}).eps == 1e-6  # a file from before it was an option
