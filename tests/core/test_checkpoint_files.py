"""Files as they are in the world: every published kind is recognised, and damage of any kind is named or harmless."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mae_core
from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.weights.catalogue import CATALOGUE, OF_MAE
from mae_core.weights.files import read_file, write_weights
from mae_core.weights.formats import SHAPES
from mae_core.weights.rename import split_index
from mae_core.weights.tools.inspect import inspect_file

FORMATS = ("official", "mae_core", "timm", "huggingface", "mmseg", "mmpretrain", "detectron2", "mae_segmentation")
HIDDEN_SAFE = ("gamma_1", "gamma_2")


@pytest.fixture(scope="module")
def official(official_state) -> dict[str, Tensor]:
    return official_state(128, 6, grid=(4, 4), patch=8, decoder=64)


def published(name: str, state: dict[str, Tensor], width: int = 128) -> dict[str, Any]:
    """The content of a published file of that kind, with random weights."""
    encoder = {key: value for key, value in state.items() if "decoder" not in key and key != "mask_token"}
    if name.startswith("pretrain"):
        return {"model": encoder}
    if name.startswith("finetuned"):
        trunk = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
        head = {"head.weight": torch.randn(1000, width), "head.bias": torch.zeros(1000)}
        return {"model": {**trunk, "fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width), **head}}
    return {"model": state}


@pytest.mark.parametrize("name", OF_MAE)
def test_every_published_kind_is_recognised(tmp_path, official, name):
    row = CATALOGUE[name]
    path = tmp_path / row.filename
    torch.save(published(name, official), path)
    found = inspect_file(path)
    assert found["format"] == "official" and found["size"] == "nano" and found["grid"] == [4, 4]
    assert found["classes"] == (1000 if name.startswith("finetuned") else 0)
    has_decoder = name.startswith(("full", "visualize"))
    assert (found["decoder"] is not None) == has_decoder == ("reconstruct" in found["use_for"])
    assert "finetune" in found["use_for"]
    if has_decoder:
        with pytest.warns(UserWarning, match="does not say which target"):
            assert mae_core.load_mae(path).target_name == row.target
    else:
        with pytest.raises(UserError, match="no decoder"):
            mae_core.load_mae(path)
    if name.startswith("finetuned"):
        assert found["missing_for"]["encode"] == ["norm.weight"]
    else:
        assert torch.equal(mae_core.load_encoder(path).blocks[5].attn.qkv.weight, official["blocks.5.attn.qkv.weight"])


SHAPES_PUBLISHED = {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}


def of_shape(official_state, width: int, depth: int, patch: int) -> dict[str, Tensor]:
    """A released file's names and shapes, its numbers one zero each, so that it is small on disk."""
    small = official_state(8, depth, grid=(1, 1), patch=1, decoder=4)
    sizes = {"D": width, "HD": 4 * width, "E": 512, "HE": 2048, "N": 1 + (224 // patch) ** 2, "C": 3, "P": patch}
    sizes |= {"T": 3 * patch * patch, "1": 1}
    state = {}
    for name in small:
        letters = SHAPES[split_index(name)[0]]
        shape = [sizes[letter.removeprefix("3")] * (3 if letter.startswith("3") else 1) for letter in letters]
        state[name] = torch.zeros(1).expand(shape)
    return state


@pytest.mark.parametrize("name", OF_MAE)
def test_every_published_file_is_told_by_its_name_and_shapes(tmp_path, official_state, name):
    size = name.split("_")[1]
    width, depth, heads, patch = SHAPES_PUBLISHED[size]
    content = published(name, of_shape(official_state, width, depth, patch), width)
    torch.save(content, tmp_path / CATALOGUE[name].filename)
    found = inspect_file(tmp_path / CATALOGUE[name].filename)
    assert [found[key] for key in ("size", "width", "depth", "heads", "patch_size")] == [
        size, width, depth, heads, patch,
    ]  # fmt: skip
    assert found["published"] == name and found["target"] == CATALOGUE[name].target
    kind = {"pretrain": "encoder", "finetuned": "classifier on mean-pooled patches"}
    assert found["kind"] == kind.get(name.split("_")[0], "encoder and decoder of a pre-training")
    renamed = tmp_path / "mine.pth"
    (tmp_path / CATALOGUE[name].filename).rename(renamed)
    unnamed = inspect_file(renamed)
    assert unnamed["published"] is None and unnamed["target"] is None


@pytest.mark.parametrize("normalised", [True, False])
def test_a_trainer_file_says_its_target_in_its_arguments(tmp_path, official, normalised):
    arguments = argparse.Namespace(norm_pix_loss=normalised, mask_ratio=0.6, lr=1e-3, model="mae_vit_base_patch16")
    path = tmp_path / "checkpoint-3.pth"
    scaler = {"scale": 65536.0, "growth_tracker": 3}
    torch.save({"model": official, "optimizer": {"state": {}}, "epoch": 3, "scaler": scaler, "args": arguments}, path)
    kind = inspect_file(path)["kind"]
    assert kind.endswith("a trainer's checkpoint (args, epoch, optimizer, scaler beside the weights)")
    model = mae_core.load_mae(path)
    assert model.target_name == ("normalized_pixels" if normalised else "pixels") and model.masker.ratio == 0.6
    for name, tensor in mae_core.convert(model.state_dict(), "mae_core", "official")[0].items():
        assert torch.equal(tensor, official[name]), name
    assert mae_core.load_mae(path, target="pixels").target_name == "pixels"


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_is_weights(tmp_path, official, name):
    """What the format holds of an encoder arrives, through the one loader behind every weights option."""
    from mae_core.weights.load import classifier_from, read_encoder
    from transfer.backbone import DenseViT
    from transfer.trunk import load_pretrained

    path = tmp_path / "x.safetensors"
    write_weights(path, mae_core.convert(official, "official", name)[0], {})
    source = read_encoder(path)
    assert source.size == "nano" and source.grid == (4, 4)
    backbone = DenseViT("nano", image_size=32, patch_size=8)
    report = load_pretrained(backbone, path)
    assert torch.equal(backbone.blocks[3].mlp.fc1.weight, official["blocks.3.mlp.fc1.weight"]) and report.share == 1
    if name == "detectron2":
        with pytest.raises(UserError, match="cls_token: missing from the file"):
            classifier_from(source, num_classes=3)
        report = classifier_from(source, num_classes=3, allow_missing=["cls_*"])[1]
        assert "cls_token" in report.new and report.share < 1
    else:
        assert torch.equal(classifier_from(source, num_classes=3)[0].cls_token, official["cls_token"])
    if name in ("mmseg", "mae_segmentation", "detectron2"):
        with pytest.raises(UserError, match="no final norm"):
            mae_core.load_encoder(path)
    else:
        assert torch.equal(mae_core.load_encoder(path).norm.weight, official["norm.weight"])


def test_wrappers_are_taken_off_and_named(tmp_path, official):
    for wrap, told in [
        (lambda s: {"state_dict": s, "meta": {}}, "unwrapped 'state_dict'"),
        (lambda s: {"model_ema": s}, "unwrapped 'model_ema'"),
        (lambda s: {"model": s, "model_ema": {"decay": torch.ones(1)}}, "unwrapped 'model'"),
        (lambda s: {"model": {"module." + k: v for k, v in s.items()}}, "removed the prefix 'module.' from every name"),
        (lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, "removed '_orig_mod.' from the names"),
        (lambda s: {"model": {"trunk.vit7." + k: v for k, v in s.items()}}, "removed the prefix 'trunk.vit7.'"),
    ]:
        path = tmp_path / "wrapped.pth"
        torch.save(wrap(official), path)
        found = inspect_file(path)
        assert found["format"] == "official" and any(told in note for note in found["notes"]), (told, found["notes"])
        assert torch.equal(mae_core.load_encoder(path).cls_token, official["cls_token"])


def test_a_segmenter_of_mmseg_gives_its_backbone(tmp_path, official):
    backbone, _ = mae_core.convert(official, "official", "mmseg")
    rest = {"decode_head.conv_seg.weight": torch.ones(2, 3), "neck.upsample_4x.0.weight": torch.ones(2)}
    index = {f"backbone.layers.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for i in (0, 1)}
    torch.save(
        {"state_dict": {**{"backbone." + k: v for k, v in backbone.items()}, **rest, **index}}, tmp_path / "s.pth"
    )
    found = inspect_file(tmp_path / "s.pth")
    assert found["format"] == "mmseg" and set(found["dropped"]) == {*rest, *index}


# Damage. Every mutation says what has to come of it: a piece of the refusal, or None where it is harmless.


def pick(rng: random.Random, state: dict[str, Tensor], *, sides: bool = False) -> str:
    """A tensor that every reader needs; with ``sides`` one whose transpose has another shape."""
    names = [n for n in state if not n.endswith(HIDDEN_SAFE)]
    if sides:
        names = [n for n in names if state[n].ndim == 2 and state[n].shape[0] != state[n].shape[1]]
    return rng.choice(sorted(names))


def drop_key(rng, state):
    name = pick(rng, state)
    del state[name]
    return f"{name}: missing from the file", name


def rename_key(rng, state):
    name = pick(rng, state)
    state[name + "_old"] = state.pop(name)
    return f"{name}_old", None


def add_key(rng, state):
    state["blocks.0.adapter.weight"] = torch.zeros(3)
    return "blocks.0.adapter.weight: the model has no such tensor", None


def misshapen(state, name, tensor):
    """Put ``tensor`` in the place of ``name``; what the refusal has to say."""
    wanted, state[name] = tuple(state[name].shape), tensor.contiguous()
    return f"{name}: file {tuple(tensor.shape)}, model {wanted}", None


def transpose(rng, state):
    name = pick(rng, state, sides=True)
    return misshapen(state, name, state[name].t())


def cut_rows(rng, state):
    name = pick(rng, state, sides=True)
    return misshapen(state, name, state[name][:-1])


def cut_width(rng, state):
    """A tensor as wide as the encoder or decoder, its last axis one shorter."""
    tables = sorted(n for n in state if n.endswith(("pos_embed", "position_embeddings")))
    name = rng.choice([*tables, *(n for n in sorted(state) if n.endswith("norm1.bias"))])
    message, _ = misshapen(state, name, state[name][..., :-1])
    if tables == [name]:  # no other tensor tells the number of positions
        message = message.replace("model (1, 10,", "model (1, N,")
    return message, None


def permute_patches(rng, state):
    name = next(n for n in state if state[n].ndim == 4)
    shape = tuple(state[name].transpose(0, 1).shape)
    state[name] = state[name].transpose(0, 1).contiguous()
    return f"{name}: file {shape}, model (32, ", None


def lose_a_block(rng, state):
    """The first of two: the one that is left is no longer where it should be."""
    part = re.compile(r"(^|\.)(blocks|layers|layer)\.0\.")
    lost = sorted(n for n in state if part.search(n) and "decoder" not in n and not n.endswith(HIDDEN_SAFE))
    for name in lost:
        del state[name]
    return ": missing from the file", lost[0]


def name_twice(rng, state):
    name = pick(rng, state)
    state["module." + name] = state[name].clone()
    return f"module.{name}: the model has no such tensor", None


def prefix_one(rng, state):
    name = pick(rng, state)
    state["old." + name] = state.pop(name)
    return f"old.{name}", None


def whole_numbers(rng, state):
    name = pick(rng, state)
    state[name] = state[name].to(torch.int32)
    return f"{name}: its numbers are int32", None


def other_precision(rng, state):
    kind = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    names = list(state) if rng.random() < 0.5 else [pick(rng, state)]
    state.update({name: state[name].to(kind) for name in names})
    return None, None


def prefix_all(rng, state):
    prefix = rng.choice(["module.", "_orig_mod.", "model.", "module._orig_mod.", "my_net.", "ema_model."])
    renamed = {prefix + name: state.pop(name) for name in list(state)}
    state.update(renamed)
    return None, None


MUTATIONS = (
    drop_key, rename_key, add_key, transpose, cut_rows, cut_width, permute_patches, lose_a_block, name_twice,
    prefix_one, whole_numbers, other_precision, prefix_all,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(official_state) -> dict[str, dict[str, Tensor]]:
    state = official_state(32, 2, grid=(3, 3), patch=4, decoder=16)
    return {name: mae_core.convert(state, "official", name)[0] for name in FORMATS}


@pytest.mark.parametrize("seed", range(312))
def test_a_mutated_file_is_refused_for_its_reason_or_loaded_right(tmp_path, small, seed):
    rng = random.Random(seed)
    name = FORMATS[seed % len(FORMATS)]
    whole = small[name]
    state = dict(whole)
    reason, lost = MUTATIONS[seed // len(FORMATS) % len(MUTATIONS)](rng, state)
    path = tmp_path / ("x.pth" if seed % 2 else "x.safetensors")
    if seed % 2:
        torch.save({"model": state}, path)
    else:
        write_weights(path, state, {})
    file = read_file(path)
    if reason is None:
        again, report = mae_core.convert(file.state, None, name)
        assert again.keys() == whole.keys() and not report.refused
        for key, tensor in again.items():
            assert torch.allclose(tensor.float(), whole[key], atol=1e-2, rtol=1e-2), key
        return
    with pytest.raises(UserError) as caught:
        mae_core.convert(file.state, name if seed % 3 else None, name)
    message = str(caught.value)
    assert "\n" not in message
    assert lost is None or lost in message
    if "decoder is not complete" in message:
        assert "missing from the file" in message
        options = re.findall(r"--drop '(.+?)'", message)
        encoder, _ = mae_core.convert(file.state, name, name, drop=options)  # the way out that it names is one
        assert not any("decoder" in key or "mask_token" in key for key in encoder)
    else:
        assert reason in message


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_file_is_refused_before_memory_is_taken(tmp_path, small, seed):
    state, path = small["official"], tmp_path / ("x.pth" if seed % 2 else "x.safetensors")
    torch.save({"model": state}, path) if seed % 2 else write_weights(path, state, {})
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content) - 1)])
    with pytest.raises(UserError, match="truncated"):
        read_file(path, mapped=False)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_tensor_in_a_torch_file_is_refused_by_its_checksum(tmp_path, checksums, mapped):
    """torch writes a checksum for each record, unless told not to, and does not look at them."""
    path = tmp_path / "x.pth"
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"weight": torch.ones(64, 64)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_file(path, mapped=mapped).state["weight"], torch.ones(64, 64))
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(64).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    if checksums:
        with pytest.raises(UserError, match=r"x/data/0 in it is not what was written; copy or download it again"):
            read_file(path, mapped=mapped)
    else:
        assert not torch.equal(read_file(path, mapped=mapped).state["weight"], torch.ones(64, 64))


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path):
    """A claim of four terabytes in a file of a few hundred bytes takes no memory."""
    claim = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(claim).to_bytes(8, "little") + claim + b"\0" * 64)
    with pytest.raises(UserError, match="truncated"):
        read_file(path)


def test_a_header_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mae_core.weights.files.LONGEST_HEADER", 1000)
    monkeypatch.setattr("mae_core.weights.files.safe_open", None)
    names = {f"n{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100)}
    header = json.dumps(names).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"has a header of \d+ bytes, longer than any model's"):
        read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 5001])
def test_metadata_that_no_parser_likes_stays_text(tmp_path, text):
    header = json.dumps({"__metadata__": {"x": text}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_file(tmp_path / "x.safetensors").metadata == {"x": text}


def test_another_network_is_refused_with_the_nearest_format():
    resnet = {"conv1.weight": torch.zeros(3), "layer1.0.bn1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
    with pytest.raises(UserError, match=r"nearest format, .* unknown: conv1\.weight, layer1\.0\.bn1\.weight, fc\.bias"):
        mae_core.convert(resnet, None, "timm")


def test_an_unknown_format_is_refused_with_the_known_ones(official):
    with pytest.raises(UserError, match="unknown format 'tensorflow'; known formats: official, mae_core, timm"):
        mae_core.convert(official, None, "tensorflow")


def test_the_exact_state_comes_from_a_mapped_file(tmp_path, official):
    write_weights(tmp_path / "x.safetensors", official, {})
    torch.save({"model": official}, tmp_path / "x.pth")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pth"):
        for mapped in (True, False):
            state = read_file(path, mapped=mapped).state
            assert state.keys() == official.keys() and all(torch.equal(state[n], official[n]) for n in state)


@pytest.mark.parametrize("source, target", [("official", "huggingface"), ("huggingface", "official")])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_bytes_that_go_from_file_to_file_are_the_right_ones(tmp_path, official, source, target, ending):
    """What is only renamed, split or joined never passes this process; what is resized does."""
    from mae_core.weights.resize import Adaptation
    from mae_core.weights.tools.convert import convert_file

    state = mae_core.convert(official, "official", source)[0]
    path = tmp_path / f"x{ending}"
    torch.save({"model": state}, path) if ending == ".pth" else write_weights(path, state, {})
    wanted = mae_core.convert(official, "official", target)[0]
    for out in (tmp_path / "same.safetensors", tmp_path / "same.pth"):
        convert_file(path, target, out)
        written = read_file(out, mapped=False).state
        assert written.keys() == wanted.keys() and all(torch.equal(written[name], wanted[name]) for name in wanted)
    plain = torch.load(tmp_path / "same.pth", weights_only=True)  # as any other program reads it
    assert all(torch.equal(plain.get("model", plain)[name], wanted[name]) for name in wanted)
    convert_file(path, target, tmp_path / "other.safetensors", adaptation=Adaptation(image_size=(48, 64)))
    resized = mae_core.convert(official, "official", target, adaptation=Adaptation(image_size=(48, 64)))[0]
    written = read_file(tmp_path / "other.safetensors", mapped=False).state
    assert written.keys() == resized.keys() and all(torch.equal(written[name], resized[name]) for name in resized)


def test_a_mapped_tensor_that_was_changed_is_written_as_it_is(tmp_path, official):
    write_weights(tmp_path / "x.safetensors", official, {})
    state = read_file(tmp_path / "x.safetensors").state
    state["norm.bias"].add_(1)
    write_weights(tmp_path / "y.safetensors", state, {})
    assert torch.equal(read_file(tmp_path / "y.safetensors").state["norm.bias"], official["norm.bias"] + 1)


def test_transformers_folder_is_weights(tmp_path, official):
    from mae_core.weights.tools.convert import convert_file

    torch.save({"model": official, "args": argparse.Namespace(norm_pix_loss=False)}, tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", "huggingface", tmp_path / "folder")
    model = mae_core.load_mae(tmp_path / "folder")
    assert model.target_name == "pixels" and isinstance(model.encoder, ViTEncoder)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = mae_core.load_mae(tmp_path / "x.pth")
    with torch.no_grad():
        assert torch.equal(model.encoder.encode(images), expected.encoder.encode(images))
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has a config\.json and no model\.safetensors"):
        mae_core.load_mae(Path(tmp_path / "folder"))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_wrote_is_read_whatever_its_ending(tmp_path, official, zipped):
    path = tmp_path / "encoder.pkl"
    torch.save({"model": official}, path, _use_new_zipfile_serialization=zipped)
    read = read_file(path).state
    assert read.keys() == official.keys() and all(torch.equal(read[name], official[name]) for name in official)
