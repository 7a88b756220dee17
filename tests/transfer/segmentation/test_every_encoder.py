"""A step of fine-tuning, of detection and of segmentation on a trunk of timm of every family, by the same options as a
user's, and the account of its file; ``benchmarks/encoders.py`` does it with networks of their full size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.eva import Eva

from mae_core.config.load import load_config
from mae_core.models.timm_trunk import described
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from tests.timm_models import file_of, small, weights_of
from tests.transfer.segmentation.test_timm_segmentation import DIGITS
from transfer.detection.run import train_detector
from transfer.segmentation.train_net import train_segmenter

STEP = ("data.workers=0", "optim.batch_size=6", "optim.epochs=0.5", "optim.warmup_epochs=0", "device=cpu")
DENSE = ("deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "samvit_base_patch16")
"""Two prefix tokens and heads, registers and patches of 14, no prefix and a neck: what the tiny models lack that the
other tests of dense tasks use."""
FAMILIES = (
    *DENSE,
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_clip_224",
)
TRIED = [(task, name) for task in ("finetune", "detect", "segment") for name in FAMILIES]


@pytest.fixture
def small_trunks(monkeypatch):
    """timm builds its models with two narrow blocks, under their own names."""
    create = timm.create_model
    described.cache_clear()
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**small(name), **given}))
    yield
    described.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def classes(tmp_path_factory, write_classes):
    return write_classes(tmp_path_factory.mktemp("classes"), val=1)


@pytest.mark.parametrize(("task", "name"), [pair for pair in TRIED if pair[0] == "finetune" or pair[1] in DENSE])
def test_a_step_on_a_trunk_of_timm(task, name, small_trunks, folder, classes, request, tmp_path):
    path, run = file_of(name, folder), tmp_path / "run"
    given = [f"weights={path}", f"model.trunk=timm:{name}"]
    patch = described(f"timm:{name}").patch_size
    if task == "finetune":
        options = [*STEP, *given, f"data.image_size=[{patch},{2 * patch}]", f"data.path={classes}", f"output={run}"]
        finetune(load_config(FinetuneConfig, None, options))
    elif task == "detect":
        options = [*given, *(["model.patch_size=16"] if patch == 14 else []), *STEP[2:4]]
        train_detector(request.getfixturevalue("configure_detection")(*options, scratch=False))
    else:
        pytest.importorskip("mmseg")
        options = {**request.getfixturevalue("tiny"), "trunk": f"timm:{name}", "iterations": 3, "crop_size": 2 * patch}
        train_segmenter(DIGITS, weights=path, work_dir=run, cfg_options=options)
    report = json.loads((run / "loading.json").read_text())
    told = {*report["loaded"], *report["renamed"], *report["changed"], *report["unused"], *report["resized"]}
    with safe_open(path, "pt") as file:
        assert {*file.keys()} <= told
    assert all(report["unused"].values()) and not report["refused"]
    assert all(name.startswith(("head", "fc_norm.")) for name in report["new"])


class Stopped(Exception):
    """As when a machine goes away in a step."""


@pytest.mark.parametrize("task", ["finetune", "detect", "segment"])
def test_a_stopped_training_goes_on_to_bitwise_the_same_weights(task, classes, request, tmp_path, monkeypatch):
    """Registers, rotary positions, layer scale, SwiGLU and drop path."""
    path = weights_of("tiny_dinov3", tmp_path)
    given = [f"weights={path}", "model.trunk=timm:tiny_dinov3", "model.drop_path=0.3", "log.checkpoint_every=2"]

    def train(run: Path, *, resume: bool = False) -> Path:
        if task == "finetune":
            options = [*STEP, *given, "optim.epochs=2", "data.image_size=32", f"data.path={classes}", f"output={run}"]
            finetune(load_config(FinetuneConfig, None, options), resume=resume)
            return run / "classifier.safetensors"
        if task == "detect":
            configure = request.getfixturevalue("configure_detection")
            train_detector(configure(*given, "optim.epochs=4", f"output={run}", scratch=False), resume=resume)
            return run / "detector.safetensors"
        pytest.importorskip("mmseg")
        options = {**request.getfixturevalue("tiny"), "trunk": "timm:tiny_dinov3", "iterations": 4}
        options |= {"model.backbone.drop_path": 0.3, "default_hooks.checkpoint.interval": 2}
        train_segmenter(DIGITS, weights=None if resume else path, work_dir=run, cfg_options=options, resume=resume)
        return run / "segmenter.safetensors"

    whole = load_file(train(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        forward, steps = Eva._pos_embed, []

        def stops(model, tokens):
            steps.append(model.training)
            if sum(steps) == 4:
                raise Stopped
            return forward(model, tokens)

        patch.setattr(Eva, "_pos_embed", stops)
        with pytest.raises(Stopped):
            train(tmp_path / "cut")
    resumed = load_file(train(tmp_path / "cut", resume=True))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
