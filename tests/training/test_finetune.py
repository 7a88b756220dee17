"""Fine-tuning from an encoder and from scratch, its metrics, and its resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core.config.load import load_config
from mae_core.data.labelled import LabelledBatch
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.models.encoder import ViTEncoder
from mae_core.training.finetune import build_model, finetune, unfit_recipe
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.predictions import evaluate_classifier
from mae_core.training.run import open_run
from mae_core.training.signals import Stopped
from mae_core.weights.files import read_weights
from mae_core.weights.load import load_encoder

OPTIONS = (
    "data.image_size=32",
    "data.workers=0",
    "optim.warmup_epochs=0",
    "optim.batch_size=4",
    "log.every=1",
    "evaluation_batch=5",
    "device=cpu",
)
SCRATCH = ("from_scratch=true", "model.size=nano", "model.patch_size=8", "ema=null")


def configuration(*options: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, None, [*OPTIONS, *options])


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.mark.slow
def test_from_an_encoder(tmp_path, data, pretrained):
    run = tmp_path / "run"
    metrics = finetune(configuration(f"weights={pretrained}", f"data.path={data}", f"output={run}", "optim.epochs=2"))
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["images"] == 9 and set(metrics["per_class"]) == {"ash", "birch", "cedar"}
    assert metrics["top5"] == 100.0  # of three classes
    assert metrics["top1"] == pytest.approx(sum(metrics["per_class"].values()) / 3, abs=0.01)

    report = json.loads((run / "loading.json").read_text())
    assert report["new"] == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert "blocks.5.mlp.fc2.bias" in report["loaded"] and not report["refused"] and report["share"] > 0.99
    state, metadata = read_weights(run / "classifier.safetensors")
    assert metadata["classes"] == ["ash", "birch", "cedar"] and state["head.weight"].shape == (3, 128)
    assert metadata["mean"] == read_weights(pretrained / "encoder.safetensors")[1]["mean"]


@pytest.mark.slow
def test_from_scratch_and_resumed(tmp_path, data):
    options = [*SCRATCH, f"data.path={data}", "optim.epochs=3", "log.checkpoint_every=4", "evaluate_every=1"]
    options += ["ema=0.5", "optim.base_lr=0.01"]  # the average must survive the resume too
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    metrics = finetune(configuration(*options, f"output={whole}"))
    assert not (whole / "loading.json").exists()

    class Stop(Exception):
        pass

    def die(*_args, **_options):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_core.training.classification.evaluate_classifier", die_at_second := _Second(die))
        with pytest.raises(Stop):
            finetune(configuration(*options, f"output={cut}"))
    assert die_at_second.calls == 3
    assert [p.name for p in complete_checkpoints(cut)] == ["step_00000004"]
    assert not (cut / "metrics.json").exists() and not (cut / "classifier.safetensors").exists()

    assert finetune(configuration(*options, f"output={cut}"), resume=True) == metrics
    assert (cut / "classifier.safetensors").read_bytes() == (whole / "classifier.safetensors").read_bytes()
    entries = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 10))
    assert [entry["step"] for entry in entries if "top1" in entry] == [3, 6, 9]

    def signalled(*parts, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_classifier(*parts, **more)

    asked = tmp_path / "asked"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr("mae_core.training.classification.evaluate_classifier", signalled)
        finetune(configuration(*options, f"output={asked}"))
    assert stopped.value.code == 75
    assert [p.name for p in complete_checkpoints(asked)] == ["step_00000004"], "the evaluation ends, and the next step"
    assert finetune(configuration(*options, f"output={asked}"), resume=True) == metrics
    assert (asked / "classifier.safetensors").read_bytes() == (whole / "classifier.safetensors").read_bytes()


class _Second:
    """Lets the first evaluation through: of the average, and of the model itself."""

    def __init__(self, then) -> None:
        self.then, self.calls = then, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return evaluate_classifier(*args, **options) if self.calls <= 2 else self.then()


@pytest.mark.slow
def test_it_learns_and_the_saved_classifier_is_the_evaluated_one(tmp_path, data):
    """Without augmentation, on three classes of a few colours: the training images are learnt by heart."""
    plain = ["data.auto_augment=null", "data.crop_scale=[1,1]", "data.hflip=0", "data.random_erasing=0"]
    plain += [
        "data.statistics=imagenet",
        "data.mixup=0",
        "data.cutmix=0",
        "data.label_smoothing=0",
        "model.drop_path=0",
    ]
    plain += ["optim.base_lr=0.08", "optim.weight_decay=0.05", "optim.betas=[0.9,0.999]"]
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(data / "train")
    (root / "val").symlink_to(data / "train")
    run = tmp_path / "run"
    options = [*SCRATCH, *plain, f"data.path={root}", f"output={run}", "optim.epochs=30", "data.test_crop=1"]
    metrics = finetune(configuration(*options, "optim.batch_size=6", "optim.warmup_epochs=3"))
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    assert metrics["top1"] == 100.0

    from mae_core.data.images import statistics_of
    from mae_core.data.labelled import TestImages, read_image_folder

    config = configuration(*options)
    files = read_image_folder(root)[1]
    images = TestImages(files, config.data, (32, 32), statistics_of(config.data))
    model = ViTEncoder("nano", image_size=32, patch_size=8, num_classes=3, pooling="mean").eval()
    model.load_state_dict(read_weights(run / "classifier.safetensors")[0])
    logits = model(torch.stack([images[index].pixels for index in range(len(images))]))
    assert logits.argmax(dim=1).tolist() == files.labels


def test_accuracy_counts_are_exact(tmp_path):
    """Against counting by hand, over uneven batches with unreadable images among them."""

    class Table(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels[:, :, 0, 0]

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 8, generator=generator), torch.randint(8, (23,), generator=generator)
    parts = [(0, 10), (10, 10), (10, 21), (21, 23)]
    batches = [LabelledBatch(logits[a:b, :, None, None], labels[a:b], []) for a, b in parts]
    run = open_run(configuration(*SCRATCH, f"output={tmp_path / 'run'}"), resume=False)
    accuracy = evaluate_classifier(Table(), batches, run, num_classes=8)

    ranks = [sorted(range(8), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    right = sum(order[0] == label for order, label in zip(ranks, labels.tolist(), strict=True))
    among = sum(label in order[:5] for order, label in zip(ranks, labels.tolist(), strict=True))
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (23, right / 23, among / 23)
    for order, label in zip(ranks, labels.tolist(), strict=True):
        accuracy.confusion[label, order[0]] -= 1
    assert not accuracy.confusion.any()


def test_per_class_accuracy_of_a_class_without_images_is_unknown():
    from mae_core.measures.accuracy import Accuracy

    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 0]])
    result = Accuracy(confusion, top5_hits=6).as_dict(["a", "b", "c"])
    assert result == {"top1": 50.0, "top5": 100.0, "images": 6, "per_class": {"a": 75.0, "b": None, "c": 0.0}}


def test_the_trunk_is_the_encoders_and_the_head_is_new(data, pretrained):
    config = configuration(f"weights={pretrained}", f"data.path={data}", "data.image_size=48", "model.drop_path=0.2")
    model, report, statistics = build_model(config, num_classes=3)
    encoder = load_encoder(pretrained)
    assert torch.equal(model.blocks[4].attn.qkv.weight, encoder.blocks[4].attn.qkv.weight)
    assert model.grid == (6, 6, 8) and report.resized == {"pos_embed": "4x4 -> 6x6"}
    assert model.head.weight.abs().max() < 2e-4
    assert len(statistics.mean) == 3
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.2 * index / 5 for index in range(6)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["model.size=base"], "size base was asked for, but the file has nano"),
        (["model.patch_size=16"], "patch_size 16 was asked for, but the file has 8"),
        (["data.channels=1"], r"data\.channels 1 was asked for, but the file has 3"),
        (["data.image_size=36"], "does not split into 8x8 patches"),
        (["optim.batch_size=5"], "mixup and cutmix need an even"),
        (["optim.batch_size=6", "optim.micro_batch=3"], "mixup and cutmix need an even"),
    ],
)
def test_what_contradicts_the_weights_is_refused_before_any_work(tmp_path, data, pretrained, options, message):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        finetune(configuration(f"weights={pretrained}", f"data.path={data}", f"output={run}", *options))
    assert not run.exists()


@pytest.mark.parametrize("batch_size, message", [(6, "need an even"), (5, "does not divide")])
def test_the_share_of_a_rank_must_be_even_for_mixup(tmp_path, data, monkeypatch, batch_size, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*SCRATCH, f"data.path={data}", f"output={tmp_path / 'run'}", f"optim.batch_size={batch_size}"]
    with pytest.raises(UserError, match=message):
        finetune(configuration(*options))
    assert not (tmp_path / "run").exists()
    assert not torch.distributed.is_initialized()


def test_layer_decay_scales_every_group(tmp_path, data, monkeypatch):
    """id 0 for the embeddings, i + 1 for block i, the rest at full rate: 0.5 ** (depth + 1 - id)."""
    seen = {}

    def spy(model, *_args, **_options):
        optimizer = _args[2]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
        raise KeyboardInterrupt

    monkeypatch.setattr("mae_core.training.finetune.fit", spy)
    options = [*SCRATCH, f"data.path={data}", f"output={tmp_path / 'run'}", "optim.layer_decay=0.5"]
    options += ["optim.weight_decay=0.05"]
    with pytest.raises(KeyboardInterrupt):
        finetune(configuration(*options))
    assert seen["cls_token"] == (0.5**7, 0.0) and seen["pos_embed"] == (0.5**7, 0.0)
    assert seen["patch_embed.proj.weight"] == (0.5**7, 0.05)
    for index in range(6):
        assert seen[f"blocks.{index}.attn.qkv.weight"] == (0.5 ** (6 - index), 0.05)
        assert seen[f"blocks.{index}.attn.qkv.bias"] == (0.5 ** (6 - index), 0.0)
    assert seen["head.weight"] == (1.0, 0.05) and seen["fc_norm.weight"] == (1.0, 0.0)


@pytest.mark.slow
def test_greyscale_images_are_pretrained_and_finetuned_on(tmp_path, data, pretrain_options):
    """One channel all the way, through the same augmentations."""
    from mae_core.training.pretrain import pretrain
    from mae_core.training.pretrain_config import PretrainConfig

    options = [*pretrain_options, "data.channels=1", f"data.path={data / 'train'}", "optim.epochs=1"]
    pretrain(load_config(PretrainConfig, None, [*options, f"output={tmp_path / 'encoder'}"]))
    options = [f"weights={tmp_path / 'encoder'}", f"data.path={data}", f"output={tmp_path / 'run'}", "optim.epochs=4"]
    with pytest.raises(UserError, match=r"data\.channels 3 was asked for, but the file has 1"):
        finetune(configuration(*options, "data.channels=3"))
    assert finetune(configuration(*options))["images"] == 9  # nobody asked: as the file says
    stored = load_config(FinetuneConfig, tmp_path / "run" / "config.yaml")
    assert (stored.data.channels, stored.model.size) == (1, "nano")
    finetune(stored, resume=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_readable_image_is_refused_before_anything_is_written(tmp_path, write_classes, split):
    root = write_classes(tmp_path / "data", train=2, val=1)
    for path in (root / split).rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="images tried can be read"):
        finetune(configuration(*SCRATCH, f"data.path={root}", f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_another_size_is_named():
    large = ["weights=somewhere", "model.size=large"]
    assert "large is base_lr 1e-3, layer_decay 0.75, drop_path 0.2" in unfit_recipe(configuration(*large))
    assert unfit_recipe(configuration(*large, "optim.base_lr=1e-3")) is None
    assert unfit_recipe(configuration("weights=somewhere")) is None
    assert unfit_recipe(configuration("from_scratch=true", "model.size=large")) is None  # Table 11 is filled in
