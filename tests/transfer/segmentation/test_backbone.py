# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""The backbone against mmseg's own, and the groups of the optimizer against the published rule and mmseg's."""

import re
from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_layer_decay

import mae_core
from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES
from mae_core.weights.resize import Adaptation
from transfer.backbone import DenseViT

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from transfer.segmentation.engine_mmseg.options import read_config

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"


@pytest.fixture(scope="module")
def digits_model():
    register_all_modules()
    return MODELS.build(read_config(DIGITS, {}).model)


NAMES_IN_MMSEG = (
    ("patch_embed.proj", "patch_embed.projection"),
    ("blocks.", "layers."),
    (".norm1", ".ln1"),
    (".norm2", ".ln2"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
)
"""A part of a name of ours -> of mmseg's MAE backbone."""


def in_mmseg(name: str) -> str:
    for ours, theirs in NAMES_IN_MMSEG:
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("image_size", [(512, 512), (208, 336)])
def test_equals_the_mae_backbone_and_the_pyramid_of_mmseg(image_size):
    """Narrow, but with all the parts: positions, a table a block with cls entries, LayerScale, taps, no final norm."""
    register_all_modules()
    shared = {"layer_scale": 1.0, "taps": [1, 2, 3, 5], "patch_size": 16}
    ours = MODELS.build({"type": "MAECoreViT", "size": "nano", "image_size": image_size, **shared})
    shape = {"embed_dims": 128, "num_layers": 6, "num_heads": 4, "img_size": image_size, "init_values": 1.0}
    norm = {"type": "LN", "eps": 1e-6}
    theirs = MODELS.build({"type": "MAE", **shape, "out_indices": [1, 2, 3, 5], "norm_cfg": norm})
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in ours.named_parameters():
        middle = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "gamma")) else 0.0
        state[name] = middle + 0.1 * torch.randn(parameter.shape, generator=generator)
    ours.load_state_dict(state)
    kept = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith("relative_position_index")}
    theirs.load_state_dict({**{in_mmseg(name): tensor for name, tensor in state.items()}, **kept})
    neck = MODELS.build({"type": "Feature2Pyramid", "embed_dim": 128, "norm_cfg": {"type": "BN"}}).eval()
    images = torch.randn((1, 3, *image_size), generator=generator)
    ours.eval(), theirs.eval()  # mmseg's returns None
    with torch.no_grad():
        mine, published = neck(ours(images)), neck(theirs(images))
    strides = [image_size[0] / level.shape[2] for level in mine]
    assert strides[:3] == [4, 8, 16] and published[0].abs().max() > 0.1
    for one, other in zip(mine, published, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_backbone_is_dense_vit_with_the_cls_token_and_tables():
    options = {"image_size": 64, "patch_size": 8, "relative_positions": "table", "layer_scale": 0.1}
    ours = engine.MAECoreViT("nano", **options).eval()
    plain = DenseViT("nano", cls_token=True, **options).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 40, 72)
    maps = ours(images)
    assert isinstance(maps, tuple) and [level.shape for level in maps] == [(2, 128, 5, 9)] * 4
    for one, other in zip(maps, plain(images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    names = set(ours.state_dict())
    assert ours.blocks[0].attn.relative_position_bias_table.shape == (15 * 15 + 3, 4)
    assert not any(name.startswith("norm.") for name in names) and "blocks.5.ls2.gamma" in names
    bare = engine.MAECoreViT("nano", image_size=64, patch_size=8, relative_positions="none")
    assert not any("table" in name or "gamma" in name for name in bare.state_dict())


@pytest.mark.parametrize(
    ("size", "taps"), [("base", (3, 5, 7, 11)), ("large", (7, 11, 15, 23)), ("tiny", (2, 5, 8, 11))]
)
def test_taps_are_the_published_ones_or_the_quarters(size, taps, monkeypatch):
    def small_init(self, size, **options):
        torch.nn.Module.__init__(self)
        self.given = options

    monkeypatch.setattr(DenseViT, "__init__", small_init)
    given = engine.MAECoreViT(size).given
    assert (given["taps"] or SIZES[size].quarter_taps) == taps and given["cls_token"] is True
    assert engine.MAECoreViT(size, taps=[0, 1]).given["taps"] == [0, 1]


def test_init_weights_draws_nothing_anew():
    backbone = engine.MAECoreViT("nano", image_size=32, patch_size=8)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_neck_and_heads_see_four_strides(digits_model):
    images = torch.randn(2, 3, 64, 64)
    features = digits_model.extract_feat(images)
    assert [tuple(level.shape) for level in features] == [(2, 128, side, side) for side in (16, 8, 4, 2)]
    assert digits_model.decode_head.forward(features).shape == (2, 5, 16, 16)
    assert digits_model.auxiliary_head.forward(features).shape == (2, 5, 4, 4)


class Trunk(torch.nn.Module):
    """A segmentor's names: a backbone, and a head of two tensors."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = torch.nn.Conv2d(2, 2, 1)


def optimizer_groups(model, constructor="MAECoreLayerDecay", lr=1e-4, decay=0.05, **rule):
    section = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": lr, "betas": (0.9, 0.999), "weight_decay": decay},
        "constructor": constructor,
        "paramwise_cfg": {"layer_decay_rate": 0.65, **rule},
    }
    return build_optim_wrapper(model, section).optimizer.param_groups


def per_parameter(groups):
    """Name -> (learning rate, weight decay, lr_scale)."""
    return {
        name: (group["lr"], group["weight_decay"], group["lr_scale"])
        for group in groups
        for name in group["param_names"]
    }


EMBEDDINGS = {"cls_token": 0.0, "pos_embed": 0.0, "patch_embed.proj.weight": 0.05, "patch_embed.proj.bias": 0.0}
BLOCK = {
    "norm1.weight": 0.0,
    "norm1.bias": 0.0,
    "attn.relative_position_bias_table": 0.0,
    "attn.qkv.weight": 0.05,
    "attn.qkv.bias": 0.0,
    "attn.proj.weight": 0.05,
    "attn.proj.bias": 0.0,
    "ls1.gamma": 0.0,
    "norm2.weight": 0.0,
    "norm2.bias": 0.0,
    "mlp.fc1.weight": 0.05,
    "mlp.fc1.bias": 0.0,
    "mlp.fc2.weight": 0.05,
    "mlp.fc2.bias": 0.0,
    "ls2.gamma": 0.0,
}
"""Tensor -> weight decay; published: ids 0 (embeddings), i + 1 (block i), 13 (neck and heads), scale 0.65^(13 - id)."""
EMBEDDING_RATE = 3.697205e-07
"""1e-4 * 0.65^13; mae_segmentation's log shows 3.66e-7 at step 1600, where the linear schedule has begun to fall."""


@pytest.fixture(scope="module")
def base_trunk():
    register_all_modules()
    with torch.device("meta"):
        return Trunk(MODELS.build({"type": "MAECoreViT", "size": "base", "layer_scale": 1.0}))


def test_groups_of_vit_base_are_the_published_rule_without_its_bug(base_trunk):
    expected = {f"backbone.{name}": (EMBEDDING_RATE, decay, 0.65**13) for name, decay in EMBEDDINGS.items()}
    for index in range(12):
        scale = 0.65 ** (12 - index)
        expected |= {f"backbone.blocks.{index}.{name}": (1e-4 * scale, decay, scale) for name, decay in BLOCK.items()}
    expected |= {"decode_head.weight": (1e-4, 0.05, 1.0), "decode_head.bias": (1e-4, 0.0, 1.0)}
    found = per_parameter(optimizer_groups(base_trunk))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name
    assert len(optimizer_groups(base_trunk)) == 2 * 14


def test_with_the_bug_the_groups_are_those_of_mmseg(base_trunk):
    narrow = {"embed_dims": 24, "num_layers": 12, "num_heads": 12, "img_size": (512, 512)}
    theirs = Trunk(MODELS.build({"type": "MAE", **narrow}))
    published = per_parameter(optimizer_groups(theirs, "LayerDecayOptimizerConstructor", num_layers=12))
    ours = {
        in_mmseg(name): values for name, values in per_parameter(optimizer_groups(base_trunk, paper_bug=True)).items()
    }
    assert ours.keys() == published.keys()
    for name, values in published.items():
        assert ours[name] == pytest.approx(values, rel=1e-9), name
    fixed = per_parameter(optimizer_groups(base_trunk, paper_bug=False))
    differing = {name for name, values in fixed.items() if values != pytest.approx(ours[in_mmseg(name)], rel=1e-9)}
    tables = {f"backbone.blocks.{index}.attn.relative_position_bias_table" for index in range(12)}
    assert differing == {"backbone.cls_token", "backbone.pos_embed", *tables}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"decay_rate": 0.5}, r"unknown key 'decay_rate' in paramwise_cfg; did you mean 'layer_decay_rate'"),
        ({"num_layers": 12}, r"unknown key 'num_layers' in paramwise_cfg; known: layer_decay_rate, paper_bug"),
    ],
)
def test_a_rule_that_nothing_reads_is_refused(base_trunk, rule, message):
    with pytest.raises(UserError, match=message):
        optimizer_groups(base_trunk, **rule)


def test_a_rule_without_a_rate_is_refused(base_trunk):
    section = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0}}
    with pytest.raises(UserError, match="paramwise_cfg has no layer_decay_rate"):
        engine.MAECoreLayerDecay(section, {"paper_bug": True})(base_trunk)


def test_layer_decay_of_the_trunk_is_one_layer_below_timm(digits_model):
    """timm gives the last block the head's rate; BEiT, mmseg and the published log put it a layer below."""
    encoder = ViTEncoder("nano", image_size=64, patch_size=8)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    expected = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(encoder, 0.05, encoder.no_weight_decay(), layer_decay=0.65)
        for parameter in group["params"]
    }
    found = {
        name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"])
        for group in optimizer_groups(digits_model, lr=1e-3)
        for name in group["param_names"]
        if name.startswith("backbone.")
    }
    assert found.keys() == expected.keys() - {"norm.weight", "norm.bias"}
    for name, values in found.items():
        assert values == pytest.approx((0.65 * expected[name][0], expected[name][1])), name


def test_layer_decay_rule(digits_model):
    depth = SIZES["nano"].depth
    groups = optimizer_groups(digits_model, lr=1e-3)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name.keys() == dict(digits_model.named_parameters()).keys()
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    for name in ("backbone.pos_embed", "backbone.cls_token"):  # the published code decays both
        assert by_name[name]["weight_decay"] == 0 and by_name[name]["lr_scale"] == pytest.approx(0.65 ** (depth + 1))
    assert by_name[f"backbone.blocks.{depth - 1}.mlp.fc1.weight"]["lr"] == pytest.approx(0.65e-3)
    for name in ("neck.upsample_2x.0.weight", "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"):
        assert by_name.get(name, groups[0])["lr"] == pytest.approx(1e-3)
        assert by_name.get(name, groups[0])["weight_decay"] in (0, 0.05)
    assert by_name["decode_head.conv_seg.bias"]["weight_decay"] == 0
    assert groups[0]["lr_scale"] == 1  # what mmengine's log shows


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
@torch.no_grad()
def test_a_dense_vit_computes_what_mmsegs_beit_does(grid):
    """Query and value biases apart, a table a block, layer scale, no absolute positions; the conversion fuses, and adds
    positions of zeros."""
    from mmseg.models.backbones import BEiT

    size, taps = (8 * grid[0], 8 * grid[1]), (2, 5)
    norm, shape = {"type": "LN", "eps": 1e-6}, {"embed_dims": 128, "num_layers": 6, "num_heads": 4, "mlp_ratio": 4}
    theirs = BEiT(img_size=size, patch_size=8, out_indices=taps, init_values=0.3, norm_cfg=norm, **shape)
    theirs.eval()  # which returns nothing
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wide = Adaptation(grid=grid)
    state, report = mae_core.convert(theirs.state_dict(), "mmseg_beit", "mae_segmentation", adaptation=wide)
    ours = DenseViT(
        "nano", image_size=size, patch_size=8, taps=taps, relative_positions="table", layer_scale=1.0, cls_token=True
    ).eval()
    names = {name: re.sub(r"gamma_(\d)", r"ls\1.gamma", name) for name in state}
    ours.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    images = torch.randn(2, 3, *size, generator=generator)
    for one, other in zip(ours(images), theirs(images), strict=True):
        assert (one - other).abs().max() < 1e-5
    assert set(report.unused) <= {name for name in theirs.state_dict() if name.endswith("relative_position_index")}
