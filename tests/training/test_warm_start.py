"""A pre-training that starts from weights: what is loaded, what learns, and that a resume is exact."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from safetensors.torch import load_file, save_file

from mae_core.atomic import checksum
from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.models.mae import build_mae
from mae_core.training.adapting import Adapted
from mae_core.training.plan import print_plan
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import AdaptConfig, PretrainConfig
from mae_core.training.warm_start import full_model_in
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import write_weights
from mae_core.weights.load import load_encoder, load_mae, read_encoder

DEPTH = 2
SMALL = {"width": 32, "depth": DEPTH, "heads": 2, "patch_size": 8}
MODES = {
    "full": (),
    "frozen first": ("adapt.frozen_epochs=1",),
    "decoder": ("adapt.mode=decoder",),
    "lora": ("adapt.mode=lora", "adapt.rank=2"),
    "explora": ("adapt.mode=lora", "adapt.rank=2", "adapt.layers=[qkv,fc1]", "adapt.blocks=1"),
}
needs_peft = pytest.mark.extra("peft")
EVERY_MODE = [pytest.param(mode, marks=needs_peft if "lora" in mode else ()) for mode in MODES]


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_images) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, 8)
    return folder


@pytest.fixture(scope="module")
def full_file(tmp_path_factory) -> Path:
    """A masked autoencoder of two blocks on 16 patches, with statistics of its own."""
    torch.manual_seed(5)
    model = build_mae(SMALL, image_size=32, decoder_width=32, decoder_depth=1, decoder_heads=2)
    facts = EncoderInfo.of(model, **model.describe(), mean=[0.3, 0.4, 0.5], std=[0.2] * 3)
    path = tmp_path_factory.mktemp("weights") / "full.safetensors"
    write_weights(path, model.state_dict(), facts.to_metadata())
    return path


@pytest.fixture(scope="module")
def encoder_file(full_file) -> Path:
    """The encoder of ``full_file`` alone."""
    model = load_mae(full_file)
    path = full_file.with_name("encoder.safetensors")
    facts = EncoderInfo.of(model.encoder, mean=[0.3, 0.4, 0.5], std=[0.2] * 3)
    write_weights(path, model.encoder.state_dict(), facts.to_metadata())
    return path


def config_of(images: Path, output: Path, weights: Path, *more: str) -> PretrainConfig:
    options = (
        f"data.path={images}",
        f"output={output}",
        f"weights={weights}",
        *("data.workers=0", "optim.warmup_epochs=0", "optim.batch_size=4", "optim.epochs=3", "log.every=1"),
        *("log.checkpoint_every=1", "log.keep_checkpoints=9", "device=cpu", "optim.base_lr=0.01"),
        *("decoder.width=32", "decoder.depth=1", "decoder.heads=2"),
    )
    return load_config(PretrainConfig, None, [*options, *more])


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, images, full_file) -> Callable[[str], Path]:
    """The run directory of a mode, made once; tests must not write to it."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(mode: str) -> Path:
        if mode not in made:
            made[mode] = root / mode.replace(" ", "_")
            pretrain(config_of(images, made[mode], full_file, *MODES[mode]))
        return made[mode]

    return run


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_what_is_frozen_stays_bitwise_and_the_encoder_is_an_ordinary_file(run_of, full_file, mode):
    run = run_of(mode)
    before = dict(load_mae(full_file).encoder.state_dict())
    after = load_encoder(run).state_dict()
    learnt = changed(before, after)
    if mode == "decoder":
        assert not learnt
    elif mode == "lora":
        assert learnt == {f"blocks.{block}.attn.qkv.weight" for block in range(DEPTH)}
    elif mode == "explora":
        below = {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
        whole = {name for name in before if name.startswith(("blocks.1.", "norm."))}
        assert learnt == below | whole
    else:
        assert learnt == before.keys() - {"pos_embed"}
    if mode == "frozen first":
        checkpoints = run / "checkpoints"
        assert not changed(before, load_mae(checkpoints / "step_00000002").encoder.state_dict())
        assert changed(before, load_mae(checkpoints / "step_00000003").encoder.state_dict())
    decoder = load_mae(run).decoder.state_dict()
    assert changed(dict(load_mae(full_file).decoder.state_dict()), decoder) == decoder.keys() - {"pos_embed"}


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_resume_of_a_warm_start_is_bitwise(tmp_path, run_of, images, full_file, mode):
    whole, halted = run_of(mode), tmp_path / "halted"
    for step in (1, 2) if mode == "frozen first" else (3,):  # before and at the switch
        shutil.rmtree(halted, ignore_errors=True)
        shutil.copytree(whole, halted)
        (halted / "encoder.safetensors").unlink()
        for folder in (halted / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)
        pretrain(config_of(images, halted, full_file, *MODES[mode]), resume=True)
        for name in ("encoder.safetensors", "checkpoints/step_00000006/model.safetensors"):
            assert (halted / name).read_bytes() == (whole / name).read_bytes(), step


@needs_peft
def test_merged_adapters_compute_what_they_computed_apart(full_file):
    model = load_mae(full_file)
    pixels = torch.rand(2, 3, 32, 32)
    plain = model.encoder.encode(pixels)
    adapted = Adapted(model, AdaptConfig(mode="lora", rank=4, layers=("qkv", "proj", "fc1", "fc2"), blocks=1))
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    apart = model.encoder.encode(pixels)
    assert not torch.allclose(apart, plain, atol=1e-3)
    names = {name for name, p in model.encoder.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.partition(".")[0] for name in names} == {"blocks", "norm"}
    assert all(name.startswith("blocks.1.") for name in names if not name.startswith("norm"))
    adapted.merge()
    torch.testing.assert_close(model.encoder.encode(pixels), apart, rtol=0, atol=1e-5)
    assert model.encoder.state_dict().keys() == load_encoder(full_file).state_dict().keys()


def test_without_peft_the_extra_is_named(full_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mae-transfer\[lora\]'"):
        Adapted(load_mae(full_file), AdaptConfig(mode="lora"))


def test_an_encoder_alone_starts_a_random_decoder_and_says_so(tmp_path, images, encoder_file, capsys):
    pretrain(config_of(images, tmp_path / "run", encoder_file, "optim.epochs=1", "adapt.mode=decoder"))
    told = " ".join(capsys.readouterr().out.split())
    assert "the decoder is random: the file has none" in told
    assert "mean 0.3, 0.4, 0.5; std 0.2 (those of the weights)" in told
    loading = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert loading["new"] and all(name.startswith("decoder.") for name in loading["new"])
    stored = load_config(PretrainConfig, tmp_path / "run" / "config.yaml")
    assert stored.data.mean == (0.3, 0.4, 0.5) and stored.data.image_size == (32, 32) and stored.model.patch_size == 8


@pytest.mark.parametrize(
    "option, why",
    [
        ("target.kind=pixels", "the file's predicts normalized_pixels, and target.kind is pixels"),
        ("decoder.heads=4", "the file's has 2 heads, and decoder.heads=4 was asked for"),
        ("decoder.width=64", r"the file's is another one \(decoder.blocks.0.attn.proj.bias: file \(32,\), asked"),
        ("model.patch_size=16", "the file's predicts patches of another size or other channels"),
    ],
)
def test_why_a_decoder_is_random_is_said(tmp_path, images, full_file, capsys, option, why):
    pretrain(config_of(images, tmp_path / "run", full_file, "optim.epochs=0.5", "data.image_size=32", option))
    capsys.readouterr()
    (note,) = [n for n in json.loads((tmp_path / "run" / "loading.json").read_text())["notes"] if "random" in n]
    assert re.search(why, note), note


def test_positions_of_14x14_become_6x6(tmp_path, images):
    torch.manual_seed(1)
    model = build_mae({**SMALL, "depth": 1}, image_size=112, decoder_width=32, decoder_depth=1, decoder_heads=2)
    path = tmp_path / "wide.safetensors"
    write_weights(path, model.state_dict(), EncoderInfo.of(model, **model.describe()).to_metadata())
    pretrain(config_of(images, tmp_path / "run", path, "data.image_size=48", "optim.epochs=0.5"))
    resized = json.loads((tmp_path / "run" / "loading.json").read_text())["resized"]
    assert resized == dict.fromkeys(("encoder.pos_embed", "decoder.pos_embed"), "14x14 -> 6x6")
    assert load_encoder(tmp_path / "run").grid[:2] == (6, 6)


def test_three_channels_become_five_and_their_statistics_are_measured(tmp_path, full_file, capsys):
    folder = tmp_path / "bands"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        bands = rng.integers(0, 200, (40, 40, 5), dtype=np.uint8)
        tifffile.imwrite(folder / f"{number}.tif", bands, planarconfig="contig", photometric="minisblack")
    pretrain(config_of(folder, tmp_path / "run", full_file, "data.channels=5", "optim.epochs=1"))
    assert "measured on 4 of 4 training images" in capsys.readouterr().out
    loading = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert loading["resized"] == {"encoder.patch_embed.proj.weight": "channels 3 -> 5 (mean_tile)"}
    assert any("random: the file's predicts patches of another size" in note for note in loading["notes"])
    assert load_encoder(tmp_path / "run").in_channels == 5


@pytest.mark.parametrize("kind", ["official", "timm", "transformers"])
def test_files_of_every_known_kind_start_a_run(tmp_path, images, full_file, kind):
    if kind == "official":
        ours = load_file(full_file)
        state = {
            n.removeprefix("encoder.").replace("decoder.", "decoder_").replace("decoder_mask_token", "mask_token"): t
            for n, t in ours.items()
        }
        weights = tmp_path / "official.pth"
        torch.save({"model": state, "epoch": 1}, weights)
        extra = ("model.heads=2",)
    elif kind == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
        weights, extra = tmp_path / "timm.safetensors", ()
        save_file(model.state_dict(), weights)
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTMAEConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=32,
            patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=128, norm_pix_loss=True, layer_norm_eps=1e-6,
        )  # fmt: skip
        weights, extra = tmp_path / "theirs", ()
        transformers.ViTMAEForPreTraining(config).save_pretrained(weights)
    pretrain(config_of(images, tmp_path / "run", weights, *extra, "optim.epochs=0.5"))
    notes = json.loads((tmp_path / "run" / "loading.json").read_text())["notes"]
    told = "the decoder is random" if kind == "timm" else "the decoder is the file's"
    assert any(note.startswith(told) for note in notes)


def test_a_run_with_a_checkpoint_is_a_start_for_another_run(tmp_path, images, pretrained, capsys):
    options = ("optim.epochs=0.5", "data.image_size=32")
    pretrain(config_of(images, tmp_path / "run", pretrained, *options))
    loading = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert "the decoder is the file's" in loading["notes"] and not loading["new"]


def test_resume_and_weights_refuse_the_case_of_the_other(tmp_path, images, full_file, encoder_file, pretrained):
    run = tmp_path / "run"
    pretrain(config_of(images, run, full_file, "optim.epochs=0.5"))
    again = config_of(images, run, encoder_file, "optim.epochs=0.5")
    with pytest.raises(UserError, match=r"which started from weights=.*: leave weights=.* out to continue it"):
        pretrain(again, resume=True)
    without = again.model_copy(update={"weights": None})
    with pytest.raises(UserError, match="give them with --resume too"):
        pretrain(without, resume=True)
    with pytest.raises(UserError, match="lies in the output folder: --resume without weights continues"):
        pretrain(config_of(images, run, run))
    scratch = tmp_path / "scratch"
    shutil.copytree(pretrained, scratch)
    with pytest.raises(UserError, match="which started without weights"):
        pretrain(config_of(images, scratch, full_file), resume=True)
    pretrain(config_of(images, run, full_file, "optim.epochs=0.5"), resume=True)
    pretrain(load_config(PretrainConfig, run / "config.yaml"), resume=True)


@pytest.mark.parametrize(
    "options, told",
    [
        (("adapt.mode=decoder",), "adapt applies only to a run that starts from weights; set weights=FILE"),
        (("weights=x", "adapt.rank=4"), "rank=4 belongs to adapt.mode=lora, and the mode is full"),
        (("weights=x", "adapt.mode=lora", "adapt.frozen_epochs=2"), "frozen_epochs=2.0 belongs to adapt.mode=full"),
        (("weights=x", "adapt.frozen_epochs=900"), "must be less than optim.epochs=800"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        load_config(PretrainConfig, None, list(options))


def test_another_size_is_refused(tmp_path, images, full_file):
    with pytest.raises(UserError, match="another architecture: width 64 was asked for, but the file has 32"):
        pretrain(config_of(images, tmp_path / "run", full_file, "model.width=64", "model.heads=2"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [("data.statistics=own",), ("data.mean=[0.1,0.6,0.3]", "data.std=[0.5,0.1,0.2]")])
def test_with_other_statistics_the_same_image_keeps_its_features(tmp_path, images, full_file, asked):
    run = tmp_path / "run"
    pretrain(config_of(images, run, full_file, *asked, "optim.epochs=1", "optim.base_lr=1e-30"))
    files = [read_encoder(path) for path in (run, full_file)]
    assert files[0].info.mean != [0.3, 0.4, 0.5]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def standardised(info):
        mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
        return (pixels - mean) / std

    found, wanted = (load_encoder(each.path).encode(standardised(each.info)) for each in files)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    told = json.loads((run / "loading.json").read_text())["notes"]
    assert any("adapted from the weights' mean and std" in note for note in told)


def test_the_plan_of_a_warm_start_says_what_learns(tmp_path, images, full_file, capsys):
    print_plan(config_of(images, tmp_path / "run", full_file, "adapt.mode=decoder"))
    told = capsys.readouterr().out
    assert "adapt.mode=decoder: 0.0 M parameters learn" in told and "adapt.mode: full -> decoder" in told
    assert not (tmp_path / "run").exists()


def test_fused_blocks_come_from_a_configuration_and_go_on_with_the_weights(tmp_path, images, pretrain_options):
    shape = [*(f"model.{name}={value}" for name, value in SMALL.items()), f"data.path={images}", "optim.epochs=0.5"]
    first, plain, second, other = (tmp_path / name for name in ("first", "plain", "second", "other"))
    options = [word for word in pretrain_options if not word.startswith("model.")]

    def run(output: Path, *more: str) -> None:
        pretrain(load_config(PretrainConfig, None, [*options, *shape, *more, f"output={output}"]))

    run(first, "decoder.fuse_blocks=[0]")
    run(plain)
    assert load_file(first / "encoder.safetensors").keys() == load_file(plain / "encoder.safetensors").keys()
    fused = load_mae(first)
    assert fused.fusion is not None and fused.fusion.blocks == (0,)

    run(second, f"weights={first}", "optim.base_lr=1e-12")
    again = load_mae(second)
    assert again.fusion is not None
    torch.testing.assert_close(again.fusion.project[0].weight, fused.fusion.project[0].weight)
    run(other, f"weights={first}", "decoder.fuse_blocks=[]")
    assert load_mae(other).fusion is None


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (model := folder / "model.safetensors").write_bytes(b"weights")
        files = {model.name: {"bytes": 7, "crc32": checksum(model)}}
        (folder / "COMPLETE").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    assert full_model_in(run).name == "step_00000002"
    (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"weighty")
    assert full_model_in(run).name == "step_00000001"
    shutil.rmtree(run / "checkpoints" / "step_00000001")
    assert full_model_in(run) == run, "which is refused by name where it is read"
