"""What can be built, and what a built model says of itself."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mae_core
from mae_core import build_mae, load_mae
from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.mae import MaskedAutoencoder
from mae_core.models.sizes import ViTSize
from mae_core.patches import patchify
from mae_core.targets import PCATarget, TokenTarget
from mae_core.tokenizers import DalleEncoder, DiscreteVAE
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights

SMALL = {"image_size": (24, 40), "patch_size": 8, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images_for(model: MaskedAutoencoder, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.encoder.in_channels, *model.encoder.grid.image_size, generator=generator)


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(build_mae).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "size": "base",
        "image_size": 224,
        "patch_size": 16,
        "in_chans": 3,
        "decoder_depth": 8,
        "decoder_width": 512,
        "decoder_heads": 16,
        "target": "normalized_pixels",
        "masking": "random",
        "mask_ratio": 0.75,
        "mask_tokens_in_encoder": False,
        "fuse_blocks": (),
    }
    assert parameters["size"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for name, p in parameters.items() if name != "size")


@pytest.mark.parametrize(
    "size, patch, visible, total",
    [("base", 16, 49, 111_907_840), ("large", 16, 49, 329_541_888), ("huge", 14, 64, 657_074_508)],
)
def test_the_papers_models_have_the_published_numbers(size, patch, visible, total):
    with torch.device("meta"):
        model = build_mae(size)
    assert model.encoder.grid.patch == patch and count(model) == total
    assert model.masker(1, model.encoder.grid).visible_ids.shape == (1, visible)
    assert model.decoder.pred.out_features == patch * patch * 3
    assert model.decoder.heads == 16 and {block.attn.head_dim for block in model.decoder.blocks} == {32}


def test_a_patch_size_that_was_asked_for_is_honoured_for_every_size():
    with torch.device("meta"):
        assert build_mae("huge", patch_size=16).encoder.grid == (14, 14, 16)
        assert build_mae("huge", patch_size=None).encoder.grid == (16, 16, 14)
        assert build_mae("base", patch_size=14).encoder.grid == (16, 16, 14)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("channels, shape, patch", [(1, (24, 40), 8), (13, (20, 10), 5), (16, (7, 21), 7)])
def test_any_shape_patch_and_number_of_channels(size, channels, shape, patch):
    options = {"decoder_depth": 3, "decoder_width": 48, "decoder_heads": 3, "mask_ratio": 0.5}
    model = build_mae(size, image_size=shape, patch_size=patch, in_chans=channels, **options).eval()
    images = images_for(model)
    patches = (shape[0] // patch) * (shape[1] // patch)
    output = model(images, generator=torch.Generator().manual_seed(0))
    assert output.prediction.shape == (2, patches, patch * patch * channels)
    assert model.encoder.encode(images).shape == (2, 1 + patches, model.encoder.embed_dim)
    assert model.reconstruct(images, output).pasted.shape == images.shape
    with pytest.raises(UserError, match=rf"takes images \(B, {channels}, {shape[0]}, {shape[1]}\)"):
        model(images[:, :1].repeat(1, channels + 1, 1, 1))


@pytest.mark.parametrize("channels", [0, -1])
def test_an_image_has_channels(channels):
    with pytest.raises(UserError, match=f"at least one channel; in_chans={channels} was asked for"):
        build_mae("nano", in_chans=channels)


def test_a_mask_of_the_callers_is_honoured():
    model = build_mae("nano", **SMALL)
    hidden = torch.zeros(2, 15, dtype=torch.bool)
    hidden[0, [0, 3, 14]] = hidden[1, [1, 2, 7]] = True
    mask = mae_core.PatchMask.from_hidden(hidden)
    assert mask.hidden_ids.tolist() == [[0, 3, 14], [1, 2, 7]]
    for mode in (True, False):
        output = model.train(mode)(images_for(model), mask=mask)
        assert torch.equal(output.mask.hidden, hidden)
    truth = model.target(images_for(model), 8)
    torch.testing.assert_close(output.loss, (output.prediction - truth)[hidden].square().mean())


class TestMaskTokensInTheEncoder:
    """Paper, Table 1c."""

    def test_the_encoder_sees_every_patch_and_no_hidden_pixel(self):
        model = build_mae("nano", **SMALL, target="pixels", mask_tokens_in_encoder=True).eval()
        assert model.decoder.mask_token is None and model.mask_token.shape == (1, 1, 128)
        images = images_for(model)
        mask = model.masker(2, model.encoder.grid, torch.Generator().manual_seed(0))
        tokens = model.encoder.encode_with_mask_tokens(images, mask, model.mask_token)
        assert tokens.shape == (2, 16, 128)
        prediction = model(images, mask=mask).prediction
        patches = patchify(images, 8)
        other = mae_core.unpatchify(patches.masked_fill(mask.hidden[:, :, None], 5.0), model.encoder.grid)
        assert torch.equal(model(other, mask=mask).prediction, prediction)
        shown = mae_core.unpatchify(patches.masked_fill(~mask.hidden[:, :, None], 5.0), model.encoder.grid)
        assert not torch.allclose(model(shown, mask=mask).prediction, prediction, atol=1e-3)

    def test_without_attention_a_token_is_its_patch_or_the_mask_token_at_its_position(self):
        model = build_mae("nano", **SMALL, mask_tokens_in_encoder=True)
        model.encoder.blocks, model.encoder.norm = nn.Sequential(), nn.Identity()
        images = images_for(model, batch=1)
        mask = PatchMask.from_hidden(torch.arange(15)[None] % 4 == 1)
        tokens = model.encoder.encode_with_mask_tokens(images, mask, model.mask_token)[0, 1:]
        positions = model.encoder.pos_embed[0, 1:]
        hidden = mask.hidden[0]
        torch.testing.assert_close(tokens[hidden], (model.mask_token[0] + positions)[hidden])
        torch.testing.assert_close(tokens[~hidden], model.encoder.embed(images)[0][~hidden])

    def test_every_parameter_learns_and_the_mask_token_starts_as_the_decoders_does(self):
        torch.manual_seed(0)
        model = build_mae("nano", **SMALL, mask_tokens_in_encoder=True)
        assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.35)
        model(images_for(model), generator=torch.Generator().manual_seed(0)).loss.backward()
        still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert still == {"encoder.pos_embed", "decoder.pos_embed"}

    def test_it_costs_what_the_paper_says(self):
        """3.3 times the FLOPs for ViT-L; all of the difference is in the encoder."""
        flops = []
        for inside in (True, False):
            with torch.device("meta"):
                model = build_mae("large", mask_tokens_in_encoder=inside).eval()
                images = torch.empty(1, 3, 224, 224)
            mask = PatchMask.from_hidden(torch.arange(196)[None] >= 49)
            with FlopCounterMode(display=False) as counter:
                tokens = (
                    model.encoder.encode_with_mask_tokens(images, mask.to("meta"), model.mask_token)
                    if inside
                    else model.encoder.encode_visible(images, mask.to("meta"))
                )
                model.decoder(tokens, mask.to("meta"))
            flops.append(counter.get_total_flops())
        assert flops[0] / flops[1] == pytest.approx(3.3, abs=0.1)


def test_weight_decay_spares_biases_and_1d_tensors_but_not_the_cls_and_mask_tokens():
    model = build_mae("nano", **SMALL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05)
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0.05}
    spared = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0}
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= decayed
    assert all(name.endswith(".weight") or name.endswith("_token") for name in decayed)
    assert all(name.endswith(".bias") or "norm" in name for name in spared)
    assert decayed | spared == set(names.values()) - {"encoder.pos_embed", "decoder.pos_embed"}


def pca() -> PCATarget:
    generator = torch.Generator().manual_seed(3)
    return PCATarget(torch.randn(5, 192, generator=generator), torch.randn(192, generator=generator))


def own_tokens() -> TokenTarget:
    tokenizer = DiscreteVAE(vocabulary=9, stride=4, width=8, depth=1, mean=(0.5,) * 3, std=(0.2,) * 3)
    return TokenTarget(tokenizer, mean=(0.4,) * 3, std=(0.3,) * 3, image_size=(12, 20))


def dalle_tokens() -> TokenTarget:
    return TokenTarget(DalleEncoder(vocabulary=11, width=8, blocks=1), mean=(0.4,) * 3, std=(0.3,) * 3)


@pytest.mark.parametrize(
    "options",
    [
        {"target": "pixels", "masking": "grid", "mask_ratio": 0.6},
        {"target": "normalized_pixels", "masking": "block", "mask_tokens_in_encoder": True},
        {"target": pca},
        {"target": own_tokens},
        {"target": dalle_tokens},
    ],
    ids=lambda options: getattr(options["target"], "__name__", options["target"]),
)
def test_a_checkpoint_alone_is_enough_to_build_the_model_again(tmp_path, options):
    torch.manual_seed(0)
    made = {**options, "target": options["target"]() if callable(options["target"]) else options["target"]}
    model = build_mae("nano", **SMALL, **made).eval()
    model.loss_on_all_patches = options["target"] == "pixels"
    file = tmp_path / "model.safetensors"
    write_weights(file, model.state_dict(), {**describe_encoder(model), **model.describe()})
    again = load_mae(file)
    assert again.describe() == model.describe() and again.masker == model.masker
    images = images_for(model)
    ours, theirs = (one(images, generator=torch.Generator().manual_seed(1)) for one in (model, again))
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.prediction, theirs.prediction)
    assert mae_core.load_encoder(file).encode(images).equal(model.encoder.encode(images))
    if model.target.gives_pixels:
        assert torch.equal(*(one.reconstruct(images, ours).pasted for one in (model, again)))


@pytest.mark.parametrize(
    "option, message",
    [({"decoder_width": 0}, "decoder width 0 must be"), ({"decoder_depth": -1}, "at least one block; depth -1")],
)
def test_a_decoder_without_numbers_is_refused(option, message):
    with pytest.raises(UserError, match=message):
        build_mae("nano", image_size=32, **{"decoder_width": 32, "decoder_heads": 2, **option})


# ---- fused blocks


def fused(blocks, **options):
    torch.manual_seed(0)
    size = ViTSize(32, 4, 2)
    shape = {"image_size": 16, "patch_size": 4, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return build_mae(size, **shape, fuse_blocks=blocks, **options)


def test_fused_blocks_are_a_weighted_mean_of_mapped_outputs():
    """Golden: block after block, matrix after matrix, without the module's own forward."""
    model, images = fused([0, 2]), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([0.3, -0.7, 1.1]))
        mask = model.masker(2, model.encoder.grid, torch.Generator().manual_seed(1))
        tokens = model.encoder.patch_embed(images) + model.encoder.pos_embed[:, 1:]
        tokens = torch.stack([each[ids] for each, ids in zip(tokens, mask.visible_ids, strict=True)])
        tokens = torch.cat([(model.encoder.cls_token + model.encoder.pos_embed[:, :1]).expand(2, -1, -1), tokens], 1)
        found = []
        for block in model.encoder.blocks:
            tokens = block(tokens)
            found.append(tokens)
        w = np.exp([0.3, -0.7, 1.1]) / np.exp([0.3, -0.7, 1.1]).sum()
        (a, b), (c, d) = ((layer.weight, layer.bias) for layer in model.fusion.project)
        mean = w[0] * (found[0] @ a.T + b) + w[1] * (found[2] @ c.T + d) + w[2] * found[3]
        expected = model.decoder(model.encoder.norm(mean.float()), mask)
        torch.testing.assert_close(model(images, mask=mask).prediction, expected, rtol=1e-5, atol=1e-5)
    model(images, mask=mask).loss.backward()
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in model.fusion.named_parameters() if "bias" not in name
    )


def test_without_weight_on_the_others_it_is_the_model_without_fusion():
    model, plain, images = fused([1]), fused([]), torch.randn(1, 3, 16, 16)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fusion.")}
    plain.load_state_dict(state)
    assert plain.fusion is None and plain.encoder.state_dict().keys() == model.encoder.state_dict().keys()
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([-100.0, 0.0]))
        mask = model.masker(1, model.encoder.grid, torch.Generator().manual_seed(1))
        torch.testing.assert_close(model(images, mask=mask).prediction, plain(images, mask=mask).prediction)


@pytest.mark.parametrize("blocks", [[3], [1, 1], [2, 0], [-1]])
def test_blocks_that_cannot_be_fused_are_refused(blocks):
    with pytest.raises(UserError, match=r"give blocks from 0 to 2, ascending; the decoder reads the last of the 4"):
        fused(blocks)
    with pytest.raises(UserError, match="exclude each other"):
        fused([0], mask_tokens_in_encoder=True)
