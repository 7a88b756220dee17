"""``mae evaluate``: against plain timm, counts by hand, the robustness sets, several ranks, and what is refused."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.measures.robustness import ALEXNET_ERROR, corruption_errors
from mae_core.models.encoder import ViTEncoder
from mae_core.training.evaluate import as_kind_says, evaluate, mce_in_words
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig
from mae_core.training.frozen_trunk import weights_of
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights
from mae_core.weights.load import with_file

OPTIONS = ("data.workers=0", "device=cpu", "evaluation_batch=4")
CLASSES = ["ash", "birch", "cedar"]


def run_evaluate(*options: str) -> dict:
    return evaluate(load_config(EvaluateConfig, None, [*OPTIONS, *options]))


def plain_timm(num_classes: int) -> VisionTransformer:
    """A ViT-nano of timm as the official fine-tuned models are built, with random weights of every kind."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=num_classes,
        global_pool="avg",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A file of ours with the classes of ``data``, and one more."""
    torch.manual_seed(1)
    model = ViTEncoder("nano", image_size=32, patch_size=8, num_classes=4, pooling="mean")
    nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    write_weights(path, model.state_dict(), {**describe_encoder(model), "classes": [*CLASSES, "douglas"]})
    return path


def test_an_official_fine_tuned_file_says_what_plain_timm_says(tmp_path, data):
    model = plain_timm(3)
    assert {"fc_norm.weight", "head.weight"} <= model.state_dict().keys() and "norm.weight" not in model.state_dict()
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned.pth")
    options = [f"weights={tmp_path / 'mae_finetuned.pth'}", f"data.path={data / 'val'}", "save_logits=true"]
    metrics = run_evaluate(*options, f"output={tmp_path / 'run'}")
    view = create_transform(32, is_training=False, interpolation="bicubic", crop_pct=0.875)
    with np.load(tmp_path / "run" / "logits.npz") as found:
        files, logits = found["files"].tolist(), found["logits"]
        assert found["classes"].tolist() == CLASSES
    assert len(files) == 9 and files[0] == "ash/000.png"
    images = torch.stack([view(Image.open(data / "val" / name).convert("RGB")) for name in files])
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    right = sum(CLASSES[row.argmax()] == name.split("/")[0] for row, name in zip(expected, files, strict=True))
    assert metrics["top1"] == pytest.approx(100 * right / 9, abs=1e-3)


def test_a_classifier_is_measured_with_the_crop_of_its_training(tmp_path, data, pretrained):
    """The logits of the training's own view; an option and the kind of images go before it."""
    run = tmp_path / "run"
    options = [f"weights={pretrained}", f"data.path={data}", "data.workers=0", "device=cpu", "data.image_size=32"]
    options += ["optim.epochs=1", "optim.batch_size=4", "optim.warmup_epochs=0", "data.test_crop=0.5"]
    finetune(load_config(FinetuneConfig, None, [*options, f"output={run}"]))
    given = [f"weights={run}", f"data.path={data}", "save_logits=true"]
    for name, more in {"told": ["data.test_crop=0.5"], "silent": [], "other": ["data.test_crop=1"]}.items():
        run_evaluate(*given, *more, f"output={tmp_path / name}")
    told, silent, other = (np.load(tmp_path / n / "logits.npz")["logits"] for n in ("told", "silent", "other"))
    np.testing.assert_array_equal(silent, told)
    assert not np.array_equal(other, told)
    assert "test_crop: 0.5" in (tmp_path / "silent" / "config.yaml").read_text()
    config = load_config(EvaluateConfig, None, [f"weights={run}", "kind=imagenet-c"])
    assert with_file(weights_of(config), as_kind_says(config), frozen=True).data.test_crop == 1.0


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_predictions_and_classes_are_written_and_add_up(tmp_path, data, classifier):
    run = tmp_path / "run"
    metrics = run_evaluate(f"weights={classifier}", f"data.path={data}", f"output={run}")
    assert json.loads((run / "metrics.json").read_text()) == metrics
    rows = rows_of(run / "predictions.csv")
    assert [row["file"] for row in rows][:2] == ["val/ash/000.png", "val/ash/001.png"] and len(rows) == 9
    assert all(row["label"] == row["file"].split("/")[1] for row in rows)
    assert all(row["predicted"] == row["top5"].split(";")[0] and len(row["top5"].split(";")) == 4 for row in rows)
    assert metrics["top1"] == pytest.approx(100 * sum(row["label"] == row["predicted"] for row in rows) / 9, abs=1e-3)
    each = rows_of(run / "per_class.csv")
    assert [row["class"] for row in each] == [*CLASSES, "douglas"]
    assert [row["images"] for row in each] == ["3", "3", "3", "0"] and each[3]["top1"] == ""
    for row in each[:3]:
        mine = [found["predicted"] for found in rows if found["label"] == row["class"]]
        assert float(row["top1"]) == pytest.approx(100 * mine.count(row["class"]) / 3, abs=1e-3)
        assert metrics["per_class"][row["class"]] == float(row["top1"])
    picture = Image.open(run / "pictures" / "confusion.png")
    assert min(picture.size) > 300
    assert not (run / "logits.npz").exists()


def test_unreadable_images_are_named_and_not_counted(tmp_path, write_classes, classifier):
    root = write_classes(tmp_path / "data")
    (root / "val" / "ash" / "000.png").write_bytes(b"no image")
    metrics = run_evaluate(f"weights={classifier}", f"data.path={root}", f"output={tmp_path / 'run'}")
    assert metrics["images"] == 8 and len(rows_of(tmp_path / "run" / "predictions.csv")) == 8
    assert "ash/000.png" in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r"])
def test_the_subset_is_that_of_the_folders(tmp_path, write_images, kind):
    """Of a file that names no classes: ImageNet's; only the classes that have a folder compete."""
    model = plain_timm(1000)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    wnids = ImageNetInfo("imagenet-1k").label_names()
    chosen = [wnids[place] for place in (3, 17, 500)]
    for number, wnid in enumerate(chosen):
        write_images(tmp_path / "set" / wnid, 3, seed=number)
    (tmp_path / "set" / "README.txt").write_text("not a class")
    options = [f"weights={tmp_path / 'official.pth'}", f"data.path={tmp_path / 'set'}", "save_logits=true"]
    metrics = run_evaluate(*options, f"kind={kind}", f"output={tmp_path / kind}")
    run_evaluate(*options, "kind=imagenet-sketch", f"output={tmp_path / 'all'}")
    with np.load(tmp_path / kind / "logits.npz") as found, np.load(tmp_path / "all" / "logits.npz") as everything:
        assert found["classes"].tolist() == chosen and everything["classes"].tolist() == wnids
        np.testing.assert_array_equal(found["logits"], everything["logits"][:, [3, 17, 500]])
        labels = [chosen.index(name.split("/")[0]) for name in found["files"].tolist()]
        right = found["logits"].argmax(axis=1) == labels
    assert metrics["top1"] == pytest.approx(100 * right.mean(), abs=1e-3) and metrics["images"] == 9


def test_a_folder_that_is_no_class_of_imagenet_is_named(tmp_path, write_images):
    torch.save({"model": plain_timm(1000).state_dict()}, tmp_path / "official.pth")
    for name in (*ImageNetInfo("imagenet-1k").label_names()[:2], "n99999999"):
        write_images(tmp_path / "set" / name, 1)
    options = [f"weights={tmp_path / 'official.pth'}", "kind=imagenet-a", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"labels that are not classes of .*official\.pth: n99999999; its classes"):
        run_evaluate(*options, f"data.path={tmp_path / 'set'}")
    write_images(tmp_path / "others" / "cat", 1)
    with pytest.raises(UserError, match=r"has 1 class folders; .* or name the folders as ImageNet does"):
        run_evaluate(*options, f"data.path={tmp_path / 'others'}")
    assert not (tmp_path / "run").exists()


def test_corruption_errors_are_the_formula():
    severities = range(1, 6)
    as_alexnet = {name: dict.fromkeys(severities, rate) for name, rate in ALEXNET_ERROR.items()}
    assert len(ALEXNET_ERROR) == 15 and corruption_errors(as_alexnet)["mCE"] == 100.0
    half = {**as_alexnet, "fog": {s: ALEXNET_ERROR["fog"] * s / 6 for s in severities}}  # mean 3/6
    found = corruption_errors(half)
    assert found["corruptions"]["fog"]["corruption_error"] == 50.0
    assert found["mCE"] == pytest.approx(100 - 50 / 15, abs=1e-3)
    assert found["corruptions"]["fog"]["error"]["5"] == pytest.approx(100 * ALEXNET_ERROR["fog"] * 5 / 6, abs=1e-3)
    part = corruption_errors({"fog": half["fog"], "snow": {1: 0.5}})
    assert part["mCE"] is None and part["mCE_of_found"] == 50.0 and part["corruptions"]["snow"]["mean_error"] == 50.0
    assert part["corruptions"]["snow"]["corruption_error"] is None
    assert "snow" in part["incomplete_corruptions"] and "fog" not in part["incomplete_corruptions"]
    assert mce_in_words(corruption_errors(as_alexnet)) == "; mCE 100.0"
    told = "; no mCE, 14 of 15 corruptions are incomplete"
    assert mce_in_words(part) == f"{told} (50.0 is the mean over the others)"
    assert mce_in_words(corruption_errors({"fog": {1: 0.5}})) == told.replace("14", "15")


def test_corruptions_are_found_in_their_groups(tmp_path, write_images, classifier):
    for place in ("noise/gaussian_noise", "fog"):
        for severity in range(1, 6):
            for number, name in enumerate(CLASSES):
                write_images(tmp_path / "c" / place / str(severity) / name, 2, seed=number, size=(32, 32))
    run = tmp_path / "run"
    metrics = run_evaluate(f"weights={classifier}", f"data.path={tmp_path / 'c'}", "kind=imagenet-c", f"output={run}")
    assert set(metrics["corruptions"]) == {"gaussian_noise", "fog"} and metrics["images"] == 60
    errors = set(metrics["corruptions"]["fog"]["error"].values())
    assert len(errors) == 1  # the same images at each severity
    fog = metrics["corruptions"]["fog"]
    assert fog["corruption_error"] == pytest.approx(fog["mean_error"] / ALEXNET_ERROR["fog"], abs=1e-2)
    assert metrics["mCE"] is None and metrics["mCE_of_found"] is not None
    rows = rows_of(run / "predictions.csv")
    assert len(rows) == 60 and rows[0]["file"] == "noise/gaussian_noise/1/ash/000.png"
    assert load_config(EvaluateConfig, run / "config.yaml").data.test_crop == 1.0


RANKS = """
import sys
from mae_core.config.load import load_config
from mae_core.training.frozen_config import EvaluateConfig
from mae_core.training.evaluate import evaluate
evaluate(load_config(EvaluateConfig, None, sys.argv[1:]))
"""


def test_any_number_of_ranks_counts_every_image_once(tmp_path, data, classifier, run_forked):
    """Nine images on two ranks, in batches of four."""
    options = [*OPTIONS, f"weights={classifier}", f"data.path={data}", "save_logits=true"]
    alone = run_evaluate(f"weights={classifier}", f"data.path={data}", "save_logits=true", f"output={tmp_path / '1'}")
    result = run_forked(["-c", RANKS, *options, f"output={tmp_path / '2'}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "2" / "metrics.json").read_text()) == alone
    assert (tmp_path / "2" / "predictions.csv").read_text() == (tmp_path / "1" / "predictions.csv").read_text()


def test_a_classifier_with_several_labels_is_measured_by_average_precision(tmp_path, write_images):
    model = ViTEncoder("nano", image_size=32, patch_size=8, num_classes=2, pooling="mean")
    nn.init.normal_(model.head.weight)
    metadata = {**describe_encoder(model), "classes": ["sea", "sky"], "multi_label": True}
    write_weights(tmp_path / "classifier.safetensors", model.state_dict(), metadata)
    write_images(tmp_path / "data", 4)
    (tmp_path / "data" / "val.csv").write_text("file,labels\n000.png,sea\n001.png,sea;sky\n002.png,\n003.png,sky\n")
    options = [f"weights={tmp_path / 'classifier.safetensors'}", f"data.path={tmp_path / 'data'}"]
    metrics = run_evaluate(*options, f"output={tmp_path / 'run'}")
    assert metrics["images"] == 4 and 0 < metrics["mAP"] <= 100
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    assert [row["label"] for row in rows] == ["sea", "sea;sky", "", "sky"]
    (tmp_path / "data" / "val.csv").write_text("file,labels\n000.png,fish\n")
    with pytest.raises(UserError, match="labels that are not the model's: fish"):
        run_evaluate(*options, f"output={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"multi-label classifier; list its images in .*val\.csv"):
        run_evaluate(*options, f"data.path={tmp_path}", f"output={tmp_path / 'other'}")
    with pytest.raises(UserError, match="multi-label classifier; evaluate it with kind=folder"):
        run_evaluate(*options, "kind=imagenet-a", f"output={tmp_path / 'other'}")


@pytest.mark.parametrize(
    "options, message",
    [
        (["weights={encoder}"], "is a pre-trained encoder without a head, not a classifier; fine-tune it"),
        (["weights={root}/three.pth", "data.path={root}/five"], "has 3 classes and does not name them, but .* has 5"),
        (
            ["data.path={root}/five"],
            "labels that are not classes of .*: c0, c1, c2, c3, c4; its classes are ash",
        ),
        (["data.path={root}/none"], "none does not exist; set data.path"),
        (["data.path={data}/val/ash"], "holds no class folders"),
        (["data.path={data}/val/ash/000.png"], "000.png is a file; set data.path to a folder"),
        (["data.path={root}/bad"], "none of 1 images tried can be read"),
        (["kind=imagenet-c"], "holds no corruption of ImageNet-C, such as gaussian_noise/1"),
        (["data.image_size=33"], "does not split into 8x8 patches"),
        (["weights=null"], "no weights given"),
        (["data.path=null"], "no image folder given"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    tmp_path, data, classifier, pretrained, write_images, options, message
):
    torch.save({"model": plain_timm(3).state_dict()}, tmp_path / "three.pth")
    for number in range(5):
        write_images(tmp_path / "five" / f"c{number}", 1)
    write_images(tmp_path / "bad" / "ash", 1)[0].write_bytes(b"no image")
    given = [option.format(root=tmp_path, data=data, encoder=pretrained) for option in options]
    with pytest.raises(UserError, match=message):
        run_evaluate(f"weights={classifier}", f"data.path={data}", f"output={tmp_path / 'run'}", *given)
    assert not (tmp_path / "run").exists()
