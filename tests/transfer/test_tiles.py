"""Detection in tiles: parts of one object are joined, neighbours stay apart, and codes are those of pycocotools."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import transfer
from mae_core.data.windows import Window, overview, tiles_of
from mae_core.errors import UserError
from transfer.detection.draw import draw_detections
from transfer.detection.heads import Detections
from transfer.detection.predict import main
from transfer.detection.tiles import as_detections, merge, parts_of

pytest.importorskip("pycocotools", reason="pip install mae-transfer[detection]")
from transfer.detection.masks import code_of_part, decode_codes, encode_masks, part_of_code


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**30), st.floats(0, 1))
def test_a_code_of_a_part_is_pycocotools_code_of_the_whole(height, width, seed, share):
    rng = np.random.default_rng(seed)
    whole = rng.random((height, width)) < share
    (code,) = encode_masks(whole[None])
    (top, left), part = part_of_code(code)
    expected = np.zeros_like(whole)
    expected[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert np.array_equal(expected, whole)
    if part.size:
        assert part.any(axis=0)[[0, -1]].all() and part.any(axis=1)[[0, -1]].all()
    again = code_of_part(part, (top, left), (height, width))
    assert again["size"] == [height, width] and np.array_equal(decode_codes([again], height, width)[0], whole)
    assert again["counts"] == code["counts"]


def disc(size, row, col, radius):
    rows, cols = np.mgrid[: size[0], : size[1]] + 0.5
    return (rows - row) ** 2 + (cols - col) ** 2 < radius**2


def seen_in(mask, tile, index, score, label=1, *, masks=True):
    """What a perfect detector says of an object in a tile; None where it does not see it."""
    part = mask[tile.top : tile.bottom, tile.left : tile.right]
    if not part.any():
        return None
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    box = torch.tensor([[cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]], dtype=torch.float32)
    codes = encode_masks(part[None]) if masks else None
    return Detections(index, box, torch.tensor([score]), torch.tensor([label]), codes)


def found_in_tiles(objects, size, tile, overlap, *, masks=True, miss=()):
    """Objects (mask, label) as a perfect detector sees them in tiles, with other scores in each tile, merged."""
    tiles, parts = tiles_of(*size, tile, overlap), []
    rng = np.random.default_rng(0)
    for index, window in enumerate(tiles):
        for number, (mask, label) in enumerate(objects):
            if (index, number) in miss:
                continue
            seen = seen_in(mask, window, index, 0.5 + rng.random() / 2, label, masks=masks)
            parts += [] if seen is None else parts_of(seen, window, size)
    return as_detections(merge(parts, tiles, 0.5), size, 0, masks=masks)


SIZE = (100, 120)


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("masks", [True, False])
def test_an_object_is_one_wherever_it_lies(overlap, masks):
    for row, col, radius in [(20, 20, 5), (32, 30, 6), (45, 60, 14), (50, 60, 35), (99, 119, 8), (40, 40, 3)]:
        mask = disc(SIZE, row, col, radius)
        found = found_in_tiles([(mask, 1)], SIZE, 40, overlap, masks=masks)
        assert len(found.scores) == 1, (row, col, radius)
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert found.boxes[0].tolist() == [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]
        if masks:
            assert np.array_equal(decode_codes(found.codes, *SIZE)[0], mask)


def test_touching_objects_stay_apart_and_all_are_counted():
    objects = [(disc(SIZE, row, col, 5.5), 1) for row in range(6, 100, 11) for col in range(6, 120, 11)]
    found = found_in_tiles(objects, SIZE, 40, 0.25)
    assert len(found.scores) == len(objects)
    truth = {mask.tobytes() for mask, _ in objects}
    assert {mask.tobytes() for mask in decode_codes(found.codes, *SIZE)} == truth


def test_classes_are_not_mixed_and_a_part_that_one_tile_missed_remains():
    one, other = disc(SIZE, 40, 40, 9), disc(SIZE, 40, 41, 9)
    found = found_in_tiles([(one, 1), (other, 2)], SIZE, 40, 0.25)
    assert sorted(found.labels.tolist()) == [1, 2]
    wide = disc(SIZE, 20, 40, 15)  # its right part is missed
    tiles = tiles_of(*SIZE, 40, 0.25)
    missed = {(index, 0) for index, tile in enumerate(tiles) if tile.left > 0}
    (mask,) = decode_codes(found_in_tiles([(wide, 1)], SIZE, 40, 0.25, miss=missed).codes, *SIZE)
    assert mask[:, :40].sum() == wide[:, :40].sum() and not mask[:, 40:].any()


def test_a_sliver_at_a_seam_is_part_of_the_object():
    """A tile that sees a few columns of an object draws them badly: the better part explains them."""
    tiles = [Window(0, 0, 40, 40), Window(0, 30, 40, 40)]
    whole = disc((40, 70), 20, 27, 8)
    good = seen_in(whole, tiles[0], 0, 0.9)
    sliver = np.zeros((40, 70), bool)
    sliver[18:22, 30:32] = True
    parts = [*parts_of(good, tiles[0], (40, 70)), *parts_of(seen_in(sliver, tiles[1], 1, 0.6), tiles[1], (40, 70))]
    found = as_detections(merge(parts, tiles, 0.5), (40, 70), 0, masks=True)
    assert len(found.scores) == 1 and np.array_equal(decode_codes(found.codes, 40, 70)[0], whole)
    assert found.scores[0] == pytest.approx(0.9)


def test_nothing_found_is_an_empty_answer():
    found = as_detections([], SIZE, 3, masks=True)
    assert found.image_index == 3 and found.boxes.shape == (0, 4) and found.codes == []


@pytest.fixture(scope="module")
def run(tmp_path_factory, detection_root, tiny_detector):
    from mae_core.config.load import load_config
    from transfer.detection.config import DetectionConfig
    from transfer.detection.run import train_detector

    folder = tmp_path_factory.mktemp("tiled") / "run"
    own = (f"data.path={detection_root}", f"output={folder}", "optim.epochs=2", "test.score_threshold=0.001")
    train_detector(load_config(DetectionConfig, None, [*tiny_detector, *own, "test.detections=5"]))
    return folder


@pytest.fixture
def mosaic(detection_root, tmp_path):
    """A TIFF of 3 x 2 images, in compressed tiles."""
    images = [np.asarray(Image.open(path)) for path in sorted((detection_root / "val").glob("*.png"))]
    rows = [np.concatenate(images, axis=1), np.concatenate(images[::-1], axis=1)]
    path = tmp_path / "mosaic.tif"
    tifffile.imwrite(path, np.concatenate(rows), tile=(16, 16), compression="zlib", photometric="rgb")
    return path


def test_one_tile_gives_the_answer_of_the_image(run, detection_root):
    detector = transfer.load_detector(run, device="cpu")
    path = detection_root / "val" / "000.png"
    plain, tiled = detector.predict(path), detector.predict(path, tile=64)
    np.testing.assert_array_equal(tiled.boxes, plain.boxes)
    np.testing.assert_array_equal(tiled.masks, plain.masks)


def test_a_large_file_is_searched_by_windows_and_written(run, mosaic, tmp_path, monkeypatch):
    command = ["--weights", str(run), str(mosaic), "--out", str(tmp_path / "out"), "--tile", "64", "--overlap", "0.25"]
    monkeypatch.setattr("mae_core.data.windows.read_image", lambda *given: pytest.fail("the file is read whole"))
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr("transfer.detection.predict.ProgressCounter", lambda what: lambda *done: counted.append(done))
    main([*command, "--score", "0", "device=cpu", "data.workers=0", "test.test_batch=3"])
    tiles = len(tiles_of(96, 192, 64, 0.25))
    assert counted == [(min(done + 3, tiles), tiles) for done in range(0, tiles, 3)]  # after each batch
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [(image["height"], image["width"]) for image in images] == [(96, 192)]
    assert results and all(result["segmentation"]["size"] == [96, 192] for result in results)
    assert max(result["bbox"][0] for result in results) > 64  # in pixels of the whole
    found = transfer.load_detector(run, device="cpu").predict(str(mosaic), tile=64, overlap=0.25)
    np.testing.assert_allclose(found.scores, [result["score"] for result in results])
    assert Image.open(tmp_path / "out" / "pictures" / "mosaic.png").mode == "RGB"
    monkeypatch.setattr("transfer.detection.detector.overview", lambda source: overview(source, 96))
    plain, drawn = (np.asarray(found.draw(score)) for score in (1.1, 0.0))
    assert plain.shape == (48, 96, 3) and not np.array_equal(plain, drawn)


def test_what_tiles_cannot_be(run, mosaic, tmp_path, capsys):
    with pytest.raises(UserError, match=r"give a tile of 1 pixel or more, and an overlap from 0 to 0\.9"):
        transfer.load_detector(run, device="cpu").predict(str(mosaic), tile=64, overlap=1.0)
    with pytest.raises(SystemExit):
        main(["--weights", str(run), str(mosaic), "--out", str(tmp_path / "out"), "--tile", "0"])
    assert "give a tile of 1 pixel or more" in capsys.readouterr().err


def test_drawing_many_objects_needs_the_picture_and_no_mask_of_its_size_for_each():
    """A picture of the largest size that is not made smaller: whole masks of what is in it were gigabytes."""
    side, number = 1024, 300
    rng = np.random.default_rng(0)
    corners = rng.integers(0, side - 12, (number, 2))
    codes = [code_of_part(np.ones((9, 12), bool), (int(row), int(col)), (side, side)) for row, col in corners]
    boxes = torch.tensor([[col, row, col + 12, row + 9] for row, col in corners], dtype=torch.float32)
    found = Detections(0, boxes, torch.full((number,), 0.9), torch.ones(number, dtype=torch.int64), codes)
    black = Image.new("RGB", (side, side))
    tracemalloc.start()
    drawn = np.asarray(draw_detections(["cell"], found, black, ("masks",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * side * side * 3  # floats and copies of the picture; the masks alone were 300 * side * side
    inside = np.zeros((side, side), bool)
    for row, col in corners:
        inside[row : row + 9, col : col + 12] = True
    assert np.array_equal(drawn.any(axis=2), inside)
