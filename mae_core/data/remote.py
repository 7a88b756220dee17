"""Tar shards at an address (https, s3, and what else fsspec reads): kept on this machine up to a limit, and those
beyond it read by parts, an image a request."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from http import HTTPStatus
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from mae_core.atomic import atomic_path, checksum, said_plainly, write_json
from mae_core.counting import Counter
from mae_core.data.reading import ShardCache
from mae_core.data.shards import Contents, Entry, LocalShard, Shard, contents_of, require
from mae_core.errors import UserError, first_line

Result = TypeVar("Result")

EXTRA = "remote"
SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+):/+(?=[^/])")
"""How an address begins; a path of this machine has made one slash of two."""
QUERY = re.compile(r"\?[^\s'\"]+")
WAITS = (1.0, 5.0, 20.0)
"""Seconds before each new try where a request fails."""
REQUESTS = 16
"""Sizes asked for at once."""
BLOCK, PIECE = 4 << 20, 32 << 20
"""Bytes a request, of what is passed over and of what is kept."""
WRITABLE = "free disk space, or keep shards elsewhere with data.cache=FOLDER, or XDG_CACHE_HOME=FOLDER"
TAGS = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "updated", "content_settings")
"""Names under which stores say that a file is another than it was."""


def address_of(path: Path | str) -> str | None:
    """``https:/host/x``, as a path has it, -> ``https://host/x``; None for what is on this machine."""
    found = SCHEME.match(str(path))
    return None if found is None else f"{found[1]}://{str(path)[found.end() :]}"


def default_folder() -> Path:
    """Where shards are kept unless ``data.cache`` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae-transfer" / "shards"


class Facts(NamedTuple):
    """A remote file: its size in bytes, and what its store says that changes with its content."""

    size: int
    tag: str


@dataclass(frozen=True)
class RemoteShard:
    """A tar file at an address, or where ``kept`` its copy in ``folder``, which another run may remove."""

    address: str
    facts: Facts
    folder: Path
    kept: bool = False

    @property
    def name(self) -> str:
        """See ``Shard``."""
        return name_of(self.address)

    @property
    def size(self) -> int:
        """See ``Shard``."""
        return self.facts.size

    @property
    def copy(self) -> Path:
        """The file that is kept of it."""
        return self.folder / self.name

    @property
    def marker(self) -> Path:
        """Says that the copy is whole, and of what."""
        return self.folder / "kept.json"

    def open(self) -> IO[bytes]:
        """See ``Shard``."""
        return BufferedReader(_Parts(self), BLOCK)

    def part(self, offset: int, size: int) -> bytes:
        """See ``Shard``."""
        if self.kept:
            with suppress(OSError):
                return LocalShard(self.copy).part(offset, size)
        return self.fetched(offset, size)

    def fetched(self, offset: int, size: int) -> bytes:
        """``part``, from its address. Raises ``OSError`` where that fails in spite of some patience."""
        if not size:
            return b""
        found: bytes = _patiently(lambda: _files_at(self.address).cat_file(self.address, offset, offset + size))
        if len(found) == self.size:  # a server that does not know parts sends all
            return found[offset : offset + size]
        if len(found) != size:
            raise OSError(f"{len(found)} bytes came where {size} were asked for")
        return found

    def contents(self) -> Contents:
        """See ``Shard``; kept too, because the pass takes much of the file."""
        file = self.folder / "contents.json"
        known = _read(file)
        if known.get("facts") == [*self.facts] and {*Contents._fields} <= known.keys():
            return Contents([Entry(*entry) for entry in known["entries"]], known["passed_over"], known["damage"])
        found = contents_of(self)
        with said_plainly(self.folder, WRITABLE):
            write_json(file, {"facts": self.facts, **found._asdict()})
        return found

    def is_whole(self) -> bool:
        """Whether the copy is there and undamaged."""
        known = _read(self.marker)
        if known.get("facts") != [*self.facts]:
            return False
        try:
            if checksum(self.copy) == known["checksum"]:
                os.utime(self.marker)
                return True
        except OSError:
            return False
        print(f"the copy {self.copy} is damaged and fetched again", flush=True)
        self.marker.unlink(missing_ok=True)
        return False

    def fetch(self, report: Callable[[int], None]) -> None:
        """Make the copy; ``report(bytes)`` as it grows. Raises ``UserError`` where the shard cannot be read."""
        with atomic_path(self.copy) as temporary:
            with temporary.open("wb") as file:
                for start in range(0, self.size, PIECE):
                    try:
                        piece = self.fetched(start, min(PIECE, self.size - start))
                    except OSError as error:
                        raise _unreadable(self.address, error) from None
                    file.write(piece)
                    report(start + len(piece))
            found = checksum(temporary)
        write_json(self.marker, {"facts": self.facts, "checksum": found, "address": str(self)})

    def __str__(self) -> str:
        return without_query(self.address)


class _Parts(RawIOBase):
    """A shard as a file. A part that cannot be had is no damage of the shard: it raises ``UserError``."""

    def __init__(self, shard: RemoteShard) -> None:
        self.shard, self.place = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.shard.size)[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        size = max(min(len(buffer), self.shard.size - self.place), 0)
        try:
            buffer[:size] = self.shard.part(self.place, size)
        except OSError as error:
            raise _unreadable(self.shard.address, error) from None
        self.place += size
        return size


def remote_shards(address: str, cache: ShardCache) -> list[Shard]:
    """The tar files that an address names: one, several by braces (``{000..099}``), or a folder that can be listed.

    As many as ``cache`` has room for are fetched, in their order, and found there by the next run; of the others parts
    are read: images come in random order, so that it makes no difference which are kept. Raises ``UserError`` where
    one cannot be read.
    """
    root = (cache.folder or default_folder()).expanduser().absolute()
    addresses = list(require("webdataset").shardlists.expand_urls(address))
    if not name_of(addresses[0]).endswith(".tar"):
        addresses = _listed(address)
    with ThreadPoolExecutor(REQUESTS) as pool:
        facts = [*pool.map(_facts, addresses)]
    shards = [RemoteShard(each, known, root / _key(each)) for each, known in zip(addresses, facts, strict=True)]
    fetch = f"fetching shards of {without_query(addresses[0]).rpartition('/')[0]} to {root}, MiB"
    report, total, before = Counter(fetch, seconds_between=10), sum(shard.size for shard in shards), 0
    found: list[Shard] = []
    for shard in shards:
        kept = _keep(shard, shards, cache.limit, lambda done, before=before: report((before + done) >> 20, total >> 20))  # type: ignore[misc]
        found.append(replace(shard, kept=kept))
        before += shard.size
    return found


def _keep(shard: RemoteShard, wanted: Sequence[RemoteShard], limit: int, report: Callable[[int], None]) -> bool:
    """Fetch ``shard`` if it is not there and there is room, one process at a time, so that the ranks of a machine fetch
    each once -> whether it is there."""
    if shard.size > limit:
        return False
    if shard.is_whole():
        return True
    with said_plainly(shard.folder, WRITABLE), _alone(shard.folder.parent):
        there = _read(shard.marker).get("facts") == [*shard.facts]  # another process fetched it meanwhile
        if not there and _make_room(shard, wanted, limit):
            shard.fetch(report)
            there = True
    return there


def _make_room(shard: RemoteShard, wanted: Sequence[RemoteShard], limit: int) -> bool:
    """Whether ``shard`` fits beside what is kept, after shards that this run does not want are removed, those used
    longest ago first."""
    wanted_folders = {each.folder for each in wanted}
    used, others = 0, []
    for file in shard.folder.parent.glob("*/*.tar"):  # those that a killed process did not finish too
        size, finished = file.stat().st_size, file.name[0] != "."
        used += size
        if file.parent not in wanted_folders or not finished:
            marker = file.parent / shard.marker.name
            others.append(((marker if marker.is_file() and finished else file).stat().st_mtime, size, file))
    for _, size, file in sorted(others):
        if used + shard.size <= limit:
            break
        if file.name[0] != ".":
            (file.parent / shard.marker.name).unlink(missing_ok=True)
        file.unlink()
        used -= size
    return used + shard.size <= limit


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is between here and there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _listed(address: str) -> list[str]:
    """The tar files in a folder."""
    files = _files_at(address)
    try:
        found = _patiently(lambda: files.glob(f"{address.rstrip('/')}/*.tar"))
    except OSError as error:
        raise _unreadable(address, error) from None
    if not found:
        place = without_query(address).rstrip("/")
        raise UserError(f"no .tar files are listed at {place}; name them, such as {place}/part-{{0000..0009}}.tar")
    return sorted(files.unstrip_protocol(each) for each in found)


def _facts(address: str) -> Facts:
    """Of one file."""
    try:
        info = _patiently(lambda: _files_at(address).info(address))
    except OSError as error:
        raise _unreadable(address, error) from None
    if not info.get("size"):
        raise UserError(f"shard {without_query(address)} cannot be read: its server does not say how large it is")
    return Facts(info["size"], " ".join(str(info[tag]) for tag in TAGS if info.get(tag)))


def _unreadable(address: str, error: OSError) -> UserError:
    missing = isinstance(error, FileNotFoundError)
    what = "does not exist" if missing else f"cannot be read ({first_line(error)})"
    return UserError(f"shard {without_query(address)} {what}; check the address, the network and your rights")


def _patiently(request: Callable[[], Result]) -> Result:
    """Its result, after some tries. Raises ``OSError``, of whatever type a store's library has its errors."""
    for wait in (*WAITS, None):
        try:
            return request()
        except (UserError, PermissionError):
            raise
        except Exception as failure:  # each store's library has errors of its own
            cause = failure.__cause__
            error = (
                cause if isinstance(cause, Exception) else failure
            )  # fsspec calls whatever befalls an http address a missing file
            status = getattr(error, "status", None) or 0
            if isinstance(error, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
                raise FileNotFoundError(first_line(error)) from None
            if wait is None or 400 <= status < 500:
                raise ConnectionError(f"{type(error).__name__}: {QUERY.sub('', first_line(error))}") from None
            time.sleep(wait)
    raise AssertionError


def _files_at(address: str) -> Any:
    """fsspec's file system for an address."""
    return _files(address.partition(":")[0], os.getpid())


@lru_cache(maxsize=16)
def _files(scheme: str, process: int) -> Any:
    """One a process: connections do not survive a fork."""
    fsspec = require("fsspec", EXTRA)
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a package that is not installed ({first_line(error)}); run: pip install "
            f"'mae-transfer[{EXTRA}]' for https:// and s3://, else the package that is named"
        ) from None
    except ValueError:
        known = ", ".join(sorted({"https", "s3", "gs", "hf", "sftp"} & {*fsspec.available_protocols()}))
        raise UserError(f"{scheme}:// is not an address that fsspec reads; it reads {known} and others") from None


def name_of(address: str) -> str:
    """The file's name."""
    return PurePosixPath(urlsplit(address).path).name


def without_query(address: str) -> str:
    """An address without what is secret in one that is signed."""
    return address.partition("?")[0]


def _key(address: str) -> str:
    return hashlib.sha256(without_query(address).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    """A small JSON file; empty where it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
