"""The check of a COCO set: what it finds, named with path and id, and what it lets pass."""

import json
import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_core.data.decoding import UnreadableImage, read_image
from transfer.detection.check_data import check_part, main
from transfer.detection.coco import Part


def survey(part):
    return check_part(part, masks=True)[0]


def wrong(report):
    return [problem for problem in report.problems if problem.severity != "note"]


@pytest.fixture
def copied(tmp_path, write_coco):
    """A set of its own, and a function that changes its training json."""
    root = write_coco(tmp_path / "data")
    path = root / "annotations" / "instances_train.json"

    def edit(change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return Part(root / "train", path)

    return edit


def one(content):
    return content["annotations"][0]


def empty(content):
    one(content)["segmentation"] = {"size": [48, 64], "counts": [48 * 64]}


def corners(annotation):
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y + h]


def far_too_large(content):
    one(content).update(segmentation=[[10, 5, 18, 5, 18, 12, 10, 12]], area=56)


def again(content):
    content["annotations"].append({**one(content), "id": 99})


WRONG = {
    "box outside": (
        lambda c: one(c).update(bbox=[50, 10, 30, 20]),
        "boxes outside the image",
        "annotation 1 of image 5",
    ),
    "corners": (lambda c: one(c).update(bbox=corners(one(c))), "boxes written as corners", "write width and height"),
    "whole image": (
        lambda c: one(c).update(bbox=[0, 0, 64, 48]),
        "boxes of the whole image",
        "annotation 1 of image 5",
    ),
    "far too large": (far_too_large, "boxes far larger than their masks", "annotation 1 of image 5"),
    "area of the image": (
        lambda c: one(c).update(area=64 * 48),
        "areas far from the mask's",
        "it is the area of the whole image",
    ),
    "area of nothing": (lambda c: one(c).update(area=0), "areas far from the mask's", "has area 0, but its mask"),
    "negative": (lambda c: one(c).update(bbox=[-9, 0, 20, 20]), "boxes outside the image", r"bbox \[-9, 0, 20, 20\]"),
    "empty mask": (empty, "empty masks", "annotation 1 of image 5 has an empty mask"),
    "no mask": (lambda c: one(c).update(segmentation=[]), "objects without a mask", "annotation 1 has no segmentation"),
    "flat polygon": (
        lambda c: one(c).update(segmentation=[[5, 5, 9, 5, 7, 5]]),
        "empty masks",
        "annotation 1 of image 5",
    ),
    "mask elsewhere": (
        lambda c: one(c).update(bbox=[0, 0, 5, 5]),
        "masks outside their boxes",
        "annotation 1 of image 5",
    ),
    "doubled annotation": (lambda c: c["annotations"][1].update(id=1), "doubled ids", "annotation id 1 appears twice"),
    "doubled image": (
        lambda c: c["images"][1].update(id=5),
        "doubled ids",
        "image id 5 appears twice, 000.png and 001",
    ),
    "doubled object": (again, "doubled objects", "annotation 99 of image 5 is a copy of annotation 1"),
    "doubled file": (
        lambda c: c["images"][1].update(file_name="000.png"),
        "doubled objects",
        "images 5 and 15 are both 0",
    ),
    "missing file": (lambda c: c["images"][2].update(file_name="no.png"), "missing files", r"image id 25 is .*no\.png"),
    "unknown category": (lambda c: one(c).update(category_id=4), "broken records", "annotation 1 has category_id 4"),
    "other size": (
        lambda c: c["images"][0].update(width=65),
        "sizes that differ",
        "image id 5, .*is 64x48, the json says 65",
    ),
    "on its side": (lambda c: c["images"][0].update(width=48, height=64), "sizes that differ", "is 64x48, the json"),
}


@pytest.mark.parametrize("change, kind, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found_with_path_and_id(copied, change, kind, message):
    part = copied(change)
    found = [problem.sentence for problem in survey(part).problems if problem.kind.startswith(kind)]
    assert len(found) == 1 and re.search(message, found[0]) and str(part.annotations) in found[0]


def test_every_problem_is_found_in_one_pass_and_ends_in_exit_code_2(copied, capsys):
    def change(content):
        one(content).update(bbox=[50, 10, 30, 20])
        content["annotations"][1].update(category_id=4)
        for image in content["images"]:
            image["file_name"] = "no" + image["file_name"]

    part = copied(change)
    with pytest.raises(SystemExit) as stopped:
        main([str(part.annotations), str(part.images)])
    said, error = capsys.readouterr()
    assert stopped.value.code == 2 and "missing files: 4" in said and "broken records: 1" in said
    assert error == "error: 6 problems found, listed above; correct the data and check it again\n"


def test_a_sound_set_passes_and_gaps_in_the_ids_are_told(copied, capsys):
    part = copied(lambda content: None)
    main([str(part.annotations.parent.parent)])
    said, _ = capsys.readouterr()
    assert said.endswith("nothing is wrong\n")
    assert "category ids run from 3 to 20, without 1, 2, 4" in said and "labels 1 to 3 follow their order" in said
    assert "4 images, 8 objects of 3 classes" in said and "64x48 to 64x48 pixels, channels 3 in 4 files" in said


def test_the_usual_folder_of_images_is_found(copied, capsys):
    part = copied(lambda content: None)
    main([str(part.annotations)])
    assert f"files in {part.images}" in capsys.readouterr().out


def test_unreadable_and_n_channel_images(copied):
    part = copied(lambda content: None)
    (part.images / "000.png").write_text("no image")
    assert "image id 5" in survey(part).problems[0].sentence and len(wrong(survey(part))) == 1

    cut = (part.images / "001.png").read_bytes()[:-200]
    (part.images / "000.png").write_bytes(cut)
    (problem,) = wrong(survey(part))
    assert problem.kind == "unreadable images" and "000.png, cannot be read: " in problem.sentence

    def to_arrays(content):
        for image in content["images"]:
            name = image["file_name"].replace(".png", ".npy")
            np.save(part.images / name, np.zeros((48, 64, 5), np.uint8))
            image["file_name"] = name

    found = survey(copied(to_arrays))
    assert not wrong(found) and "note: set data.channels=5" in found.describe()
    np.save(part.images / "001.npy", np.zeros((48, 64, 6), np.uint8))
    (mixed,) = wrong(survey(part))
    assert mixed.kind == "different channels" and "5 in 3 files, 6 in 1 files" in mixed.sentence


def test_a_tiff_of_four_bands_among_pictures_is_named(copied):
    def to_tiff(content):
        content["images"][0]["file_name"] = "bands.tif"

    part = copied(to_tiff)
    bands = np.random.default_rng(0).integers(0, 200, (48, 64, 4), dtype=np.uint8)
    tifffile.imwrite(part.images / "bands.tif", bands, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage):  # so that training leaves it out
        read_image(part.images / "bands.tif", 3)
    (problem,) = wrong(survey(part))
    assert problem.kind == "different channels" and "bands.tif, cannot be read as RGB" in problem.sentence


def test_many_objects_and_classes_without_any_are_told(copied):
    def crowd(content):
        content["annotations"] = [{**one(content), "id": n, "bbox": [0, 0, 64, 48 - n / 1000]} for n in range(1, 502)]

    facts = survey(copied(crowd)).describe()
    assert "an image has 501 objects" in facts and "set test.detections=501" in facts
    assert "2 of 3 classes are never annotated: frame, disc" in facts


def test_wrong_input_is_one_sentence(tmp_path, capsys, copied):
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(picture)
    (tmp_path / "list.json").write_text("[1]")
    part = copied(lambda content: None)
    for given, message in (
        ([tmp_path / "nowhere.json"], "does not exist; give a COCO json"),
        ([picture], "is not JSON"),
        ([tmp_path / "list.json"], "is JSON but not COCO"),
        ([tmp_path], "holds no annotations/instances_train.json"),
        ([part.annotations, tmp_path / "no"], "image folder .*no of .* does not exist"),
        ([part.annotations.parent.parent, part.images], "is a folder with images of its own"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(path) for path in given])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error


def test_boxes_without_masks_are_checked_for_a_detector_of_boxes(copied, capsys):
    def boxes(box=None):
        def edit(content):
            for annotation in content["annotations"]:
                annotation["segmentation"] = None
                annotation["bbox"] = box or annotation["bbox"]

        return copied(edit)

    def found(part):
        return [problem for problem in wrong(check_part(part, masks=False)[0]) if problem.kind != "doubled objects"]

    part = boxes()
    assert not found(part)
    main([str(part.annotations), "--boxes-only"])
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    with pytest.raises(SystemExit):
        main([str(part.annotations)])
    assert "objects without a mask: 8 (training refuses to start)" in capsys.readouterr().out
    assert all("looks like corners" in problem.sentence for problem in found(boxes([40, 30, 60, 44])))
    (whole,) = found(boxes([0, 0, 64, 48]))
    assert "8 of 8 boxes are the whole image" in whole.sentence


@pytest.mark.parametrize("drawn, told", [("upright", "read them upright"), ("stored", "they are read as stored")])
def test_turned_photos_are_told_and_their_sides_decide(copied, capsys, drawn, told):
    part = copied(lambda content: None)
    with Image.open(part.images / "000.png") as image:
        stored = image.transpose(Image.Transpose.ROTATE_90) if drawn == "upright" else image.copy()
    exif = Image.Exif()
    exif[274] = 6
    stored.save(part.images / "000.png", exif=exif)
    main([str(part.annotations)])
    said = capsys.readouterr().out
    assert said.endswith("nothing is wrong\n") and "1 image with the orientation tag 6, the first is" in said
    assert told in said.replace("reads them", "read them")


def test_the_command_of_the_toolkit_and_both_scripts_say_the_same(copied, run_forked, tmp_path):
    from typer.testing import CliRunner

    from mae_core.cli.main import app

    part = copied(lambda content: one(content).update(bbox=[50, 10, 30, 20]))
    result = CliRunner().invoke(app, ["check", "coco", str(part.annotations), "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "boxes outside the image: 1" in result.output
    (found,) = json.loads((tmp_path / "a.json").read_text())["sets"]
    assert found["objects"] == 8 and found["problems"][0]["severity"] == "wrong"
    script = run_forked(["transfer/detection/coco.py", part.annotations])
    assert script.returncode == 2 and result.output == script.stdout + script.stderr
    assert "usage: mae check coco" in CliRunner().invoke(app, ["check", "coco", "--help"]).output


def test_a_contact_sheet_shows_faulty_images_first(copied, tmp_path, capsys):
    part = copied(empty)
    (part.images / "003.png").write_bytes(b"no image")
    command = [str(part.annotations), str(part.images), "--picture", str(tmp_path / "sheet.png")]
    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr()
    assert f"drew 4 of 4 images into {tmp_path / 'sheet.png'}, 2 with faults first" in said.out
    assert "problems found" in said.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell = 160 + 8
    assert sheet.shape[1] == 4 * cell + 8
    assert (sheet[80, 8 + cell + 80] == (200, 60, 60)).all()  # the second: it cannot be read
    assert not (sheet[80, 8 + 80] == (200, 60, 60)).all()
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; choose another file with --picture" in capsys.readouterr().err
