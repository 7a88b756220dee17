import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment

from mae_core.data import labelled, unlabelled
from mae_core.data.augmentation import centre_view
from mae_core.data.config import FinetuneData, ImagesConfig, PretrainData
from mae_core.data.decoding import to_tensor
from mae_core.data.images import (
    GREY_MEAN,
    ImageFiles,
    Statistics,
    UnreadableImage,
    check_all,
    describe_passed_over,
    list_images,
    passed_over_in,
    read_image,
    statistics_of,
)
from mae_core.data.labelled import TestImages, TrainImages, read_image_folder
from mae_core.data.loading import make_loader
from mae_core.data.sources import open_places
from mae_core.data.unlabelled import UnlabelledImages
from mae_core.errors import UserError
from mae_core.masking import RandomMasking, SampleMasks
from mae_core.patches import PatchGrid


def noise(side: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8))


def reason_of(path: Path, channels: int = 3) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, channels)
    assert caught.value.unreadable.path == str(path)
    reason = caught.value.unreadable.reason
    assert reason and "\n" not in reason
    return reason


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels, wanted", [(1, "L"), (3, "RGB")])
def test_every_8_bit_mode_becomes_grey_or_rgb(tmp_path, mode, channels, wanted):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    noise().convert(mode).save(path)
    image = read_image(path, channels)
    assert (image.mode, image.size) == (wanted, (40, 30))


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_unreadable(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    assert reason_of(tmp_path / "x.jpg") == "not an image"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_a_truncated_image_is_unreadable(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    noise((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reason_of(path)


def test_a_folder_or_a_missing_file_is_unreadable_not_a_crash(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    for name in ("folder.jpg", "link.jpg", "none.jpg"):
        reason_of(tmp_path / name)


@settings(max_examples=150)
@given(
    suffix=st.sampled_from([".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm", ".gif"]),
    place=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=12),
    cut=st.booleans(),
)
def test_damage_of_any_kind_is_an_image_or_a_reason(tmp_path_factory, suffix, place, junk, cut):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    noise((12, 9)).save(path)
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    path.write_bytes(content[: start + len(junk)] if cut else content)
    try:
        image = read_image(path, 3)
    except UnreadableImage as error:
        assert error.unreadable.reason
    else:
        assert len(to_tensor(image)) == 3


def test_images_are_found_below_a_folder_sorted_hidden_ones_left_out(tmp_path, write_images):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1, suffix=".JPG")
    write_images(tmp_path / ".cache", 1)
    (tmp_path / "a" / "._0.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["a/deep/000.JPG", "b/000.png", "b/001.png"]


def test_linked_folders_are_looked_into_once_around_a_loop(tmp_path, write_images):
    write_images(tmp_path / "elsewhere", 2)
    write_images(tmp_path / "images" / "here", 1)
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "here" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / ".secret").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "itself").symlink_to(tmp_path / "images" / "itself")
    found = [str(path.relative_to(tmp_path / "images")) for path in list_images(tmp_path / "images")]
    assert found == ["here/000.png", "linked/000.png", "linked/001.png"]


def test_what_is_passed_over_is_counted_by_ending(tmp_path, write_images):
    for suffix in (".jfif", ".JPE", ".jp2", ".png"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}", {".jp2": "JPEG2000", ".png": "PNG"}.get(suffix, "JPEG"))
    for name in ("a.tif2", "b.tif2", "c", "d.txt", ".hidden"):
        (tmp_path / name).write_text("")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    source = open_places([tmp_path], 3)
    assert len(source) == 4 and all(read_image(path, 3).size == (8, 8) for path in source.paths)
    found = passed_over_in(source)
    assert found == {".tif2": 2, "no ending": 1, ".txt": 1, "no regular file": 2 if hasattr(os, "mkfifo") else 1}
    assert "6 files passed over, by ending: 2 x .tif2" in describe_passed_over(found)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.tif2").write_text("")
    with pytest.raises(UserError, match=r"it holds 1 x \.tif2; looked for"):
        list_images(tmp_path / "only")
    assert passed_over_in(open_places([tmp_path, tmp_path], 3))[".tif2"] == 6 and not describe_passed_over({})


@pytest.mark.parametrize(
    "what, message", [("none", "does not exist"), ("file", "is a file"), ("empty", "no images below")]
)
def test_a_folder_without_images_is_refused(tmp_path, what, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        list_images(tmp_path / what)
    with pytest.raises(UserError, match=r"set data\.path"):
        list_images(None)


def test_reading_everything_first_names_the_bad_file(tmp_path, write_images):
    paths = write_images(tmp_path, 6)
    seen = []
    check_all(ImageFiles(paths, 3), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    with pytest.raises(UserError, match=r"004\.png cannot be read"):
        check_all(ImageFiles(paths, 3))


def test_statistics_follow_the_channels_and_the_configuration():
    assert statistics_of(ImagesConfig(channels=1)).mean == GREY_MEAN
    assert len(statistics_of(ImagesConfig()).std) == 3
    given_ones = statistics_of(ImagesConfig(mean=(0.1, 0.2, 0.3)))
    assert given_ones.mean == (0.1, 0.2, 0.3) and given_ones.std == statistics_of(ImagesConfig()).std


def pretrain_set(paths: list[Path], seed: int = 0) -> UnlabelledImages:
    masks = SampleMasks(RandomMasking(0.5), PatchGrid(4, 4, 4))
    return UnlabelledImages(ImageFiles(paths, 3), PretrainData(image_size=16), seed, masks)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path, write_images):
    paths = write_images(tmp_path, 4)
    images = pretrain_set(paths)
    first = images[(2, 3)]
    torch.manual_seed(99), np.random.seed(99)
    images[(0, 0)], images[(1, 2)]
    again = pretrain_set(paths)[(2, 3)]
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.mask.hidden, again.mask.hidden)
    assert first.pixels.shape == (3, 16, 16) and first.pixels.dtype == torch.uint8
    for other in (images[(3, 3)], images[(2, 1)], pretrain_set(paths, seed=1)[(2, 3)]):
        assert not torch.equal(first.pixels, other.pixels)
        assert not torch.equal(first.mask.hidden, other.mask.hidden)


def test_a_labelled_sample_depends_on_seed_epoch_and_index_alone(tmp_path, write_classes):
    files = read_image_folder(write_classes(tmp_path))[0]
    data = FinetuneData(image_size=16)

    def sample(seed: int, place: tuple[int, int]) -> torch.Tensor:
        torch.manual_seed(sum(place)), np.random.seed(seed + 5)
        return TrainImages(files, data, (16, 16), statistics_of(data), seed)[place].pixels

    assert torch.equal(sample(0, (1, 2)), sample(0, (1, 2)))
    images = TrainImages(files, data, (16, 16), statistics_of(data), 0)
    images[(0, 0)]
    assert torch.equal(images[(1, 2)].pixels, sample(0, (1, 2)))
    assert not torch.equal(sample(0, (1, 2)), sample(0, (2, 2)))
    assert not torch.equal(sample(0, (1, 2)), sample(1, (1, 2)))


def test_an_unreadable_file_is_replaced_and_reported(tmp_path, write_images):
    paths = write_images(tmp_path, 4)
    for number in (1, 2):
        paths[number].write_bytes(b"broken")
    images = pretrain_set(paths)
    sample = images[(0, 1)]
    assert [entry.path for entry in sample.unreadable] == [str(paths[1]), str(paths[2])]
    batch = unlabelled.collate([sample, images[(0, 0)]])
    assert len(batch) == 2 and len(batch.unreadable) == 2
    parts = batch.split(1)
    assert [len(part) for part in parts] == [1, 1] and torch.equal(parts[1].pixels[0], batch.pixels[1])
    assert [len(images.fixed_views(count)) for count in (1, 2, 3)] == [1, 2, 2]  # of files 1 alone no view can be made


def test_a_folder_of_broken_files_is_refused(tmp_path, write_images):
    paths = write_images(tmp_path, 3)
    for path in paths:
        path.write_bytes(b"broken")
    images = pretrain_set(paths)
    with pytest.raises(UserError, match="none of 3 images tried can be read"):
        images.fixed_views(2)
    with pytest.raises(UserError, match=r"cannot be read.*002\.png"):
        unlabelled.collate([images[(0, 0)]])


def test_unreadable_test_images_are_left_out_never_replaced(tmp_path, write_classes):
    files = read_image_folder(write_classes(tmp_path))[1]
    files.paths[1].write_bytes(b"broken")
    data = FinetuneData(image_size=16)
    images = TestImages(files, data, (16, 16), statistics_of(data))
    batch = labelled.collate_readable([images[index] for index in range(3)])
    assert len(batch) == 2 and [entry.path for entry in batch.unreadable] == [str(files.paths[1])]
    assert len(labelled.collate_readable([images[1]])) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_training_images_without_a_readable_one_are_refused_in_the_parent(tmp_path, write_classes, workers):
    """With the count and the last reason, and without the traceback of a worker."""
    files = read_image_folder(write_classes(tmp_path))[0]
    for path in files.paths:
        path.write_bytes(b"broken")
    data = FinetuneData(image_size=16)
    images = TrainImages(files, data, (16, 16), statistics_of(data), 0)
    loader = make_loader(images, [[(0, 0), (0, 1)]], labelled.collate, workers=workers, pin=False)
    with pytest.raises(UserError, match=r"^12 images in a row cannot be read, the last is .*003\.png \(not an image\)"):
        list(loader)


def test_data_sets_travel_to_spawned_workers(tmp_path, write_classes):
    train, val = read_image_folder(write_classes(tmp_path))
    data = FinetuneData(image_size=16)
    statistics = statistics_of(data)
    for images, place in (
        (pretrain_set(train.paths), (1, 2)),
        (TrainImages(train, data, (16, 16), statistics, 0), (1, 2)),
        (TestImages(val, data, (16, 16), statistics), 2),
    ):
        copy = pickle.loads(pickle.dumps(images))
        assert torch.equal(copy[place].pixels, images[place].pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_default_augmentation_survives_posterizing_to_no_bits(tmp_path, write_classes, channels):
    files = read_image_folder(write_classes(tmp_path))[0]
    data = FinetuneData(image_size=16, channels=channels)
    for seed in range(25):
        images = TrainImages(files, data, (16, 16), statistics_of(data), seed)
        for index in range(len(images)):
            assert images[(0, index)].pixels.isfinite().all()
    picture = noise().convert("L" if channels == 1 else "RGB")
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        black = auto_augment.NAME_TO_OP[name](picture, 0)
        assert (black.mode, black.size) == (picture.mode, picture.size) and not np.asarray(black).any()
        assert set(np.unique(np.asarray(auto_augment.NAME_TO_OP[name](picture, 1)))) == {0, 128}
    strong = FinetuneData(image_size=16, channels=channels, auto_augment="rand-m1-mstd3-inc0")
    images = TrainImages(files, strong, (16, 16), statistics_of(strong), 0)
    for epoch in range(20):
        images[(epoch, 0)]


def test_classes_are_the_folders_of_train(tmp_path, write_classes):
    root = write_classes(tmp_path, train=2, val=1)
    train, val = read_image_folder(root)
    assert train.classes == val.classes == ["ash", "birch", "cedar"]
    assert train.labels == [0, 0, 1, 1, 2, 2] and val.labels == [0, 1, 2]


def break_folder(root: Path, how: str) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        relative = str(path.relative_to(root))
        doomed = {
            "no val": relative.startswith("val"),
            "no train": relative.startswith("train"),
            "one class": relative.startswith(("train/b", "train/c", "val/b", "val/c")),
            "empty val": relative.startswith("val/"),
            "empty class": relative.startswith("train/birch/"),
            "stranger": relative.startswith("train/cedar"),
        }[how]
        if doomed:
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "how, message",
    [
        ("no val", r"has no val/ folder \(it holds train\)"),
        ("no train", r"has no train/ folder \(it holds val\)"),
        ("one class", "has 1 class folders; classification needs two or more"),
        ("empty val", "val holds no images to evaluate on"),
        ("empty class", "class folder .*birch holds no images; put some there"),
        ("stranger", "has classes that train does not have: cedar"),
    ],
)
def test_an_image_folder_out_of_shape_is_refused(tmp_path, write_classes, how, message):
    root = write_classes(tmp_path)
    break_folder(root, how)
    with pytest.raises(UserError, match=message):
        read_image_folder(root)


def test_no_image_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"set data\.path"):
        read_image_folder(None)
    with pytest.raises(UserError, match="the folder does not exist"):
        read_image_folder(tmp_path / "none")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no val/ folder \(it holds train, val \(a broken link\)\)"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("size, box", [((80, 40), (20, 0, 60, 40)), ((40, 80), (0, 20, 40, 60))])
def test_a_centre_view_is_the_largest_centred_part(size, box):
    statistics = Statistics((0.5,) * 3, (0.25,) * 3)
    image = noise(size)
    view = centre_view((40, 40), statistics)(image)
    expected = (torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)
