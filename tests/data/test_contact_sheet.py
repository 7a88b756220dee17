"""The contact sheet of a check: what cannot be read and what is odd first, then copies, then the others."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.data.contact_sheet import GAP, LINE, MISSING, MOST, SIDE, Cell, contact_sheet, draw_checked
from mae_core.data.near_copies import Copy

COLUMNS = 6


def middle(sheet: Image.Image, number: int, lines: int) -> tuple[int, ...]:
    """The colour in the middle of a picture of a sheet, above ``lines`` of caption."""
    row, column = divmod(number, COLUMNS)
    return sheet.getpixel((GAP + column * (SIDE + GAP) + SIDE // 2, GAP + row * (SIDE + GAP + 16 * lines) + SIDE // 2))


def test_the_order_of_many_images_takes_no_time(tmp_path):
    """Twenty thousand images, half of them faulty: a comparison of all with all would take minutes."""
    drawn = []

    def draw(number):
        drawn.append(number)
        return Image.new("RGB", (8, 8))

    cells = [Cell((f"{n}.png", f"{n}.map"), f"{n}", lambda n=n: draw(n)) for n in range(20_000)]
    said = draw_checked(tmp_path / "a.png", cells, {f"{n}.map" for n in range(1, 20_000, 2)}, [])
    assert drawn == list(range(1, 2 * MOST, 2)) and said.endswith("60 with faults first")
    drawn.clear()
    copies = [Copy("50.png", "7.png", 1.0), Copy("51.png", "7.png", 1.0), Copy("9.png", "elsewhere.png", 1.0)]
    said = draw_checked(tmp_path / "b.png", cells[:200], {"11.png"}, copies)
    assert drawn[:4] == [11, 7, 50, 51] and len(drawn) == len(set(drawn)) == MOST
    assert said == f"drew 60 of 200 images into {tmp_path / 'b.png'}, 1 with faults first, then 3 that are near-copies"


def check(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)])


@pytest.mark.parametrize("kind", ["images", "folders"])
def test_unreadable_images_come_first(tmp_path, write_classes, kind):
    root = write_classes(tmp_path / "set")
    (root / "train" / "cedar" / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (48, 40), (10, 200, 30)).save(root / "train" / "ash" / "a.png")
    place, picture = root if kind == "folders" else root / "train", tmp_path / "sheet.png"
    result = check(kind, place, "--picture", picture)
    assert result.exit_code == 2 and "1 problem found" in result.output
    assert f"of {23 if kind == 'folders' else 14} images into {picture}, 1 with faults first" in result.output
    with Image.open(picture) as sheet:
        assert middle(sheet, 0, 2) == MISSING
        assert middle(sheet, 5, 2) == (10, 200, 30)  # after it the others in their order: 000 to 003, then a
    before = picture.read_bytes()
    again = check(kind, place, "--picture", picture)
    assert again.exit_code == 2 and "choose another file with --picture" in again.output
    assert "near-constant" not in again.output and picture.read_bytes() == before  # at once, before any image is read


def test_label_maps_lie_over_their_images(tmp_path, write_images):
    """Class 0 and 1, ignored and a value that is no class; a map of another size, and one that is missing."""
    root = tmp_path / "set"
    for half in ("training", "validation"):
        for path in write_images(root / "images" / half, 4, size=(40, 40), seed=len(half)):
            labels = np.zeros((40, 40), np.uint8)
            (root / "annotations" / half).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "annotations" / half / path.name)
            Image.new("RGB", (40, 40), (100, 100, 100)).save(path)
    maps = root / "annotations" / "training"
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(maps / "001.png")
    Image.fromarray(np.full((20, 40), 1, np.uint8)).save(maps / "002.png")
    (maps / "003.png").unlink()
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(maps / "000.png")
    picture = tmp_path / "sheet.png"
    result = check("labels", root, "num_classes=2", "reduce_zero_label=False", "--picture", picture)
    assert result.exit_code == 2 and "drew 8 of 8 images" in result.output and ", 3 with faults first" in result.output
    with Image.open(picture) as sheet:
        colours = [middle(sheet, number, 2) for number in range(8)]
    assert colours[0] == (150, 80, 80)  # half of 100 and half of the red of 200, 60, 60
    assert colours[1] == colours[2] == MISSING
    assert colours[3] == (50, 50, 50)  # ignored is black
    assert len(set(colours[4:])) == 1 and colours[4] not in (MISSING, (50, 50, 50))


def test_copies_stand_together(tmp_path, write_images):
    paths = write_images(tmp_path / "images", 12)
    shutil.copy(paths[8], tmp_path / "images" / "z.png")
    result = check("images", tmp_path / "images", "--picture", tmp_path / "sheet.png")
    assert result.exit_code == 0 and "0 with faults first, then 2 that are near-copies" in result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert middle(sheet, 0, 2) == middle(sheet, 1, 2)


def test_rows_are_as_high_as_their_pictures_and_a_legend_goes_below(tmp_path):
    wide = Image.new("RGB", (160, 40), "blue")
    assert contact_sheet([wide, wide], ["a", "b"]).height == GAP + 40 + LINE + GAP
    cells = [Cell((str(number),), str(number), lambda: wide) for number in range(3)]
    draw_checked(tmp_path / "a.png", cells, set(), [])
    draw_checked(tmp_path / "b.png", cells, set(), [], lambda width: Image.new("RGB", (width, 9), "red"))
    plain, with_legend = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(with_legend[:-9], plain) and (with_legend[-9:] == (255, 0, 0)).all()
