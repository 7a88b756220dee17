"""``mae labels``: each format against what was drawn, odd exports, what is left out, and tiles of large images."""

from __future__ import annotations

import base64
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.errors import UserError
from transfer.detection.check_data import check_parts, parts_of
from transfer.detection.coco import Part, decode_masks, read_coco
from transfer.detection.data_sets import read_data
from transfer.detection.labels import coco_files
from transfer.detection.labels.convert import convert, name_apart
from transfer.detection.labels.cutting import cut_into_tiles
from transfer.detection.labels.instance_maps import read_map
from transfer.detection.labels.records import LabelledImage, Labels, mask_of, masks_of
from transfer.detection.masks import cut_part
from transfer.detection.plan import print_plan
from transfer.detection.run import evaluate_detector, train_detector

pytest.importorskip("pycocotools", reason="pip install mae-transfer[detection]")
WIDTH, HEIGHT = 40, 30
BOXES = {
    "a": [("cat", (4, 5, 10, 8)), ("dog", (20, 10, 12, 15))],
    "b": [("dog", (0, 0, 9, 30))],
    "c": [],
    "d": [("cat", (30, 20, 10, 10))],
}
"""Image -> its objects: class and (x, y, width, height), whole pixels."""


def picture(name):
    rng = np.random.default_rng(ord(name))
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def corners(box):
    x, y, w, h = box
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def flat(box):
    return [value for point in corners(box) for value in point]


def write_pictures(folder, names=BOXES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(name).save(folder / f"{name}.png")


def coco_content(prefix="", **more):
    classes = {"cat": 0, "dog": 4}
    sides = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": n, "file_name": f"{prefix}{name}.png", **sides} for n, name in enumerate(BOXES)]
    annotations = [
        {
            "id": 10 * n + m,
            "image_id": n,
            "category_id": classes[label],
            "bbox": list(box),
            "segmentation": [flat(box)],
            "iscrowd": 0,
            "attributes": {"occluded": False},
        }
        for n, objects in enumerate(BOXES.values())
        for m, (label, box) in enumerate(objects)
    ]
    categories = [{"id": number, "name": name} for name, number in classes.items()]
    return {"images": images, "annotations": annotations, "categories": categories, **more}


def as_coco(root):
    write_pictures(root / "images")
    (root / "annotations.json").write_text(json.dumps(coco_content()))


def as_cvat(root):
    write_pictures(root / "images" / "default")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(coco_content("default/")))


def as_label_studio(root):
    write_pictures(root / "images")
    content = coco_content("..\\..\\label-studio\\data\\images\\")
    (root / "result.json").write_text(json.dumps(content))


def as_roboflow(root):
    for split, names in (("train", "abc"), ("valid", "d")):
        content = coco_content()
        content["images"] = [image for image in content["images"] if image["file_name"][0] in names]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        write_pictures(root / split, names)
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


def yolo_rows(name, kind):
    rows = []
    for label, (x, y, w, h) in BOXES[name]:
        number = ("cat", "dog").index(label)
        if kind == "boxes":
            values = [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
        else:
            values = [value for px, py in corners((x, y, w, h)) for value in (px / WIDTH, py / HEIGHT)]
        rows.append(" ".join([str(number), *(f"{value:.8f}" for value in values)]))
    return "\n".join(rows) + "\n" * bool(rows)


def as_yolo(root, kind="polygons"):
    for split, names in (("train", "abc"), ("val", "d")):
        write_pictures(root / "images" / split, names)
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            (root / "labels" / split / f"{name}.txt").write_text(yolo_rows(name, kind))
    content = {"path": "/somewhere/else", "train": "images/train", "val": "images/val", "names": {0: "cat", 1: "dog"}}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def as_yolo_boxes(root):
    """Beside the images, with a list of classes that begins with a byte order mark."""
    write_pictures(root)
    for name in BOXES:
        (root / f"{name}.txt").write_text(yolo_rows(name, "boxes"))
    (root / "classes.txt").write_bytes("\ufeffcat\ndog\n".encode())


def as_voc(root):
    write_pictures(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, objects in BOXES.items():
        found = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in objects
        )
        text = f"<annotation><filename>{name}.png</filename>{found}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("d\n")


def as_labelme(root):
    root.mkdir(exist_ok=True)
    for name, objects in BOXES.items():
        kinds = (("rectangle", lambda box: [corners(box)[0], corners(box)[2]]), ("polygon", corners))
        shapes = [
            {"label": label, "shape_type": kinds[n % 2][0], "points": kinds[n % 2][1](box), "group_id": None}
            for n, (label, box) in enumerate(objects)
        ]
        content = {"imagePath": f"..\\photos\\{name}.png", "imageData": None, "shapes": shapes}
        if name == "b":  # its image is inside
            file = io.BytesIO()
            picture(name).save(file, "PNG")
            content["imageData"] = base64.b64encode(file.getvalue()).decode()
        else:
            picture(name).save(root / f"{name}.png")
        (root / f"{name}.json").write_text(json.dumps(content))


FORMATS = {
    "COCO": as_coco,
    "CVAT": as_cvat,
    "Label Studio": as_label_studio,
    "Roboflow": as_roboflow,
    "YOLO": as_yolo,
    "YOLO boxes": as_yolo_boxes,
    "VOC": as_voc,
    "labelme": as_labelme,
}


def objects_in(out):
    """Image -> sorted (class, box), of both halves; and whether all have masks that fill their boxes."""
    found, filled = {}, True
    for split in ("train", "val"):
        coco = read_coco(Part(out / split, out / "annotations" / f"instances_{split}.json"), masks=False)
        for image in coco.images:
            name = image.path.stem
            found[name] = sorted((coco.names[i.label - 1], tuple(round(v) for v in i.box)) for i in image.instances)
            assert np.array_equal(np.asarray(Image.open(image.path)), np.asarray(picture(name[0])))
            with_shape = [i for i in image.instances if i.shape is not None]
            filled &= len(with_shape) == len(image.instances)
            for instance, mask in zip(with_shape, decode_masks(image, with_shape), strict=True):
                x, y, w, h = (round(v) for v in instance.box)
                assert mask[y : y + h, x : x + w].all() and mask.sum() == w * h
    return found, filled


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_becomes_what_was_drawn(name, tmp_path):
    source, said = tmp_path / "source", []
    source.mkdir()
    FORMATS[name](source)
    out = convert(source, tmp_path / "out", val_share=0.25, say=said.append)
    found, filled = objects_in(out)
    assert found == {stem: sorted(objects) for stem, objects in BOXES.items()}
    boxes_only = name in ("YOLO boxes", "VOC")
    assert filled != boxes_only and (f"{out} --boxes-only" in said[-1]) == boxes_only
    counts = {split: len(list((out / split).rglob("*.png"))) for split in ("train", "val")}
    assert counts == {"train": 3, "val": 1}
    record = json.loads((out / "conversion.json").read_text())
    written = sorted(file.rpartition("/")[2] for files in record["splits"].values() for file in files)
    assert record["classes"] == ["cat", "dog"] and written == [f"{stem}.png" for stem in BOXES]
    for report in check_parts(parts_of(out, None), masks=not boxes_only):
        assert not [p for p in report.problems if p.severity != "note"], report.describe()


def test_label_maps_become_one_object_a_value(tmp_path):
    write_pictures(tmp_path / "in" / "images")
    (tmp_path / "in" / "masks").mkdir()
    for number, (name, objects) in enumerate(BOXES.items()):
        values = np.zeros((HEIGHT, WIDTH), np.uint16)
        for place, (_, (x, y, w, h)) in enumerate(objects, start=1):
            values[y : y + h, x : x + w] = 300 * place
        if number % 2:
            tifffile.imwrite(tmp_path / "in" / "masks" / f"{name}.tif", values)
        else:
            Image.fromarray(values).save(tmp_path / "in" / "masks" / f"{name}_mask.png")
    out = convert(tmp_path / "in", tmp_path / "out", val_share=0.25, class_name="cell", say=lambda line: None)
    found, filled = objects_in(out)
    assert filled and found == {name: sorted(("cell", box) for _, box in objects) for name, objects in BOXES.items()}


def test_a_split_is_by_image_seeded_and_written_down(tmp_path):
    as_coco(tmp_path / "in")
    vals = []
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        out = convert(tmp_path / "in", tmp_path / f"out{number}", val_share=0.5, seed=seed, say=lambda line: None)
        record = json.loads((out / "conversion.json").read_text())
        assert record["split"] == f"0.5 of the images for validation, seed {seed}"
        vals.append(record["splits"]["val"])
        assert not {*record["splits"]["val"]} & {*record["splits"]["train"]} and len(vals[-1]) == 2
    assert vals[0] == vals[1] and len({tuple(val) for val in vals}) > 1


def test_what_is_left_out_is_counted_with_an_example(tmp_path):
    as_yolo_boxes(tmp_path / "in")
    rows = ["7 0.5 0.5 0.1 0.1", "0 0.5 0.5 0 0", "0 0.1 0.1 0.2", "x 1 1 1 1", "0 0.5 0.5 0.5 0.5 0.9"]
    rows += ["0 2 2 0.1 0.1"]
    (tmp_path / "in" / "a.txt").write_text("\n".join(rows))
    (tmp_path / "in" / "b.txt").unlink()
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    said = []
    out = convert(tmp_path / "in", tmp_path / "out", say=said.append)
    text = "\n".join(said)
    for part in (
        "1 x objects of the class 7, which has no name, the first in",
        "2 x boxes without area, or outside the image",
        "1 x rows that are neither a box nor a polygon",
        "1 x rows that are not numbers",
        "1 x scores of predictions; their boxes are kept",
        "1 x label files that are missing; their images are kept, without objects",
        "1 x images that cannot be read (not an image), the first in",
        "a.txt, line 1",
    ):
        assert part in text, part
    assert objects_in(out)[0]["a"] == [("cat", (10, 8, 20, 15))] and objects_in(out)[0]["b"] == []


def test_labelme_groups_circles_and_masks(tmp_path):
    picture("a").save(tmp_path / "a.png")
    picture("b").save(tmp_path / "b.png")
    inside = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).save(inside, "PNG")
    encoded = base64.b64encode(inside.getvalue()).decode()
    shapes = [
        {"label": "cat", "points": corners((1, 1, 4, 4)), "group_id": 3},
        {"label": "cat", "points": corners((10, 1, 4, 4)), "group_id": 3},
        {"label": "dog", "points": [[20, 20], [20, 15]], "shape_type": "circle"},
        {"label": "dog", "points": [[30, 2], [31, 3]], "shape_type": "mask", "mask": encoded},
        {"label": "dog", "points": [[1, 1], [2, 2]], "shape_type": "line"},
    ]
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"imagePath": f"{name}.png", "shapes": shapes}))
    said = []
    out = convert(tmp_path, tmp_path / "out", val_share=0.5, say=said.append)
    coco = read_coco(Part(out / "train", out / "annotations" / "instances_train.json"))
    (image,) = coco.images
    areas = sorted(int(mask.sum()) for mask in decode_masks(image, image.instances))
    assert areas[:2] == [3, 32] and areas[2] == pytest.approx(np.pi * 25, rel=0.05)
    assert any("2 x shapes of the kind line, which has no area" in line for line in said)


def test_wrong_input_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    as_coco(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    runner = CliRunner()
    for words, message in (
        (["no", "out"], "does not exist; give a folder of annotations"),
        (["empty", "out"], "holds no annotations that are known"),
        (["in", "full"], "is not empty; give another"),
        (["in", "out", "--val-share", "1.5"], "give a share of the images between 0 and 1"),
        (["in", "out", "--format", "yollo"], "did you mean 'yolo'"),
        (["in", "out", "--format", "coco", "--class-name", "x"], "--class-name is not for coco; leave it out"),
    ):
        paths = [str(tmp_path / word) if not word.startswith("-") and n < 2 else word for n, word in enumerate(words)]
        result = runner.invoke(app, ["labels", "convert", *paths])
        assert result.exit_code == 2 and message in result.output, (words, result.output)
        assert not (tmp_path / "out").exists()


def test_a_large_annotated_image_becomes_tiles(tmp_path):
    """Of a polygon, a run-length code and a box: parts fit their tiles, small ones are left out and counted."""
    root = tmp_path / "in"
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    for split in ("train", "val"):
        tifffile.imwrite(root / split / "large.tif", pixels, tile=(16, 16), compression="zlib", photometric="rgb")
    from transfer.detection.masks import encode_masks

    disc = (np.mgrid[:100, :120][0] - 50) ** 2 + (np.mgrid[:100, :120][1] - 60) ** 2 < 15**2
    (code,) = encode_masks(disc[None])
    annotations = [
        {"bbox": [10, 10, 20, 20], "segmentation": [flat((10, 10, 20, 20))]},
        {"bbox": [46, 36, 29, 29], "segmentation": {"size": [100, 120], "counts": code["counts"].decode()}},
        {"bbox": [30, 80, 12, 10]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "large.tif", "width": 120, "height": 100}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, **a} for n, a in enumerate(annotations)],
    }
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    said = []
    out = cut_into_tiles(root, tmp_path / "out", tile=40, least_share=0.2, say=said.append)
    coco = read_coco(Part(out / "train", out / "annotations" / "instances_train.json"), masks=False)
    assert len(coco.images) == 3 * 3 and {(i.height, i.width) for i in coco.images} == {(40, 40)}
    total = np.zeros((100, 120), bool)
    for image in coco.images:
        top, left = (int(part) for part in image.path.stem.split("_")[1:])
        assert np.array_equal(np.asarray(Image.open(image.path)), pixels[top : top + 40, left : left + 40])
        shaped = [i for i in image.instances if i.shape is not None]
        for mask in decode_masks(image, shaped):
            total[top : top + 40, left : left + 40] |= mask
    assert total[10:30, 10:30].all() and total[disc].mean() > 0.9 and not total[80:].any()
    boxes = [i.box for image in coco.images for i in image.instances if i.shape is None]
    assert sum(w * h for _, _, w, h in boxes) >= 100  # 10 of 12 columns in one tile, the rest is below the share
    expected = "parts with less than 0.2 of their object were left out; 0 of 6 objects are in no tile"
    assert any(expected in line for line in said)


def test_tiles_are_cut_from_the_pixels_that_were_annotated(tmp_path):
    """Of an image inside of its annotations, and of a photo on its side that was annotated as it is stored."""
    inside, root = io.BytesIO(), tmp_path / "labelme"
    picture("a").save(inside, "PNG")
    root.mkdir()
    content = {"imagePath": "gone.png", "imageData": base64.b64encode(inside.getvalue()).decode()}
    shapes = [{"label": "cat", "points": corners((2, 2, 6, 6))}]
    for name in "ab":
        (root / f"{name}.json").write_text(json.dumps({**content, "shapes": shapes}))
    out = cut_into_tiles(root, tmp_path / "one", tile=64, val_share=0.5, say=lambda text: None)
    (tile,) = (out / "train").iterdir()
    assert np.array_equal(np.asarray(Image.open(tile)), np.asarray(picture("a")))

    as_coco(coco := tmp_path / "coco")
    (path,) = [p for p in coco.rglob("a.*") if p.suffix in (".png", ".jpg")]
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("a").save(path, exif=exif)
    out = cut_into_tiles(coco, tmp_path / "other", tile=64, val_share=0.5, say=lambda text: None)
    (tile,) = (p for p in out.rglob("a_0_0.*"))
    assert np.array_equal(np.asarray(Image.open(tile)), np.asarray(picture("a")))


@pytest.mark.parametrize(
    "by_stem, names", [(False, ["a.png", "a.jpg", "a_2.png"]), (True, ["a.png", "a_2.jpg", "a_3.png"])]
)
def test_images_of_one_name_are_numbered(by_stem, names):
    """Tiles of an image are named by its stem."""
    images = [LabelledImage(Path(name), name, 1, 1) for name in ("a.png", "a.jpg", "a.png")]
    labels = Labels("x")
    name_apart(images, labels, by_stem=by_stem)
    assert [image.name for image in images] == names
    assert len(labels.notes) == sum(image.name != image.path.name for image in images)


@pytest.mark.parametrize("name, content", [("a.npy", b"\x93NUMPY broken"), ("a.tif", b"II*\0"), ("a.png", b"no")])
def test_a_damaged_label_map_is_one_sentence(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"label map .*{name} cannot be read \(.+\); repair or remove it"):
        read_map(tmp_path / name)


def test_a_mask_and_a_tile_that_do_not_meet_have_nothing_in_common():
    """The box of an annotation can reach further than its mask."""
    corner, part = cut_part((100, 100), np.ones((20, 20), bool), (0, 90, 99, 40))
    assert not part.size and corner[0] >= 99


# ---------------------------------------------------------------- sets that the training finds and splits


def test_cocos_own_folder_names_are_found(write_coco, configure_detection, tmp_path):
    root = write_coco(tmp_path / "coco", 2, 2)
    for half in ("train", "val"):
        (root / half).rename(root / f"{half}2017")
        (root / "annotations" / f"instances_{half}.json").rename(root / "annotations" / f"instances_{half}2017.json")
    config = configure_detection(f"data.path={root}")
    train, val = read_data(config)
    assert (len(train.images), len(val.images)) == (2, 2) and train.images[0].path.parent.name == "train2017"
    assert [part.images.name for part in parts_of(root, None)] == ["train2017", "val2017"]
    (root / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances_val2014\.json and instances_val2017\.json; say which with"):
        read_data(config)


def test_one_json_is_split_by_image_and_the_split_is_written_down(write_coco, configure_detection, tmp_path):
    root = write_coco(tmp_path / "one", 6, 1)
    (root / "annotations" / "instances_val.json").unlink()
    config = configure_detection(f"data.path={root}", "data.val_share=0.34", "optim.epochs=0.2")
    train, val = read_data(config)
    names = [{image.path.name for image in coco.images} for coco in (train, val)]
    assert len(names[1]) == 2 and not names[0] & names[1] and len(names[0] | names[1]) == 6
    run = train_detector(config)
    record = json.loads((config.output / "split.json").read_text())
    assert run["images"] == 2 and record["val_share"] == 0.34 and {*record["val"]} == names[1]
    again = evaluate_detector(config.model_copy(update={"weights": config.output, "output": tmp_path / "again"}))
    assert again["bbox"] == run["bbox"]


def test_images_in_both_halves_are_said(write_coco, configure_detection, tmp_path, capsys):
    root = write_coco(tmp_path / "same", 2, 1)
    both = [f"data.{half}_images={root / 'train'}" for half in ("train", "val")]
    both += [f"data.{half}_annotations={root / 'annotations' / 'instances_train.json'}" for half in ("train", "val")]
    config = configure_detection(*both, "optim.epochs=0.2")
    for say in (train_detector, partial(print_plan, devices=1)):
        say(config)
        assert "note: 2 of 2 validation images are in the training set too" in capsys.readouterr().out
    with pytest.raises(UserError, match="val_share takes validation images from the training set"):
        configure_detection(*both, "data.val_share=0.1")


def test_values_become_masks_in_one_pass_whatever_they_are():
    values = np.random.default_rng(0).integers(0, 40, (31, 17)) * 1000
    found = dict(masks_of(values))
    assert sorted(found) == [value for value in np.unique(values) if value]
    for value, mask in found.items():
        expected = mask_of(values == value)
        assert mask.corner == expected.corner and np.array_equal(mask.pixels, expected.pixels)


def test_a_coco_json_is_parsed_once(tmp_path, monkeypatch):
    """Asked what the folder is, which files are meant, and what they hold."""
    as_coco(tmp_path)
    parsed, parse = [], json.loads
    monkeypatch.setattr(coco_files.json, "loads", lambda raw: parsed.append(len(raw)) or parse(raw))
    convert(tmp_path, tmp_path / "out", val_share=0.5, say=lambda line: None)
    assert len(parsed) == 1
