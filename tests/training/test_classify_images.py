"""A classifier and an encoder from Python: files, pictures and arrays in, the answers of the commands out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mae_core
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.training.classify_images import predict_folder
from mae_core.training.embedding import write_features
from mae_core.training.evaluate import evaluate
from mae_core.training.frozen_config import EvaluateConfig, FeaturesConfig
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights

CLASSES = ["ash", "birch", "cedar"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def make_classifier(tmp_path_factory):
    def make(**facts) -> Path:
        torch.manual_seed(1)
        model = ViTEncoder("nano", image_size=32, patch_size=8, num_classes=3, pooling="mean")
        nn.init.normal_(model.head.weight)
        path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
        write_weights(path, model.state_dict(), {**describe_encoder(model), "classes": CLASSES, **facts})
        return path

    return make


def test_the_answers_are_those_of_the_evaluation(data, make_classifier, tmp_path):
    weights = make_classifier()
    options = [f"weights={weights}", f"data.path={data / 'val'}", f"output={tmp_path / 'run'}", "device=cpu"]
    evaluate(load_config(EvaluateConfig, None, [*options, "data.workers=0", "save_logits=true"]))
    stored = np.load(tmp_path / "run" / "logits.npz")
    paths = [data / "val" / name for name in stored["files"]]
    found = mae_core.load_classifier(weights, device="cpu").predict(paths)
    expected = torch.from_numpy(stored["logits"]).softmax(dim=1).numpy()
    np.testing.assert_allclose([answer.probabilities for answer in found], expected, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    assert [answer.name for answer in found] == [row["predicted"] for row in rows]
    assert found[0].classes == CLASSES and [name for name, _ in found[0].top(2)] == rows[0]["top5"].split(";")[:2]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_files_pictures_arrays_and_tensors_agree(mode, write_images, make_classifier, tmp_path):
    (path,) = write_images(tmp_path, 1)
    picture = Image.open(path).convert(mode)
    picture.save(path)
    classifier = mae_core.load_classifier(make_classifier(), device="cpu")
    array = np.asarray(picture)
    given = [path, str(path), picture, array]
    if mode == "RGB":
        given += [torch.from_numpy(array.copy()).permute(2, 0, 1)]
    found = classifier.predict(given)
    for other in found[1:]:
        np.testing.assert_array_equal(other.probabilities, found[0].probabilities)
    one = classifier.predict(array)
    assert one.name == found[0].name and one.draw().width >= 320


def test_deep_arrays_are_shares_of_their_type(write_images, make_classifier, tmp_path):
    """uint16 and floats of 0..1 are the same image as the 8 bits, but for resizing in numbers instead of in steps."""
    (path,) = write_images(tmp_path, 1)
    array = np.asarray(Image.open(path))
    classifier = mae_core.load_classifier(make_classifier(), device="cpu")
    plain, deep, shares = classifier.predict([array, array.astype(np.uint16) * 257, (array / 255).astype(np.float32)])
    np.testing.assert_allclose(deep.probabilities, shares.probabilities, atol=1e-4)
    np.testing.assert_allclose(deep.probabilities, plain.probabilities, atol=0.05)


def test_a_folder_without_labels_becomes_a_table_and_a_sheet(data, make_classifier, tmp_path, capsys):
    (data / "val" / "ash" / "broken.png").write_bytes(b"no image")
    weights, images = make_classifier(), data / "val"
    table = predict_folder(weights, images, tmp_path / "out", device="cpu")
    rows = list(csv.DictReader(table.open()))
    said = capsys.readouterr().out
    assert "broken.png: not an image" in said and "classified 9 images" in said
    (data / "val" / "ash" / "broken.png").unlink()
    assert [row["file"] for row in rows[:2]] == ["ash/000.png", "ash/001.png"] and len(rows) == 9
    found = mae_core.load_classifier(weights, device="cpu").predict(images / rows[0]["file"])
    assert rows[0]["name"] == found.name and float(rows[0]["probability"]) == pytest.approx(found.probability, abs=1e-5)
    assert [entry.split()[0] for entry in rows[0]["top3"].split(";")] == [name for name, _ in found.top(3)]
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 160
    with pytest.raises(UserError, match="out is not empty; give another --out"):
        predict_folder(weights, images, tmp_path / "out")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        predict_folder(weights, tmp_path / "text.png", tmp_path / "other", device="cpu")
    assert not (tmp_path / "other").exists()


def test_several_labels_an_image_have_probabilities_of_their_own(write_images, make_classifier, tmp_path):
    (path,) = write_images(tmp_path, 1)
    plain = mae_core.load_classifier(make_classifier(), device="cpu").predict(path)
    several = mae_core.load_classifier(make_classifier(multi_label=True), device="cpu").predict(path)
    logits = torch.from_numpy(several.probabilities).logit()
    np.testing.assert_allclose(logits.softmax(0).numpy(), plain.probabilities, atol=1e-5)
    assert several.names == [name for name, value in several.top(3) if value >= 0.5]


def test_what_cannot_be_classified_is_said(pretrained, make_classifier, tmp_path):
    classifier = mae_core.load_classifier(make_classifier(), device="cpu")
    with pytest.raises(UserError, match=r"image number 1 \(ndarray\) cannot be read \(it has 5 channels"):
        classifier.predict([np.zeros((9, 9), np.uint8), np.zeros((9, 9, 5), np.float32)])
    with pytest.raises(UserError, match="no images given"):
        classifier.predict([])
    with pytest.raises(UserError, match=r"none\.png cannot be read"):
        classifier.predict(tmp_path / "none.png")
    with pytest.raises(UserError, match="a pre-trained encoder without a head, not a classifier"):
        mae_core.load_classifier(pretrained)
    with pytest.raises(UserError, match="has 3 classes, and 2 names were given"):
        mae_core.load_classifier(make_classifier(classes=None), classes=["a", "b"])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embeddings_are_those_of_mae_features(pooling, pretrained, write_images, tmp_path):
    paths = write_images(tmp_path / "images", 3)
    options = [f"weights={pretrained}", f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "device=cpu"]
    options += ["data.workers=0", "data.test_crop=1", "picture=none", f"model.pooling={pooling}"]
    stored = np.load(write_features(load_config(FeaturesConfig, None, options)))["features"]
    found = mae_core.embed(mae_core.load_encoder(pretrained), paths, pooling=pooling, batch=2)
    assert found.shape == (3, 128)
    np.testing.assert_allclose(found.numpy(), stored, atol=1e-5)
    one = mae_core.embed(mae_core.load_encoder(pretrained), np.asarray(Image.open(paths[1])), pooling=pooling)
    np.testing.assert_allclose(one[0].numpy(), stored[1], atol=1e-5)
