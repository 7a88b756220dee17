"""Less memory by option: checkpointed blocks change no gradient, and the micro-batch is found once and stored."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mae_core.config.load import load_config
from mae_core.data.config import FinetuneData
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import build_mae
from mae_core.models.timm_trunk import checkpoint_blocks
from mae_core.training import micro_batch, precision
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.memory import fixed_bytes, kept_per_image, kept_storages
from mae_core.training.micro_batch import largest_that_fits
from mae_core.training.pretrain import build_pretrain_model, loss_of_zeros, pretrain
from mae_core.training.pretrain_config import PretrainConfig


def autoencoder() -> nn.Module:
    return build_mae("nano", image_size=32, patch_size=8, decoder_width=32, decoder_depth=2, decoder_heads=2)


def classifier() -> nn.Module:
    return ViTEncoder("nano", image_size=32, patch_size=8, num_classes=3, pooling="mean", drop_path=0.4)


@pytest.mark.parametrize("build", [autoencoder, classifier])
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(build):
    torch.manual_seed(0)
    model, pixels = build().train(), torch.randn(4, 3, 32, 32)
    nn.init.normal_(getattr(model, "head", nn.Linear(1, 1)).weight)

    def loss() -> Tensor:
        torch.manual_seed(1)
        output = model(pixels)
        return output.loss if hasattr(output, "loss") else output.square().sum()

    found = []
    for on in (False, True):
        assert checkpoint_blocks(model, on=on)
        model.zero_grad(set_to_none=True)
        loss().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append((gradients, sum(kept_storages(loss, model))))
    (plain, kept), (again, less) = found
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert less < 0.6 * kept


def test_what_is_computed_again_is_counted(pretrain_options):
    kept = []
    for on in ("false", "true"):
        config = load_config(PretrainConfig, None, [*pretrain_options, f"model.checkpointing={on}", "model.depth=6"])
        model = build_pretrain_model(config)
        blocks = checkpoint_blocks(model, on=config.model.checkpointing)
        kept.append(kept_per_image(loss_of_zeros(model, config), model))
        assert all(block.checkpointing == config.model.checkpointing for block in blocks)
    tokens = 5 * 128 * 4
    assert 6 * tokens < kept[1] < 0.6 * kept[0]


@given(st.integers(1, 300), st.integers(0, 400))
def test_the_search_finds_what_fits_to_an_eighth_and_asks_little(most, room):
    asked = []
    found = largest_that_fits(lambda n: asked.append(n) or n <= room, most)
    best = min(most, room)
    assert found <= best and best - found <= max(1, found // 8)
    assert len(asked) == len(set(asked)) <= 16 and all(1 <= n <= most for n in asked)


def test_auto_is_planned_stored_and_resumed(tmp_path, write_images, pretrain_options, monkeypatch, capsys):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=2", "optim.batch_size=8"]
    model = build_pretrain_model(load_config(PretrainConfig, None, options))
    each = kept_per_image(loss_of_zeros(model, load_config(PretrainConfig, None, options)), model)
    free = int((fixed_bytes(model) + 3.5 * each) / micro_batch.ROOM)
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: free)
    auto = [*options, "optim.micro_batch=auto", f"output={tmp_path / 'run'}", "log.checkpoint_every=1"]
    pretrain(load_config(PretrainConfig, None, auto))
    assert "optim.micro_batch: 3 images at once are the most that fit, of 8 a device" in capsys.readouterr().out
    assert load_config(PretrainConfig, tmp_path / "run" / "config.yaml").optim.micro_batch == 3
    pretrain(load_config(PretrainConfig, None, [*options, "optim.micro_batch=3", f"output={tmp_path / 'other'}"]))
    weights = (tmp_path / "other" / "encoder.safetensors").read_bytes()
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == weights
    shutil.rmtree(complete_checkpoints(tmp_path / "run")[-1])
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: 100 * free)
    pretrain(load_config(PretrainConfig, None, auto), resume=True)
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == weights


def test_fine_tuning_takes_pairs_and_resumes_with_auto(tmp_path, write_classes, pretrained, monkeypatch):
    write_classes(tmp_path / "classes", train=4, val=1)
    options = [f"data.path={tmp_path / 'classes'}", f"weights={pretrained}", f"output={tmp_path / 'run'}", "device=cpu"]
    options += ["data.workers=0", "optim.batch_size=8", "optim.epochs=1", "optim.micro_batch=auto"]
    options += ["optim.warmup_epochs=0", "model.checkpointing=true"]
    monkeypatch.setattr(micro_batch, "_planned", lambda model, loss, share: 5)
    finetune(load_config(FinetuneConfig, None, options))
    assert FinetuneData().mixup
    assert load_config(FinetuneConfig, tmp_path / "run" / "config.yaml").optim.micro_batch == 4
    monkeypatch.setattr(micro_batch, "_planned", lambda model, loss, share: 8)
    finetune(load_config(FinetuneConfig, None, options), resume=True)


def test_where_nothing_compiles_the_option_is_refused_before_anything_is_written(
    tmp_path, write_images, pretrain_options, monkeypatch
):
    def broken(function):
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\nmore lines")

    write_images(tmp_path / "images", 4)
    monkeypatch.setattr(precision.torch, "compile", broken)
    options = [
        *pretrain_options,
        f"data.path={tmp_path / 'images'}",
        f"output={tmp_path / 'run'}",
        "model.compile=true",
    ]
    with pytest.raises(
        UserError, match=r"cannot compile here \(InvalidCxxCompiler.*found\); install .* model.compile=false"
    ):
        pretrain(load_config(PretrainConfig, None, options))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(tmp_path, write_images, pretrain_options):
    try:
        precision.check_compiler(torch.device("cpu"))
    except UserError:
        pytest.skip("no compiler")
    write_images(tmp_path / "images", 4)
    losses = []
    for on in ("false", "true"):
        options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / on}", "model.depth=1"]
        options += ["optim.epochs=2", f"model.compile={on}"]
        losses.append(pretrain(load_config(PretrainConfig, None, options)).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
