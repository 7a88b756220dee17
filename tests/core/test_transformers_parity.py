"""The method against an independent implementation: transformers' ViTMAE, with the same weights and the same mask."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from mae_core.masking import PatchMask
from mae_core.models.mae import MaskedAutoencoder, build_mae
from mae_core.pos_embed import resize_pos_embed

transformers = pytest.importorskip("transformers")

PARTS = {
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
REST = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
    "vit.layernorm": "encoder.norm",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_pos_embed": "decoder.pos_embed",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pred",
}
TRUNKS = {"vit.layers": "encoder.blocks", "decoder.decoder_layers": "decoder.blocks"}


def in_our_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers 5 (weights, or gradients) under our names; query, key and value in one."""
    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in theirs.items():
        stem, _, kind = name.rpartition(".")
        trunk = next((trunk for trunk in TRUNKS if name.startswith(trunk)), None)
        if trunk is None:
            ours[REST[name] if name in REST else f"{REST[stem]}.{kind}"] = tensor
            continue
        index, _, part = stem.removeprefix(f"{trunk}.").partition(".")
        block = f"{TRUNKS[trunk]}.{index}"
        if part in PARTS:
            ours[f"{block}.{PARTS[part]}.{kind}"] = tensor
        else:
            thirds.setdefault(f"{block}.attn.qkv.{kind}", {})[part] = tensor
    for name, parts in thirds.items():
        ours[name] = torch.cat([parts[f"attention.{letter}_proj"] for letter in "qkv"])
    return ours


def twin_of(ours: MaskedAutoencoder, side: int) -> nn.Module:
    """transformers' model of the same shape on images of ``side`` x ``side``, its weights away from their start."""
    encoder, decoder = ours.encoder, ours.decoder
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=encoder.blocks[0].attn.num_heads,
            intermediate_size=4 * encoder.embed_dim,
            image_size=side,
            patch_size=encoder.grid.patch,
            num_channels=encoder.in_channels,
            decoder_hidden_size=decoder.norm.normalized_shape[0],
            decoder_num_hidden_layers=len(decoder.blocks),
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=4 * decoder.norm.normalized_shape[0],
            layer_norm_eps=1e-6,  # its default is 1e-12, the released weights' is 1e-6
            norm_pix_loss=ours.target_name == "normalized_pixels",
            mask_ratio=ours.masker.ratio,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "position_embeddings" not in name and "pos_embed" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return theirs.eval()


def compare(ours: MaskedAutoencoder, theirs: nn.Module, images: Tensor, mask: PatchMask, **options: bool) -> None:
    """Loss, prediction and the gradient of every parameter agree to 1e-5, relative to the norm of each tensor."""
    noise = mask.hidden.float() + torch.arange(mask.hidden.shape[1]) / 1000  # it keeps the lowest, in raster order
    expected = theirs(images, noise=noise, **options)
    assert torch.equal(expected.mask.bool(), mask.hidden)
    output = ours(images, mask=mask)
    assert torch.equal(output.mask.hidden, mask.hidden)
    assert off(output.loss, expected.loss) < 1e-5
    assert off(output.prediction, expected.logits) < 1e-5
    output.loss.backward()
    expected.loss.backward()
    wanted = in_our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert {name for name, _ in ours.named_parameters()} - found.keys() == {"encoder.pos_embed", "decoder.pos_embed"}
    worst = max(found, key=lambda name: off(found[name], wanted[name]))
    assert off(found[worst], wanted[worst]) < 1e-5, worst


def off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_vit_base_equals_transformers_in_loss_and_every_gradient():
    """The published model with its default target; both targets below, on a small one."""
    ours = build_mae("base").eval()
    theirs = twin_of(ours, side=224)
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.copy_(ours.encoder.pos_embed)
        theirs.decoder.decoder_pos_embed.copy_(ours.decoder.pos_embed)  # zeros in a fresh model of theirs
    ours.load_state_dict(in_our_names(theirs.state_dict()))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 224, 224, generator=generator)
    compare(ours, theirs, images, ours.masker(1, ours.encoder.grid, generator))


@pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
@pytest.mark.parametrize("masking, ratio, channels", [("random", 0.75, 3), ("block", 0.5, 4)])
def test_a_tiny_model_on_an_image_that_is_not_square_equals_transformers(target, masking, ratio, channels):
    """Of theirs, positions are those of a square grid and resized on the fly: the encoder's as ours, the decoder's as
    one line of positions, which for as many patches leaves them alone."""
    ours = build_mae(
        "tiny",
        image_size=(16, 64),
        patch_size=8,
        in_chans=channels,
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=4,
        target=target,
        masking=masking,
        mask_ratio=ratio,
    ).train()
    theirs = twin_of(ours, side=32)
    square = torch.randn(1, 17, 192, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.copy_(square)
        theirs.decoder.decoder_pos_embed.copy_(ours.decoder.pos_embed)
    weights = in_our_names(theirs.state_dict())
    assert not torch.allclose(resize_pos_embed(square, (4, 4), (2, 8)), square, atol=0.1)
    ours.load_state_dict({**weights, "encoder.pos_embed": resize_pos_embed(square, (4, 4), (2, 8))})
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, channels, 16, 64, generator=generator)
    compare(ours, theirs, images, ours.masker(3, ours.encoder.grid, generator), interpolate_pos_encoding=True)
