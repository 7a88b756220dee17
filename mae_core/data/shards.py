"""Images in tar files of the webdataset layout, read at random: where each lies is found in one pass."""

from __future__ import annotations

import importlib
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, decode_bytes
from mae_core.data.images import IMAGE_SUFFIXES
from mae_core.data.reading import ReadAs
from mae_core.errors import UserError


class Shard(Protocol):
    """A tar file, wherever it is; ``str`` of it says where."""

    @property
    def name(self) -> str:
        """Of the file, without its folder."""

    @property
    def size(self) -> int:
        """Bytes; 0 where it cannot be read."""

    def open(self) -> IO[bytes]:
        """The whole file, for one pass in which much is jumped over. Raises ``OSError``."""

    def part(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on. Raises ``OSError``."""

    def contents(self) -> Contents:
        """See ``contents_of``."""


@dataclass(frozen=True)
class LocalShard:
    """A tar file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """See ``Shard``."""
        return self.path.name

    @property
    def size(self) -> int:
        """See ``Shard``."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def open(self) -> IO[bytes]:
        """See ``Shard``."""
        return self.path.open("rb")

    def part(self, offset: int, size: int) -> bytes:
        """See ``Shard``."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def contents(self) -> Contents:
        """See ``Shard``."""
        return contents_of(self)

    def __str__(self) -> str:
        return str(self.path)


class Entry(NamedTuple):
    """An image inside a tar file: where its bytes are."""

    name: str
    offset: int
    size: int


class Contents(NamedTuple):
    """What a tar file holds: its images; by ending, the members of samples without an image; why it ends too early."""

    entries: list[Entry]
    passed_over: dict[str, int]
    damage: str | None = None


def contents_of(shard: Shard) -> Contents:
    """One pass over the headers. A member's suffix, in webdataset's sense, is all after the first dot."""
    size = shard.size
    split_name = require("webdataset").tariterators.base_plus_ext
    entries: list[Entry] = []
    with_image: set[str] = set()
    others: list[tuple[str, str]] = []
    damage = None
    try:
        with shard.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                key, extension = split_name(member.name)
                suffix = f".{(extension or '').rpartition('.')[2].lower()}"
                if not member.isfile():
                    continue
                if suffix not in IMAGE_SUFFIXES:
                    others.append((key or member.name, suffix))
                    continue
                with_image.add(key)
                entries.append(Entry(member.name, member.offset_data, member.size))
            # tarfile stops silently at any header that is cut or damaged, other than the first; a file's end is a
            # block of zeros
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is cut or damaged at byte {archive.offset}, what follows is not read")
    except (OSError, tarfile.TarError) as error:
        damage = str(error) if entries else f"{error}; a shard is a tar file without compression"
    return Contents(entries, Counter(suffix for key, suffix in others if key not in with_image), damage)


class TarShards:
    """The images of several tar files, one file after the other; only places are kept.

    ``damaged`` names the shards that end too early; the images before the end are used. ``passed_over`` counts the
    members, by ending, of samples that have no image.
    """

    def __init__(self, shards: Sequence[Shard], read_as: ReadAs) -> None:
        self.shards, self.read_as = list(shards), read_as
        self.members: list[tuple[int, Entry]] = []
        self.damaged: list[Unreadable] = []
        self.passed_over: Counter[str] = Counter()
        for number, shard in enumerate(self.shards):
            contents = shard.contents()
            self.members += ((number, entry) for entry in contents.entries)
            self.passed_over.update(contents.passed_over)
            if contents.damage is not None:
                self.damaged.append(Unreadable(str(shard), contents.damage))
        if not self.members:
            reason = f": {self.damaged[0].reason}" if self.damaged else ""
            raise UserError(f"no images in {self.shards[0]} and {len(self.shards) - 1} other shards{reason}")

    @property
    def names(self) -> list[str]:
        """shard/member."""
        return [f"{self.shards[shard].name}/{entry.name}" for shard, entry in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> Pixels:
        """See ``read_image``."""
        return decode_bytes(self.content(index), self._label(index), self.read_as)

    def content(self, index: int) -> bytes:
        """The bytes of a member. Raises ``UnreadableImage``."""
        shard, entry = self.members[index]
        try:
            return self.shards[shard].part(entry.offset, entry.size)
        except OSError as error:
            raise UnreadableImage(self._label(index), str(error)) from None

    def _label(self, index: int) -> str:
        shard, entry = self.members[index]
        return f"{self.shards[shard]}/{entry.name}"


def require(package: str, extra: str = "data") -> Any:
    """Import an optional package. Raises ``UserError`` with the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"this needs {package}, which is not installed; run: pip install 'mae-transfer[{extra}]'"
        ) from None
