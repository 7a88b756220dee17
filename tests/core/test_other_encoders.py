"""Files of other encoders of the field: MoCo v3, DINO, iBOT, supervised ViTs. Each gives the features that timm's or
torchvision's own model computes, every tensor is accounted for, and what is ambiguous is refused with the option that
chooses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

import mae_core
from benchmarks.encoders import IBOT_HEAD, MOCO_HEAD, behind, dino, ibot, moco
from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.models.sizes import alike, size_of
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.weights.classifier import classifier_of
from mae_core.weights.load import classifier_from, read_encoder, with_file
from mae_core.weights.tools.inspect import inspect_file
from transfer.backbone import DenseViT
from transfer.trunk import build_trunk, load_pretrained

SIDE = 32
SIZES = [(SIDE, SIDE), (16, 40)]
"""The native size and one that is not square, in this order: a model whose positions were resized stays so."""


def vit(**options: Any) -> VisionTransformer:
    """timm's ViT of six blocks of width 128 with random weights, none of them zero or one."""
    shape: dict[str, Any] = {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0, "global_pool": ""}
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(img_size=SIDE, patch_size=8, norm_layer=norm, **{**shape, **options})
    generator = torch.Generator().manual_seed(len(options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def tokens_of(model: VisionTransformer, size: tuple[int, int]) -> Tensor:
    """timm's own tokens, normalised, at any size: the positions resized as the official MAE code does."""
    grid = (size[0] // 8, size[1] // 8)
    if grid != model.patch_embed.grid_size:
        prefix = 0 if model.no_embed_class else 1
        table = resample_abs_pos_embed(model.pos_embed, list(grid), num_prefix_tokens=prefix, antialias=False)
        model.pos_embed = nn.Parameter(table)
        model.patch_embed.img_size, model.patch_embed.grid_size = size, grid
    return model.forward_features(images(size))


SEVERAL: dict[str, tuple[Callable[..., dict[str, Any]], str, str]] = {
    "moco": (
        lambda a, b: {**moco(a, b), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        "momentum_encoder",
        "base_encoder",
    ),
    "dino": (lambda a, b: {**dino(a, b), "dino_loss": {"center": torch.zeros(1, 3)}}, "teacher", "student"),
    "ibot": (lambda a, b: {**ibot(a, b), "ibot_loss": {"center": torch.zeros(1, 3)}}, "teacher", "student"),
    "deit": (lambda a, b: {"model": b, "model_ema": a, "optimizer": {}}, "model_ema", "model"),
    "timm": (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema", "state_dict"),
    "deepspeed": (lambda a, b: {"module": b, "ema": {"module": a}}, "ema", "module"),
    "lightning": (
        lambda a, b: {"state_dict": {**behind("student.backbone.", b), **behind("teacher.backbone.", a)}},
        "teacher",
        "student",
    ),
    "solo_learn": (
        lambda a, b: {
            "state_dict": {
                **behind("backbone.", b),
                **behind("momentum_backbone.", a),
                "momentum_projector.0.weight": torch.ones(2, 2),
                "classifier.weight": torch.ones(2, 2),
            }
        },
        "momentum_backbone",
        "backbone",
    ),
    "dinov2": (
        lambda a, b: {
            "model": {
                **behind("student.backbone._fsdp_wrapped_module.", b),
                **behind("teacher.backbone._fsdp_wrapped_module.", a),
                "student.dino_head.mlp.0.weight": torch.ones(2, 2),
            }
        },
        "teacher",
        "student",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_encoder_that_is_chosen_gives_timms_features(tmp_path, kind):
    wrap, name, other = SEVERAL[kind]
    wanted = vit()
    file = tmp_path / "x.pth"
    torch.save(wrap(wanted.state_dict(), vit(proj_bias=True).state_dict()), file)
    for size in SIZES:
        encoder = mae_core.load_encoder(file, branch=name, image_size=size)
        assert (encoder.encode(images(size)) - tokens_of(wanted, size)).abs().max() < 1e-5
    with pytest.raises(UserError, match=f'holds 2 encoders .*branch="{name}"') as caught:
        mae_core.load_encoder(file)
    assert f'branch="{other}"' in str(caught.value)
    with pytest.raises(UserError, match="has no such encoder; choose one of"):
        mae_core.load_encoder(file, branch="coach")
    report = read_encoder(file, branch=name).report
    apart = {name for name, why in report.unused.items() if why == "of another encoder in the file"}
    assert len(apart) >= len(wanted.state_dict()) and all(other in name.split(".") for name in apart)


def test_all_of_a_chosen_branch_is_accounted_for(tmp_path):
    state = vit().state_dict()
    torch.save(moco(state, state), tmp_path / "moco.pth")
    assert beside(tmp_path / "moco.pth", "base_encoder") == {
        "module.predictor.0.weight": "of the pre-training alone",
        **dict.fromkeys(MOCO_HEAD, "a projection head of the pre-training, not the encoder"),
    }
    torch.save(ibot(state, state), tmp_path / "ibot.pth")
    assert beside(tmp_path / "ibot.pth", "student").keys() == {*IBOT_HEAD, "backbone.masked_embed"}


def beside(path: Path, branch: str) -> dict[str, str]:
    unused = read_encoder(path, branch=branch).report.unused
    return {name: why for name, why in unused.items() if why != "of another encoder in the file"}


def test_moco_v3s_small_has_twelve_heads(tmp_path):
    with torch.device("meta"):
        model = VisionTransformer(patch_size=8, img_size=SIDE, embed_dim=384, depth=12, num_heads=12, num_classes=0)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save(moco(state, state), tmp_path / "moco.pth")
    torch.save(state, tmp_path / "plain.pth")
    source = read_encoder(tmp_path / "moco.pth", branch="momentum_encoder")
    assert source.shape.heads == 12 and read_encoder(tmp_path / "plain.pth").shape.heads == 6
    given = [f"weights={source.path}", "branch=momentum_encoder", "model.size=small"]
    model = with_file(source, load_config(FinetuneConfig, None, given)).model
    assert model.size == "small" and model.heads == 12, "the name of a size says width and depth"
    assert (
        alike("small", source.shape) and not alike(size_of("small"), source.shape) and not alike("tiny", source.shape)
    )


def mae(*arguments: object, code: int) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


def test_each_command_names_its_own_option(tmp_path):
    state = vit().state_dict()
    file = tmp_path / "dino.pth"
    torch.save(dino(state, state), file)
    out = tmp_path / "o.safetensors"
    for arguments in (
        ["inspect", file],
        ["convert", file, "--to", "mae_core", "--out", out],
        ["export", file, "--timm", "--out", tmp_path / "folder"],
        ["check", "images", tmp_path, "--weights", file],
        ["map", file, tmp_path, "--out", tmp_path / "map.html"],
    ):
        assert "choose one with --branch teacher or --branch student" in mae(*arguments, code=2)
    assert "of another encoder in the file" in mae("inspect", file, "--branch", "teacher", code=0)
    mae("convert", file, "--to", "mae_core", "--out", out, "--branch", "teacher", "--check", code=0)
    for task in ("knn", "linprobe", "finetune", "features", "pretrain"):
        told = mae(task, f"weights={file}", f"data.path={tmp_path}", f"output={tmp_path / task}", code=2)
        assert "choose one with branch=teacher or branch=student" in told, told
    assert inspect_file(out)["format"] == "mae_core"
    with pytest.raises(UserError, match="it holds a single encoder; leave it out"):
        mae_core.load_encoder(out, branch="teacher")


def in_blocks(word: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(blocks\.\d\.)", rf"\1{word}", name): tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "distributed": lambda s: {"state_dict": behind("module.", s)},
    "compiled": lambda s: behind("_orig_mod.", s),
    "lightning": lambda s: {"state_dict": behind("model.", s), "pytorch-lightning_version": "2"},
    "lightning_encoder": lambda s: {"state_dict": behind("model.encoder.", s)},
    "deepspeed": lambda s: {"module": behind("module.", s), "optimizer": None},
    "fsdp": lambda s: {"model": behind("_fsdp_wrapped_module.", in_blocks("_fsdp_wrapped_module.", s))},
    "checkpointed": lambda s: in_blocks("_checkpoint_wrapped_module.", s),
    "average": lambda s: {"ema_model": {**behind("module.", s), "n_averaged": torch.tensor(7)}},
    "unknown_key": lambda s: {"weights": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "one_branch_of_two": lambda s: {"student": {"fc.weight": torch.ones(2, 2)}, "teacher": s},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_trainers_wrap_around_an_encoder_is_taken_off(tmp_path, kind):
    model = vit()
    torch.save(WRAPPED[kind](model.state_dict()), tmp_path / "x.pth")
    encoder = mae_core.load_encoder(tmp_path / "x.pth")
    assert (encoder.encode(images((SIDE, SIDE))) - tokens_of(model, (SIDE, SIDE))).abs().max() < 1e-5
    notes = " ".join(read_encoder(tmp_path / "x.pth").report.notes)
    assert "unwrapped" in notes or "removed" in notes


def test_a_sharded_checkpoint_of_torch_is_named_with_the_command_that_joins_it(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = vit().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is enough here
        checkpoint.save({"model": state}, checkpoint_id=tmp_path / "sharded")
    with pytest.raises(UserError, match=r"sharded checkpoint of torch.* dcp_to_torch .* whole\.pth"):
        mae_core.load_encoder(tmp_path / "sharded")
    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "whole.pth")
    assert torch.equal(mae_core.load_encoder(tmp_path / "whole.pth").cls_token, state["cls_token"])


def test_flat_shards_of_fsdp_are_named(tmp_path):
    torch.save({"model": {"_fsdp_wrapped_module._flat_param": torch.ones(9)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"a shard of FSDP.*full_state_dict"):
        mae_core.load_encoder(tmp_path / "x.pth")


IN_MOMENTUM = "module.momentum_encoder.blocks.1."


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop(f"{IN_MOMENTUM}attn.proj.weight"), "blocks.1.attn.proj.weight: missing"),
        (lambda s: s.update({f"{IN_MOMENTUM}mlp.fc3.weight": torch.ones(2)}), "fc3.weight: the model has no"),
    ],
)
def test_a_damaged_branch_is_refused(tmp_path, change, told):
    state = vit().state_dict()
    content = moco(state, state)
    change(content["state_dict"])
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        mae_core.load_encoder(tmp_path / "x.pth", branch="momentum_encoder")


# Supervised ViTs.


def official_deit(model: VisionTransformer) -> dict[str, Any]:
    return {"model": model.state_dict()}


def official_deit_3(model: VisionTransformer) -> dict[str, Any]:
    """Its layer scale is named as in BEiT."""
    return {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): t for name, t in model.state_dict().items()}}


def old_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names in the published files."""
    return {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}


SCALED = {"init_values": 0.3, "no_embed_class": True, "num_classes": 5}
SUPERVISED: dict[str, tuple[dict[str, Any], Callable[[VisionTransformer], dict[str, Any]]]] = {
    "timm": ({"num_classes": 5}, lambda model: model.state_dict()),
    "deit": ({"num_classes": 5}, official_deit),
    "deit_3_timm": (SCALED, lambda model: model.state_dict()),
    "deit_3": (SCALED, official_deit_3),
    "dinov2": ({"init_values": 0.3}, lambda model: {**model.state_dict(), "mask_token": torch.ones(1, 128)}),
}


@pytest.mark.parametrize("kind", SUPERVISED)
def test_a_supervised_vit_gives_timms_features(tmp_path, kind):
    options, named = SUPERVISED[kind]
    model = vit(**options)
    torch.save(named(model), tmp_path / "x.pth")
    source = read_encoder(tmp_path / "x.pth")
    for size in SIZES:
        tokens = tokens_of(model, size)
        encoder = mae_core.load_encoder(source, image_size=size)
        assert (encoder.encode(images(size)) - tokens).abs().max() < 1e-5
        if model.num_classes:
            classifier, _ = classifier_of(source, image_size=size)
            assert (classifier(images(size)) - model.head(tokens[:, 0])).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("named", [dict, old_torchvision])
def test_torchvisions_vit_gives_its_features(tmp_path, named, size):
    from torchvision.models.vision_transformer import VisionTransformer as Torchvisions

    model = Torchvisions(
        image_size=SIDE, patch_size=8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=5
    ).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    state = model.state_dict()
    torch.save(named(state), tmp_path / "x.pth")
    encoder = mae_core.load_encoder(tmp_path / "x.pth", image_size=size)
    table = resample_abs_pos_embed(model.encoder.pos_embedding, [s // 8 for s in size], antialias=False)
    model.encoder.pos_embedding = nn.Parameter(table)
    patches = model.conv_proj(images(size)).flatten(2).transpose(1, 2)
    expected = model.encoder(torch.cat([model.class_token.expand(2, -1, -1), patches], dim=1))
    assert (encoder.encode(images(size)) - expected).abs().max() < 1e-5
    found = inspect_file(tmp_path / "x.pth")
    assert (found["format"], found["classes"], found["dropped"]) == ("torchvision", 5, {})
    back, _ = mae_core.convert(mae_core.convert(state, None, "official")[0], "official", "torchvision")
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("named", [official_deit, official_deit_3])
def test_a_conversion_of_a_supervised_vit_is_proven(tmp_path, named):
    torch.save(named(vit(**SCALED)), tmp_path / "x.pth")
    for target in ("timm", "torchvision"):
        out = tmp_path / f"{target}.safetensors"
        told = mae("convert", tmp_path / "x.pth", "--to", target, "--out", out, "--check", code=0)
        assert "checked: largest feature difference" in told


def saved(kind: str, path: Path) -> str | None:
    """Write a file of that kind; the branch to ask for."""
    if kind in SEVERAL:
        wrap, branch, _ = SEVERAL[kind]
        torch.save(wrap(vit().state_dict(), vit().state_dict()), path)
        return branch
    options, named = SUPERVISED[kind]
    torch.save(named(vit(**options)), path)
    return None


@pytest.mark.parametrize("kind", ["moco", "dino", "ibot", *SUPERVISED])
def test_every_file_takes_a_step_in_classification_and_as_a_dense_trunk(tmp_path, kind):
    source = read_encoder(tmp_path / "x.pth", branch=saved(kind, tmp_path / "x.pth"))
    classifier, _ = classifier_from(source, num_classes=3)
    windows = build_trunk(source, taps=lambda size: size.quarter_taps, positions=(48, 40), window=2)
    tables = build_trunk(source, taps=lambda size: size.quarter_taps, relative_positions="table", cls_token=True)
    losses = (
        nn.functional.cross_entropy(classifier(images((SIDE, SIDE))), torch.tensor([0, 2])),
        sum(level.square().mean() for level in windows.vit(images((48, 40)))),
        sum(level.square().mean() for level in tables.vit(images((48, 40)))),
    )
    for model, loss in zip((classifier, windows.vit, tables.vit), losses, strict=True):
        before = model.blocks[0].attn.qkv.weight.detach().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and not torch.equal(before, model.blocks[0].attn.qkv.weight)


def test_the_trunk_of_a_classifier_is_fine_tuned_and_probed(tmp_path):
    from mae_core.training.frozen_trunk import trunk_from

    torch.save(official_deit_3(vit(**SCALED)), tmp_path / "deit.pth")
    source = read_encoder(tmp_path / "deit.pth")
    for pooling, left in (
        ("mean", {"head.weight", "head.bias", "norm.weight", "norm.bias"}),
        ("cls", {"head.weight", "head.bias"}),
    ):
        model, report = classifier_from(source, num_classes=3, pooling=pooling)
        assert model.head.weight.shape == (3, 128)
        assert {name for name in report.unused if "blocks" not in name} == left
        assert trunk_from(source, pooling=pooling)[1].share == 1
    assert load_pretrained(DenseViT(source.shape, image_size=SIDE, patch_size=8), source).share == 1
    pooled = vit(num_classes=5, global_pool="avg").state_dict()
    torch.save(pooled, tmp_path / "pooled.pth")
    source = read_encoder(tmp_path / "pooled.pth")
    model, report = classifier_from(source, num_classes=3)
    assert torch.equal(model.fc_norm.weight, pooled["fc_norm.weight"])
    with pytest.raises(UserError, match=r"classifier on mean-pooled patches .* set model\.pooling=mean"):
        classifier_from(source, num_classes=3, pooling="cls")


# Encoders that are none of ours.


def beit(*, pretrained: bool) -> dict[str, Tensor]:
    from timm.models.beit import Beit

    tables = {"use_abs_pos_emb": False, "use_rel_pos_bias": not pretrained, "use_shared_rel_pos_bias": pretrained}
    model = Beit(
        img_size=SIDE, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=5, init_values=0.1, **tables
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    state = model.state_dict()
    if pretrained:
        state = {n: t for n, t in state.items() if not n.startswith(("head", "fc_norm"))}
        state |= {"mask_token": torch.ones(1, 1, 128), "norm.weight": torch.ones(128), "norm.bias": torch.ones(128)}
    return state


TIMMS = {
    "beit": (lambda: beit(pretrained=False), "relative positions and it has no absolute ones", "beit_base_patch16_224"),
    "beit_pretrained": (
        lambda: {"model": beit(pretrained=True)},
        "relative positions and it has no",
        "beit_base_patch16_224",
    ),
    "distilled": (
        lambda: {**vit().state_dict(), "dist_token": torch.ones(1, 1, 128), "pos_embed": torch.ones(1, 18, 128)},
        "a distillation token",
        "deit_base_distilled_patch16_224",
    ),
    "registers": (
        lambda: {**vit(init_values=1.0).state_dict(), "register_tokens": torch.ones(1, 4, 128)},
        "register tokens",
        "vit_base_patch14_reg4_dinov2",
    ),
}


@pytest.mark.parametrize("kind", TIMMS)
def test_a_file_of_another_trunk_is_refused_by_its_fact_and_the_option_that_takes_it(tmp_path, kind):
    import timm

    make, fact, name = TIMMS[kind]
    torch.save(make(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: .*{fact}.*model\.trunk=timm:{name}$"):
        read_encoder(tmp_path / "x.pth")
    assert timm.is_model(name)


def test_every_option_for_another_trunk_names_a_model_of_timm():
    import timm

    from mae_core.weights.formats import BEIT as BEIT_TABLE
    from mae_core.weights.formats import OTHER_TRUNKS
    from mae_core.weights.parts import told_trunk

    assert all(timm.is_model(name.format("base")) for _, name in OTHER_TRUNKS.values())
    told = {width: told_trunk(BEIT_TABLE, width).rpartition("timm:")[2] for width in (128, 768, 1024)}
    assert told == {128: "beit_base_patch16_224", 768: "beit_base_patch16_224", 1024: "beit_large_patch16_224"}
