"""The model against independent implementations: timm's ViT, the formulas and counts of the paper."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.decoder import MAEDecoder
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import build_mae

SIDE, PATCH, NUM_PATCHES = 32, 8, 16
NANO = {"image_size": SIDE, "patch_size": PATCH}
DECODER = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 4}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter but the position tables values far from a fresh model's: none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("pos_embed"):
                noise = torch.randn(parameter.shape, generator=generator) * 0.08
                parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)


def images_of(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def random_mask(batch: int, kept: int, seed: int = 0) -> PatchMask:
    order = torch.rand(batch, NUM_PATCHES, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return PatchMask.from_hidden(order >= kept)


def hidden_pixels(mask: PatchMask) -> Tensor:
    """(B, 1, SIDE, SIDE) bool."""
    return mask.hidden.reshape(-1, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def test_training_predicts_as_evaluation_does():
    model = build_mae("nano", **NANO, **DECODER)
    randomise(model)
    images, mask = images_of(2), random_mask(2, 4)
    evaluated, trained = (model.train(mode)(images, mask=mask) for mode in (False, True))
    assert trained.prediction.shape == (2, NUM_PATCHES, PATCH * PATCH * 3)
    assert torch.equal(trained.prediction, evaluated.prediction) and trained.loss == evaluated.loss


def test_hidden_pixels_do_not_reach_the_prediction_and_visible_ones_do():
    model = build_mae("nano", **NANO, **DECODER).eval()
    randomise(model)
    images, mask = images_of(1), random_mask(1, 4)
    pixels = hidden_pixels(mask)
    prediction = model(images, mask=mask).prediction
    assert torch.equal(model(images.masked_fill(pixels, 9.0), mask=mask).prediction, prediction)
    assert not torch.allclose(model(images.masked_fill(~pixels, 9.0), mask=mask).prediction, prediction, atol=1e-3)


def test_the_same_mask_gives_the_same_loss_and_a_generator_decides_a_drawn_one():
    model = build_mae("nano", **NANO, **DECODER)
    images, mask = images_of(2), random_mask(2, 4)
    assert model(images, mask=mask).loss == model(images, mask=mask).loss
    one, two, other = (model(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.loss == two.loss != other.loss
    assert int(one.mask.hidden.sum()) == 2 * 12


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_encode_equals_timm_with_the_same_weights(pooling):
    ours = ViTEncoder("nano", **NANO, in_chans=1, pooling=pooling).eval()
    randomise(ours, seed=3)
    theirs = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=0,
        global_pool="",
        embed_dim=128,
        depth=6,
        num_heads=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = images_of(2)[:, :1] * 1e-3  # small activations: another LayerNorm epsilon would show
    torch.testing.assert_close(ours.encode(images), theirs.forward_features(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "size, encoder, decoder, classifier",
    [
        ("base", 85_798_656, 26_109_184, 86_567_656),
        ("large", 303_301_632, 26_240_256, 304_326_632),
        ("huge", 630_764_800, 26_309_708, 632_045_800),
    ],
)
def test_parameter_counts_are_the_published_ones(size, encoder, decoder, classifier):
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        trunk = ViTEncoder(size)
        assert count(trunk) == encoder
        assert count(MAEDecoder(trunk.embed_dim, trunk.grid, trunk.grid.patch**2 * 3)) == decoder
        for pooling in ("mean", "cls"):
            assert count(ViTEncoder(size, num_classes=1000, pooling=pooling)) == classifier


def test_encode_is_deterministic_and_in_raster_order():
    encoder = ViTEncoder("nano", image_size=(24, 40), patch_size=8)
    encoder.blocks, encoder.norm = nn.Sequential(), nn.Identity()
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.cls_token.fill_(-1.0)
        encoder.patch_embed.proj.weight.fill_(1 / (3 * 8 * 8))
        encoder.patch_embed.proj.bias.zero_()
    raster = torch.arange(15.0).reshape(1, 1, 3, 5)
    images = raster.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(2, 3, -1, -1)
    for mode in (True, False):
        tokens = encoder.train(mode).encode(images)
        assert tokens.shape == (2, 16, 128)
        torch.testing.assert_close(tokens[1, :, 7], torch.tensor([-1.0, *range(15)]))
        assert torch.equal(tokens, encoder.encode(images))


def test_a_pass_over_visible_patches_sees_their_own_positions():
    """Without attention between patches (identity blocks) the visible pass is the full pass, gathered."""
    encoder = ViTEncoder("nano", **NANO)
    encoder.blocks = nn.Sequential()
    images, mask = images_of(2), random_mask(2, 5)
    full, visible = encoder.encode(images), encoder.encode_visible(images, mask)
    assert visible.shape == (2, 6, 128)
    torch.testing.assert_close(visible[:, 0], full[:, 0])
    for sample in range(2):
        torch.testing.assert_close(visible[sample, 1:], full[sample, 1:][~mask.hidden[sample]])


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = build_mae("nano", image_size=32, patch_size=8, decoder_width=64, decoder_depth=2, decoder_heads=4)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # xavier-uniform; fused qkv is one matrix
            assert layer.weight.abs().max() <= bound, name
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
            assert not layer.bias.any(), name
        elif isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and not layer.bias.any() and layer.eps == 1e-6, name
    patch_embed = model.encoder.patch_embed.proj
    bound = (6 / (3 * 64 + 128)) ** 0.5
    assert patch_embed.weight.abs().max() <= bound
    assert patch_embed.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert 0.5 / 192**0.5 < patch_embed.bias.abs().max() <= 1 / 192**0.5  # the convolution's own default
    for token in (model.encoder.cls_token, model.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.35)
    head = ViTEncoder("nano", **NANO, num_classes=50, pooling="mean").head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.1) and not head.bias.any()


def test_gradient_reaches_everything_but_the_position_tables():
    model = build_mae("nano", **NANO, **DECODER).train()
    model(images_of(2), mask=random_mask(2, 4)).loss.backward()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {"encoder.pos_embed", "decoder.pos_embed"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in fixed), name
        assert name in fixed or parameter.grad.abs().sum() > 0, name


def test_positions_learn_in_a_classifier_and_mean_pooling_leaves_the_cls_token_out():
    model = ViTEncoder("nano", **NANO, num_classes=5, pooling="mean")
    randomise(model)
    assert model.pos_embed.requires_grad
    model.blocks = nn.Sequential()  # no attention: what the cls token holds could reach the logits by pooling alone
    images = images_of(2)
    before = model(images)
    with torch.no_grad():
        model.cls_token.add_(torch.randn(128))
    assert torch.equal(model(images), before)
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    expected = model.head(nn.functional.layer_norm(tokens.mean(dim=1), (128,), *_affine(model.fc_norm), eps=1e-6))
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-6)


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def test_reconstruction_panels_show_what_they_say():
    model = build_mae("nano", **NANO, **DECODER, target="pixels").eval()
    images, mask = images_of(2), random_mask(2, 4)
    output = model(images, mask=mask)
    shown = model.reconstruct(images, output)
    hidden = hidden_pixels(mask).expand(images.shape)
    assert torch.equal(shown.pasted[~hidden], images[~hidden])
    assert torch.equal(shown.pasted[hidden], shown.predicted[hidden])
    assert torch.equal(shown.masked[~hidden], images[~hidden]) and not shown.masked[hidden].any()
    loss = (shown.predicted - images)[hidden].square().mean()
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "bas"}, "unknown model size 'bas'"),
        ({"target": "pixel"}, "unknown name 'pixel'; known: pixels"),
        ({"masking": "checkers"}, "unknown name 'checkers'"),
        ({"image_size": 30}, "does not split into 8x8"),
        ({"mask_ratio": 1.0}, "outside"),
        ({"mask_ratio": 0.99}, "keeps 0 of 16"),
        ({"decoder_width": 50}, "divisible by its heads"),
    ],
)
def test_build_mae_refuses_what_does_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        build_mae(**{"size": "nano", **NANO, **DECODER, **options})


def test_a_model_refuses_images_and_masks_that_are_not_its_own():
    model = build_mae("nano", **NANO, **DECODER)
    for images in (torch.zeros(1, 3, 32, 40), torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(UserError, match=r"takes images \(B, 3, 32, 32\)"):
            model(images)
    with pytest.raises(UserError, match="floating-point pixels"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"PatchMask\.from_hidden"):
        model(torch.zeros(1, 3, 32, 32), mask=torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(UserError, match="does not fit 3 images of 16 patches"):
        model(images_of(3), mask=random_mask(2, 4))
