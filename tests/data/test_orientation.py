"""Photos are read upright, whatever their file: against Pillow's own transposition, and NumPy where Pillow has none."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mae_core.data.decoding import read_image, size_of, to_tensor
from mae_core.data.orientation import as_stored, orientation_of, upright

TAG = 274
RNG = np.random.default_rng(0)
BY_NUMPY = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def photo(path: Path, orientation: int, mode: str = "RGB") -> None:
    """Coarse blocks, 40 wide and 24 high as stored, with the tag."""
    blocks = RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(blocks).convert(mode)
    if path.suffix == ".tif":
        image.save(path, tiffinfo={TAG: orientation})
    else:
        exif = Image.Exif()
        exif[TAG] = orientation
        image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "suffix, mode", [(".jpg", "RGB"), (".png", "RGB"), (".png", "P"), (".tif", "L"), (".webp", "RGB")]
)
def test_pictures_are_read_as_pillow_turns_them(tmp_path, suffix, mode, orientation):
    path = tmp_path / f"x{suffix}"
    photo(path, orientation, mode)
    with path.open("rb") as file, Image.open(file) as image:  # by its name, Pillow 13 garbles plain TIFF on their side
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = read_image(path, 3)
    assert np.array_equal(np.asarray(found), wanted)
    assert wanted.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
    assert orientation_of(path) == orientation
    assert size_of(as_stored(found, orientation)) == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels, dtype", [(1, np.uint16), (5, np.uint8), (4, np.uint16), (2, np.float32)])
def test_bands_and_deep_values_are_turned_likewise(tmp_path, channels, dtype, orientation):
    stored = RNG.integers(0, 200, (24, 40, channels)).astype(dtype)
    path = tmp_path / "x.tif"
    tag = [(TAG, "H", 1, orientation, True)]
    tifffile.imwrite(path, stored.squeeze(), photometric="minisblack", planarconfig="contig", extratags=tag)
    pixels = to_tensor(read_image(path, None)).numpy()
    scale = np.iinfo(dtype).max if dtype == np.uint16 else 1
    np.testing.assert_allclose(np.moveaxis(pixels, 0, -1) * scale, BY_NUMPY[orientation](stored), atol=1e-2)
    assert orientation_of(path) == orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_back_is_the_inverse_for_pictures_and_tensors(orientation):
    image = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = to_tensor(image)
    assert np.array_equal(to_tensor(upright(image, orientation)), upright(pixels, orientation))
    for one in (image, pixels):
        assert np.array_equal(to_tensor(as_stored(upright(one, orientation), orientation)), pixels)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_a_value_that_the_standard_does_not_have_changes_nothing(tmp_path, tag):
    photo(tmp_path / "x.jpg", tag)
    assert orientation_of(tmp_path / "x.jpg") == 1
    assert size_of(read_image(tmp_path / "x.jpg", 3)) == (24, 40)


def test_a_damaged_block_of_exif_is_not_a_damaged_picture(tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert size_of(read_image(tmp_path / "x.jpg", 3)) == (24, 40)


def test_what_is_no_picture_is_upright(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.uint8))
    (tmp_path / "words.jpg").write_text("words")
    assert [orientation_of(tmp_path / name) for name in ("x.npy", "words.jpg", "none.png")] == [1, 1, 1]
