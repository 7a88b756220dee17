"""Tar shards at an address (https, s3, and what else fsspec reads): kept on this machine up to a limit, and those
beyond it read by parts, an image a request."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from http import HTTPStatus
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from mae_core.atomic import atomic_path, checksum, read_json, said_plainly, write_json
from mae_core.counting import Counter
from mae_core.data.reading import ShardCache
from mae_core.data.shards import Contents, Entry, LocalShard, Shard, contents_of, require
from mae_core.errors import UserError, first_line

Result = TypeVar("Result")

EXTRA = "remote"
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")
"""How an address begins; where it came as a path, one slash is left of two."""
QUERY = re.compile(r"\?[^\s'\"]+")
WAITS = (1.0, 5.0, 20.0)
"""Seconds before each new try where a request fails."""
REQUESTS = 16
"""Sizes asked for at once."""
LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals that may end by themselves."""
MARKER, USED = "kept.json", ".used-"
BLOCK, PIECE = 4 << 20, 32 << 20
"""Bytes a request, of what is passed over and of what is kept."""
WRITABLE = "free disk space, or keep shards elsewhere with data.cache=FOLDER, or XDG_CACHE_HOME=FOLDER"
TAGS = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "updated", "blob_id")
"""Names under which stores say that a file is another than it was."""


def address_of(place: Path | str) -> str | None:
    """``https://host/x``, also of ``https:/host/x``, as a path has it; None for what is on this machine."""
    found = SCHEME.match(str(place))
    if found is None:
        return None
    rest = str(place)[found.end() :]
    return f"{found[1].lower()}://{rest if isinstance(place, Path) else rest.removeprefix('/')}"


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
        """Says that the copy is whole."""
        return self.folder / MARKER

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
        """``part``, from its address. Raises ``OSError`` where that fails in spite of some patience, and ``UserError``
        where the server cannot send a part."""
        found = self._asked(offset, size) if size else b""
        if len(found) == size:
            return found
        if len(found) == self.size:
            raise UserError(
                f"shard {self} is not kept, and its server sends no parts of files; raise data.cache_gb so that all "
                "shards can be kept"
            )
        raise OSError(f"{len(found)} bytes came where {size} were asked for")

    def _asked(self, offset: int, size: int) -> bytes:
        """What the server sends when it is asked for a part: that, or all."""
        found: bytes = _patiently(lambda: _files_at(self.address).cat_file(self.address, offset, offset + size))
        return found

    def contents(self) -> Contents:
        """See ``Shard``; written down, because the pass takes much of the file."""
        known = self._known_contents()
        if known is not None:
            return known
        with said_plainly(self.folder, WRITABLE), nullcontext() if self.kept else alone(self.folder.parent):
            found = self._known_contents()  # another process passed over it meanwhile
            if found is None:
                found = contents_of(self)
                write_json(self.folder / "contents.json", found._asdict())
            return found

    def _known_contents(self) -> Contents | None:
        known = read_json(self.folder / "contents.json") or {}
        if not {*Contents._fields} <= known.keys():
            return None
        return Contents([Entry(*entry) for entry in known["entries"]], known["passed_over"], known["damage"])

    def is_whole(self) -> bool:
        """Whether the copy is there and undamaged."""
        known = read_json(self.marker) or {}
        if "checksum" not in known or not self.copy.is_file() or checksum(self.copy) != known["checksum"]:
            return False
        with suppress(OSError):  # another user's
            os.utime(self.marker)
        return True

    def remove(self) -> None:
        """Remove the copy, and say so where it was damaged."""
        if self.marker.is_file():
            print(f"the copy {self.copy} is damaged and fetched again", flush=True)
        self.marker.unlink(missing_ok=True)
        self.copy.unlink(missing_ok=True)

    def fetch(self, report: Callable[[int], None]) -> None:
        """Make the copy; ``report(bytes)`` as it grows. Raises ``UserError`` where the shard cannot be read."""
        with atomic_path(self.copy) as temporary:
            with temporary.open("wb") as file:
                while (start := file.tell()) < self.size:
                    try:
                        piece = self._asked(start, min(PIECE, self.size - start))
                    except OSError as error:
                        raise _unreadable(self.address, error) from None
                    file.write(piece[start:] if len(piece) == self.size else piece)
                    report(file.tell())
            if temporary.stat().st_size != self.size:
                raise _unreadable(self.address, OSError("its server sent more than the file"))
            found = checksum(temporary)
        write_json(self.marker, {"checksum": found, "address": str(self)})

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
    plain = [*map(without_query, addresses)]
    keys = plain if len({*plain}) == len(plain) else addresses  # a signature changes, what names a file does not
    shards = [
        RemoteShard(each, known, root / hashlib.sha256(repr((key, *known)).encode()).hexdigest()[:16])
        for each, key, known in zip(addresses, keys, facts, strict=True)
    ]
    if cache.limit:
        with said_plainly(root, WRITABLE):
            _in_use.append(used_by_this_process(root, shards))
    progress = Counter(f"shards of {plain[0].rpartition('/')[0]} in {root}, MiB", seconds_between=10)
    total, before = (sum(shard.size for shard in shards) >> 20) + 1, 0
    found: list[RemoteShard] = []
    for shard in shards:

        def report(done: int, before: int = before) -> None:
            progress((before + done) >> 20, total)

        found.append(replace(shard, kept=_keep(shard, shards, cache.limit, report)))
        before += shard.size
        report(0, before)
    if left := [shard for shard in found if not shard.kept]:
        print(
            f"{len(left)} of {len(found)} shards are not kept, for want of room within data.cache_gb: they are passed "
            "over once, and each image is a request",
            flush=True,
        )
    return [*found]


def _keep(shard: RemoteShard, wanted: Sequence[RemoteShard], limit: int, report: Callable[[int], None]) -> bool:
    """Fetch ``shard`` if it is not there and there is room, one process at a time, so that the ranks of a machine fetch
    each once -> whether it is there."""
    if shard.size > limit:
        return False
    if shard.is_whole():
        return True
    with said_plainly(shard.folder, WRITABLE), alone(shard.folder.parent):
        if shard.is_whole():  # another process fetched it meanwhile
            return True
        shard.remove()
        if not _make_room(shard, wanted, limit):
            return False
        print(f"fetching {shard} to {shard.folder}, {shard.size / 1e6:.1f} MB", flush=True)
        shard.fetch(report)
        return True


def _make_room(shard: RemoteShard, wanted: Sequence[RemoteShard], limit: int) -> bool:
    """Whether ``shard`` fits beside what is kept, after shards are removed that neither this run nor another uses,
    those used longest ago first."""
    root = shard.folder.parent
    busy = {each.folder.name for each in wanted} | used_by_others(root)
    used, others = 0, []
    for file in root.glob("*/*.tar"):
        size, finished = file.stat().st_size, file.name[0] != "."  # or left by a process that was killed
        used += size
        if file.parent.name not in busy or not finished:
            marker = file.parent / MARKER
            others.append(((marker if marker.is_file() and finished else file).stat().st_mtime, size, file))
    for _, size, file in sorted(others):
        if used + shard.size <= limit:
            break
        if file.name[0] != ".":
            (file.parent / MARKER).unlink(missing_ok=True)
        file.unlink()
        used -= size
    return used + shard.size <= limit


_in_use: list[IO[str]] = []
"""Open files that say which shards this process uses: they are locked for as long as it lives."""


def used_by_this_process(root: Path, shards: Sequence[RemoteShard]) -> IO[str]:
    """A file that names the folders of ``shards``, locked until it is closed."""
    root.mkdir(parents=True, exist_ok=True)
    with alone(root):  # or another process takes it for a dead one's before it is locked
        descriptor, _ = tempfile.mkstemp(prefix=USED, dir=root)
        file = os.fdopen(descriptor, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("\n".join(shard.folder.name for shard in shards))
        file.flush()
    return file


def used_by_others(root: Path) -> set[str]:
    """Names of the folders that a living process uses; what dead ones left is removed."""
    found: set[str] = set()
    for path in root.glob(f"{USED}*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found |= {*file.read().split()}
            else:
                path.unlink(missing_ok=True)
    return found


@contextmanager
def alone(folder: Path) -> Iterator[None]:
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
            cause = failure.__cause__  # fsspec calls whatever befalls an http address a missing file
            error = cause if isinstance(cause, Exception) else failure
            status = getattr(error, "status", None) or 0
            said = QUERY.sub("", first_line(error))
            if isinstance(error, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
                raise FileNotFoundError(said) from None
            if wait is None or (400 <= status < 500 and status not in LATER):
                raise ConnectionError(f"{type(error).__name__}: {said}") from None
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
