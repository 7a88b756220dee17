"""The command that looks at images and label maps before a training; none of it needs mmseg but a config."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from transfer.segmentation.check_data import main
from transfer.segmentation.label_coding import LabelCoding, coding_mistake


def look(scenes: Path, capsys, *arguments: str, num_classes: int = 3, reduce: str = "no") -> tuple[int, str]:
    """Exit code and all that the command says of the training half of the scenes."""
    folders = [f"--{name}={scenes / folder / 'training'}" for name, folder in FOLDERS.items()]
    classes = [] if any("--classes" in word for word in arguments) else [f"--num-classes={num_classes}"]
    code = 0
    try:
        main([*folders, *classes, f"--reduce-zero-label={reduce}", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.out + said.err


FOLDERS = {"images": "images", "label-maps": "annotations"}


def relabel(scenes: Path, change) -> None:
    """Write every label map of both halves anew."""
    for path in (scenes / "annotations").rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path))).astype(np.uint8)).save(path)


def test_nothing_wrong(scenes, capsys):
    code, said = look(scenes, capsys)
    assert code == 0 and "all 8 images read" in said and said.endswith("nothing is wrong\n")
    maps = np.stack([np.asarray(Image.open(path)) for path in sorted((scenes / "annotations/training").iterdir())])
    assert f"class 1                  {(maps == 1).mean():>7.2%}\n" in said


def test_every_mistake_is_listed_at_once(scenes, capsys):
    images, maps = (scenes / folder / "training" for folder in FOLDERS.values())
    (maps / "0.png").unlink()
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    (maps / "3.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((31, 32), np.uint8)).save(maps / "4.png")
    labels = np.asarray(Image.open(maps / "5.png")).copy()
    labels[3, 4] = 200
    Image.fromarray(labels).save(maps / "5.png")
    Image.new("RGB", (32, 32)).save(maps / "6.png")
    code, said = look(scenes, capsys)
    assert code == 2
    for line in (
        "images without a label map: 1",
        f"image {images / '0.png'} has no label map {maps / '0.png'}; add it",
        "label maps without an image: 1",
        f"label map {maps / '1.png'} has no image of the same name below {images}",
        "unreadable images: 1",
        f"image {images / '2.png'} cannot be read (",
        "unreadable label maps: 2",
        f"label map {maps / '3.png'} cannot be read (not an image); replace",
        f"label map {maps / '6.png'} is a colour picture",
        "different sizes: 1",
        f"image {images / '4.png'} has 32x32 pixels and its label map {maps / '4.png'} 31x32",
        "values that are no class: 1",
        f"label map {maps / '5.png'} holds the value 200, but num_classes=3 allows 0..2",
        "error: 7 problems found",
    ):
        assert line in said, line


def test_the_suffix_that_would_match_the_names_is_told(scenes, capsys):
    maps = scenes / "annotations" / "training"
    for path in list(maps.iterdir()):
        path.rename(maps / f"{path.stem}_labelIds.png")
    code, said = look(scenes, capsys)
    assert code == 2 and "images without a label map: 8" in said and "set seg_map_suffix=_labelIds.png" in said
    assert look(scenes, capsys, "--map-suffix=_labelIds.png")[0] == 0


def test_void_that_is_not_reduced(scenes, capsys):
    relabel(scenes, lambda labels: labels + (labels > 0))  # 0 void, 2 and 3; and now 1
    relabel(scenes, lambda labels: np.where(np.arange(32) == 0, 1, labels))
    code, said = look(scenes, capsys)
    assert code == 2 and "the meaning of the values: 1" in said
    assert "the values run from 0 to 3, one more than the 3 classes: if 0 is void, as in ADE20K, set reduce" in said
    assert look(scenes, capsys, reduce="yes")[0] == 0


def test_a_class_that_would_be_reduced_away(scenes, capsys):
    code, said = look(scenes, capsys, reduce="yes")
    assert code == 2 and "the values run from 0 to 2, as many as there are classes" in said
    names = scenes / "names.txt"
    names.write_text("0\tvoid\n1\tbox\n2\tdisc\n3\trare\n")  # somebody has said what is meant
    assert look(scenes, capsys, f"--classes={names}", reduce="yes")[0] == 0


@pytest.mark.parametrize(
    ("values", "num_classes", "reduced", "wrong"),
    [
        ({0, 1, 2}, 3, False, False),
        ({0, 1, 2, 255}, 3, False, False),
        ({1, 2, 3}, 3, False, True),
        ({0, 3}, 3, False, True),
        ({0, 200}, 3, False, False),  # out of range, but not by one
        ({0, 1, 2, 3}, 3, True, False),
        ({0, 1, 2}, 3, True, True),
        ({1, 2}, 3, True, False),
        ({0, 1}, 3, True, False),
        ({255}, 3, True, False),
    ],
)
def test_zero_label_mistake(values, num_classes, reduced, wrong):
    mistake = coding_mistake(values, LabelCoding.of(num_classes, reduce_zero_label=reduced))
    assert ("reduce_zero_label" in (mistake or "")) == wrong


def test_maps_that_were_reduced_before():
    """ADE20K with 0..149 in its files, where mmseg's data set counts from 1."""
    every, coding = set(range(150)), LabelCoding.of(150, reduce_zero_label=True)
    assert coding_mistake(every, coding, names="dataset") is not None
    assert coding_mistake(every - {77}, coding, names="dataset") is None  # a part of the set, as it should be
    assert coding_mistake({*every, 150}, coding, names="dataset") is None
    assert coding_mistake(every, coding, names="written") is None


def test_what_is_missing_is_said(capsys, tmp_path, scenes):
    for arguments, message in (
        ([f"--images={tmp_path}"], "for a pair of folders give --label-maps, --reduce-zero-label, --num-classes"),
        (["no_such.py"], "config no_such.py does not exist"),
        (["a.py", f"--images={tmp_path}"], "leave it out, or leave out the options that describe a pair of folders"),
        (["--num-classes=-3"], "--num-classes is -3; give the number of classes, 1 or more"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    (scenes / "images" / "training").rename(scenes / "images" / "elsewhere")
    assert "images/training does not exist" in look(scenes, capsys)[1]


def test_folders_of_a_config(scenes, capsys):
    pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
    config = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"
    (scenes / "annotations" / "validation" / "3.png").unlink()
    with pytest.raises(SystemExit):
        main([str(config), "--cfg-options", f"data_root={scenes}", "num_classes=3"])
    said = capsys.readouterr().out
    assert "train data: all 8 images read" in said and "val data: 7 of 8 images read" in said and "disc" in said
    assert said.count("without a label map: 1") == 1
    with pytest.raises(SystemExit):
        main([str(config), "--cfg-options", f"data_root={scenes}", "num_classes=4"])
    assert "num_classes=4, but the train data have 3 classes" in capsys.readouterr().err


def test_ade20k_with_a_label_of_200(scenes, capsys):
    pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
    config = Path(__file__).parents[3] / "configs" / "segmentation" / "mae_vit_base_upernet_160k_ade20k_512x512.py"
    for path in (scenes / "images").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    main([str(config), "--cfg-options", f"data_root={scenes}"])
    assert "    1  wall " in capsys.readouterr().out
    relabel(scenes, lambda labels: np.where(labels == 2, 200, labels))
    with pytest.raises(SystemExit) as stopped:
        main([str(config), "--cfg-options", f"data_root={scenes}"])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.count("\n") == 1
    assert "holds the value 200, but num_classes=150 allows 1..150, 0 = ignored and 255 = ignored" in said.out


def check_labels(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", "labels", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_a_data_folder_takes_the_options_of_a_config(scenes, tmp_path):
    code, said = check_labels(scenes)
    assert code == 2 and "the first 8 hold 0, 1, 2: add reduce_zero_label=True where 0 is void" in said
    code, said = check_labels(scenes, "reduce_zero_label=False", "--json", tmp_path / "found.json")
    assert (
        code == 0 and "training: all 8 images read" in said and "disc" in said and said.endswith("nothing is wrong\n")
    )
    assert "8 of 8 validation images are in the training set too" in said
    first, _ = json.loads((tmp_path / "found.json").read_text())["sets"]
    assert first["images"] == 8 and set(first["pixels"]) == {"0", "1", "2"} and first["problems"] == []
    for path in list((scenes / "annotations").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_L.png"))
    assert "set seg_map_suffix=_L.png" in check_labels(scenes, "reduce_zero_label=False")[1]
    assert check_labels(scenes, "reduce_zero_label=False", "seg_map_suffix=_L.png")[0] == 0
    assert (
        check_labels(scenes, "label_values=[0,[1,2]]", "seg_map_suffix=_L.png", "classes_file=none", "num_classes=2")[0]
        == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["reduce_zero_label=False", "num_classes=4"], "num_classes is 4, but .*classes.txt names 3 classes"),
        (["reduce_zero_label=False", "classes_file=no.txt"], "there is no .*no.txt; add num_classes=N"),
        (["reduce_zero=1"], "has no option 'reduce_zero'"),
        (["elsewhere", "reduce_zero_label=False"], "elsewhere; write options as key=value"),
    ],
)
def test_a_data_folder_that_is_not_described_is_one_sentence(scenes, options, message):
    code, said = check_labels(scenes, *options)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said), said


def test_photos_turned_without_their_maps_are_named_with_the_reason(scenes):
    image = scenes / "images" / "training" / "0.png"
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(image) as opened:
        opened.crop((0, 0, 32, 20)).save(image, exif=exif)
    path = scenes / "annotations" / "training" / "0.png"
    with Image.open(path) as opened:
        opened.crop((0, 0, 32, 20)).save(path)
    code, said = check_labels(scenes, "reduce_zero_label=False")
    assert code == 2 and "turn the map as its image's orientation tag says" in said
    with Image.open(path) as opened:
        opened.transpose(Image.Transpose.ROTATE_270).save(path)
    code, said = check_labels(scenes, "reduce_zero_label=False")
    assert code == 0 and "note: 1 image with the orientation tag 6" in said


def test_a_recipe_is_checked_by_its_name_in_any_folder(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = 0
    try:
        main(["digits", f"data_root={scenes}", "num_classes=3"])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert "does not exist" not in said.err and "all 8 images read" in said.out, (code, said)
