"""The one reader of label maps and what their values mean, against OpenCV, tifffile and the written numbers."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_core.errors import UserError
from transfer.segmentation.label_check import check_label_maps, survey
from transfer.segmentation.label_coding import LabelCoding, as_values, coding_mistake
from transfer.segmentation.label_maps import LabelledImage, read_classes, read_label_map

SHAPE = (5, 7)


def numbers(most: int, least: int = 0) -> np.ndarray:
    values = np.random.default_rng(most).integers(least, most + 1, SHAPE)
    values[0, :2] = least, most
    return values


def grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A greyscale PNG of few bits, which neither Pillow nor OpenCV writes (PNG specification, 11.2.2)."""
    rows = b""
    for row in values:
        text = "".join(format(value, f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def palette_picture(values: np.ndarray, colours: list[int]) -> Image.Image:
    picture = Image.fromarray(values.astype(np.uint8)).convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette(colours)
    return picture


def big_endian_tiff(path: Path, values: np.ndarray) -> None:
    tifffile.imwrite(path, values.astype(">u2"), byteorder=">")
    with Image.open(path) as image:
        assert image.mode == "I;16B"


WRITERS = {
    "png 1 bit": (".png", 1, lambda path, values: Image.fromarray(values.astype(bool)).save(path)),
    "png 2 bits": (".png", 3, lambda path, values: grey_png(path, values, 2)),
    "png 4 bits": (".png", 15, lambda path, values: grey_png(path, values, 4)),
    "png 8 bits": (".png", 255, lambda path, values: cv2.imwrite(str(path), values.astype(np.uint8))),
    "png 16 bits": (".png", 65535, lambda path, values: cv2.imwrite(str(path), values.astype(np.uint16))),
    "png palette": (".png", 9, lambda path, values: palette_picture(values, list(range(60, 90))).save(path)),
    "png palette 2 bits": (".png", 3, lambda path, values: palette_picture(values, [9, 9, 9] * 4).save(path, bits=2)),
    "pgm": (".pgm", 11, lambda path, values: path.write_bytes(b"P5\n7 5\n11\n" + values.astype(np.uint8).tobytes())),
    "pgm 16 bits": (
        ".pgm",
        300,
        lambda path, values: path.write_bytes(b"P5\n7 5\n300\n" + values.astype(">u2").tobytes()),
    ),
    "bmp": (".bmp", 255, lambda path, values: cv2.imwrite(str(path), values.astype(np.uint8))),
    "tiff big endian": (".tif", 65535, big_endian_tiff),
    "tiff float": (".tif", 4000, lambda path, values: tifffile.imwrite(path, values.astype(np.float32))),
    "tiff double": (".tif", 4000, lambda path, values: tifffile.imwrite(path, values.astype(np.float64))),
    "tiff int8": (".tif", 127, lambda path, values: tifffile.imwrite(path, values.astype(np.int8))),
    "tiff int16": (".tif", 32767, lambda path, values: tifffile.imwrite(path, values.astype(np.int16))),
    "tiff int32": (".tif", 70000, lambda path, values: tifffile.imwrite(path, values.astype(np.int32))),
    "tiff tiled": (".tif", 900, lambda path, values: tifffile.imwrite(path, values.astype(np.uint16), tile=(16, 16))),
    "tiff white is zero": (
        ".tif",
        200,
        lambda path, values: tifffile.imwrite(path, values.astype(np.uint8), photometric="miniswhite"),
    ),
    "tiff lzw": (
        ".tif",
        200,
        lambda path, values: Image.fromarray(values.astype(np.uint8)).save(path, compression="tiff_lzw"),
    ),
    "tiff deflate": (
        ".tif",
        900,
        lambda path, values: tifffile.imwrite(path, values.astype(np.uint16), compression="zlib"),
    ),
    "npy int32": (".npy", 70000, lambda path, values: np.save(path, values.astype(np.int32))),
    "npy bool": (".npy", 1, lambda path, values: np.save(path, values.astype(bool))),
    "npy (H, W, 1)": (".npy", 9, lambda path, values: np.save(path, values[..., None])),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_is_read_as_the_numbers_that_were_written(kind, tmp_path):
    suffix, most, write = WRITERS[kind]
    values, path = numbers(most), tmp_path / f"map{suffix}"
    write(path, values)
    found = read_label_map(path)
    assert found.values.dtype == np.int64 and np.array_equal(found.values, values)
    independent = None
    if suffix == ".tif" and kind != "tiff lzw":
        independent = tifffile.imread(path)
    elif kind in ("png 8 bits", "png 16 bits"):
        independent = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    elif "palette" in kind:
        independent = np.asarray(Image.open(path))
    assert independent is None or np.array_equal(independent, found.values)
    assert (found.palette is not None) == ("palette" in kind)


def test_negative_values_of_a_signed_map_stay_negative(tmp_path):
    values = numbers(3, -1)
    for kind in (np.int8, np.int16, np.int32, np.float32):
        tifffile.imwrite(tmp_path / "map.tif", values.astype(kind))
        assert np.array_equal(read_label_map(tmp_path / "map.tif").values, values)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_map_is_turned_as_its_tag_says(tmp_path, orientation):
    values = numbers(200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "map.png", exif=exif)
    tifffile.imwrite(tmp_path / "map.tif", values.astype(np.uint16), extratags=[(274, "H", 1, orientation, True)])
    expected = np.rot90(values, {3: 2, 6: 3}[orientation])
    for name in ("map.png", "map.tif"):
        assert np.array_equal(read_label_map(tmp_path / name).values, expected)


def write_refused(root: Path) -> dict[str, tuple[Path, str]]:
    """Name -> a file that holds no classes, and what is said of it."""
    grey = numbers(3).astype(np.uint8)
    coloured = np.stack([grey, grey, 3 - grey], axis=2)
    Image.fromarray(grey).save(root / "noise.jpg")
    Image.fromarray(coloured).save(root / "colour.png")
    Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.new("L", SHAPE[::-1], 255)]).save(root / "equal.png")
    Image.merge("LA", [Image.fromarray(grey)] * 2).save(root / "alpha.png")
    tifffile.imwrite(root / "fractions.tif", grey / 2)
    tifffile.imwrite(root / "nan.tif", np.where(grey > 0, np.nan, 0).astype(np.float32))
    tifffile.imwrite(root / "bands.tif", np.stack([grey] * 4), photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(root / "pages.tif", np.stack([grey] * 3), photometric="minisblack")
    np.save(root / "deep.npy", np.zeros((5, 7, 3)))
    np.save(root / "words.npy", np.array([["a"]]))
    (root / "text.png").write_text("no picture")
    (root / "cut.tif").write_bytes((root / "fractions.tif").read_bytes()[:40])
    return {
        "noise.jpg": "is compressed with loss (JPEG), which changes its values; write the classes as PNG",
        "colour.png": "is a colour picture (mode RGB); write one channel",
        "equal.png": "is a colour picture (mode RGBA); its channels are equal, so write one of them",
        "alpha.png": "is a colour picture (mode LA)",
        "fractions.tif": "holds the value 1.5; a class is a whole number",
        "nan.tif": "holds the value nan; a class is a whole number",
        "bands.tif": "is a colour picture (4 channels)",
        "pages.tif": "has 3 pages",
        "deep.npy": "has the shape (5, 7, 3); write one channel",
        "words.npy": "not numbers",
        "text.png": "cannot be read",
        "cut.tif": "cannot be read",
    }


def test_what_holds_no_classes_is_refused_by_name(tmp_path):
    for name, message in write_refused(tmp_path).items():
        with pytest.raises(UserError) as refusal:
            read_label_map(tmp_path / name)
        assert f"label map {tmp_path / name} " in str(refusal.value) and message in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with Image.open(tmp_path / "equal.png") as image:  # the advice
        image.getchannel(0).save(tmp_path / "one.png")
    assert np.array_equal(read_label_map(tmp_path / "one.png").values, numbers(3))


# ---------------------------------------------------------------- what the values mean


@pytest.mark.parametrize(
    ("options", "values", "classes", "ignored"),
    [
        ({"num_classes": 3}, [0, 1, 2, 255], [0, 1, 2, 255], 255),
        ({"num_classes": 3, "reduce_zero_label": True}, [0, 1, 2, 3, 255], [255, 0, 1, 2, 255], 255),
        ({"num_classes": 2, "label_values": [0, 255]}, [0, 255, 65535], [0, 1, 255], 255),
        ({"num_classes": 2, "label_values": [7, [1, 2]]}, [1, 2, 7, 255], [1, 1, 0, 255], 255),
        ({"num_classes": 2, "ignored_values": [-1, 9]}, [0, 1, -1, 9], [0, 1, 255, 255], 255),
        ({"num_classes": 2, "label_values": [-5, 100000]}, [-5, 100000, 255], [0, 1, 255], 255),
        ({"num_classes": 256}, [0, 255, 65535], [0, 255, 65535], 65535),
        ({"num_classes": 255, "reduce_zero_label": True}, [0, 1, 255, 65535], [255, 0, 254, 255], 255),
        ({"num_classes": 300}, [0, 255, 258, 297, 65535], [0, 255, 258, 297, 65535], 65535),
        ({"num_classes": 300, "ignored_values": 400}, [299, 400], [299, 65535], 65535),
    ],
)
def test_values_become_classes(options, values, classes, ignored):
    coding = LabelCoding.of(**options)
    found = coding.encode(np.array([values]), "map.png")
    assert found.tolist() == [classes] and coding.ignore_index == ignored
    assert found.dtype == (np.uint8 if ignored == 255 else np.uint16)
    with pytest.raises(UserError, match=r"label map map\.png holds the value 5\d\d, but"):
        coding.encode(np.array([[values[0], 543]]), "map.png")


@pytest.mark.parametrize(
    "options", [{"num_classes": 3}, {"num_classes": 300}, {"num_classes": 2, "label_values": [0, 255]}]
)
def test_predicted_classes_are_written_as_the_values_they_were_read_from(options, tmp_path):
    coding = LabelCoding.of(**options)
    classes = np.arange(coding.num_classes)[None]
    values = as_values(classes, coding.values)
    Image.fromarray(values).save(tmp_path / "map.png")
    assert np.array_equal(coding.encode(read_label_map(tmp_path / "map.png").values, "map.png"), classes)
    assert values.dtype == (np.uint16 if coding.num_classes > 255 else np.uint8)
    assert as_values(np.array([[1, 0]]), [-1, 4]).tolist() == [[1, 0]]  # a PNG has no negative numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3, "label_values": [0, 255]}, "label_values holds 2 entries, and num_classes is 3"),
        ({"num_classes": 2, "label_values": [0, 0]}, "label_values holds 0 twice"),
        (
            {"num_classes": 2, "label_values": [0, 1], "reduce_zero_label": True},
            "reduce_zero_label=True has no meaning",
        ),
        (
            {"num_classes": 2, "label_values": [0, 9], "ignored_values": 9},
            "the value 9 is a class and in ignored_values",
        ),
        ({"num_classes": 2, "label_values": "0,255"}, "label_values holds '0'; give integers"),
        ({"num_classes": 2, "ignored_values": 0.5}, "ignored_values holds 0.5; give integers"),
        ({"num_classes": 70000}, "num_classes is 70000; give a number from 1 to 65535"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError) as refusal:
        LabelCoding.of(**options)
    assert message in str(refusal.value)


GREY_LEVELS = [
    # values that occur, coding, the advice
    ({0, 255}, {"num_classes": 2}, "set label_values=[0,255] num_classes=2; if 255 is void, set ignored_values=255"),
    ({0, 255}, {"num_classes": 11, "reduce_zero_label": True}, "num_classes=2 reduce_zero_label=False; if 255 is void"),
    ({0, 127}, {"num_classes": 2}, "set label_values=[0,127] num_classes=2"),
    ({0, 128, 255}, {"num_classes": 3}, "set label_values=[0,128,255] num_classes=3"),
    ({0, 65535}, {"num_classes": 2}, "set label_values=[0,65535] num_classes=2"),
    ({50, 100, 150}, {"num_classes": 3}, "set label_values=[50,100,150] num_classes=3"),
]


@pytest.mark.parametrize(("values", "options", "advice"), GREY_LEVELS)
def test_grey_levels_are_flagged_with_an_advice_that_works(values, options, advice):
    assert advice in (coding_mistake(values, LabelCoding.of(**options)) or "")
    followed = {"label_values": sorted(values), "num_classes": len(values)}
    coding = LabelCoding.of(**followed)
    assert coding_mistake(values, coding) is None
    assert coding.encode(np.array([sorted(values)]), "map").tolist() == [list(range(len(values)))]


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({0, 1, 255}, {"num_classes": 2}),
        ({0, 1}, {"num_classes": 2}),
        ({1, 255}, {"num_classes": 1, "reduce_zero_label": True}),
        ({0, 255}, {"num_classes": 2, "ignored_values": 255}),
        ({0, 3, 255}, {"num_classes": 11}),
    ],
)
def test_usual_maps_are_not_flagged(values, options):
    assert coding_mistake(values, LabelCoding.of(**options)) is None


def pairs_of(root: Path, maps: list[Image.Image], suffix: str = ".png") -> list[LabelledImage]:
    for index, picture in enumerate(maps):
        Image.new("RGB", picture.size).save(root / f"{index}.jpg")
        picture.save(root / f"{index}_map{suffix}")
    return [LabelledImage(root / f"{index}.jpg", root / f"{index}_map{suffix}") for index in range(len(maps))]


def test_palettes_that_give_a_value_another_colour_are_reported(tmp_path):
    colours, values = list(range(30)), numbers(2)
    same = pairs_of(
        tmp_path, [palette_picture(values, colours), palette_picture(values, [*colours[:9], 200, 200, 200])]
    )
    coding = LabelCoding.of(3)
    assert not survey(same, coding).problems  # a colour that no pixel has
    other = pairs_of(tmp_path, [palette_picture(values, colours), palette_picture(values, colours[3:])])
    (problem,) = survey(other, coding).problems
    assert problem.kind == "palettes that differ" and "write all with one palette, or in grey" in problem.sentence
    with pytest.raises(UserError, match=r"has another palette than .*: the value 0 is"):
        check_label_maps(other, coding)
    for pair in other:  # the advice
        Image.fromarray(np.asarray(Image.open(pair.label_map))).save(pair.label_map)
    assert not survey(other, coding).problems


def test_names_of_given_values(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("0\tground\n255\tobject\n-1\tvoid\n")
    assert read_classes(path, [0, 255]) == ["ground", "object"]
    with pytest.raises(
        UserError, match=r"names the values \[-1, 0, 255\], and label_values holds 7 too; write a line 7"
    ):
        read_classes(path, [0, 7])
