"""Images from folders, lists, shards and data sets: the same pixels, by index, whatever they lie in."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.data.config import PretrainData
from mae_core.data.decoding import UnreadableImage, to_tensor
from mae_core.data.sources import damaged_parts, kind_of, open_source
from mae_core.data.unlabelled import UnlabelledImages
from mae_core.errors import UserError
from mae_core.masking import RandomMasking, SampleMasks
from mae_core.patches import PatchGrid


def write_shards(folder: Path, paths: list[Path], per_shard: int) -> list[Path]:
    import webdataset

    folder.mkdir(parents=True)
    shards = []
    for first in range(0, len(paths), per_shard):
        shards.append(folder / f"part-{first // per_shard:04d}.tar")
        with webdataset.TarWriter(str(shards[-1])) as writer:
            for path in paths[first : first + per_shard]:
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "cls": "3"})
    return shards


def saved_dataset(folder: Path, paths: list[Path]) -> Path:
    import datasets

    table = datasets.Dataset.from_dict({"name": [p.name for p in paths], "image": [str(p) for p in paths]})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(folder))
    return folder


def pixels_of(source, index: int) -> torch.Tensor:
    return to_tensor(source.read(index))


@pytest.fixture
def paths(tmp_path, write_images) -> list[Path]:
    return write_images(tmp_path / "images", 5)


@pytest.fixture
def places(tmp_path, paths) -> dict[str, Path]:
    """The same five images, in every kind of place."""
    (tmp_path / "list.txt").write_text("# mine\n" + "".join(f"images/{path.name}\n\n" for path in paths))
    write_shards(tmp_path / "shards", paths, 2)
    saved_dataset(tmp_path / "saved", paths)
    return {
        "files": tmp_path / "images",
        "list": tmp_path / "list.txt",
        "shards": tmp_path / "shards",
        "huggingface": tmp_path / "saved",
    }


@pytest.mark.extra("webdataset", "datasets")
@pytest.mark.parametrize("kind", ["files", "list", "shards", "huggingface"])
def test_every_kind_of_place_yields_the_same_samples(places, paths, kind):
    assert kind_of(places[kind]) == kind
    source = open_source(PretrainData(path=places[kind]))
    assert len(source) == len(source.names) == len(set(source.names)) == 5
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            assert torch.equal(pixels_of(source, index), to_tensor(image.convert("RGB")))
    data = PretrainData(path=places[kind], image_size=16)
    masks = SampleMasks(RandomMasking(0.5), PatchGrid(4, 4, 4))
    reference = UnlabelledImages(open_source(PretrainData(path=places["files"])), data, 3, masks)[(2, 4)]
    sample = pickle.loads(pickle.dumps(UnlabelledImages(source, data, 3, masks)))[(2, 4)]
    assert torch.equal(sample.pixels, reference.pixels)
    assert torch.equal(sample.mask.hidden, reference.mask.hidden)


@pytest.mark.extra("webdataset", "datasets")
def test_a_folder_of_classes_is_an_imagefolder_for_hugging_face(tmp_path, write_classes, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = write_classes(tmp_path / "classes") / "train"
    source = open_source(PretrainData(path=root, source="huggingface"))
    assert len(source) == len(open_source(PretrainData(path=root))) and pixels_of(source, 0).shape[0] == 3


@pytest.mark.extra("webdataset", "datasets")
def test_splits_and_columns_are_named(tmp_path, places):
    assert len(open_source(PretrainData(path=places["huggingface"], split="test"))) == 1
    with pytest.raises(UserError, match=r"no split 'val'; choose one of train, test"):
        open_source(PretrainData(path=places["huggingface"], split="val"))
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(UserError, match="no column of images, only text"):
        open_source(PretrainData(path=tmp_path / "words"))


@pytest.mark.extra("webdataset", "datasets")
def test_several_places_follow_each_other(places, tmp_path, write_images):
    write_images(tmp_path / "more", 2)
    data = PretrainData(path=(places["shards"], tmp_path / "more"))
    source = open_source(data)
    assert len(source) == 7 and source.names[0].startswith("0/") and source.names[6] == "1/001.png"
    assert torch.equal(pixels_of(source, 6), pixels_of(open_source(PretrainData(path=tmp_path / "more")), 1))
    assert torch.equal(pixels_of(source, 4), pixels_of(open_source(PretrainData(path=places["shards"])), 4))


@pytest.mark.extra("webdataset", "datasets")
def test_shards_may_be_named_by_braces(places):
    assert len(open_source(PretrainData(path=places["shards"] / "part-{0000..0001}.tar"))) == 4
    with pytest.raises(UserError, match=r"part-0003\.tar does not exist"):
        open_source(PretrainData(path=places["shards"] / "part-{0000..0007}.tar"))


@pytest.mark.extra("webdataset", "datasets")
def test_a_shard_cut_short_is_reported_and_what_is_whole_is_used(places):
    shard = places["shards"] / "part-0000.tar"
    with tarfile.open(shard) as archive:
        second = [member for member in archive if member.name.endswith(".png")][1]
    shard.write_bytes(shard.read_bytes()[: second.offset_data + second.size // 2])
    source = open_source(PretrainData(path=places["shards"]))
    assert len(source) == 4
    (entry,) = damaged_parts(source)
    assert entry.path == str(shard) and entry.reason
    assert damaged_parts(open_source(PretrainData(path=(places["files"], places["shards"])))) == [entry]


@pytest.mark.extra("webdataset", "datasets")
@pytest.mark.parametrize("harm", ["cut before a header", "cut in a header", "a damaged header"])
def test_a_shard_that_tarfile_takes_for_ended_is_reported(places, harm):
    shard = places["shards"] / "part-0000.tar"
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[-1].offset
    whole = shard.read_bytes()
    assert not damaged_parts(open_source(PretrainData(path=shard))) and place
    ends = {"cut before a header": b"", "cut in a header": whole[place : place + 100]}
    shard.write_bytes(whole[:place] + ends.get(harm, b"x" * 512 + whole[place + 512 :]))
    source = open_source(PretrainData(path=shard))
    (entry,) = damaged_parts(source)
    assert 0 < len(source) and entry.reason == f"it is cut or damaged at byte {place}, what follows is not read"


@pytest.mark.extra("webdataset", "datasets")
def test_a_compressed_shard_is_refused(tmp_path, paths):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(paths[0], "0.png")
    with pytest.raises(UserError, match="a shard is a tar file without compression"):
        open_source(PretrainData(path=tmp_path / "x.tar"))


@pytest.mark.extra("webdataset", "datasets")
def test_a_broken_image_in_a_shard_is_unreadable_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("0.png", b"broken"), ("1.seg.npy", npy(np.zeros((3, 4), "uint8")))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_source(PretrainData(path=tmp_path / "x.tar"))
    with pytest.raises(UnreadableImage) as caught:
        source.read(0)
    assert caught.value.unreadable.path == f"{tmp_path / 'x.tar'}/0.png"
    assert pixels_of(source, 1).shape == (3, 3, 4)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.extra("webdataset", "datasets")
@pytest.mark.parametrize(
    "path, message",
    [
        ("none", "image folder {root}/none does not exist"),
        ("empty.txt", "names no files; write one path per line"),
        ("binary.txt", "is in UTF-16, not in UTF-8"),
        ("none.txt", "cannot be read"),
        ("none.tar", "none.tar does not exist; name tar files"),
        ("words.tar", "no images in {root}/words.tar"),
        ("table", "not a data set that Hugging Face datasets can load"),
    ],
)
def test_places_without_images_are_refused_in_a_sentence(tmp_path, path, message):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "note").write_text("hello")
    with tarfile.open(tmp_path / "words.tar", "w") as archive:
        archive.add(tmp_path / "note", "note.txt")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError) as caught:
        open_source(PretrainData(path=tmp_path / path))
    assert message.format(root=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "way", [str, str.upper, lambda line: line.replace("/", "\\")], ids=["as is", "upper", "windows"]
)
def test_a_list_of_other_systems_names_every_file(tmp_path, paths, encoding, way):
    file = tmp_path / "list.txt"
    file.write_bytes("\r\n".join(way(f"images/{path.name}") for path in paths).encode(encoding))
    assert open_source(PretrainData(path=file)).names == [f"images/{path.name}" for path in paths]
