"""Pairing, class names, the check of label maps, and the pictures; none of it needs mmseg."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from transfer.segmentation.drawing import IGNORED_COLOUR, TITLES, Example, colour_labels, draw_examples, palette
from transfer.segmentation.label_check import check_label_maps
from transfer.segmentation.label_coding import LabelCoding
from transfer.segmentation.label_maps import pair_files, read_classes


def write_pair(root: Path, name: str, labels: np.ndarray, image_suffix: str = ".jpg") -> None:
    for folder in ("images", "maps"):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*labels.shape, 3), 90, np.uint8)).save(root / "images" / (name + image_suffix))
    Image.fromarray(labels).save(root / "maps" / (name + ".png"))


def check(root: Path, num_classes: int = 3, reduce_zero_label: bool = False, **options):
    pairs = pair_files(root / "images", root / "maps")
    coding = LabelCoding.of(num_classes, reduce_zero_label=reduce_zero_label)
    return check_label_maps(pairs, coding, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index, suffix in enumerate((".jpg", ".png", ".JPG")):
        write_pair(tmp_path, f"city/{index}", generator.integers(0, 3, (6, 9), dtype=np.uint8), suffix)
    return tmp_path


def test_images_of_any_format_in_subfolders_find_their_maps(folder):
    pairs = pair_files(folder / "images", folder / "maps")
    assert [pair.image.name for pair in pairs] == ["0.jpg", "1.png", "2.JPG"]
    assert [pair.label_map.relative_to(folder).as_posix() for pair in pairs] == [f"maps/city/{i}.png" for i in range(3)]


def test_counts_equal_numpy(folder):
    labels = np.array([[0, 1, 255], [2, 2, 255]], dtype=np.uint8)
    write_pair(folder, "more", labels)
    everything = np.concatenate([np.asarray(Image.open(path)).ravel() for path in (folder / "maps").rglob("*.png")])
    found = check(folder)
    assert found.pixels.tolist() == [int((everything == value).sum()) for value in range(3)]
    assert (found.ignored, found.checked, found.total) == (2, 4, 4)


def test_zero_is_void_where_it_is_reduced(folder):
    found = check(folder, num_classes=2, reduce_zero_label=True)
    assert found.ignored > 0 and found.pixels.shape == (2,)
    with pytest.raises(UserError, match=r"holds the value 2, but num_classes=1 allows 1\.\.1, 0 = ignored and 255"):
        check(folder, num_classes=1, reduce_zero_label=True)


def test_two_classes_of_one_name_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("0\tsky\n1\ttree\n2\tsky\n")
    with pytest.raises(UserError, match=r"line 3: a second class 'sky'; give it another name, or join the values"):
        read_classes(tmp_path / "classes.txt")


def test_a_class_that_never_occurs_is_named(folder):
    assert "never labelled: d" in check(folder, num_classes=4).describe(["a", "b", "c", "d"])


@pytest.mark.parametrize(("value", "kind"), [(200, np.uint8), (3, np.uint8), (256, np.uint16), (255 * 256, np.uint16)])
def test_a_value_out_of_range_is_named_with_its_file(folder, value, kind):
    labels = np.zeros((4, 4), dtype=kind)
    labels[1, 2] = value
    write_pair(folder, "wrong", labels)
    with pytest.raises(UserError, match=rf"wrong\.png holds the value {value}, but num_classes=3 allows 0\.\.2"):
        check(folder)


def test_sizes_must_agree(folder):
    write_pair(folder, "small", np.zeros((4, 4), np.uint8))
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "maps" / "small.png")
    with pytest.raises(UserError, match=r"small\.jpg has 4x4 pixels and its label map .*small\.png 4x5"):
        check(folder)


def test_size_is_that_of_the_turned_image(folder):
    write_pair(folder, "turned", np.zeros((4, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.new("RGB", (4, 8)).save(folder / "images" / "turned.jpg", exif=exif)
    assert check(folder).checked == 4


def test_a_colour_picture_is_no_label_map(folder):
    write_pair(folder, "coloured", np.zeros((4, 4, 3), np.uint8)[..., 0])
    Image.new("RGB", (4, 4)).save(folder / "maps" / "coloured.png")
    with pytest.raises(UserError, match=r"coloured\.png is a colour picture \(mode RGB\)"):
        check(folder)


def test_a_palette_picture_is_read_by_index(folder):
    picture = Image.fromarray(np.full((6, 9), 2, np.uint8)).convert("P")
    picture.putdata([2] * 54)
    picture.putpalette([255, 0, 0] * 256)
    picture.save(folder / "maps" / "city" / "0.png")
    assert check(folder).pixels[2] >= 54


def test_a_truncated_label_map_is_named(folder):
    path = folder / "maps" / "city" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"0\.png cannot be read \(.*; replace or remove it"):
        check(folder)


def test_truncated_images_are_listed_unless_all_are(folder):
    bad, *others = sorted((folder / "images" / "city").iterdir())
    bad.write_bytes(bad.read_bytes()[:40])
    found = check(folder)
    assert [path for path, _ in found.unreadable] == [str(bad)]
    assert found.pixels.sum() == 2 * 54
    assert f"1 unreadable images left out: {bad} (" in found.describe(["a", "b", "c"])
    with pytest.raises(UserError, match=r"0\.jpg cannot be read \(.*; repair or remove it, or set on_error=skip"):
        check(folder, on_error="raise")
    with pytest.raises(UserError, match=r"on_error is 'stop'; set it to skip or raise"):
        check(folder, on_error="stop")
    for path in others:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 images can be read"):
        check(folder)


def test_hidden_files_are_no_images(folder):
    (folder / "images" / "city" / "._0.jpg").write_bytes(b"a notebook's copy")
    (folder / "images" / ".thumbnails").mkdir()
    (folder / "images" / ".thumbnails" / "0.jpg").write_bytes(b"")
    assert len(pair_files(folder / "images", folder / "maps")) == 3


def test_images_without_maps_are_counted(folder):
    (folder / "maps" / "city" / "1.png").unlink()
    with pytest.raises(UserError, match=r"image .*1\.png has no label map .*1\.png; add it, or remove the image"):
        check(folder)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"image folder .*images does not exist; set data_root"):
        check(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"label map folder .*maps does not exist"):
        check(tmp_path)
    (tmp_path / "maps").mkdir()
    with pytest.raises(UserError, match=r"image folder .*images holds no image"):
        check(tmp_path)


def test_a_map_named_as_the_images_stem_is_no_suffix(tmp_path):
    """The map of ``a.png.jpg`` is ``a.png.png``; ``a.png`` is another's."""
    write_pair(tmp_path, "a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "maps" / "a.png.png").rename(tmp_path / "maps" / "a.png")
    with pytest.raises(UserError, match=r"a\.png\.jpg has no label map .*a\.png\.png; add it, or remove the image"):
        check(tmp_path)


def test_all_ignored_is_refused(tmp_path):
    write_pair(tmp_path, "void", np.full((4, 4), 255, np.uint8))
    with pytest.raises(UserError, match=r"every pixel of the 1 label maps .* is ignored"):
        check(tmp_path)


def test_a_large_folder_is_sampled_with_a_seed(folder):
    first, again, other = (check(folder, most=2, seed=seed) for seed in (0, 0, 1))
    assert (first.checked, first.total) == (2, 3)
    assert first.pixels.tolist() == again.pixels.tolist() != other.pixels.tolist()


def test_class_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("0\tvoid\n2\ttall tree\n1\tsky\n\n", encoding="utf-8-sig")
    assert read_classes(path, reduce_zero_label=True) == ["sky", "tall tree"]
    assert read_classes(path, reduce_zero_label=False) == ["void", "sky", "tall tree"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 void\n", r"line 1: '0 void' is not value<TAB>name"),
        ("0\ta\n0\tb\n", r"line 2"),
        ("0\ta\n2\tb\n", r"names the values \[0, 2\]; they must run from 0 without gaps"),
    ],
)
def test_a_broken_class_file_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(path, reduce_zero_label=False)


def test_every_class_has_a_colour_of_its_own():
    for number in (1, 11, 150):
        colours = palette(number)
        assert len({*colours, IGNORED_COLOUR}) == number + 1
    assert palette(11) == palette(150)[:11]


def test_labels_become_their_colours():
    labels = np.array([[0, 1, 255]], dtype=np.uint8)
    assert np.asarray(colour_labels(labels, palette(2))).tolist() == [[*map(list, palette(2)), list(IGNORED_COLOUR)]]


def test_sheet_shows_truth_beside_prediction():
    truth, prediction = np.zeros((8, 12), np.uint8), np.ones((8, 12), np.uint8)
    colours = palette(2)
    example = Example(Image.new("RGB", (12, 8), "white"), truth, prediction)
    one, two = (np.asarray(draw_examples([example] * rows, ["sky", "road"], colours)) for rows in (1, 2))
    third = one.shape[1] // len(TITLES)
    row = one[100]
    assert tuple(row[third + third // 2]) == colours[0] and tuple(row[2 * third + third // 2]) == colours[1]
    assert two.shape[0] > one.shape[0]
