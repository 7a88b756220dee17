"""What a file says of its pixels is honoured at every depth or refused by name: against OpenCV, tifffile, Pillow."""

import importlib.util
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mae_core.data.decoding import UnreadableImage, decode_bytes, fill_no_data, read_image, to_picture, to_tensor
from mae_core.data.reading import Reading, notes_taken

RNG = np.random.default_rng(7)


def deep(*shape: int, top: int = 65535, dtype: str = "uint16") -> np.ndarray:
    return RNG.integers(0, top, shape, dtype=dtype, endpoint=True)


def shares(path: Path, read_as: Reading | int | None) -> np.ndarray:
    """(H, W, C), as shares of white where the file has whole numbers."""
    found = to_tensor(read_image(path, read_as))
    return (found.double() / (255 if found.dtype == torch.uint8 else 1)).numpy().transpose(1, 2, 0)


def reason(path: Path, read_as: Reading | int | None) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, read_as)
    return caught.value.unreadable.reason


def plain_png(array: np.ndarray, colour_type: int, interlaced: bool = False) -> bytes:
    """A PNG of 16 bits, written here since neither Pillow nor OpenCV writes grey with alpha or interlaced ones."""
    height, width = array.shape[:2]
    passes = [(slice(None), slice(None))]
    if interlaced:
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        passes = [(slice(y, None, dy), slice(x, None, dx)) for y, x, dy, dx in starts]
    rows = [b"\0" + row.astype(">u2").tobytes() for place in passes for row in array[place] if row.size]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, int(interlaced))
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


# ---- 16 bits in pictures


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("top", [63, 65535])
def test_16_bit_colours_of_opencv_keep_their_range(tmp_path, channels, top):
    cv2 = pytest.importorskip("cv2")
    array = np.sort(deep(31, 23, channels, top=top), axis=1)  # smooth rows, so that all filters of PNG occur
    order = [2, 1, 0, 3][:channels]
    assert cv2.imwrite(str(tmp_path / "x.png"), array[..., order])
    np.testing.assert_allclose(shares(tmp_path / "x.png", 3), array[..., :3] / 65535, rtol=1e-6)
    np.testing.assert_allclose(shares(tmp_path / "x.png", channels), array / 65535, rtol=1e-6)
    grey = array[..., :3] @ np.array([0.299, 0.587, 0.114]) / 65535
    np.testing.assert_allclose(shares(tmp_path / "x.png", 1)[..., 0], grey, rtol=1e-5)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_of_every_kind(tmp_path, colour_type, channels, interlaced):
    array = deep(13, 11, channels)
    (tmp_path / "x.png").write_bytes(plain_png(array, colour_type, interlaced))
    colours = array[..., : 1 if channels < 3 else 3]
    np.testing.assert_allclose(shares(tmp_path / "x.png", None), colours / 65535, rtol=1e-6)
    half = (tmp_path / "x.png").read_bytes()[: 60 + 100 * channels]
    with pytest.raises(UnreadableImage):
        decode_bytes(half, "half.png", None)


@pytest.mark.parametrize("largest", [1023, 65535])
def test_16_bit_ppm_keeps_its_range(tmp_path, largest):
    array = deep(5, 7, 3, top=largest)
    (tmp_path / "x.ppm").write_bytes(f"P6 7 5 {largest}\n".encode() + array.astype(">u2").tobytes())
    np.testing.assert_allclose(shares(tmp_path / "x.ppm", 3), array / largest, rtol=1e-6)
    (tmp_path / "x.ppm").write_bytes((tmp_path / "x.ppm").read_bytes()[:-9])
    assert "truncated" in reason(tmp_path / "x.ppm", 3)
    (tmp_path / "x.ppm").write_text(f"P3 1 1 {largest}\n1 2 3\n")
    assert "written as text" in reason(tmp_path / "x.ppm", 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_2000_keeps_its_range(tmp_path, channels):
    codecs = pytest.importorskip("imagecodecs")
    array = deep(64, 64, channels).squeeze()
    (tmp_path / "x.jp2").write_bytes(codecs.jpeg2k_encode(array, reversible=True))
    np.testing.assert_allclose(shares(tmp_path / "x.jp2", None).squeeze(), array / 65535, rtol=1e-6)


# ---- alpha, palettes, colours


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode, channels", [("LA", 1), ("RGBA", 3)])
def test_alpha_is_left_out_and_noted(tmp_path, suffix, mode, channels):
    array = deep(5, 6, len(mode), top=255, dtype="uint8")
    Image.fromarray(array, mode).save(tmp_path / f"x{suffix}")
    for read_as in (None, channels):
        with notes_taken() as notes:
            np.testing.assert_allclose(shares(tmp_path / f"x{suffix}", read_as), array[..., :channels] / 255)
        assert notes.sentences(1) == ["1 of 1 images have an alpha channel, which is left out"]
    with notes_taken() as notes:
        assert shares(tmp_path / f"x{suffix}", len(mode)).shape == (5, 6, len(mode))
    assert not notes


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra, channels", [("unassalpha", 3), ("unspecified", 4)])
def test_a_fourth_band_is_alpha_only_where_the_tag_says_so(tmp_path, bits, extra, channels):
    array = deep(5, 6, 4, top=2**bits - 1, dtype=f"uint{bits}")
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="rgb", extrasamples=[extra])
    np.testing.assert_allclose(shares(tmp_path / "x.tif", None), array[..., :channels] / (2**bits - 1), rtol=1e-6)
    if channels == 4:
        assert reason(tmp_path / "x.tif", 3) == "it has 4 channels, data.channels is 3"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [1, 5])
def test_white_is_zero_is_inverted(tmp_path, dtype, planar, channels):
    array = deep(6, 7, channels, top=np.iinfo(dtype).max, dtype=dtype)
    stored = array.squeeze() if planar == "contig" or channels == 1 else array.transpose(2, 0, 1)
    options = {} if channels == 1 else {"planarconfig": planar}
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="miniswhite", **options)
    np.testing.assert_allclose(shares(tmp_path / "x.tif", None), 1 - array / np.iinfo(dtype).max, atol=1e-7)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_white_is_zero_of_numbers_without_a_largest_is_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "x.tif", np.ones((4, 4), dtype), photometric="miniswhite")
    assert reason(tmp_path / "x.tif", 1).startswith("its white is zero")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_palette_gives_its_colours(tmp_path, dtype):
    indices = deep(6, 7, top=200, dtype=dtype)
    table = deep(3, 2 ** (8 * indices.itemsize))
    tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette", colormap=table)
    wanted = table[:, indices].transpose(1, 2, 0) / 65535
    np.testing.assert_allclose(shares(tmp_path / "x.tif", None), wanted, atol=1 / 255 if dtype == "uint8" else 1e-6)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_of_8_bits_is_rgb_as_pillow_makes_it(tmp_path, suffix):
    image = Image.fromarray(deep(8, 8, 4, top=255, dtype="uint8"), "CMYK")
    image.save(tmp_path / f"x{suffix}")
    with Image.open(tmp_path / f"x{suffix}") as stored:
        wanted = np.asarray(stored.convert("RGB")) / 255
    np.testing.assert_allclose(shares(tmp_path / f"x{suffix}", None), wanted)


@pytest.mark.parametrize(
    "photometric, samples, dtype, named",
    [
        ("separated", 4, "uint16", "CMYK with 16 bits"),
        ("cielab", 3, "uint16", "CIELAB"),
        ("cfa", 1, "uint16", "colour filter"),
    ],
)
def test_other_colours_are_refused_by_name(tmp_path, photometric, samples, dtype, named):
    tifffile.imwrite(tmp_path / "x.tif", deep(8, 8, samples, dtype=dtype).squeeze(), photometric=photometric)
    for read_as in (None, 3, samples):
        assert named in reason(tmp_path / "x.tif", read_as)


def test_complex_numbers_are_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.ones((4, 4), "complex64"), photometric="minisblack")
    assert "complex64" in reason(tmp_path / "x.tif", 1)


# ---- compression and depth


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("predictor", [False, True])
def test_compressed_tiff_is_what_tifffile_wrote(tmp_path, compression, dtype, predictor):
    pytest.importorskip("imagecodecs")
    if predictor and compression == "packbits":
        pytest.skip("packbits has no predictor")
    array = (
        RNG.normal(0, 9, (17, 19)).astype(dtype)
        if dtype == "float32"
        else deep(17, 19, top=np.iinfo(dtype).max, dtype=dtype)
    )
    tifffile.imwrite(tmp_path / "x.tif", array, compression=compression, predictor=predictor)
    wanted = array if dtype == "float32" else array / np.iinfo(dtype).max
    np.testing.assert_allclose(shares(tmp_path / "x.tif", 1)[..., 0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "shape, dtype", [((9, 7, 3), "uint8"), ((9, 7), "uint16"), ((9, 7), "uint8"), ((9, 7), "float32")]
)
def test_opencvs_tiff_is_read_without_imagecodecs(tmp_path, monkeypatch, shape, dtype):
    cv2 = pytest.importorskip("cv2")
    array = (
        RNG.normal(0, 9, shape).astype(dtype)
        if dtype == "float32"
        else deep(*shape, top=np.iinfo(dtype).max, dtype=dtype)
    )
    assert cv2.imwrite(str(tmp_path / "x.tif"), array[..., ::-1] if len(shape) == 3 else array)  # LZW by default
    without_imagecodecs(monkeypatch)
    wanted = array if dtype == "float32" else array / np.iinfo(dtype).max
    np.testing.assert_allclose(shares(tmp_path / "x.tif", None).squeeze(), wanted, rtol=1e-6)


def test_what_needs_imagecodecs_names_the_line_that_installs_it(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    assert cv2.imwrite(str(tmp_path / "x.tif"), deep(9, 7, 3))
    without_imagecodecs(monkeypatch)
    assert reason(tmp_path / "x.tif", 3) == (
        "its 16 bits with LZW compression need imagecodecs; run: pip install 'mae-transfer[tiff]'"
    )


def without_imagecodecs(monkeypatch) -> None:
    """As where it is not installed: tifffile then says that it needs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "imagecodecs" else find(name, *rest)
    )

    class Missing(dict):
        def __missing__(self, key):
            raise KeyError(f"{key!r} requires the 'imagecodecs' package")

        def __getitem__(self, key):
            return self.__missing__(key) if int(key) != 1 else None

        def __contains__(self, key):
            return int(key) == 1

    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", Missing())


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", None])
def test_one_bit_of_any_compression(tmp_path, compression):
    array = deep(16, 24, top=1, dtype="uint8").astype(bool)
    Image.fromarray(array).save(tmp_path / "x.tif", compression=compression)
    np.testing.assert_array_equal(shares(tmp_path / "x.tif", 1)[..., 0], array)


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
def test_odd_depths_are_shares_of_their_own_largest(tmp_path, bits):
    pytest.importorskip("imagecodecs")
    array = deep(8, 9, top=2**bits - 1)
    file = tmp_path / "x.tif"
    file.write_bytes(packed_tiff(array, bits))
    np.testing.assert_allclose(shares(file, 1)[..., 0], array / (2**bits - 1), rtol=1e-5)


def packed_tiff(array: np.ndarray, bits: int) -> bytes:
    """An uncompressed grey TIFF whose rows are packed, which tifffile does not write."""
    rows = b"".join(
        np.packbits(((row[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8).ravel()).tobytes() for row in array
    )
    height, width = array.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 3, height), (279, 4, len(rows))]
    directory = struct.pack("<H", len(tags))
    for number, kind, value in tags:
        directory += struct.pack("<HHI", number, kind, 1) + struct.pack(
            "<HH" if kind == 3 else "<I", *((value, 0) if kind == 3 else (value,))
        )
    return struct.pack("<2sHI", b"II", 42, 8 + len(rows)) + rows + directory + struct.pack("<I", 0)


# ---- missing data


@pytest.mark.parametrize(
    "dtype, text, value",
    [
        ("float32", "-9999", -9999),
        ("float32", "nan", np.nan),
        ("float32", "-3.4028234663852886e+38", np.finfo("float32").min),
        ("float64", "-1.7976931348623157e+308", np.finfo("float64").min),
        ("int16", "-9999", -9999),
        ("uint16", "0", 0),
        ("uint8", "255", 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_no_data_of_gdal_is_nan_noted_and_filled_with_the_mean(tmp_path, dtype, text, value, channels):
    array = deep(9, 8, channels, top=100, dtype="uint8").astype(dtype) + np.ones((), dtype)
    array[2:4, 3:5] = value
    options = {"planarconfig": "contig"} if channels > 1 else {}
    options |= {"extratags": [(42113, "s", 0, text, True)], "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "x.tif", array.squeeze(), **options)
    with notes_taken() as notes:
        found = read_image(tmp_path / "x.tif", channels)
    missing = found.isnan().numpy()
    assert missing[:, 2:4, 3:5].all() and missing.sum() == 4 * channels
    largest = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    np.testing.assert_allclose(found.numpy()[~missing], (array / largest).transpose(2, 0, 1)[~missing], rtol=1e-6)
    assert "1 of 1 images have pixels without data (5.6 % of all pixels)" in notes.sentences(1)[0]
    filled = fill_no_data(found, [0.5] * channels)
    assert (filled.numpy()[missing] == 0.5).all() and torch.equal(filled[~found.isnan()], found[~found.isnan()])
    assert to_picture(found).size == (8, 9)


def test_no_data_that_does_not_occur_leaves_8_bits(tmp_path):
    array = deep(5, 5, top=200, dtype="uint8")
    for text in ("255", "-9999"):
        tifffile.imwrite(tmp_path / "x.tif", array, extratags=[(42113, "s", 0, text, True)])
        assert to_tensor(read_image(tmp_path / "x.tif", 1)).dtype == torch.uint8
    tifffile.imwrite(tmp_path / "x.tif", array, extratags=[(42113, "s", 0, "none", True)])
    assert "GDAL_NODATA is 'none'" in reason(tmp_path / "x.tif", 1)


def test_the_mask_of_a_geotiff_is_missing_data_and_its_overviews_are_no_pages(tmp_path):
    array = deep(16, 16, 3)
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        writer.write(array, photometric="rgb")
        writer.write(array[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(np.tri(16, dtype=bool), photometric="minisblack", subfiletype=4)
    found = read_image(tmp_path / "x.tif", 3).numpy()
    assert np.array_equal(np.isnan(found[1]), np.tri(16) == 0)
    np.testing.assert_allclose(found[:, 15], array[15].T / 65535, rtol=1e-6)


# ---- pages


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_pages_are_channels_only_where_that_is_asked_for(tmp_path, dtype, count):
    array = deep(count, 6, 9, top=255, dtype=dtype)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack")
    for read_as in (None, 1, 3):
        assert reason(tmp_path / "x.tif", read_as).startswith(f"it has {count} pages; set data.pages=bands")
    largest = np.iinfo(dtype).max
    bands = shares(tmp_path / "x.tif", Reading(count, pages="bands"))
    np.testing.assert_allclose(bands, array.transpose(1, 2, 0) / largest, rtol=1e-6)
    first = shares(tmp_path / "x.tif", Reading(3, pages="first"))
    np.testing.assert_allclose(first, np.repeat(array[0, ..., None], 3, -1) / largest, rtol=1e-6)


def test_an_array_written_without_a_word_on_its_axes_is_read_where_its_channels_are_asked_for(tmp_path):
    array = deep(12, 9, 7)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack")
    np.testing.assert_allclose(shares(tmp_path / "x.tif", 7), array / 65535, rtol=1e-6)
    np.testing.assert_allclose(shares(tmp_path / "x.tif", 12), array.transpose(1, 2, 0) / 65535, rtol=1e-6)
    assert "it has 12 pages" in reason(tmp_path / "x.tif", None)


def test_channels_of_a_microscope_are_channels(tmp_path):
    array = deep(3, 6, 9)
    tifffile.imwrite(tmp_path / "x.tif", array, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_allclose(shares(tmp_path / "x.tif", 3), array.transpose(1, 2, 0) / 65535, rtol=1e-6)
    tifffile.imwrite(tmp_path / "z.tif", array, imagej=True, metadata={"axes": "ZYX"})
    assert "3 pages" in reason(tmp_path / "z.tif", 3)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_of_an_animation_are_named(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:])
    assert "it holds 2 frames; set data.pages=first" in reason(tmp_path / f"x{suffix}", 3)
    assert read_image(tmp_path / f"x{suffix}", Reading(3, pages="first")).getpixel((1, 1))[0] > 240


# ---- sizes


def test_headers_that_claim_more_than_the_file_has_are_refused_without_taking_memory(tmp_path):
    file = tmp_path / "x.npy"
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(
            opened, {"descr": "<f8", "fortran_order": False, "shape": (120000, 125000)}
        )
    assert reason(file, 1) == "its header names 120000000000 bytes of numbers, the file has 0; it is damaged or cut off"
    tifffile.imwrite(tmp_path / "x.tif", deep(8, 8))
    content = bytearray((tmp_path / "x.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        for tag in (256, 257):
            place = tiff.pages[0].tags[tag].valueoffset
            content[place : place + 2] = struct.pack("<H", 12000)
    (tmp_path / "x.tif").write_bytes(content)
    assert "the file has" in reason(tmp_path / "x.tif", 1)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".jp2"])
def test_an_image_above_the_limit_is_named_with_the_option_that_reads_it(tmp_path, suffix):
    array = deep(64, 32, top=255, dtype="uint8")
    np.save(tmp_path / "x.npy", array) if suffix == ".npy" else Image.fromarray(array).save(tmp_path / f"x{suffix}")
    message = reason(tmp_path / f"x{suffix}", Reading(1, max_pixels=2000))
    assert "set data.max_pixels=2048 to read it" in message
    assert to_tensor(read_image(tmp_path / f"x{suffix}", Reading(1, max_pixels=2048))).shape == (1, 64, 32)


def test_pillows_limit_is_data_max_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("L", (64, 32)).save(tmp_path / "x.png")
    assert "set data.max_pixels=2048 to read it" in reason(tmp_path / "x.png", Reading(1, max_pixels=1000))
    assert read_image(tmp_path / "x.png", Reading(1, max_pixels=2048)).size == (64, 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_regular_files_are_images(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    assert reason(tmp_path / "x.png", 3) == "not a regular file"
    assert reason(tmp_path, 3) == "not a regular file"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".jp2", ".tga", ".bmp", ".ppm", ".avif"])
def test_damaged_pictures_are_pixels_or_a_reason(tmp_path, suffix):
    content = bytearray(picture_of(suffix))
    for _ in range(40):
        damaged = bytearray(content)
        for place in RNG.integers(0, min(len(content), 400), 3):
            damaged[place] = RNG.integers(256)
        try:
            assert to_tensor(decode_bytes(bytes(damaged), "x", Reading(3, max_pixels=10**6))).shape[0] == 3
        except UnreadableImage as error:
            assert error.unreadable.reason and "\n" not in error.unreadable.reason


def picture_of(suffix: str) -> bytes:
    from PIL import features

    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = BytesIO()
    image = Image.fromarray(deep(16, 16, 3, top=255, dtype="uint8"))
    Image.init()
    image.save(buffer, Image.EXTENSION[suffix])
    return buffer.getvalue()


def test_what_is_noticed_needs_no_listener(tmp_path):
    buffer = BytesIO()
    Image.new("LA", (3, 3)).save(buffer, "PNG")
    assert decode_bytes(buffer.getvalue(), "x.png", 1).mode == "L"
