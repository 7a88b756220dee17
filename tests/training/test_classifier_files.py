"""A classifier leaves the toolkit: in timm's create_model, exported from a run, converted, it is what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from typer.testing import CliRunner

import mae_core
from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.training.evaluate import evaluate
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig, LinprobeConfig
from mae_core.training.linprobe import linprobe
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import read_weights, write_weights

CLASSES = ["ash", "birch", "cedar"]


def mae(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, pretrained) -> Path:
    """A file of ours that states its classes and a test crop of its own."""
    torch.manual_seed(1)
    model = mae_core.build_classifier(pretrained, 3, pooling="mean")
    nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    write_weights(path, model.state_dict(), {**describe_encoder(model), "classes": CLASSES, "test_crop": 0.5})
    return path


def test_a_saved_classifier_opens_in_timms_create_model(tmp_path, pretrained):
    """The names are timm's: its own factory builds the same network, and its logits are ours."""
    model = mae_core.build_classifier(pretrained, 3, pooling="mean")
    nn.init.normal_(model.head.weight)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    other = timm.create_model("vit_base_patch16_224", num_classes=3, global_pool="avg", **options)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other.eval()(images), model.eval()(images), rtol=1e-5, atol=1e-5)


def test_an_exported_classifier_is_the_same_in_timm(tmp_path, data, classifier):
    """One command, and timm's create_model gives the logits, the class names and the view of our evaluation."""
    mae("export", classifier, "--timm", "--out", tmp_path / "folder")
    other = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert other.pretrained_cfg["label_names"] == CLASSES
    view = create_transform(**timm.data.resolve_model_data_config(other), is_training=False)
    options = [f"weights={classifier}", f"data.path={data}", f"output={tmp_path / 'run'}", "save_logits=true"]
    evaluate(load_config(EvaluateConfig, None, [*options, "data.workers=0", "device=cpu"]))
    with np.load(tmp_path / "run" / "logits.npz") as found, torch.no_grad():
        images = torch.stack([view(Image.open(data / name).convert("RGB")) for name in found["files"]])
        np.testing.assert_allclose(other(images).numpy(), found["logits"], atol=1e-5)


def test_a_run_is_exported_as_it_was_measured(tmp_path, data, pretrained):
    """The averaged weights, not those of the checkpoint; of a probe the trunk and its head."""
    common = [f"weights={pretrained}", f"data.path={data}", "data.workers=0", "device=cpu", "optim.epochs=1"]
    common += ["optim.batch_size=4", "optim.warmup_epochs=0", "optim.base_lr=0.1"]
    finetune(load_config(FinetuneConfig, None, [*common, "data.image_size=32", "ema=0.9", f"output={tmp_path / 'ft'}"]))
    linprobe(load_config(LinprobeConfig, None, [*common, f"output={tmp_path / 'lp'}"]))
    for run, kind in (("ft", "--timm"), ("lp", "--timm"), ("ft", "--huggingface")):
        out = tmp_path / f"{run}{kind}"
        mae("export", tmp_path / run, kind, "--out", out, "--check")
        if kind == "--timm":
            exported, saved = (
                read_weights(place)[0]
                for place in (out / "model.safetensors", tmp_path / run / "classifier.safetensors")
            )
            assert exported.keys() == saved.keys()
            assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())


def test_a_converted_classifier_is_measured_as_before(tmp_path, classifier):
    """What the file says of its labels and of its view goes along."""
    tensors, metadata = read_weights(classifier)
    stated = {"multi_label": True, "test_crop": 0.5}
    write_weights(tmp_path / "one.safetensors", tensors, {**metadata, **stated})
    mae("convert", tmp_path / "one.safetensors", "--to", "timm", "--out", tmp_path / "other.safetensors")
    assert stated.items() <= read_weights(tmp_path / "other.safetensors")[1].items()
