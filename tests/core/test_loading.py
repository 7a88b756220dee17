"""Weights files into models: every tensor accounted for, every bad file refused in one sentence."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import build_mae
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.load import (
    build_classifier,
    classifier_from,
    fit_state,
    load_encoder,
    load_mae,
    read_encoder,
    settled,
)
from mae_core.weights.tools.inspect import describe_file
from transfer.backbone import DenseViT
from transfer.trunk import load_pretrained


@pytest.fixture(scope="module")
def encoder() -> ViTEncoder:
    torch.manual_seed(0)
    model = ViTEncoder("nano", image_size=(32, 48), patch_size=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture(scope="module")
def encoder_file(encoder: ViTEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    write_weights(path, encoder.state_dict(), {**describe_encoder(encoder), "target": "pixels", "epochs": 3})
    return path


@pytest.fixture(scope="module")
def square_state() -> dict[str, Tensor]:
    """A square encoder under the official names: what a released file holds, with no metadata."""
    torch.manual_seed(1)
    return ViTEncoder("nano", image_size=32, patch_size=8).state_dict()


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_round_trip_keeps_every_tensor_and_the_grid(encoder, encoder_file):
    loaded = load_encoder(encoder_file)
    assert loaded.grid == (4, 6, 8) and not loaded.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    metadata = read_weights(encoder_file)[1]
    assert metadata["image_size"] == [32, 48] and metadata["format"] == "mae_core" and metadata["epochs"] == 3


def test_report_of_a_classifier_accounts_for_every_tensor_on_both_sides(encoder_file):
    source = read_encoder(encoder_file)
    model, report = classifier_from(source, num_classes=7, pooling="mean", image_size=64)
    assert report.new == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert set(report.unused) == {"norm.weight", "norm.bias"} and "mean pooling" in report.unused["norm.bias"]
    assert report.resized == {"pos_embed": "4x6 -> 8x8"}
    assert not report.refused and not report.renamed
    assert {*report.loaded, *report.unused, *report.resized} == set(source.tensors)
    assert {*report.loaded, *report.new, *report.resized} == set(model.state_dict())
    fresh = sum(dict(model.named_parameters())[name].numel() for name in report.new)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report.total_parameters == total and report.loaded_parameters == total - fresh
    assert report.share == pytest.approx(1 - fresh / total)
    assert json.loads(json.dumps(report.as_dict()))["share"] == report.share


def test_the_printed_report_has_a_line_a_category(encoder_file):
    _, report = classifier_from(read_encoder(encoder_file), num_classes=7, image_size=64)
    console = Console(width=200, record=True, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    for label in ("loaded", "renamed", "resized", "newly initialised", "not used", "refused"):
        assert re.search(rf"│ {label} +│ +\d+", text), label
    assert "pos_embed 4x6 -> 8x8" in text and f"{report.share:.1%} of the model's" in text


def test_cls_pooling_keeps_the_pretrained_norm(encoder, encoder_file):
    model, report = classifier_from(read_encoder(encoder_file), num_classes=7, pooling="cls")
    assert report.new == ["head.bias", "head.weight"] and not report.unused
    assert torch.equal(model.norm.weight, encoder.norm.weight)


def test_renamed_tensors_are_reported(encoder, encoder_file):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.final = nn.LayerNorm(128)

    everything_else = {name: "not of this model" for name in ("cls_token", "pos_embed", "patch_embed.*", "blocks.*")}
    model = Wrapped()
    report = fit_state(
        model,
        read_encoder(encoder_file),
        grid=(4, 6),
        unused=everything_else,
        rename={"norm.weight": "final.weight", "norm.bias": "final.bias"},
    )
    assert report.renamed == {"norm.weight": "final.weight", "norm.bias": "final.bias"} and not report.loaded
    assert torch.equal(model.final.weight, encoder.norm.weight)


def test_positions_are_resized_to_the_image(encoder, encoder_file):
    model = load_encoder(encoder_file, image_size=(64, 64))
    assert model.pos_embed.shape == (1, 65, 128)
    assert torch.equal(model.pos_embed[:, :1], encoder.pos_embed[:, :1])
    model.encode(torch.zeros(1, 3, 64, 64))


def test_equally_many_positions_on_another_grid_are_resized(encoder, encoder_file):
    model = load_encoder(encoder_file, image_size=(48, 32))
    assert model.pos_embed.shape == encoder.pos_embed.shape
    assert not torch.allclose(model.pos_embed, encoder.pos_embed, atol=1e-2)


def test_a_model_never_starts_half_loaded(encoder_file):
    source = read_encoder(encoder_file)
    model = ViTEncoder("tiny", image_size=(32, 48), patch_size=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = refusal(fit_state, model, source, grid=(4, 6))
    assert "does not fit this model" in message and "nano encoder with patch 8 and 3 channels" in message
    assert "missing from the file" in message or "model (" in message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.3.mlp.fc1.bias"), "blocks.3.mlp.fc1.bias: missing from the file"),
        (lambda s: s.update({"blocks.0.extra": torch.ones(1)}), "blocks.0.extra: the model has no such tensor"),
        (lambda s: s.update({"norm.bias": torch.ones(64)}), r"norm.bias: file (64,), model (128,)"),
        (lambda s: s.pop("pos_embed"), "no MAE encoder in it"),
        (lambda s: s.pop("patch_embed.proj.weight"), "no MAE encoder in it"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 24, 128)}), "do not fill a"),
        (lambda s: s.update({"pos_embed": torch.zeros(17, 128)}), "pos_embed"),
        (lambda s: s.update({"pos_embed": torch.zeros(17)}), "pos_embed"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 1, 128)}), ""),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(128, 192)}), "patch_embed.proj.weight"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(100, 3, 8, 8)}), "model (128, C, P, P)"),
        (lambda s: s.update({"blocks.6.norm1.bias": torch.ones(128)}), "blocks.6.attn.proj.bias: missing"),
    ],
)
def test_a_file_with_anything_missing_or_left_over_is_refused(tmp_path, square_state, change, message):
    state = dict(square_state)
    change(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    assert message in refusal(load_encoder, tmp_path / "x.pth")


def test_another_architecture_is_refused(encoder_file):
    source = read_encoder(encoder_file)
    found = {"model.size": source.size, "model.patch_size": source.patch_size, "data.channels": source.in_chans}
    assert settled(source.path, {"model.size": "nano", "data.channels": None}, must=found) == found
    given = {"model.size": "base", "model.patch_size": 16, "data.channels": 3}
    message = refusal(settled, source.path, given, must=found)
    assert "size base was asked for, but the file has nano" in message and "patch_size 16 was asked for" in message
    assert "channels" not in message
    assert settled(source.path, {"a": 2}, must={}, may={"a": 1, "b": 3, "c": None}) == {"a": 2, "b": 3}


def test_other_channels_are_adapted_with_a_warning(encoder, encoder_file):
    with pytest.warns(UserWarning, match="an initialisation to train on from, not a frozen feature"):
        grey = load_encoder(encoder_file, in_chans=1)
    image = torch.rand(1, 1, 32, 48)
    assert torch.allclose(grey.encode(image), encoder.encode(image.expand(-1, 3, -1, -1)), atol=1e-5)


def test_a_full_autoencoder_gives_its_encoder_and_itself(tmp_path):
    torch.manual_seed(0)
    model = build_mae("nano", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, decoder_heads=2).eval()
    file = tmp_path / "model.safetensors"
    write_weights(file, model.state_dict(), {**describe_encoder(model), "target": "pixels", "decoder_heads": 2})
    encoder = load_encoder(file)
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    again = load_mae(file)
    assert again.target_name == "pixels" and again.masker.ratio == 0.75 and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    _, report = classifier_from(read_encoder(file), num_classes=3)
    assert all("pre-training only" in why for name, why in report.unused.items() if "decoder" in name)


def test_an_encoder_alone_has_no_decoder(encoder_file):
    assert "has no decoder" in refusal(load_mae, encoder_file)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "metadata"),
        ({"decoder_heads": 2, "target": "clusters"}, "unknown name 'clusters'"),
        ({"decoder_heads": 5, "target": "pixels"}, "divisible by its heads"),
    ],
)
def test_a_full_autoencoder_with_unusable_metadata_is_refused(tmp_path, metadata, message):
    model = build_mae("nano", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, decoder_heads=2)
    file = tmp_path / "model.safetensors"
    write_weights(file, model.state_dict(), metadata)
    assert message in refusal(load_mae, file)


@pytest.mark.parametrize("lost", ["decoder.embed.weight", "decoder.mask_token"])
def test_a_full_autoencoder_that_lacks_a_tensor_is_refused(tmp_path, lost):
    model = build_mae("nano", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, decoder_heads=2)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
    write_weights(tmp_path / "model.safetensors", state, {"decoder_heads": 2, "target": "pixels"})
    assert lost in refusal(load_mae, tmp_path / "model.safetensors")


def test_a_full_autoencoder_of_other_shapes_is_refused(tmp_path):
    model = build_mae("nano", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, decoder_heads=2)
    state = {**model.state_dict(), "decoder.pred.weight": torch.zeros(100, 32)}
    write_weights(tmp_path / "model.safetensors", state, {"decoder_heads": 2, "target": "pixels"})
    assert "decoder.pred.weight" in refusal(load_mae, tmp_path / "model.safetensors")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_of_official_names_load(tmp_path, square_state, wrapper, legacy):
    content = {wrapper: square_state, "epoch": 5} if wrapper else square_state
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_encoder(tmp_path / "x.pth")
    assert loaded.grid == (4, 4, 8)
    assert torch.equal(loaded.blocks[5].mlp.fc2.weight, square_state["blocks.5.mlp.fc2.weight"])


def test_official_full_files_load_without_their_decoder(tmp_path, square_state):
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_embed.weight": torch.zeros(32, 128),
        "decoder_blocks.0.norm1.weight": torch.ones(32),
        "decoder_norm.weight": torch.ones(32),
        "decoder_pred.bias": torch.zeros(192),
    }
    torch.save({"model": {**square_state, **decoder}}, tmp_path / "full.pth")
    _, report = classifier_from(read_encoder(tmp_path / "full.pth"), num_classes=3)
    assert set(decoder) <= set(report.unused) and not report.refused


def test_a_training_checkpoint_with_its_arguments_loads(tmp_path, square_state):
    """The official trainer saves its argparse.Namespace beside the weights."""
    arguments = argparse.Namespace(lr=1e-3, name="x")
    file = tmp_path / "checkpoint-1.pth"
    torch.save({"model": square_state, "optimizer": {"state": {}}, "epoch": 1, "args": arguments}, file)
    assert torch.equal(load_encoder(file).cls_token, square_state["cls_token"])


class Bomb:
    """Unpickling one creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_python_objects_is_refused_and_not_executed(tmp_path, square_state, legacy):
    bomb = Bomb(tmp_path / "executed")
    torch.save({"model": square_state, "args": bomb}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    message = refusal(load_encoder, tmp_path / "x.pth")
    assert "could execute code" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
def test_a_truncated_file_is_refused(tmp_path, encoder_file, square_state, share, kind):
    if kind == "safetensors":
        content = encoder_file.read_bytes()
    else:
        torch.save({"model": square_state}, tmp_path / "whole", _use_new_zipfile_serialization=kind == "pth")
        content = (tmp_path / "whole").read_bytes()
    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes(content[: int(len(content) * share)])
    message = refusal(load_encoder, broken)
    assert str(broken) in message and "truncated" in message


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_cut_in_its_header_is_refused(tmp_path, encoder_file, square_state, length, kind):
    torch.save(square_state, tmp_path / "whole.pth")
    whole = encoder_file if kind == "safetensors" else tmp_path / "whole.pth"
    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes(whole.read_bytes()[:length])
    assert str(broken) in refusal(read_weights, broken)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.jpg"])
@pytest.mark.parametrize("content", [b"hello, this is no weights", b"\x00" * 64, b"\x80\x02garbage", b"PK\x03\x04zip?"])
def test_a_foreign_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(read_weights, tmp_path / name)


@pytest.mark.parametrize(
    "content, message",
    [({}, "no tensors"), ({"model": {}}, "no tensors"), ([1, 2], "holds a list"), (torch.zeros(3), "holds a Tensor")],
)
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    assert message in refusal(read_weights, tmp_path / "x.pth")


@given(st.binary(min_size=1, max_size=40), st.floats(0, 1), st.sampled_from(["safetensors", "pth", "old"]))
@settings(max_examples=120)
def test_damage_of_any_kind_is_weights_or_one_sentence(tmp_path_factory, junk, place, kind):
    path = tmp_path_factory.getbasetemp() / ("fuzz.safetensors" if kind == "safetensors" else "fuzz.pth")
    state = {"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.int64)}
    if kind == "safetensors":
        write_weights(path, state, {"size": "nano"})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    path.write_bytes(content)
    try:
        tensors, _ = read_weights(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


def test_equal_weights_make_equal_files(tmp_path, encoder):
    """The library writes metadata in a random order, which would hide that two runs agree."""
    metadata = {**describe_encoder(encoder), "mean": [0.1, 0.2], "név": "é"}
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file in files:
        write_weights(file, encoder.state_dict(), metadata)
    assert len({file.read_bytes() for file in files}) == 1
    state, read_back = read_weights(files[0])
    assert read_back == metadata and state.keys() == encoder.state_dict().keys()


def test_another_network_is_refused_by_its_first_names(tmp_path):
    save_file({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    message = refusal(load_encoder, tmp_path / "resnet.safetensors")
    assert "no MAE encoder in it" in message and "conv1.weight" in message


def test_missing_files_and_folders_without_weights_are_refused(tmp_path):
    assert "does not exist" in refusal(load_encoder, tmp_path / "none.safetensors")
    assert "no complete checkpoint" in refusal(load_encoder, tmp_path)
    assert "is a folder" in refusal(read_weights, tmp_path)


def test_a_run_and_its_checkpoint_are_weights_too(pretrained, tmp_path):
    exported = read_weights(pretrained / "encoder.safetensors")[0]
    checkpoint = sorted((pretrained / "checkpoints").iterdir())[-1]
    for path in (pretrained, checkpoint, checkpoint / "model.safetensors"):
        assert torch.equal(load_encoder(path).blocks[0].attn.qkv.weight, exported["blocks.0.attn.qkv.weight"])
        assert load_mae(path).target_name == "normalized_pixels"
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    (torn / "COMPLETE").unlink()
    assert "not complete" in refusal(load_encoder, torn)


def test_writing_weights_is_atomic(tmp_path, monkeypatch, encoder):
    path = tmp_path / "encoder.safetensors"
    write_weights(path, {"a": torch.ones(2)}, {})

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mae_core.weights.files.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        write_weights(path, encoder.state_dict(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert list(read_weights(path)[0]) == ["a"]


def test_a_dense_backbone_takes_the_same_file(encoder, encoder_file):
    backbone = DenseViT("nano", image_size=(32, 48), patch_size=8)
    report = load_pretrained(backbone, encoder_file)
    assert set(report.unused) == {"norm.weight", "norm.bias", "cls_token"} and not report.new
    assert torch.equal(backbone.blocks[3].attn.proj.weight, encoder.blocks[3].attn.proj.weight)
    refusal(load_pretrained, DenseViT("tiny", image_size=(32, 48), patch_size=8), encoder_file)


def test_build_classifier_starts_from_the_file(encoder, encoder_file):
    model = build_classifier(encoder_file, 4, image_size=(32, 48))
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 4)
    assert torch.equal(model.cls_token, encoder.cls_token)
    assert "num_classes=0 was asked for" in refusal(build_classifier, encoder_file, 0)
    assert "unknown pooling 'max'; known: 'mean', 'cls'" in refusal(build_classifier, encoder_file, 4, "max")


def test_inspect_describes_a_file(encoder_file, pretrained):
    text = describe_file(encoder_file)
    assert "ViT-nano: width 128, depth 6, heads 4" in text
    assert "8x8, grid 4x6 (images 32x48), 3 channels" in text
    assert "target pixels, epochs 3" in text
    assert "not for    reconstruct: lacks decoder_pred.weight" in text
    whole = describe_file(sorted((pretrained / "checkpoints").iterdir())[-1])
    assert re.search("use it for .*reconstruct", whole)


def test_a_mean_pooled_classifier_is_not_an_encoder_and_inspect_says_so(tmp_path, encoder_file):
    model = build_classifier(encoder_file, 4)
    path = tmp_path / "classifier.safetensors"
    write_weights(path, model.state_dict(), describe_encoder(model))
    assert "no final norm" in refusal(load_encoder, path)
    assert "use it for finetune, detection, segmentation" in describe_file(path)


@pytest.mark.parametrize("grid", ["4x6", [4], [4.0, 6.0], {"rows": 4}, 24])
def test_a_grid_that_is_not_two_numbers_is_refused(tmp_path, encoder, grid):
    path = tmp_path / "odd.safetensors"
    write_weights(path, encoder.state_dict(), {**describe_encoder(encoder), "grid": grid})
    assert "which is not [rows, columns]" in refusal(read_encoder, path)
