"""Trunks of timm: their features, their files, their layers, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.beit import checkpoint_filter_fn  # noqa: F401  # timm looks for it in the module of a model
from timm.optim import param_groups_layer_decay

from mae_core.errors import UserError
from mae_core.models.classifier import freeze_below
from mae_core.models.timm_trunk import build_timm, described
from mae_core.training.groups import layer_decay_groups
from mae_core.weights.load import fit_state, load_encoder, read_encoder
from mae_core.weights.timm_file import read_timm
from tests.timm_models import NAMES, SMALL, file_of, filled, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("timm")


@pytest.mark.parametrize("shape", ["native", "not square"])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_that_timm_computes_from_the_same_file(name, shape, folder):
    path, found = file_of(name, folder), described(f"timm:{name}")
    size = found.image_size if shape == "native" else (3 * found.patch_size, 5 * found.patch_size)
    source = read_encoder(path, trunk=f"timm:{name}")
    model = source.build(size, pooling=found.pooling, **small(name)).eval()
    report = fit_state(model, source, grid=model.grid[:2], unused={"head.*": "a classifier's head"})
    told = [*report.loaded, *report.renamed, *report.changed, *report.resized, *report.unused]
    assert {*source.tensors} <= {*told} and not report.new and report.share == 1

    sized = {} if name.startswith("samvit") else {"img_size": size}
    overlay = {"file": str(path), "num_classes": 1000}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **small(name), **sized
    )
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_patches_in_raster_order_behind_the_prefix(name):
    trunk = build_timm(f"timm:{name}", image_size=(2 * described(f"timm:{name}").patch_size,) * 2, **small(name)).eval()
    side = trunk.grid.patch
    with torch.no_grad():
        tokens = trunk(torch.randn(2, 3, 2 * side, 2 * side))
    assert tokens.shape == (2, trunk.prefix + 4, trunk.num_features)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_rates_by_layer_and_what_is_not_decayed_are_timms(name):
    trunk = build_timm(f"timm:{name}", image_size=56 if "14" in name else 64, pooling="cls", num_classes=3, **SMALL)
    ours = layer_decay_groups(trunk, trunk, layer_decay=0.5, weight_decay=0.1)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in ours for p in group["params"]}
    exempt = trunk.no_weight_decay()
    theirs = param_groups_layer_decay(trunk, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=exempt)
    expected = {id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    assert found == expected


def test_freezing_leaves_the_last_blocks_and_what_reads_them():
    trunk = build_timm("timm:vit_small_patch14_reg4_dinov2", image_size=28, pooling="cls", num_classes=2, **SMALL)
    freeze_below(trunk, 1)
    learning = {name.partition(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert learning == {"blocks", "norm", "head"} and not trunk.blocks[0].mlp.fc1.weight.requires_grad
    freeze_below(trunk, 0.5)
    names = [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]
    last = {name.split(".")[2] for name in names if name.startswith("blocks.1")}
    assert last == {"norm2", "mlp", "ls2"}


# Files of the models' own projects.


def test_the_original_names_of_dinov2_with_registers(folder):
    name = "vit_small_patch14_reg4_dinov2"
    state = filled(timm.create_model(name, num_classes=0, **SMALL)).state_dict()
    original = dict(state)
    original["register_tokens"] = original.pop("reg_token")
    positions = torch.cat([torch.zeros(1, 1, SMALL["embed_dim"]), original.pop("pos_embed")], dim=1)
    original |= {"pos_embed": positions, "mask_token": torch.zeros(1, SMALL["embed_dim"])}
    path = folder / "dinov2.pth"
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in original.items()}}, path)
    source = read_timm(path, f"timm:{name}")
    model = source.build(None, pooling="cls", **SMALL)
    report = fit_state(model, source, grid=model.grid[:2])
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert report.renamed["backbone.register_tokens"] == "reg_token"
    assert report.unused["backbone.mask_token"] == "for pre-training only"


def test_a_pretrained_beit_shares_its_table_and_every_block_gets_a_copy(folder):
    name = "beit_base_patch16_224"
    sharing = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False}
    shared = filled(timm.create_model(name, num_classes=0, **sharing, **SMALL))
    state = {**shared.state_dict(), "mask_token": torch.zeros(1, 1, 96), "lm_head.weight": torch.zeros(8192, 96)}
    path = folder / "beit_pt.pth"
    torch.save({"model": state}, path)
    trunk = read_timm(path, f"timm:{name}")
    for size in ((224, 224), (48, 80)):
        model = trunk.build(size, pooling="mean", **SMALL).eval()
        report = fit_state(model, trunk, grid=model.grid[:2])
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            shared.set_input_size(img_size=size)
            before_norm = shared.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NLC")[0]
            torch.testing.assert_close(model.forward_features(images)[:, 1:], before_norm, atol=1e-5, rtol=1e-5)
    assert report.unused["mask_token"] == "for pre-training only" and "lm_head.weight" in report.unused
    assert any("was copied to each of 2 blocks" in note for note in report.notes)


# What is refused, in one sentence.


def sentence(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def load_as(path, name):
    source = read_encoder(path, trunk=f"timm:{name}")
    model = source.build(None, pooling=described(f"timm:{name}").pooling, **small(name))
    return fit_state(model, source, grid=model.grid[:2], unused={"head.*": "a classifier's head"})


@pytest.mark.parametrize(
    "file, name, words",
    [
        ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", ["has no register tokens", "needs them"]),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", ["has register tokens", "has none"]),
        ("vit_small_patch16_dinov3", "deit_tiny_patch16_224", ["register tokens", "has none"]),
        ("deit_tiny_patch16_224", "beit_base_patch16_224", ["has learned positions", "has none"]),
        ("beit_base_patch16_224", "deit_tiny_patch16_224", ["has no learned positions", "needs them"]),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", ["has learned positions", "has rotary ones"]),
        ("vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", ["has no learned positions", "needs them"]),
        ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", ["has distillation tokens", "has none"]),
        ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", ["has no distillation tokens", "needs them"]),
        ("vit_base_patch16_siglip_224", "vit_tiny_patch16_224", ["has no class tokens", "needs them"]),
        ("deit3_small_patch16_224", "vit_tiny_patch16_224", ["has layer scale factors", "has none"]),
        ("deit_tiny_patch16_224", "vit_base_patch32_clip_224", ["not a file of timm:vit_base_patch32_clip_224"]),
    ],
)
def test_a_file_of_another_name_is_refused(file, name, words, folder):
    text = sentence(load_as, file_of(file, folder), name)
    assert all(word in text for word in words) and f"timm:{name}" in text


@pytest.mark.parametrize(
    "trunk, words",
    [
        ("timm:vit_tiny_patch16_223", "did you mean vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "give timm:NAME"),
        ("timm:resnet50", "not a plain ViT"),
        ("timm:swin_tiny_patch4_window7_224", "not a plain ViT"),
    ],
)
def test_names_that_are_no_plain_vit_are_refused(trunk, words):
    assert words in sentence(described, trunk)


@pytest.mark.parametrize(
    "name, pooling, own",
    [
        ("vit_base_patch16_siglip_224", "cls", "map"),
        ("deit_tiny_distilled_patch16_224", "mean", "cls"),
        ("beit_base_patch16_224", "map", "mean"),
        ("samvit_base_patch16", "cls", "mean"),
    ],
)
def test_a_pooling_that_the_model_lacks_is_refused_with_its_own(name, pooling, own):
    text = sentence(build_timm, f"timm:{name}", image_size=64, pooling=pooling, **small(name))
    assert f"set model.pooling={own}" in text


def test_what_needs_the_own_vit_says_so(folder):
    path = file_of("deit_tiny_patch16_224", folder)
    source = read_encoder(path, trunk="timm:deit_tiny_patch16_224")
    assert "needs the toolkit's own ViT" in sentence(lambda: source.shape)


def test_an_encoder_of_timm_in_python(folder):
    path, name = folder / "whole.pth", "deit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=0).eval()
    torch.save(model.state_dict(), path)
    encoder = load_encoder(path, trunk=f"timm:{name}", image_size=32)
    pixels = encoder.transform(torch.zeros(3, 40, 50, dtype=torch.uint8))[None]
    model.set_input_size(32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(pixels), model.forward_features(pixels), atol=1e-5, rtol=1e-5)
