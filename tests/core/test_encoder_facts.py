"""Facts that no tensor tells, and files that are not what they seem: honoured, or refused by name. Compared with timm's
and transformers' own models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import get_act_layer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

import mae_core
from mae_core.cli.main import app
from mae_core.errors import UserError
from mae_core.models.sizes import ViTSize
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.load import load_state, read_encoder
from mae_core.weights.tools.convert import convert_file
from mae_core.weights.tools.inspect import inspect_file
from transfer.backbone import DenseViT
from transfer.trunk import load_pretrained

SIDE, PATCH = 32, 16


def mae(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def images(channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def stir(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformers_mae(folder: Path, heads: int, eps: float, activation: str = "gelu", width: int = 768, **more):
    """transformers' ViTMAE, saved; returns the model."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_act=activation,
        layer_norm_eps=eps,
        image_size=SIDE,
        patch_size=PATCH,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        mask_ratio=0.0,
        **more,
    )
    model = stir(ViTMAEForPreTraining(config))
    model.save_pretrained(folder)
    return model


def transformers_tokens(model, pixels: Tensor) -> Tensor:
    noise = torch.arange((SIDE // PATCH) ** 2, dtype=torch.float).expand(len(pixels), -1)
    return model.vit(pixels, noise=noise).last_hidden_state


def timm_vit(heads: int, eps: float, activation: str = "gelu", width: int = 768, depth: int = 2) -> nn.Module:
    return stir(
        VisionTransformer(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=2.0,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=eps),
            act_layer=get_act_layer(activation),
        )
    )


def dense_tokens(file) -> Tensor:
    """Patch tokens of a ``DenseViT`` with the file's weights, before the final norm."""
    source = read_encoder(file)
    model = DenseViT(source.shape, image_size=SIDE, in_chans=source.in_chans, cls_token=True).eval()
    load_pretrained(model, source)
    return model(images())[-1].flatten(2).transpose(1, 2)


def before_the_norm(model: nn.Module, block: nn.Module, run) -> Tensor:
    seen = []
    hook = block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    run()
    hook.remove()
    return seen[0][:, 1:]


HEADS_AND_EPSILON = pytest.mark.parametrize("heads, eps", [(6, 1e-5), (8, 1e-12), (12, 1e-6), (16, 1e-6), (16, 1e-12)])
"""Each number of heads, each epsilon: a file states them apart, and nothing asks for both at once."""


@HEADS_AND_EPSILON
@torch.no_grad()
def test_heads_and_epsilon_of_transformers_are_honoured(tmp_path, heads, eps):
    model = transformers_mae(tmp_path / "theirs", heads, eps)
    expected = transformers_tokens(model, images())
    encoder = mae_core.load_encoder(tmp_path / "theirs")
    assert (encoder.shape.heads, encoder.shape.norm_eps) == (heads, eps)
    assert (encoder.encode(images()) - expected).abs().max() < 1e-5
    block = (model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer)[-1]
    raw = before_the_norm(model, block, lambda: transformers_tokens(model, images()))
    assert (dense_tokens(tmp_path / "theirs") - raw).abs().max() < 1e-5
    whole = mae_core.load_mae(tmp_path / "theirs")
    assert whole.decoder.heads == 4 and whole.decoder.norm.eps == eps
    convert_file(tmp_path / "theirs", "mae_core", tmp_path / "ours.safetensors", check=True)
    assert (mae_core.load_encoder(tmp_path / "ours.safetensors").encode(images()) - expected).abs().max() < 1e-5
    convert_file(tmp_path / "ours.safetensors", "huggingface", tmp_path / "back", check=True)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert (transformers_tokens(again, images()) - expected).abs().max() < 1e-5


@HEADS_AND_EPSILON
@torch.no_grad()
def test_heads_and_epsilon_of_timm_are_honoured(tmp_path, heads, eps):
    model = timm_vit(heads, eps)
    expected = model.forward_features(images())
    file = tmp_path / "ours.safetensors"
    write_weights(file, model.state_dict(), {"heads": heads, "norm_eps": eps})
    assert (mae_core.load_encoder(file).encode(images()) - expected).abs().max() < 1e-5
    raw = before_the_norm(model, model.blocks[-1], lambda: model.forward_features(images()))
    assert (dense_tokens(file) - raw).abs().max() < 1e-5
    if eps == 1e-12:  # no configuration of timm's states it
        with pytest.raises(UserError, match="the epsilon 1e-12, which a timm folder cannot state"):
            convert_file(file, "timm", tmp_path / "timm")
        convert_file(file, "timm", tmp_path / "timm.safetensors", check=True)
        assert (mae_core.load_encoder(tmp_path / "timm.safetensors").encode(images()) - expected).abs().max() < 1e-5
        return
    convert_file(file, "timm", tmp_path / "timm", check=True)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert (theirs.forward_features(images()) - expected).abs().max() < 1e-5
    convert_file(tmp_path / "timm", "mae_core", tmp_path / "back.safetensors", check=True)
    assert (mae_core.load_encoder(tmp_path / "back.safetensors").encode(images()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu", "silu"])
@torch.no_grad()
def test_the_activation_is_honoured(tmp_path, activation):
    model = transformers_mae(tmp_path / "theirs", 4, 1e-12, activation, width=64)
    expected = transformers_tokens(model, images())
    assert (mae_core.load_encoder(tmp_path / "theirs").encode(images()) - expected).abs().max() < 1e-5
    convert_file(tmp_path / "theirs", "mae_core", tmp_path / "ours.safetensors", check=True)
    convert_file(tmp_path / "ours.safetensors", "huggingface", tmp_path / "back", check=True)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert (transformers_tokens(again, images()) - expected).abs().max() < 1e-5
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "hidden_act": "mish"}))
    with pytest.raises(UserError, match="hidden_act is 'mish', which is not supported"):
        mae_core.load_encoder(tmp_path / "theirs")


@pytest.mark.parametrize(
    "processor, mean, std",
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, [0, 0, 0], [1, 1, 1]),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, [0.5] * 3, [0.2] * 3),
    ],
)
def test_statistics_beside_a_file_are_honoured(tmp_path, processor, mean, std):
    transformers_mae(tmp_path / "theirs", 4, 1e-12, width=64)
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    info = read_encoder(tmp_path / "theirs").info
    assert list(info.mean) == pytest.approx(mean) and list(info.std) == pytest.approx(std)
    convert_file(tmp_path / "theirs", "huggingface", tmp_path / "again")
    assert list(read_encoder(tmp_path / "again").info.std) == pytest.approx(std)


def test_heads_that_nothing_tells_are_refused_with_the_option(tmp_path, official_state):
    torch.save(official_state(96, 2, grid=(2, 2), patch=8), tmp_path / "x.pth")
    for attempt in (
        lambda: mae_core.load_encoder(tmp_path / "x.pth"),
        lambda: mae_core.build_classifier(tmp_path / "x.pth", 3),
        lambda: convert_file(tmp_path / "x.pth", "timm", tmp_path / "out.safetensors"),
    ):
        with pytest.raises(UserError, match=r"no named size is 96 wide; give model\.heads=N .* --heads N .* heads=N"):
            attempt()
    found = inspect_file(tmp_path / "x.pth")
    assert found["heads"] is None and "encode" not in found["use_for"] and "heads" in found["missing_for"]["encode"]
    assert mae_core.load_encoder(tmp_path / "x.pth", heads=6).shape == ViTSize(96, 2, 6, 4.0, 8)
    assert inspect_file(tmp_path / "x.pth", heads=6)["heads"] == 6
    mae("convert", tmp_path / "x.pth", "--to", "timm", "--out", tmp_path / "t.safetensors", "--heads", 6, "--check")
    assert read_weights(tmp_path / "t.safetensors")[1]["heads"] == 6
    with pytest.raises(UserError, match="heads=3 was given, but the file has 6"):
        mae_core.load_encoder(tmp_path / "t.safetensors", heads=3)
    with pytest.raises(UserError, match="5 attention heads do not divide"):
        mae_core.load_encoder(tmp_path / "x.pth", heads=5)


def test_heads_of_a_named_width_and_another_depth_are_said(tmp_path, official_state):
    torch.save(official_state(128, 2, grid=(2, 2), patch=8, decoder=None), tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="4, as nano has, are assumed"):
        assert mae_core.load_encoder(tmp_path / "x.pth").shape.heads == 4
    assert "are assumed" in mae("inspect", tmp_path / "x.pth")
    assert mae_core.load_encoder(tmp_path / "x.pth", heads=8).shape.heads == 8


@torch.no_grad()
def test_heads_of_the_decoder_are_said_or_stated(tmp_path, official_state):
    torch.save({"model": official_state(128, 6, grid=(2, 2), patch=8, decoder=64)}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="how many attention heads its decoder has; 16"):
        assumed = mae_core.load_mae(tmp_path / "x.pth", target="pixels")
    stated = mae_core.load_mae(tmp_path / "x.pth", target="pixels", decoder_heads=4)
    assert (assumed.decoder.heads, stated.decoder.heads) == (16, 4)
    text = mae("convert", tmp_path / "x.pth", "--to", "huggingface", "--out", tmp_path / "hf")
    assert "how many attention heads its decoder has; 16" in text
    arguments = ["convert", tmp_path / "x.pth", "--to", "huggingface", "--out", tmp_path / "four", "--decoder-heads", 4]
    assert "its decoder has; 16" not in mae(*arguments)
    assert json.loads((tmp_path / "four" / "config.json").read_text())["decoder_num_attention_heads"] == 4


@torch.no_grad()
def test_a_wrong_assumption_fails_the_proof(tmp_path, monkeypatch):
    """The source is built by transformers as its own config.json says, whatever our reading of that file is."""
    from mae_core.weights import encoder_file

    transformers_mae(tmp_path / "theirs", 16, 1e-12)
    words = {name: ours for name, ours in encoder_file.TRANSFORMERS_WORDS.items() if ours != "heads"}
    monkeypatch.setattr(encoder_file, "TRANSFORMERS_WORDS", words)
    with pytest.raises(UserError, match="features of source and target differ"):
        convert_file(tmp_path / "theirs", "mae_core", tmp_path / "ours.safetensors", check=True)


# Prefix tokens.


@pytest.mark.parametrize("side", [3, 4, 14])
@torch.no_grad()
def test_a_table_without_a_row_for_the_cls_token_is_folded(tmp_path, side):
    model = stir(
        VisionTransformer(
            img_size=8 * side, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=0, global_pool="",
            no_embed_class=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "deit3.pth")
    pixels = images(side=8 * side)
    expected = model.forward_features(pixels)
    encoder = mae_core.load_encoder(tmp_path / "deit3.pth")
    assert (encoder.encode(pixels) - expected).abs().max() < 1e-5
    found = inspect_file(tmp_path / "deit3.pth")
    assert found["grid"] == [side, side] and any("none for the cls token" in note for note in found["notes"])
    text = mae("convert", tmp_path / "deit3.pth", "--to", "mae_core", "--out", tmp_path / "o.safetensors", "--check")
    assert "none for the cls token" in text and "checked: largest feature difference" in text
    assert (mae_core.load_encoder(tmp_path / "o.safetensors").encode(pixels) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("side", [4, 7, 14])
@pytest.mark.parametrize("stated", [True, False])
def test_two_prefix_tokens_are_refused_by_that_name(tmp_path, official_state, side, stated):
    state = official_state(128, 6, grid=(side, side), patch=8, decoder=None)
    state["pos_embed"] = torch.cat([state["pos_embed"], state["pos_embed"][:, :1]], dim=1)
    write_weights(tmp_path / "x.safetensors", state, {"image_size": [8 * side] * 2} if stated else {})
    for attempt in (
        lambda: mae_core.load_encoder(tmp_path / "x.safetensors"),
        lambda: inspect_file(tmp_path / "x.safetensors"),
        lambda: convert_file(tmp_path / "x.safetensors", "timm", tmp_path / "o.safetensors"),
    ):
        with pytest.raises(UserError, match="2 prefix tokens") as caught:
            attempt()
        assert "--grid" not in str(caught.value)


# Weights that are not finite, not whole, or not weights.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused(tmp_path, official_state, value, dtype):
    state = {name: t.to(dtype) for name, t in official_state(128, 6, grid=(2, 2), patch=8, decoder=None).items()}
    state["blocks.3.mlp.fc1.weight"][2, 5] = value
    torch.save({"model": state}, tmp_path / "x.pth")
    for attempt in (
        lambda: mae_core.load_encoder(tmp_path / "x.pth"),
        lambda: read_encoder(tmp_path / "x.pth"),
        lambda: inspect_file(tmp_path / "x.pth"),
        lambda: convert_file(tmp_path / "x.pth", "timm", tmp_path / "o.safetensors"),
    ):
        with pytest.raises(UserError, match=r"NaN or infinite numbers in blocks\.3\.mlp\.fc1\.weight \(1 of 65536"):
            attempt()
    mae("inspect", tmp_path / "x.pth", code=2)


def test_any_model_refuses_weights_that_are_not_finite(tmp_path):
    model = nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), 3e38), "bias": torch.zeros(2)}
    load_state(model, state, "x")  # the sum is infinite, the numbers are not
    before = model.weight.clone()
    with pytest.raises(UserError, match="x: NaN or infinite numbers in bias"):
        load_state(model, {"weight": torch.zeros(2, 2), "bias": torch.tensor([0.0, torch.nan])}, "x")
    assert torch.equal(model.weight, before), "nothing is copied"


def test_a_proof_says_what_it_left_out(tmp_path, official_state):
    state = official_state(128, 6, grid=(2, 2), patch=8, decoder=None)
    state["register_tokens"] = torch.randn(1, 4, 128)
    torch.save(state, tmp_path / "x.pth")
    arguments = ["convert", tmp_path / "x.pth", "--to", "timm", "--out", tmp_path / "o.safetensors", "--check"]
    text = mae(*arguments, "--drop", "register_tokens", "--report", tmp_path / "r.json")
    assert "the comparison leaves out 1 tensors removed by --drop (register_tokens)" in text
    assert json.loads((tmp_path / "r.json").read_text())["check"]["without"] == ["register_tokens"]


def test_a_dino_checkpoint_is_read(tmp_path, official_state):
    encoder = official_state(128, 6, grid=(2, 2), patch=8, decoder=None)
    head = {"head.mlp.0.weight": torch.ones(4, 128), "head.last_layer.weight_v": torch.ones(3, 4)}
    teacher = {**{f"backbone.{name}": t for name, t in encoder.items()}, **head}
    student = {f"module.{name}": t for name, t in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 1, "args": None}, tmp_path / "dino.pth")
    loaded = read_encoder(tmp_path / "dino.pth", branch="teacher")
    assert torch.equal(loaded.tensors["cls_token"], encoder["cls_token"])
    assert {name for name in loaded.report.unused if not name.startswith("student.")} == set(head)


def test_advice_to_leave_tensors_out_can_be_followed(tmp_path, official_state):
    state = official_state(128, 6, grid=(2, 2), patch=8, decoder=None)
    torch.save({**state, "projector.0.weight": torch.ones(3, 3), "queue": torch.ones(4)}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        mae_core.load_encoder(tmp_path / "x.pth")
    command = str(caught.value).split("leave them out with mae ")[1].split(", and use")[0]
    words = [word.strip("'") for word in command.split()]
    words = [str(tmp_path / {"FILE": "x.pth"}.get(w, w)) if w in ("FILE", "encoder.safetensors") else w for w in words]
    mae(*words)
    assert torch.equal(mae_core.load_encoder(tmp_path / "encoder.safetensors").cls_token, state["cls_token"])


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_patterns_to_drop_hold_for_names_as_they_are_in_the_file(tmp_path, official_state, prefix):
    """MoCo v3: two encoders and a predictor behind one prefix."""
    encoder = official_state(128, 6, grid=(2, 2), patch=8, decoder=None)
    state = {f"module.{part}.{n}": t for part in ("base_encoder", "momentum_encoder") for n, t in encoder.items()}
    state["module.predictor.0.weight"] = torch.ones(3, 3)
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    drops = ["--drop", f"{prefix}momentum_encoder.*", "--drop", f"{prefix}predictor.*"]
    text = mae("convert", tmp_path / "moco.pth", "--to", "timm", "--out", tmp_path / "o.safetensors", "--check", *drops)
    assert "measured without" not in text
    assert torch.equal(read_weights(tmp_path / "o.safetensors")[0]["cls_token"], encoder["cls_token"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pth", "x.pkl", "x.weights"])
def test_safetensors_are_read_under_any_ending(tmp_path, official_state, name):
    state = official_state(128, 6, grid=(2, 2), patch=8, decoder=None)
    save_file(state, tmp_path / name)
    assert torch.equal(mae_core.load_encoder(tmp_path / name).cls_token, state["cls_token"])


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_what_is_no_weights_file_is_named_with_its_remedy(tmp_path, name):
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, a=np.ones(3))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for content, told in [
        (pointer, "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page.*download the file itself"),
        (arrays.read_bytes(), "NumPy arrays.*safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told):
            mae_core.load_encoder(tmp_path / name)


@torch.no_grad()
def test_a_folder_of_shards_is_read(tmp_path):
    model = transformers_mae(tmp_path / "theirs", 4, 1e-12, width=64)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = transformers_tokens(model, images())
    assert (mae_core.load_encoder(tmp_path / "sharded").encode(images()) - expected).abs().max() < 1e-5
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[0]
    with pytest.raises(UserError, match=r"is one of .* shards; give their folder"):
        mae_core.load_encoder(shard)
    shard.unlink()
    with pytest.raises(UserError, match="which is missing"):
        mae_core.load_encoder(tmp_path / "sharded")


def test_empty_tensors_of_zero_3_are_named(tmp_path, official_state):
    state = {name: torch.empty(0) for name in official_state(128, 6, grid=(2, 2), patch=8, decoder=None)}
    torch.save({"module": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"tensors are empty.*DeepSpeed ZeRO-3.*zero_to_fp32\.py"):
        mae_core.load_encoder(tmp_path / "x.pth")
