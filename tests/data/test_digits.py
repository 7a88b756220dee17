import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError

pytest.importorskip("sklearn", reason="the embedded digits come with scikit-learn")

from mae_core.data import glyphs
from mae_core.data.digits import (
    CLASS_NAMES,
    DigitsLayout,
    compose_scene,
    digit_indices,
    run_lengths,
    write_digits,
)
from mae_core.data.scenes import MIN_VISIBLE_RATIO

TINY = {"seed": 3, "image_size": 32, "num_unlabelled": 12, "num_train": 20, "num_test": 10}


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def scenes():
    return [compose_scene(split, index, seed=1) for split in ("unlabelled", "train", "test") for index in range(25)]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "set", **TINY)


def test_halves_are_disjoint_complete_and_stratified():
    halves = digit_indices(seed=0)
    labels = glyphs.load_source()[1]
    assert not set(halves.train) & set(halves.test)
    assert sorted([*halves.train, *halves.test]) == list(range(1797))
    for digit in range(10):
        share = (labels[halves.test] == digit).sum() / (labels == digit).sum()
        assert share == pytest.approx(1 / 3, abs=0.01)


def test_the_halves_depend_on_the_seed():
    assert not np.array_equal(digit_indices(seed=0).test, digit_indices(seed=1).test)


@pytest.mark.parametrize("split, half", [("unlabelled", "train"), ("train", "train"), ("test", "test")])
def test_scenes_use_the_digits_of_their_half_only(monkeypatch, split, half):
    """With every digit of the other half made unusable, no scene changes."""
    expected = [compose_scene(split, index, image_size=32).image for index in range(20)]
    spoiled = np.full_like(glyphs.load_glyphs(), np.nan)
    kept = getattr(digit_indices(0), half)
    spoiled[kept] = glyphs.load_glyphs()[kept]
    monkeypatch.setattr("mae_core.data.scenes.load_glyphs", lambda: spoiled)
    for index, image in enumerate(expected):
        assert np.array_equal(compose_scene(split, index, image_size=32).image, image)


def test_a_scene_depends_on_seed_split_and_index_alone():
    first = compose_scene("train", 5, seed=7)
    compose_scene("train", 6, seed=7)
    again = compose_scene("train", 5, seed=7)
    for name in ("image", "labels", "boxes", "masks"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    for other in (("train", 15, 7), ("unlabelled", 5, 7), ("test", 5, 7), ("train", 5, 8)):
        split, index, seed = other
        difference = compose_scene(split, index, seed=seed).image.astype(int) - first.image
        assert np.abs(difference).mean() > 5, other


def test_shapes_and_types(scenes):
    for scene in scenes:
        count = len(scene.labels)
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert scene.labels.dtype == np.int64 and set(scene.labels) <= set(range(10))
        assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32
        assert scene.masks.shape == (count, 64, 64) and scene.masks.dtype == bool
    assert {len(scene.labels) for scene in scenes} == {1, 2, 3, 4}


def test_boxes_are_tight_around_the_masks(scenes):
    for scene in scenes:
        for (left, top, right, bottom), mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            for edge in (mask[top, :], mask[bottom - 1, :], mask[:, left], mask[:, right - 1]):
                assert edge.any()


def test_masks_do_not_overlap_and_some_digits_are_occluded(scenes):
    assert max(scene.masks.sum(axis=0).max() for scene in scenes) == 1
    boxes_overlap = 0
    for scene in scenes:
        painted = np.zeros((64, 64), dtype=int)
        for left, top, right, bottom in scene.boxes.astype(int):
            painted[top:bottom, left:right] += 1
        boxes_overlap += painted.max() > 1
    assert boxes_overlap > 5


def test_occluded_digits_stay_visible(monkeypatch):
    drawn = []
    original = glyphs.bend_glyph

    def spy(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr("mae_core.data.scenes.bend_glyph", spy)
    ratios = []
    for index in range(40):
        drawn.clear()
        scene = compose_scene("train", index, digits=(4, 4), clutter=0)
        if len(drawn) == len(scene.labels):
            ratios += [mask.sum() / stroke.mask.sum() for mask, stroke in zip(scene.masks, drawn, strict=True)]
    assert len(ratios) > 60
    assert MIN_VISIBLE_RATIO <= min(ratios) < 1


def test_label_map_is_masks_and_labels(scenes):
    for scene in scenes:
        expected = scene.textures.copy()
        for mask in scene.masks:
            expected[mask] = 4
        assert expected.shape == (64, 64) and expected.max() == 4
        assert scene.label_map.dtype == np.uint8
        assert np.array_equal(scene.label_map, expected)


def test_digits_stand_out_from_what_is_around_them():
    """The mask lies where the stroke was painted: its brightness differs from the ring around it."""
    contrasts = []
    for index in range(40):
        scene = compose_scene("train", index, digits=(1, 1), clutter=0.3)
        grey, mask = scene.image @ glyphs.LUMA, scene.masks[0]
        left, top, right, bottom = scene.boxes[0].astype(int)
        around = np.zeros_like(mask)
        around[top:bottom, left:right] = True
        contrasts.append(abs(grey[mask].mean() - grey[around & ~mask].mean()))
    assert min(contrasts) > 45


def test_a_zero_is_a_ring_and_no_digit_falls_apart():
    """The faint parts of handwriting belong to the digit: without them most zeros were a C in the truth, and in the
    picture a ring of which an arc is darker."""
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = np.random.default_rng(0)
    labels, glyph, rings, pieces = glyphs.load_source()[1], glyphs.load_glyphs(), [], []
    for number in range(300):
        mask = np.pad(glyphs.bend_glyph(generator, glyph[number], 30, 64).mask, 1)
        pieces.append(ndimage.label(mask, np.ones((3, 3)))[1])
        if labels[number] == 0:
            rings.append(ndimage.label(~mask)[1] == 2)
    assert np.mean(rings) > 0.75 and np.mean(np.array(pieces) > 1) < 0.03


def test_one_digit_scenes_are_large_and_balanced():
    scenes = [compose_scene("test", index, digits=(1, 1)) for index in range(20)]
    assert [int(scene.labels.item()) for scene in scenes] == [*range(10)] * 2
    assert min(scene.boxes[0, 3] - scene.boxes[0, 1] for scene in scenes) > 0.4 * 64


@pytest.mark.parametrize("image_size", [32, 96])
def test_other_image_sizes(image_size):
    for index in range(20):
        scene = compose_scene("unlabelled", index, image_size=image_size)
        assert scene.image.shape == (image_size, image_size, 3)
        assert scene.boxes.min() >= 0 and scene.boxes.max() <= image_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "val"}, "no split 'val'; choose one of unlabelled, train, test"),
        ({"index": -1}, "must not be negative"),
        ({"image_size": 16}, "use an image size of 32 or more"),
        ({"digits": (0, 3)}, r"digits=\(0, 3\)"),
        ({"digits": (4, 1)}, r"digits=\(4, 1\)"),
    ],
)
def test_wrong_scene_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        compose_scene(**{"split": "train", "index": 0, **arguments})


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r'pip install "mae-transfer\[demo\]"'):
        glyphs.load_source.__wrapped__()


def test_run_lengths_by_hand():
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)
    assert run_lengths(mask) == {"counts": [1, 4, 1], "size": [2, 3]}
    assert run_lengths(~mask) == {"counts": [0, 1, 4, 1], "size": [2, 3]}


def test_folders_and_counts(layout):
    assert len(list(layout.unlabelled.glob("*.png"))) == 12
    for part, count in (("train", 20), ("val", 10)):
        for name in CLASS_NAMES:
            assert len(list((layout.classification / part / name).glob("*.png"))) == count // 10
        assert len(list((layout.detection / part).glob("*.png"))) == count
    for part, count in (("training", 20), ("validation", 10)):
        names = [
            sorted(path.name for path in (layout.segmentation / kind / part).iterdir())
            for kind in ("images", "annotations")
        ]
        assert names[0] == names[1] and len(names[0]) == count
    assert layout.segmentation_classes.read_text().splitlines()[:2] == ["0\tplain", "1\tstripes"]
    assert "seed 3" in (layout.root / "README.txt").read_text()


def test_no_image_is_written_twice(layout):
    images = [
        Image.open(path).tobytes() for path in sorted(layout.root.rglob("*.png")) if "annotations" not in path.parts
    ]
    assert len(images) == 12 + 3 * 30
    assert len(set(images)) == len(images)


def test_label_maps_hold_every_class(layout):
    values = set()
    for path in (layout.segmentation / "annotations" / "training").iterdir():
        with Image.open(path) as picture:
            assert picture.mode == "L" and picture.size == (32, 32)
            values |= set(np.unique(np.asarray(picture)).tolist())
    assert values == set(range(5))


@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_file_gives_the_masks_back_and_the_truth_scores_one(layout, part):
    pytest.importorskip("pycocotools", reason="reads the annotations as the detection metric does")
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO(str(layout.detection_json(part)))
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [(d + 1, str(d)) for d in range(10)]
    results = []
    for image in coco.dataset["images"]:
        split = {"train": "train", "val": "test"}[part]
        with Image.open(layout.detection / part / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            pixels = np.asarray(picture)
        scene = compose_scene(split, 10_000_000 + image["id"] - 1, seed=TINY["seed"], image_size=32)
        assert np.array_equal(pixels, scene.image)
        instances = coco.imgToAnns[image["id"]]
        assert [i["category_id"] for i in instances] == (scene.labels + 1).tolist()
        for instance, mask in zip(instances, scene.masks, strict=True):
            assert np.array_equal(coco.annToMask(instance).astype(bool), mask)
            rle = coco.annToRLE(instance)
            assert coco_mask.toBbox(rle).tolist() == instance["bbox"]
            assert coco_mask.area(rle) == instance["area"]
            results.append(
                {**{k: instance[k] for k in ("image_id", "category_id", "bbox")}, "segmentation": rle, "score": 1.0}
            )
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_two_workers_write_the_same_files(tmp_path):
    sizes = {"seed": 3, "image_size": 32, "num_unlabelled": 60, "num_train": 3, "num_test": 2}
    one = files_of(write_digits(tmp_path / "one", **sizes).root)
    two = files_of(write_digits(tmp_path / "two", **sizes, workers=2).root)
    assert len(one) == 60 + 5 * (1 + 1 + 2) + 4
    assert one == two


def test_sizes_per_task_and_progress(tmp_path, layout):
    train = {"classification": 10, "detection": 0, "segmentation": 4}
    calls = []
    sizes = {**TINY, "num_unlabelled": 51, "num_train": train, "num_test": 0}
    small = write_digits(tmp_path / "small", **sizes, on_progress=lambda *counts: calls.append(counts))
    assert calls == [(50, 65), (51, 65), (61, 65), (65, 65)]
    assert json.loads(small.detection_json("train").read_text())["images"] == []
    written = files_of(small.classification)
    larger = files_of(layout.classification)
    assert len(written) == 10 and all(larger[name] == data for name, data in written.items())


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        write_digits(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    layout = write_digits(tmp_path / "set", image_size=32, num_unlabelled=1, num_train=0, num_test=0)
    assert layout == DigitsLayout(tmp_path / "set")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_digits(empty, image_size=32, num_unlabelled=1, num_train=0, num_test=0)
    assert (empty / "unlabelled" / "000000.png").is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "set", **TINY, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_unlabelled": -1}, "num_unlabelled=-1"),
        ({"num_train": {"detecton": 3}}, "num_train has sizes for detecton"),
        ({"num_test": -2}, "num_test=-2 for classification"),
        ({"workers": 0}, "workers=0"),
        ({"image_size": 8}, "image size of 32 or more"),
    ],
)
def test_wrong_sizes_are_named_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_digits(tmp_path / "set", **{**TINY, **arguments})
    assert list(tmp_path.iterdir()) == []
