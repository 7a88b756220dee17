"""Near-copies: found where they were made, of photos, of dark noisy images and of flat ones; and what checks say."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.data import near_copies
from mae_core.data.near_copies import Fingerprints, copies_across, copies_within, fingerprint, fingerprint_of


def photo(seed: int, size: tuple[int, int] = (320, 280)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def microscope(seed: int) -> Image.Image:
    """Some bright discs on a dark background of noise: where difference hashes see noise alone."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(6, 1.5, (256, 256))
    rows, cols = np.mgrid[:256, :256]
    for row, col in rng.integers(10, 246, (12, 2)):
        pixels[(rows - row) ** 2 + (cols - col) ** 2 < 81] += 25
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "same": lambda picture: picture,
    "quality 40": lambda picture: encoded(picture, 40),
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC),
    "a quarter, squashed": lambda picture: picture.resize((picture.width // 4, picture.height // 5)),
    "brighter": lambda picture: picture.point(lambda value: value * 0.9 + 20),
}


@pytest.mark.parametrize("made", [photo, microscope])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_found_and_nothing_else(made, copied):
    pictures = [made(seed) for seed in range(8)]
    found = Fingerprints(9)
    for number, picture in enumerate([*pictures, copied(pictures[3])]):
        found.add(str(number), fingerprint(picture))
    ((name, of, similarity),) = copies_within(found)
    assert (name, of) == ("8", "3") and similarity >= near_copies.ALIKE


def test_what_a_fingerprint_is_of(tmp_path):
    """16 bits, five bands, a JPEG at an eighth and its upright view agree with the picture; flat images have none."""
    picture = photo(0, (640, 560))
    plain = fingerprint(picture)
    assert plain.dtype == np.float16 and np.linalg.norm(plain.astype(float)) == pytest.approx(1, abs=1e-2)
    grey = np.asarray(picture.convert("L"))
    assert plain @ fingerprint(torch.from_numpy(grey.astype(np.float32) / 255)[None]) > 0.999
    tifffile.imwrite(tmp_path / "deep.tif", grey.astype(np.uint16) * 257)
    picture.save(tmp_path / "a.jpg", quality=90)
    exif = Image.Exif()
    exif[274] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("deep.tif", "a.jpg", "turned.jpg"):
        assert plain.astype(float) @ fingerprint_of(tmp_path / name).astype(float) > 0.995, name
    assert fingerprint(Image.new("RGB", (40, 30), "white")) is None
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:600])
    assert fingerprint_of(tmp_path / "cut.jpg") is None and fingerprint_of(tmp_path / "none.png") is None
    five = torch.rand(5, 40, 40, generator=torch.Generator().manual_seed(0))
    assert fingerprint(five).shape == (256,)


def test_across_blocks_and_sets(monkeypatch):
    monkeypatch.setattr(near_copies, "ROWS_AT_ONCE", 3)
    rows = [fingerprint(photo(seed)) for seed in (0, 1, 2, 3, 0, 4, 1)]
    one, other = Fingerprints(7), Fingerprints(2)
    for number, row in enumerate(rows):
        one.add(number, row)
    other.add("x", rows[3])
    other.add("flat", None)
    assert [(copy.name, copy.of) for copy in copies_within(one)] == [("4", "0"), ("6", "1")]
    assert [(copy.name, copy.of) for copy in copies_across(other, one)] == [("x", "3")]
    assert copies_across(other, Fingerprints(0)) == [] and copies_within(Fingerprints(0)) == []


def said_by(*arguments) -> str:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert "Traceback" not in result.output and result.exit_code == 0, result.output
    return result.output


def test_the_checks_say_it_and_list_all(tmp_path, write_classes):
    root = write_classes(tmp_path / "set")
    ash = root / "train" / "ash"
    with Image.open(ash / "001.png") as picture:
        encoded(picture, 60).save(root / "train" / "birch" / "z.jpg")
        picture.resize((30, 26)).save(root / "val" / "cedar" / "z.png")
    shutil.copy(ash / "002.png", root / "val" / "ash" / "same.png")
    said = said_by("folders", root, "--json", tmp_path / "found.json")
    assert (
        f"note: 1 of 13 images are near-copies of another one, the first is {root}/train/birch/z.jpg (of {ash}/001"
        in said
    )
    assert "1 of 11 validation images are in the training set too" in said and "same.png" in said
    assert (
        f"1 of 11 validation images are near-copies of training images, the first is {root}/val/cedar/z.png (of" in said
    )
    train, val = json.loads((tmp_path / "found.json").read_text())["sets"]
    assert [(copy["name"], copy["of"]) for copy in train["near_copies"]] == [
        (f"{root}/train/birch/z.jpg", f"{ash}/001.png")
    ]
    leaks = [(copy["name"], copy["similarity"] == 1) for copy in val["near_copies"]]
    assert leaks == [(f"{root}/val/ash/same.png", True), (f"{root}/val/cedar/z.png", False)]
    assert "1 of 13 images are near-copies" in said_by("images", root / "train")


def test_of_a_large_set_some_are_compared_and_it_is_said(tmp_path, write_images, monkeypatch):
    monkeypatch.setattr("mae_core.data.survey.Fingerprints", lambda total: Fingerprints(total, 4))
    for path in write_images(tmp_path, 4):
        shutil.copy(path, path.with_name(f"{path.stem}b.png"))  # of these none is compared
    shutil.copy(tmp_path / "000.png", tmp_path / "002.png")
    assert "1 of 8 images are near-copies of another one (4 of 8 compared)" in said_by("images", tmp_path)
