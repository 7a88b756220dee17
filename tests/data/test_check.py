"""mae check images and mae check folders: what they report, in one form, and what the exit code says."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.data.check import Problem, Report, conclude, refuse
from mae_core.data.labelled import read_image_folder
from mae_core.errors import UserError
from mae_core.training.pretrain_config import PretrainConfig


def checked(*arguments):
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def turn(path, orientation, suffix=".jpg"):
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(path) as image:
        turned = image.convert("RGB")
    path.unlink()
    turned.save(path.with_suffix(suffix), exif=exif)
    return path.with_suffix(suffix)


def test_a_sound_folder_of_images_is_clean(tmp_path, write_images):
    write_images(tmp_path, 4)
    code, said = checked("images", tmp_path)
    assert code == 0 and said.endswith("nothing is wrong\n") and "data: {channels: 3, mean: [" in said


@pytest.mark.parametrize("flat, noted", [(3, False), (4, True)])
def test_near_constant_patches_are_counted_and_what_helps_is_said(tmp_path, flat, noted):
    """Sixteen patches of 16 pixels, ``flat`` of them dark with the noise of one grey level."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for place in range(flat):
        pixels[:16, 16 * place : 16 * place + 16] = rng.integers(9, 11, (16, 16, 3))
    Image.fromarray(pixels).save(tmp_path / "0.png")
    code, said = checked("images", tmp_path)
    assert code == 0 and f"near-constant: {flat / 16:.0%} of the patches of 16 pixels" in said
    assert ("of the patches are near-constant" in said) == noted
    if noted:  # and the advice is an option
        eps = said.split("pre-train with ")[1].split(",")[0]
        assert load_config(PretrainConfig, None, [eps]).target.eps == 1e-2


def test_a_note_is_no_fault(tmp_path, write_images):
    paths = write_images(tmp_path, 6)
    turn(paths[0], 6), turn(paths[1], 6), turn(paths[2], 3)
    for name in ("a.xcf", "b.xcf", "c.txt"):
        (tmp_path / name).write_text("x")
    code, said = checked("images", tmp_path)
    assert code == 0 and said.endswith("nothing is wrong\n")
    assert f"note: 2 images with the orientation tag 6, the first is {tmp_path / '000.jpg'}" in said
    assert "note: 1 image with the orientation tag 3" in said
    assert "3 files passed over, by ending: 2 x .xcf, 1 x .txt" in said


def in_shard(root, paths):
    with tarfile.open(root / "a.tar", "w") as archive:
        for path in paths:
            archive.add(path, path.name)
    return [root / "a.tar"]


def in_table(root, paths):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image()})).save_to_disk(
        root / "t"
    )
    return [root / "t"]


@pytest.mark.parametrize("put", [in_shard, in_table])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_turned_photos_inside_of_other_files_are_noted(tmp_path, write_images, put, suffix):
    paths = [turn(path, 6, suffix) for path in write_images(tmp_path / "images", 3)]
    code, said = checked("images", *put(tmp_path, paths))
    assert code == 0 and "note: 3 images with the orientation tag 6, the first is " in said


def test_members_of_a_shard_without_an_image_are_counted(tmp_path, write_images):
    paths = write_images(tmp_path, 2)
    for name in ("000.json", "strange.jxl", "other.jxl", "other.txt"):
        (tmp_path / name).write_text("{}")
    code, said = checked("images", *in_shard(tmp_path, [*paths, *tmp_path.glob("*.j*"), *tmp_path.glob("*.txt")]))
    assert code == 0 and "3 files passed over, by ending: 2 x .jxl, 1 x .txt" in said


@pytest.mark.parametrize("put", [in_shard, in_table])
def test_other_channels_inside_of_other_files_are_reported(tmp_path, write_images, put):
    paths = write_images(tmp_path / "images", 3)
    bands = tmp_path / "images" / "bands.tif"
    tifffile.imwrite(bands, np.zeros((9, 9, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    code, said = checked("images", *put(tmp_path, [*paths, bands]))
    assert code == 2 and "images with other channels: 1" in said and "it has 5 channels, data.channels is 3" in said


@pytest.mark.parametrize("kind", ["images", "folders"])
def test_the_check_takes_the_options_that_its_advice_names(tmp_path, write_classes, kind):
    root = write_classes(tmp_path / "set")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    folder = next(path for path in (root / "train").iterdir() if path.is_dir())
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (90, 90)).save(folder / "large.png")
    place = root if kind == "folders" else root / "train"
    code, said = checked(kind, place, "--max-pixels", "8000")
    assert code == 2 and "set data.pages=first" in said and "set data.max_pixels=8100 to read it" in said
    assert checked(kind, place, "--max-pixels", "8100", "--pages", "first")[0] == 0
    assert "--pages frist is unknown; did you mean 'first'?" in checked(kind, place, "--pages", "frist")[1]


def test_an_unreadable_image_is_named_once(tmp_path, write_images):
    write_images(tmp_path, 2)
    (tmp_path / "cut.png").write_bytes(b"")
    assert checked("images", tmp_path)[1].count("cut.png") == 1
    counted = CliRunner().invoke(app, ["data-stats", str(tmp_path)]).output
    assert counted.count("cut.png") == 1 and counted.splitlines()[-1].startswith("data: {channels: 3")


def test_images_are_compared_with_the_statistics_of_the_weights(tmp_path, write_images, write_classes):
    from mae_core.models.encoder import ViTEncoder
    from mae_core.weights.encoder_file import describe_encoder
    from mae_core.weights.files import write_weights

    encoder = ViTEncoder("nano", image_size=16, patch_size=8)
    for mean, far in ((0.5, False), (0.01, True)):
        file = tmp_path / f"{mean}.safetensors"
        write_weights(file, encoder.state_dict(), {**describe_encoder(encoder), "mean": [mean] * 3, "std": [0.25] * 3})
        for kind, place in (("images", tmp_path / "flat"), ("folders", tmp_path / "set")):
            if not place.exists():
                write_images(place, 3) if kind == "images" else write_classes(place)
            code, said = checked(kind, place, "--weights", file)
            assert code == 0 and ("far from those of the weights" in said) == far


def test_what_lies_beside_the_classes_is_counted_by_the_check_and_the_training(tmp_path, write_images, write_classes):
    root = write_classes(tmp_path / "set")
    write_images(root / "train", 2)
    next((root / "val").iterdir()).joinpath("a.jxl").write_text("")
    code, said = checked("folders", root)
    assert code == 0 and "2 files passed over, by ending: 2 x image outside a class folder" in said
    train, val = read_image_folder(root)
    assert dict(train.passed_over) == {"image outside a class folder": 2} and dict(val.passed_over) == {".jxl": 1}


def test_what_a_pre_training_leaves_out_ends_in_exit_code_2(tmp_path, write_images):
    write_images(tmp_path, 3)
    (tmp_path / "cut.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    tifffile.imwrite(
        tmp_path / "bands.tif", np.zeros((9, 9, 5), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    np.save(tmp_path / "nan.npy", np.full((4, 4, 3), np.nan, np.float32))
    code, said = checked("images", tmp_path, "--json", tmp_path / "found.json")
    assert code == 2 and "unreadable images: 2 (training would start, but leave them out" in said
    assert "images with other channels: 1" in said and "bands.tif: it has 5 channels, data.channels is 3" in said
    assert "error: 3 problems found, listed above" in said
    (one,) = json.loads((tmp_path / "found.json").read_text())["sets"]
    assert one["images"] == 6 and {p["severity"] for p in one["problems"]} >= {"wrong"}
    assert checked("images", tmp_path, "--json", tmp_path / "found.json")[0] == 2  # written before


def test_many_bands_are_told_their_setting(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 9, (8, 8, 5), dtype=np.uint8))
    code, said = checked("images", tmp_path)
    assert code == 0 and "note: set data.channels=5" in said


def test_dark_images_are_told_their_statistics(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 9, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert "far from ImageNet's" in checked("images", tmp_path)[1]


def test_sound_class_folders_are_clean(tmp_path, write_classes):
    code, said = checked("folders", write_classes(tmp_path / "set"))
    assert code == 0 and "train: 12 images of 3 classes" in said and said.endswith("nothing is wrong\n")


def remove(root, *folders):
    for folder in folders:
        shutil.rmtree(root / folder)


def empty_class(root):
    remove(root, "train/ash")
    (root / "train" / "ash").mkdir()


FAULTS = {
    "an empty class": (empty_class, "ash holds no images"),
    "a class of val alone": (
        lambda root: shutil.copytree(root / "val/ash", root / "val/oak"),
        "has classes that train",
    ),
    "one class": (lambda r: remove(r, "train/ash", "train/birch", "val/ash", "val/birch"), "has 1 class folders"),
    "no val images": (lambda r: remove(r, "val/ash", "val/birch", "val/cedar"), "holds no images to evaluate on"),
}


@pytest.mark.parametrize("break_it, message", FAULTS.values(), ids=FAULTS)
def test_the_check_of_folders_refuses_what_training_refuses(tmp_path, write_classes, break_it, message):
    root = write_classes(tmp_path / "set")
    break_it(root)
    code, said = checked("folders", root)
    assert code == 2 and message in said and "(training refuses to start)" in said
    with pytest.raises(UserError, match=message):
        read_image_folder(root)


def test_all_faults_are_found_in_one_pass(tmp_path, write_classes):
    root = write_classes(tmp_path / "set")
    for path in (root / "train" / "ash").iterdir():
        path.unlink()
    (root / "val" / "birch" / "000.png").write_text("words")
    shutil.copy(root / "train" / "cedar" / "001.png", root / "val" / "cedar" / "copy.png")
    shutil.rmtree(root / "val" / "ash")
    turn(root / "train" / "birch" / "000.png", 8)
    code, said = checked("folders", root)
    assert code == 2 and "error: 2 problems found" in said
    assert "1 of 7 validation images are in the training set too" in said
    assert "note: 1 image with the orientation tag 8" in said and "1 classes have no validation image: ash" in said


def test_lists_with_several_labels_are_checked_too(tmp_path, write_images):
    write_images(tmp_path, 4)
    (tmp_path / "train.csv").write_text("file,labels\n000.png,a;b\n001.png,a\n")
    (tmp_path / "val.csv").write_text("file,labels\n002.png,a\n003.png,\n")
    code, said = checked("folders", tmp_path)
    assert code == 0 and "train.csv: 2 images of 2 classes" in said and "1 classes have no validation image: b" in said


def test_nothing_to_check_is_one_sentence(tmp_path):
    for verb in ("images", "folders"):
        code, said = checked(verb, tmp_path)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_kind_is_counted_and_named_up_to_a_limit():
    report = Report("set", ["set: 9 images"], [Problem("cut files", f"{n}.png is cut", "", "wrong") for n in range(7)])
    lines = report.describe(most=2).splitlines()
    assert lines[1].startswith("  cut files: 7 (training")
    assert lines[2:] == ["    0.png is cut", "    1.png is cut", "    ... and 5 more"]
    with pytest.raises(UserError, match=r"^7 problems found"):
        conclude([report], say=lambda text: None)


def test_training_raises_the_refused_alone():
    refuse(Problem("a", "only to know", "", "note"))
    refuse(Problem("a", "left out", "", "wrong"))
    with pytest.raises(UserError, match="cannot start"):
        refuse(Problem("a", "cannot start"))
