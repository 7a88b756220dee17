"""Where images without labels come from: folders, file lists, tar shards, Hugging Face data sets; one or several."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.data.config import PretrainData
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, decode_bytes, read_content, read_image
from mae_core.data.images import IMAGE_SUFFIXES, ImageFiles, ImageSource, list_images, passed_over_in
from mae_core.data.reading import ReadAs, ShardCache
from mae_core.data.remote import address_of, remote_shards, without_query
from mae_core.data.shards import LocalShard, TarShards, require
from mae_core.errors import UserError
from mae_core.texts import find_named, read_lines

LIST_SUFFIXES = (".txt", ".lst")
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")
COLUMNAR_SUFFIXES = (".parquet", ".arrow")


class HuggingFaceImages:
    """The image column of a Hugging Face data set on this disk: saved with ``save_to_disk``, or a folder that
    ``load_dataset`` understands (imagefolder, parquet)."""

    def __init__(self, path: Path, read_as: ReadAs, split: str | None = None) -> None:
        datasets = require("datasets")
        self.path, self.read_as = path, read_as
        try:
            saved = any((path / name).is_file() for name in SAVED_DATASET)
            found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"{path} is not a data set that Hugging Face datasets can load ({' '.join(str(error).split())})"
            ) from None
        if hasattr(found, "keys"):
            splits = list(found.keys())
            chosen = split or ("train" if "train" in splits else splits[0])
            if chosen not in splits:
                raise UserError(f"{path} has no split {chosen!r}; choose one of {', '.join(splits)}")
            found = found[chosen]
        elif split is not None:
            raise UserError(f"{path} was saved as one split; ask for none")
        columns = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise UserError(f"{path} has no column of images, only {', '.join(found.features)}")
        self.column = columns[0]
        self.table = found.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))

    @property
    def names(self) -> list[str]:
        """Row numbers."""
        return [str(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Pixels:
        """See ``read_image``."""
        cell = self._cell(index)
        if cell["bytes"] is not None:
            return decode_bytes(cell["bytes"], f"{self.path}[{index}]", self.read_as)
        return read_image(Path(cell["path"]), self.read_as)

    def content(self, index: int) -> bytes:
        """The bytes in a cell, or of the file that it names. Raises ``UnreadableImage``."""
        cell = self._cell(index)
        return read_content(Path(cell["path"])) if cell["bytes"] is None else bytes(cell["bytes"])

    def _cell(self, index: int) -> Any:
        cell = self.table[index][self.column]
        if cell is None:
            raise UnreadableImage(f"{self.path}[{index}]", "the cell is empty")
        return cell


class JoinedSources:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = list(sources)
        self.ends = list(accumulate(len(source) for source in sources))

    @property
    def names(self) -> list[str]:
        """The number of the source, and the name in it."""
        return [f"{number}/{name}" for number, source in enumerate(self.sources) for name in source.names]

    @property
    def damaged(self) -> list[Unreadable]:
        """What the sources found damaged as they were opened."""
        return [entry for source in self.sources for entry in damaged_parts(source)]

    @property
    def passed_over(self) -> Counter[str]:
        """The files that were passed over in all of them, by ending."""
        return sum((passed_over_in(source) for source in self.sources), Counter())

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, index: int) -> Pixels:
        """See ``read_image``."""
        source, place = self._place(index)
        return source.read(place)

    def content(self, index: int) -> bytes:
        """See ``ImageSource``."""
        source, place = self._place(index)
        return source.content(place)

    def _place(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self.ends, index)
        return self.sources[number], index - (self.ends[number - 1] if number else 0)


class Part:
    """Some images of a source, by their indices there."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    @property
    def names(self) -> list[str]:
        """Those of the source."""
        names = self.source.names
        return [names[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Pixels:
        """See ``read_image``."""
        return self.source.read(self.indices[index])

    def content(self, index: int) -> bytes:
        """See ``ImageSource``."""
        return self.source.content(self.indices[index])


def damaged_parts(source: ImageSource) -> list[Unreadable]:
    """What a source found damaged as it was opened: shards that end too early."""
    return list(getattr(source, "damaged", []))


class Wanted(NamedTuple):
    """How a place is read. ``read_as=None``: as it is stored; ``split``: of a data set; ``cache``: of remote shards."""

    read_as: ReadAs
    split: str | None = None
    cache: ShardCache = ShardCache()


def _files(path: Path, wanted: Wanted) -> ImageSource:
    passed_over: Counter[str] = Counter()
    return ImageFiles(list_images(path, passed_over), wanted.read_as, path, passed_over)


def _list(path: Path, wanted: Wanted) -> ImageSource:
    """A line a file, relative to the list's folder; empty lines and those that start with # are passed over. A file
    that is missing is unreadable later."""
    lines = [line.strip() for line in read_lines(path)]
    paths = [find_named(path.parent, line) or path.parent / line for line in lines if line and line[0] != "#"]
    if not paths:
        raise UserError(f"file list {path} names no files; write one path per line")
    return ImageFiles(paths, wanted.read_as, path.parent)


def _shards(path: Path, wanted: Wanted) -> ImageSource:
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
    else:
        shards = [Path(name) for name in require("webdataset").shardlists.expand_urls(str(path))]
    missing = [shard for shard in shards if not shard.is_file()]
    if not shards or missing:
        lost = missing[0] if missing else path / "*.tar"
        raise UserError(f"shard {lost} does not exist; name tar files, or a folder of them")
    return TarShards([LocalShard(shard) for shard in shards], wanted.read_as)


def _huggingface(path: Path, wanted: Wanted) -> ImageSource:
    if not path.is_dir():
        raise UserError(f"data set {path} is not a folder; name one that was saved or downloaded before")
    return HuggingFaceImages(path, wanted.read_as, wanted.split)


SOURCES: dict[str, Callable[[Path, Wanted], ImageSource]] = {
    "files": _files,
    "list": _list,
    "shards": _shards,
    "huggingface": _huggingface,
}
"""Name in a config -> (path, how it is read) -> images. To add one: a function, and a row; ``kind_of`` may recognise
it."""


def kind_of(path: Path) -> str:
    """Row of ``SOURCES`` that a path looks like: a file by its suffix, a folder by what it holds, else a folder of
    image files."""
    if path.suffix in LIST_SUFFIXES and not path.is_dir():
        return "list"
    if path.suffix == ".tar" or address_of(path) is not None:
        return "shards"
    if not path.is_dir():
        return "files"
    held = [entry for entry in path.iterdir() if entry.is_file()]
    if any(entry.name in SAVED_DATASET or entry.suffix in COLUMNAR_SUFFIXES for entry in held):
        return "huggingface"
    suffixes = {entry.suffix.lower() for entry in held}
    return "shards" if ".tar" in suffixes and not suffixes & IMAGE_SUFFIXES else "files"


def open_source(data: PretrainData) -> ImageSource:
    """The images that a configuration names. Raises ``UserError`` where one of the paths holds none."""
    if data.path is None:
        list_images(None)
    paths: tuple[Path | str, ...] = data.path if isinstance(data.path, tuple) else (data.path or Path(),)
    return open_places(paths, data.reading, kind=data.source, split=data.split, cache=data.shard_cache)


def open_places(
    paths: Sequence[Path | str],
    read_as: ReadAs,
    *,
    kind: str = "auto",
    split: str | None = None,
    cache: ShardCache = ShardCache(),
) -> ImageSource:
    """The images of several places, one after the other. ``read_as``, ``split``, ``cache``: see ``Wanted``.

    Raises ``UserError`` where one of the places holds none.
    """
    wanted = Wanted(read_as, split, cache)
    sources = [_open(path, wanted, kind) for path in paths]
    return sources[0] if len(sources) == 1 else JoinedSources(sources)


def _open(place: Path | str, wanted: Wanted, kind: str) -> ImageSource:
    address = address_of(place)
    if address is None:
        path = Path(place)
        return SOURCES[kind_of(path) if kind == "auto" else kind](path, wanted)
    if kind not in ("auto", "shards"):
        raise UserError(f"{without_query(address)} is read as tar shards, and not as source={kind}; leave source out")
    return TarShards(remote_shards(address, wanted.cache), wanted.read_as)


def open_files(path: Path | None, read_as: ReadAs) -> ImageFiles:
    """The image files of a folder, of a list of files, or one image file, for what asks a file's place, size and time.

    Raises ``UserError`` as ``open_places`` does, and for images that lie inside other files.
    """
    if path is None:
        return ImageFiles(list_images(path), read_as)
    if (kind := kind_of(path)) not in ("files", "list"):
        raise UserError(
            f"{address_of(path) or path} holds images inside other files; name a folder of image files, a list, or one "
            "image"
        )
    source = SOURCES[kind](path, Wanted(read_as))
    assert isinstance(source, ImageFiles)
    return source
