"""A shrunk copy: the sizes asked for, every depth kept, all sources taken, checked, and nothing written over."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.data import shrink as shrinking
from mae_core.data.decoding import read_image, to_tensor
from mae_core.data.images import IMAGE_SUFFIXES, ImageFiles
from mae_core.data.reading import Reading
from mae_core.data.shrink import MANIFEST, shrink
from mae_core.data.sources import open_places
from mae_core.errors import UserError


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["shrink", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def smooth(*shape: int) -> np.ndarray:
    """(H, W, C) in 0..1, of low frequencies: a resize hardly changes it."""
    rows, cols, bands = (np.arange(n) for n in shape)
    waves = np.sin(rows[:, None, None] / 17 + bands) + np.cos(cols[None, :, None] / 23 - bands)
    return (waves + 2) / 4


def test_photos_stay_jpeg_small_ones_their_bytes_and_others_are_named(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "small"
    (folder / "a").mkdir(parents=True)
    large = Image.fromarray((smooth(120, 90, 3) * 255).astype(np.uint8))
    large.save(folder / "a" / "large.jpg")
    large.save(folder / "large.png")
    large.crop((0, 0, 40, 30)).save(folder / "small.v2.jpg")
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "notes.txt").write_text("x")
    text = run(folder, out, "--shortest", 45)
    assert "3 images, 2 of them resized" in text and "broken.png (not an image)" in text
    found = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    assert found.keys() == {"a/large.jpg", "large.png", "small_v2.jpg", MANIFEST}
    assert Image.open(found["a/large.jpg"]).size == Image.open(found["large.png"]).size == (45, 60)
    assert found["small_v2.jpg"].read_bytes() == (folder / "small.v2.jpg").read_bytes()
    manifest = json.loads(found[MANIFEST].read_text())
    assert manifest["unreadable"] == {"broken.png": "not an image"} and manifest["no_images"] == {".txt": 1}
    reference = np.asarray(large.resize((45, 60), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(Image.open(found["large.png"])).astype(int) - reference).max() <= 1
    with pytest.raises(UserError, match="exists, and nothing is written over"):
        shrink(ImageFiles([folder / "large.png"], None), out, reading=Reading(), shortest=45)


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_every_depth_and_number_of_channels_keeps_its_range(tmp_path, channels, kind):
    values = smooth(80, 64, channels)
    array = (values * 300 - 20).astype("float32") if kind == "float32" else (values * np.iinfo(kind).max).astype(kind)
    np.save(tmp_path / "x.npy", array)
    shrink(ImageFiles([tmp_path / "x.npy"], None, tmp_path), tmp_path / "out", reading=Reading(channels), shortest=32)
    (file,) = (p for p in (tmp_path / "out").iterdir() if p.name != MANIFEST)
    found, before = (to_tensor(read_image(p, channels)) for p in (file, tmp_path / "x.npy"))
    assert found.shape == (channels, 40, 32) and found.dtype == before.dtype
    picked = before[:, 1::2, 1::2].float()
    assert float((found.float() - picked).abs().mean()) < 0.02 * float(picked.max() - picked.min())
    if kind == "uint16":
        assert np.load(file).dtype == np.uint16 and len(found.unique()) > 300


def test_missing_data_stays_missing(tmp_path):
    array = smooth(80, 64, 2).astype(np.float32).transpose(2, 0, 1).copy()
    array[:, :40] = np.nan
    tags = [(42113, "s", 0, "nan", True)]
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack", planarconfig="separate", extratags=tags)
    shrink(ImageFiles([tmp_path / "x.tif"], None, tmp_path), tmp_path / "out", reading=Reading(2), shortest=32)
    found = read_image(tmp_path / "out" / "x.tif", 2)
    assert found.shape == (2, 40, 32)
    assert found[:, :19].isnan().all() and not found[:, 21:].isnan().any()


@pytest.mark.extra("webdataset")
def test_shards_hold_what_a_folder_holds_and_are_taken_again(tmp_path, write_images):
    paths = write_images(tmp_path / "images", 5, size=(60, 50))
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in paths))
    run(tmp_path / "images", tmp_path / "files", "--shortest", 25)
    run(tmp_path / "list.txt", tmp_path / "shards", "--shortest", 25, "--shards")
    run(tmp_path / "shards", tmp_path / "again", "--shortest", 25)
    folder, shards, again = (open_places([tmp_path / n], 3) for n in ("files", "shards", "again"))
    assert len(folder) == len(shards) == len(again) == 5
    for index in range(5):
        one, other, third = (to_tensor(s.read(index)) for s in (folder, shards, again))
        assert one.shape == (3, 25, 30) and torch.equal(one, other) and torch.equal(one, third)
    with tarfile.open(next((tmp_path / "shards").glob("*.tar"))) as archive:
        assert all(name.count(".") == 1 for name in archive.getnames())


def test_a_disk_that_returns_other_bytes_leaves_nothing(tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "images", 2, size=(60, 50))
    real = Path.read_bytes
    monkeypatch.setattr(shrinking, "fsync_path", lambda path: None)
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + (b"x" if "out" in str(path) else b""))
    with pytest.raises(UserError, match="reads back from the disk with another checksum"):
        shrink(open_places([tmp_path / "images"], None), tmp_path / "out", reading=Reading(), shortest=25)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_two_images_of_one_name_both_stay(tmp_path):
    for suffix in (".png", ".bmp"):
        Image.new("RGB", (60, 50), "red").save(tmp_path / f"x{suffix}")
    files = ImageFiles([tmp_path / "x.png", tmp_path / "x.bmp"], None, tmp_path)
    shrink(files, tmp_path / "out", reading=Reading(), shortest=25)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"x.png", "x-2.png", MANIFEST}


@pytest.mark.parametrize("names", [("a.png", "A.png"), ("A.png", "a.png"), ("B/a.png", "b/A.png")])
def test_names_that_differ_in_case_alone_stay_apart_on_disks_without_it(names):
    taken: set[str] = set()
    first, second = (shrinking._new_name(name, ".png", taken) for name in names)
    assert first == names[0] and second == names[1].replace(".png", "-2.png")


def test_images_above_the_limit_are_passed_over_and_the_limit_is_an_option(tmp_path, write_images):
    write_images(tmp_path / "images", 2, size=(32, 32))
    result = CliRunner().invoke(
        app, ["shrink", str(tmp_path / "images"), str(tmp_path / "out"), "--max-pixels", "1000"]
    )
    assert result.exit_code == 2 and "none of 2 images can be read" in result.output
    assert "2 images" in run(tmp_path / "images", tmp_path / "out", "--max-pixels", 1024)


def test_a_photo_without_a_name_stays_jpeg(tmp_path):
    """As a row of a table has none."""
    file = io.BytesIO()
    Image.fromarray((smooth(120, 90, 3) * 255).astype(np.uint8)).save(file, "JPEG")
    copied = shrinking._copy(file.getvalue(), "17", "", Reading(), 45, 95)
    assert copied.suffix == ".jpg" and copied.content.startswith(b"\xff\xd8")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(file := io.BytesIO(), "JPEG2000")
    assert shrinking._copy(file.getvalue(), "18", "", Reading(), 45, 95).suffix in IMAGE_SUFFIXES
