"""``mae knn`` and ``mae features``: against scikit-learn on the same features, with pictures, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.config.load import load_config
from mae_core.data.images import statistics_of
from mae_core.data.labelled import TestImages, read_image_folder
from mae_core.data.sources import open_files
from mae_core.errors import UserError
from mae_core.training.embedding import knn, pca, write_features
from mae_core.training.frozen_config import FeaturesConfig, KnnConfig
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.load import load_encoder, read_encoder

PCA = pytest.importorskip("sklearn.decomposition", reason="the independent reference").PCA
KNeighborsClassifier = pytest.importorskip("sklearn.neighbors").KNeighborsClassifier

OPTIONS = ("data.workers=0", "device=cpu", "evaluation_batch=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


def embed(data: Path, pretrained: Path) -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    """cls features of train and val, image by image."""
    encoder, found = load_encoder(pretrained), []
    config = load_config(KnnConfig, None, ["data.image_size=32"])
    statistics = statistics_of(config.data, read_encoder(pretrained).metadata)
    for files in read_image_folder(data):
        images = TestImages(files, config.data, (32, 32), statistics)
        with torch.no_grad():
            rows = [encoder.encode(images[index].pixels[None])[0, 0] for index in range(len(images))]
        found += [torch.stack(rows).numpy(), list(files.labels)]
    return tuple(found)


def test_knn_is_scikit_learns_on_the_encoders_features(tmp_path, data, pretrained):
    options = [*OPTIONS, f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}", "k=[3,10]"]
    metrics = knn(load_config(KnnConfig, None, options))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    bank, bank_labels, queries, labels = embed(data, pretrained)
    for k in (3, 10):
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(bank, bank_labels)
        assert metrics["top1"][str(k)] == pytest.approx(100 * reference.score(queries, labels), abs=1e-3)
    assert (metrics["images"], metrics["bank"], metrics["pooling"]) == (9, 12, "cls")


@pytest.mark.parametrize("picture", ["pca", "tsne"])
def test_features_come_with_their_files_and_a_picture(tmp_path, data, pretrained, picture):
    (data / "train" / "ash" / "zz.png").write_bytes(b"no image")
    options = [*OPTIONS, f"weights={pretrained}", f"data.path={data / 'train'}", f"output={tmp_path / 'run'}"]
    file = write_features(load_config(FeaturesConfig, None, [*options, f"picture={picture}"]))
    (data / "train" / "ash" / "zz.png").unlink()
    with np.load(file) as found:
        names, features, folders = found["files"].tolist(), found["features"], found["folders"].tolist()
    assert len(names) == 12 and names[0] == "ash/000.png" and "ash/zz.png" not in names
    assert folders == [name.split("/")[0] for name in names]
    bank, _, _, _ = embed(data, pretrained)
    np.testing.assert_allclose(features, bank, atol=1e-5)
    image = Image.open(tmp_path / "run" / "pictures" / f"{picture}.png").convert("RGB")
    assert min(image.size) > 400 and len(image.getcolors(maxcolors=2**20)) > 10


@pytest.mark.parametrize("given, names", [("000.png", ["000.png"]), ("two.txt", ["001.png", "000.png"])])
def test_one_image_and_a_list_have_the_features_of_their_folder(tmp_path, write_images, pretrained, given, names):
    folder = tmp_path / "images"
    write_images(folder, 3)
    (folder / "two.txt").write_text("001.png\n000.png\n")
    found = {}
    for path in (folder, folder / given):
        options = [*OPTIONS, f"weights={pretrained}", f"data.path={path}", f"output={tmp_path / f'run_{path.name}'}"]
        with np.load(write_features(load_config(FeaturesConfig, None, options))) as held:
            found[path] = dict(zip(held["files"].tolist(), held["features"], strict=True))
    assert list(found[folder / given]) == names
    for name in names:
        np.testing.assert_allclose(found[folder / given][name], found[folder][name], atol=1e-5)


def test_images_inside_other_files_have_no_places(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        shard.add(tmp_path / "0.png", "0.png")
    with pytest.raises(UserError, match="inside other files; name a folder of image files, a list, or one image"):
        open_files(tmp_path / "shard.tar", 3)


def test_principal_components_are_scikit_learns():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0])
    points, shares = pca(features)
    reference = PCA(2).fit(features.numpy())
    expected = reference.transform(features.numpy())
    for place in range(2):
        sign = np.sign((expected[:, place] * points[:, place].numpy()).sum())
        np.testing.assert_allclose(points[:, place].numpy(), sign * expected[:, place], atol=1e-4)
        assert shares[place] == pytest.approx(reference.explained_variance_ratio_[place], abs=1e-5)
    assert pca(torch.ones(1, 4))[0].shape == (1, 2)


@pytest.mark.parametrize(
    "schema, action, options, message",
    [
        (KnnConfig, knn, [], "20 nearest neighbours were asked for, but the bank holds 12 images; lower k"),
        (KnnConfig, knn, ["weights=null"], "no weights given"),
        (KnnConfig, knn, ["data.path={data}/train"], "has no train/ folder"),
        (FeaturesConfig, write_features, ["data.path={data}/none"], "does not exist"),
        (FeaturesConfig, write_features, ["data.path={data}/val/ash/../ash", "data.image_size=33"], "does not split"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, data, pretrained, schema, action, options, message):
    given = [option.format(data=data) for option in options]
    with pytest.raises(UserError, match=message):
        action(
            load_config(
                schema,
                None,
                [*OPTIONS, f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}", *given],
            )
        )
    assert not (tmp_path / "run").exists()


def test_kept_features_are_those_of_the_same_trunk_view_precision_and_files(
    tmp_path, write_classes, pretrained, capsys
):
    root, cache, weights = write_classes(tmp_path / "data"), tmp_path / "cache", tmp_path / "encoder.safetensors"
    (root / "val" / "ash" / "001.png").write_bytes(b"no image")
    shutil.copy(pretrained / "encoder.safetensors", weights)
    options = [*OPTIONS, f"weights={weights}", f"data.path={root / 'val'}", f"cache={cache}", "picture=none"]
    runs = (tmp_path / f"run_{number}" for number in itertools.count())

    def kept(*more: str) -> int:
        write_features(load_config(FeaturesConfig, None, [*options, *more, f"output={next(runs)}"]))
        return len(list(cache.iterdir()))

    assert kept() == 1 and "and have no features" not in capsys.readouterr().out
    assert (
        kept() == 1
        and "1 images could not be read when the file was written and have no features" in capsys.readouterr().out
    )
    changes = ("data.image_size=40", "data.test_crop=1", "model.pooling=mean", "precision=bf16", f"data.path={root}")
    for count, change in enumerate(changes, start=2):
        assert kept(change) == count, change
    (root / "val" / "ash" / "001.png").write_bytes((root / "val" / "ash" / "000.png").read_bytes())
    assert kept() == 7
    tensors, metadata = read_weights(weights)
    tensors["norm.bias"] += 1
    write_weights(weights, tensors, metadata)
    assert kept() == 8 and kept() == 8
    some = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    some.write_bytes(some.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{some.name} is truncated"):
        kept()


def test_a_number_of_neighbours_alone():
    assert load_config(KnnConfig, None, ["k=5"]).k == (5,)
    with pytest.raises(UserError, match=r"k.*greater than or equal to 1"):
        load_config(KnnConfig, None, ["k=0"])


def test_an_unreadable_image_refuses_where_asked(tmp_path, write_classes, pretrained):
    root = write_classes(tmp_path / "data")
    (root / "val" / "ash" / "001.png").write_bytes(b"no image")
    options = [*OPTIONS, f"weights={pretrained}", f"data.path={root}", f"output={tmp_path / 'run'}"]
    for schema, action in ((KnnConfig, knn), (FeaturesConfig, write_features)):
        with pytest.raises(UserError, match=r"001\.png cannot be read"):
            action(load_config(schema, None, [*options, "data.on_error=raise", *(["k=[3]"] if action is knn else [])]))
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_a_measurement_is_left_alone(tmp_path, data, pretrained):
    options = [*OPTIONS, f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}", "k=[3]"]
    knn(load_config(KnnConfig, None, options))
    with pytest.raises(UserError, match=r"already holds a run \(.*\); choose another with output=FOLDER"):
        knn(load_config(KnnConfig, None, options))
