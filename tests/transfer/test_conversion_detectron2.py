"""detectron2's own ViT on weights converted from every format, against timm's ViT without a cls token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mae_core
from mae_core.models.mae import build_mae
from mae_core.weights.features import Geometry
from mae_core.weights.formats import FORMATS
from mae_core.weights.resize import Adaptation
from tests.independent_vit import OwnReading

pytestmark = pytest.mark.detectron2
SOURCES = ("official", "mae_core", "timm", "huggingface", "mmseg", "mmpretrain", "detectron2", "mae_segmentation")
PREFIX = FORMATS["detectron2"].layouts[0].prefixes[0]


@pytest.fixture(scope="module", params=[3, 13])
def mae(request):
    """A MAE of random weights on images of 64x64 pixels, none of its tensors as it was initialised."""
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "in_chans": request.param}
    model = build_mae("nano", **sizes, decoder_width=32, decoder_depth=1, decoder_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def images_for(mae, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, mae.encoder.in_channels, height, width, generator=generator)


def detectron2_features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """(B, N, D) of detectron2's ViT, built for pre-training at 64x64; the position table is resized by detectron2."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    model = vit.ViT(
        img_size=64,
        patch_size=16,
        in_chans=images.shape[1],
        embed_dim=128,
        depth=6,
        num_heads=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        pretrain_img_size=64,
    ).eval()
    loaded = model.load_state_dict({name.removeprefix(PREFIX): t for name, t in state.items()}, strict=False)
    assert not loaded.unexpected_keys and all("rel_pos" in name for name in loaded.missing_keys)
    with torch.no_grad():
        return model(images)["last_feat"].flatten(2).transpose(1, 2)


def timm_features(official: dict[str, Tensor], images: Tensor) -> Tensor:
    """(B, N, D) of timm's ViT before the final norm, without a cls token."""
    model = VisionTransformer(
        img_size=tuple(images.shape[2:]),
        patch_size=16,
        in_chans=images.shape[1],
        num_classes=0,
        global_pool="",
        class_token=False,
        embed_dim=128,
        depth=6,
        num_heads=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    state = {name: tensor for name, tensor in official.items() if name != "cls_token"}
    model.load_state_dict({**state, "pos_embed": official["pos_embed"][:, 1:]})
    with torch.no_grad():
        return model.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)[-1]


@pytest.mark.parametrize("source", SOURCES)
def test_detectron2_gives_the_features_of_every_format(mae, source):
    there, _ = mae_core.convert(mae.state_dict(), "mae_core", source)
    converted, report = mae_core.convert(there, source, "detectron2")
    assert any("rel_pos_h" in name for name in report.new)
    images = images_for(mae, 64, 64)
    expected = timm_features(mae_core.convert(mae.encoder.state_dict(), "mae_core", "timm")[0], images)
    theirs = detectron2_features(converted, images)
    assert (theirs - expected).abs().max() < 1e-5
    names = {name.removeprefix(PREFIX): tensor for name, tensor in converted.items()}
    ours = OwnReading(cls=False)(names, Geometry((64, 64), 16, images.shape[1], 4), images).raw
    assert (ours - theirs).abs().max() < 1e-5, "what --check runs where detectron2 is not installed"


def test_detectron2_resizes_positions_as_a_conversion_does(mae):
    """detectron2 resizes them when it runs, to any grid; converted for that grid they give the same features."""
    images = images_for(mae, 48, 96)
    converted, _ = mae_core.convert(mae.state_dict(), "mae_core", "detectron2")
    resized, _ = mae_core.convert(mae.state_dict(), "mae_core", "timm", adaptation=Adaptation(image_size=(48, 96)))
    assert (detectron2_features(converted, images) - timm_features(resized, images)).abs().max() < 1e-5
