"""What a detector does with images and annotations that are unusual but sound: each has a promised outcome."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.data.images import Statistics
from mae_core.errors import UserError
from transfer import engines
from transfer.detection.coco import Part, decode_masks, read_coco
from transfer.detection.draw import draw_detections
from transfer.detection.heads import Detections
from transfer.detection.masks import encode_masks
from transfer.detection.results import average_precision, coco_results
from transfer.detection.run import evaluate_detector, train_detector
from transfer.detection.samples import TrainingSamples, WholeImages
from transfer.detection.train_net import main

PLAIN = Statistics((0.0,) * 3, (1.0,) * 3)
EMPTY, POINTS, CROWDED, GREY = range(4)
MANY = 150


def record(image, box, number):
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"id": number, "image_id": image, "category_id": 7, "bbox": list(box), "segmentation": corners, "iscrowd": 0}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One image each: without an object, with objects of one pixel, with 150 objects, in greyscale."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    boxes = [
        [],
        [(5, 7, 1, 1), (60, 40, 1, 1)],
        [(x, y, 2, 2) for y in range(0, 20, 2) for x in range(0, 30, 2)],
        [(10, 10, 20, 30)],
    ]
    images, annotations = [], []
    for image, places in enumerate(boxes):
        pixels = rng.integers(0, 200, (48, 64), dtype=np.uint8)
        picture = Image.fromarray(pixels) if image == GREY else Image.fromarray(np.stack([pixels] * 3, -1))
        images.append({"id": image, "file_name": f"{image}.png", "height": 48, "width": 64})
        annotations += [record(image, box, len(annotations) + n) for n, box in enumerate(places, start=1)]
        for half in ("train", "val"):
            (root / half).mkdir(exist_ok=True)
            picture.save(root / half / f"{image}.png")
    (root / "annotations").mkdir()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "a"}, {"id": 90, "name": "b"}],
    }
    for half in ("train", "val"):
        (root / "annotations" / f"instances_{half}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def coco(odd):
    return read_coco(Part(odd / "train", odd / "annotations" / "instances_train.json"))


def found_as_annotated(coco, index):
    image = coco.images[index]
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in (i.box for i in image.instances)]).reshape(-1, 4)
    labels = torch.tensor([i.label for i in image.instances], dtype=torch.int64)
    codes = encode_masks(decode_masks(image, image.instances)) if image.instances else []
    return Detections(index, boxes.float(), torch.full((len(labels),), 0.9), labels, codes)


def alone(coco, index):
    """The set of one image."""
    return type(coco)(coco.path, (coco.images[index],), coco.categories)


def test_all_of_them_train_are_scored_and_drawn(odd, configure_detection, tmp_path):
    options = (f"data.path={odd}", "test.num_pictures=4", "test.score_threshold=0", "optim.epochs=2", "log.every=1")
    metrics = train_detector(configure_detection(*options))
    assert metrics["images"] == 4 and metrics["unreadable"] == [] and metrics["training"]["loss"] > 0
    assert 0 <= metrics["bbox"]["AP"] <= 1 and metrics["bbox"]["per_class"]["b"]["AP"] is None
    run = tmp_path / "run"
    assert {path.name for path in (run / "pictures").glob("val_*")} == {f"val_{n}.png" for n in range(4)}
    found = json.loads((run / "predictions.json").read_text())
    assert found and {p["category_id"] for p in found} <= {7, 90}  # the json's ids, in spite of their gap
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert not [entry for entry in losses if "non-finite" in str(entry.get("event"))]


def test_an_image_without_objects_is_learned_from_and_cannot_be_scored_alone(coco, configure_detection):
    config = configure_detection()
    sample = TrainingSamples(coco, config.data, PLAIN, 0)[(0, EMPTY)]
    assert sample.pixels is not None and sample.target["boxes"].shape == (0, 4)
    with pytest.raises(UserError, match="has no annotations; there is nothing to score against"):
        average_precision(alone(coco, EMPTY), [])


@pytest.mark.parametrize("size, drawn", [((1, 9000), (1, 9000)), ((30, 2000), (60, 4000)), ((64, 48), (448, 336))])
def test_a_picture_is_enlarged_up_to_a_limit(size, drawn):
    nothing = Detections(0, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), None)
    assert draw_detections(["a"], nothing, Image.new("RGB", size), {"boxes"}).size == drawn


def test_objects_of_one_pixel_are_learned_and_scored(coco, configure_detection):
    sample = TrainingSamples(coco, configure_detection().data, PLAIN, 0)[(0, POINTS)]
    assert sample.target["boxes"].tolist() == [[5.0, 7.0, 6.0, 8.0], [60.0, 40.0, 61.0, 41.0]]
    one = alone(coco, POINTS)
    scores = average_precision(one, coco_results(one, [found_as_annotated(one, 0)]))
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == scores["segm"]["APs"] == 1.0


def test_more_objects_than_are_usually_counted_are_learned_and_scored(coco, configure_detection):
    sample = TrainingSamples(coco, configure_detection().data, PLAIN, 0)[(0, CROWDED)]
    assert len(sample.target["boxes"]) == len(sample.target["masks"]) == MANY
    one = alone(coco, CROWDED)
    results = coco_results(one, [found_as_annotated(one, 0)])
    assert average_precision(one, results, detections=MANY)["segm"]["AR"] == 1.0
    assert average_precision(one, results)["segm"]["AR"] == pytest.approx(100 / MANY)


def test_a_greyscale_image_is_read_as_rgb_or_as_one_channel(coco, configure_detection):
    pixels = WholeImages(coco, configure_detection().data, PLAIN)[GREY].pixels
    assert pixels.shape[0] == 3 and torch.equal(pixels[0], pixels[2])
    grey = configure_detection("data.channels=1").data
    assert WholeImages(coco, grey, Statistics((0.0,), (1.0,)))[GREY].pixels.shape[0] == 1


def test_images_of_five_channels_train_and_are_scored(tmp_path, write_coco, to_bands, configure_detection):
    root = write_coco(tmp_path / "bands", val_seed=0)
    to_bands(root)
    mean = "data.mean=[0.1,0.1,0.1,0.1,0.1]"
    options = (f"data.path={root}", "data.channels=5", mean, mean.replace("mean", "std"), "optim.epochs=1")
    metrics = train_detector(configure_detection(*options))
    assert metrics["images"] == 3 and not metrics["unreadable"]
    again = configure_detection(
        f"weights={tmp_path / 'run'}", f"data.path={root}", f"output={tmp_path / 'b'}", scratch=False
    )
    assert evaluate_detector(again)["bbox"] == metrics["bbox"]


def test_another_number_of_classes_is_refused_with_the_first_difference(odd, tmp_path, write_coco, configure_detection):
    train_detector(configure_detection("optim.epochs=1"))
    options = (f"weights={tmp_path / 'run'}", f"data.path={odd}", f"output={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"differ in 4 categories \(id 3 is 'absent' in the one, 'bar' in the other\)"):
        evaluate_detector(configure_detection(*options, scratch=False))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage, message", [
    (lambda root, path: (root / "train" / "001.png").unlink(), r"image id 15 is .*001\.png, which does not exist"),
    (lambda root, path: path.write_text('{"boxes": []}'), "is JSON but not COCO: it has no list of images"),
    (lambda root, path: path.write_text("{"), "is not JSON"),
    (lambda root, path: path.unlink(), r"annotation file .*instances_train\.json does not exist"),
])  # fmt: skip
def test_a_broken_set_ends_in_one_sentence_and_leaves_nothing(tmp_path, write_coco, capsys, damage, message):
    root = write_coco(tmp_path / "data")
    damage(root, root / "annotations" / "instances_train.json")
    check_refused([f"data.path={root}", f"output={tmp_path / 'run'}", "from_scratch=true"], message, capsys)
    assert not (tmp_path / "run").exists()


def test_without_detectron2_its_engine_says_where_it_comes_from(detection_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "installed", lambda package: package != "detectron2")
    options = ["engine=detectron2", f"data.path={detection_root}", f"output={tmp_path / 'run'}", "from_scratch=true"]
    message = (
        r"engine detectron2 needs detectron2, not installed here; .*https://detectron2\.readthedocs\.io/\S*install"
    )
    check_refused(options, message, capsys)
    assert not (tmp_path / "run").exists()


def check_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error


@pytest.mark.parametrize("most", [1, 5, 10, 50])
def test_as_many_detections_count_as_are_asked_for(coco, most):
    one = alone(coco, CROWDED)
    results = coco_results(one, [found_as_annotated(one, 0)])
    scores = average_precision(one, results, detections=most)["bbox"]
    assert scores["AR"] == pytest.approx(most / MANY) and scores["AR10"] == pytest.approx(min(most, 10) / MANY)
    assert scores["AR1"] == pytest.approx(1 / MANY)
