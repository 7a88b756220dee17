"""Windows of images on disk equal the same part of the image read whole, and touch only what lies below them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mae_core.data.decoding import UnreadableImage, read_image, to_tensor
from mae_core.data.windows import Window, open_windows, overview, steps_over, tiles_of
from mae_core.errors import UserError

WINDOWS = [Window(0, 0, 60, 90), Window(17, 33, 20, 40), Window(59, 89, 1, 1), Window(16, 0, 16, 90)]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 2**16, (60, 90), dtype=np.uint16)
BANDS = RNG.random((60, 90, 5), dtype=np.float32)
FILES = {
    "strips.tif": (RGB, {"rowsperstrip": 7, "compression": "zlib"}),
    "tiles.tif": (RGB, {"tile": (16, 32), "compression": "lzw", "predictor": True}),
    "separate.tif": (np.moveaxis(RGB, -1, 0), {"planarconfig": "separate", "tile": (16, 32), "photometric": "rgb"}),
    "plain.tif": (RGB, {}),
    "swapped.tif": (GREY16, {"byteorder": ">"}),
    "deep.tif": (GREY16, {"tile": (32, 16), "compression": "zlib"}),
    "bands.tif": (BANDS, {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16)}),
    "white_is_zero.tif": (RGB[..., 0], {"photometric": "miniswhite", "rowsperstrip": 9, "compression": "zlib"}),
    "bands.npy": (BANDS, None),
    "picture.png": (RGB, None),
    "turned.tif": (RGB, {"extratags": [(274, "H", 1, 6, True)]}),  # read whole
}


def write(folder, name):
    array, options = FILES[name]
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, array)
    elif options is None:
        Image.fromarray(array).save(path)
    else:
        byteorder = options.pop("byteorder", None) if "byteorder" in options else None
        with tifffile.TiffWriter(path, byteorder=byteorder) as file:
            file.write(array, **options)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_window_is_that_part_of_the_image(name, tmp_path):
    path = write(tmp_path, name)
    channels = 5 if "bands" in name else 3
    whole = to_tensor(read_image(path, channels))
    image = open_windows(path, channels, name)
    assert (image.height, image.width) == tuple(whole.shape[1:])
    again = pickle.loads(pickle.dumps(image))  # as for a worker
    for window in WINDOWS:
        if window.right > image.width or window.bottom > image.height:
            continue
        expected = whole[:, window.top : window.bottom, window.left : window.right]
        for opened in (image, again):
            torch.testing.assert_close(to_tensor(opened.read(window)), expected, rtol=0, atol=0)
    assert type(image.read(Window(0, 0, 2, 2))) is type(read_image(path, channels)) or name.endswith("npy")


@pytest.mark.parametrize("name, most", [("strips.tif", 4), ("tiles.tif", 6), ("separate.tif", 18)])
def test_only_what_is_below_a_window_is_decoded(name, most, tmp_path):
    image = open_windows(write(tmp_path, name), 3, name)
    image.read(WINDOWS[1])
    assert 0 < len(image._kept) <= most


def test_pages_damage_and_what_is_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((3, 20, 20), np.uint8), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="it has 3 pages"):
        open_windows(tmp_path / "pages.tif", 3, "pages")
    path = write(tmp_path, "tiles.tif")
    content = bytearray(path.read_bytes())
    content[-400:] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(UnreadableImage):
        open_windows(path, 3, "tiles").read(WINDOWS[0])
    (tmp_path / "text.tif").write_text("no image")
    with pytest.raises(UnreadableImage, match="not an image"):
        open_windows(tmp_path / "text.tif", 3, "text")


def test_tiles_cover_an_image_and_overlap():
    assert steps_over(10, 16, 8) == [0] and steps_over(20, 16, 8) == [0, 4] and steps_over(32, 16, 8) == [0, 8, 16]
    tiles = tiles_of(50, 30, 20, 0.25)
    count = np.zeros((50, 30), int)
    for tile in tiles:
        assert tile.bottom <= 50 and tile.right <= 30
        count[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert count.min() == 1 and tiles[0] == (0, 0, 20, 20) and tiles[-1].bottom == 50
    assert tiles_of(5, 7, 20, 0.2) == [(0, 0, 5, 7)]
    with pytest.raises(UserError, match=r"give a tile of 1 pixel or more, and an overlap from 0 to 0\.9"):
        tiles_of(5, 7, 20, 1.0)


def test_an_overview_is_the_image_made_smaller(tmp_path):
    path = write(tmp_path, "tiles.tif")
    picture, scale = overview(open_windows(path, 3, "x"), 45)
    assert picture.size == (45, 30) and scale == 0.5
    expected = RGB.reshape(30, 2, 45, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(picture) - expected).max() <= 0.5
    assert overview(open_windows(write(tmp_path, "bands.npy"), 5, "x"))[0].mode == "RGB"
