"""Numbers of 1 to 16 channels and 8 to 32 bits come out of files as they went in."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mae_core.data.decoding import UnreadableImage, decode_bytes, read_image, size_of, to_picture, to_tensor


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(5, 40, shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def write(path: Path, array: np.ndarray, **options) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        tifffile.imwrite(path, array, **options)
    return path


def expected(array: np.ndarray) -> np.ndarray:
    kind = array.dtype.kind
    return array / np.iinfo(array.dtype).max if kind == "u" else array.astype(np.float64)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13, 16])
def test_every_depth_and_number_of_channels_keeps_its_range(tmp_path, suffix, dtype, channels):
    array = numbers((9, 7, channels), dtype)
    options = {"photometric": "minisblack", "planarconfig": "contig"} if suffix == ".tif" and channels > 1 else {}
    stored = array[..., 0] if channels == 1 else array
    pixels = read_image(write(tmp_path / f"x{suffix}", stored, **options), channels)
    found = to_tensor(pixels)
    assert found.shape == (channels, 9, 7) and size_of(pixels) == (9, 7)
    assert found.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    values = found.double().numpy() / (255 if dtype == "uint8" else 1)
    np.testing.assert_allclose(values, expected(array).transpose(2, 0, 1), rtol=1e-6)


@pytest.mark.parametrize("layout", ["planar", "pages"])
def test_bands_that_come_first_are_found(tmp_path, layout):
    array = numbers((5, 9, 7), "uint16")
    options = {"photometric": "minisblack", "planarconfig": "separate"} if layout == "planar" else {}
    path = write(tmp_path / "x.tif", array, **options)
    np.testing.assert_allclose(read_image(path, 5).numpy(), array / 65535, rtol=1e-6)
    np.testing.assert_allclose(read_image(write(tmp_path / "x.npy", array), 5).numpy(), array / 65535, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_stays_grey_and_deep(tmp_path, suffix):
    array = numbers((9, 7), "uint16")
    Image.fromarray(array).save(tmp_path / f"deep{suffix}")
    grey, rgb = (read_image(tmp_path / f"deep{suffix}", channels) for channels in (1, 3))
    np.testing.assert_allclose(grey[0].numpy(), array / 65535, rtol=1e-6)
    assert rgb.shape == (3, 9, 7) and torch.equal(rgb[0], rgb[1]) and torch.equal(rgb[:1], grey)


def test_16_bit_colours_keep_their_low_bits_and_become_grey_like_pillow(tmp_path):
    array = numbers((9, 7, 3), "uint16")
    path = write(tmp_path / "x.tif", array, photometric="rgb")
    np.testing.assert_allclose(read_image(path, 3).numpy(), array.transpose(2, 0, 1) / 65535, rtol=1e-6)
    wanted = array @ np.array([0.299, 0.587, 0.114]) / 65535
    np.testing.assert_allclose(read_image(path, 1)[0].numpy(), wanted, rtol=1e-5)


def test_signed_numbers_and_floats_stay_as_they_are(tmp_path):
    array = np.array([[-300, 5], [7, 1200]], dtype=np.int16)
    assert read_image(write(tmp_path / "x.npy", array), 1).tolist() == [array.tolist()]


def test_a_picture_with_transparency_has_four_channels_where_four_are_asked(tmp_path):
    array = numbers((5, 4, 4), "uint8")
    Image.fromarray(array, "RGBA").save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", 4).numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "array, channels, reason",
    [
        (np.zeros((20, 30, 13), "uint8"), 3, "it has 13 channels, data.channels is 3"),
        (np.zeros((20, 30), "uint8"), 13, "it has 1 channels, data.channels is 13"),
        (np.zeros((20, 30, 4), "uint16"), 3, "it has 4 channels, data.channels is 3"),
        (np.zeros(4), 1, r"an array \(4,\) of float64"),
        (np.zeros((2, 3, 4, 5)), 1, "(H, W), (H, W, C) or (C, H, W) are needed"),
        (np.zeros((0, 5)), 1, r"an array \(0, 5\)"),
        (np.full((4, 5), np.nan), 1, "it holds NaN; replace them"),
        (np.full((4, 5), 1e300), 1, "it holds the value 1e+300, too large to compute with"),
        (np.full((4, 5), 3e38, "float32"), 1, "it holds the value 3e+38, too large to compute with"),
        (np.full((4, 5), -np.inf), 1, "it holds infinite values, too large to compute with"),
        (np.array([["a", "b"]]), 1, "an array"),
    ],
)
def test_what_does_not_fit_is_unreadable_with_a_reason(tmp_path, array, channels, reason):
    with pytest.raises(UnreadableImage) as caught:
        read_image(write(tmp_path / "x.npy", array), channels)
    assert reason.replace("\\", "") in caught.value.unreadable.reason


def test_objects_in_an_array_are_not_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="allow_pickle"):
        read_image(tmp_path / "x.npy", 1)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_half_a_file_is_unreadable(tmp_path, suffix, share):
    path = write(tmp_path / f"x{suffix}", numbers((64, 64, 13), "uint16"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, 13)
    assert caught.value.unreadable.reason and "\n" not in caught.value.unreadable.reason


def test_damaged_tiff_is_numbers_or_a_reason(tmp_path):
    content = write(tmp_path / "x.tif", numbers((16, 16, 5), "uint16"), compression="zlib").read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] = rng.integers(256)
        try:
            outcomes.add(read_kind(bytes(damaged)))
        except UnreadableImage as error:
            assert error.unreadable.reason and "\n" not in error.unreadable.reason
            outcomes.add("reason")
    assert "reason" in outcomes


def read_kind(content: bytes) -> str:
    assert decode_bytes(content, "x.tif", 5).shape[0] == 5
    return "numbers"


def test_what_a_file_is_says_its_content_not_its_name(tmp_path):
    buffer = BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    (tmp_path / "x.npy").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "x.npy", 3).size == (4, 3)


def test_a_picture_of_any_numbers_is_stretched_to_be_seen():
    pixels = torch.linspace(0.01, 0.02, 100).reshape(1, 10, 10).repeat(13, 1, 1)
    picture = to_picture(pixels)
    assert picture.mode == "RGB" and picture.getextrema() == ((0, 255),) * 3
    assert to_picture(torch.zeros(2, 4, 5)).mode == "L"
