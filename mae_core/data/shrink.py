"""``mae shrink``: a smaller copy of a set of images, for slow disks and large photos, checked before it has its name.

An image whose shorter side is no longer than asked for is copied byte for byte. Of the others, 8-bit grey and RGB stay
JPEG where they were, and are PNG otherwise; all other depths and numbers of channels are .npy, or a TIFF that marks
missing data where there is any. Nothing is rounded to fewer bits than the source has.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mae_core.atomic import atomic_folder, fsync_path, said_plainly, write_json
from mae_core.data.decoding import Unreadable, UnreadableImage, decode_bytes, to_tensor
from mae_core.data.images import ImageSource, in_threads, passed_over_in
from mae_core.data.reading import Reading
from mae_core.data.sources import damaged_parts
from mae_core.errors import UserError

MANIFEST = ".shrunk.json"
"""In the copy: size and CRC-32 of every file, and what was passed over. A dot file, so that no command takes it."""
SHARD_BYTES = 1 << 29
DEEP = 2**16 - 1
_JPEGS = (".jpg", ".jpeg", ".jpe", ".jfif")
_NO_DATA_TAG = 42113  # GDAL_NODATA


class Copied(NamedTuple):
    """A file of the copy: its bytes, its ending, and whether it was resized."""

    content: bytes
    suffix: str
    resized: bool


class Shrunk(NamedTuple):
    """What a copy holds and what it lacks."""

    images: int
    resized: int
    bytes_before: int
    bytes_after: int
    passed_over: list[Unreadable]

    def lines(self, out: Path) -> list[str]:
        """For the screen."""
        rate = self.bytes_after / max(self.bytes_before, 1)
        lines = [
            f"wrote {out}: {self.images} images, {self.resized} of them resized; "
            f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB ({rate:.0%}); checksums agree"
        ]
        lines += [f"passed over {path} ({reason})" for path, reason in self.passed_over[:10]]
        if len(self.passed_over) > 10:
            lines.append(f"passed over {len(self.passed_over) - 10} more; {out / MANIFEST} names all")
        return lines


def shrink(
    source: ImageSource,
    out: Path,
    *,
    reading: Reading,
    shortest: int,
    shards: bool = False,
    quality: int = 95,
    on_progress: Callable[[int, int], None] | None = None,
) -> Shrunk:
    """Copy ``source`` to the new folder ``out``, shorter sides at most ``shortest`` pixels, with ``shards`` as tar.

    The folder appears once all files are on the disk and their checksums agree. Raises ``UserError`` where ``out``
    exists, no image can be read, or the disk is full.
    """
    if out.exists():
        raise UserError(f"{out} exists, and nothing is written over; name another folder")
    names = list(source.names)
    before = after = resized = 0
    passed_over = damaged_parts(source)
    files: dict[str, dict[str, int | str]] = {}
    taken: set[str] = set()

    def one(index: int) -> tuple[int, Copied] | Unreadable:
        try:
            content = source.content(index)
            suffix = PurePosixPath(names[index]).suffix.lower()
            return len(content), _copy(content, names[index], suffix, reading, shortest, quality)
        except UnreadableImage as error:
            return Unreadable(names[index], error.unreadable.reason)

    with said_plainly(out.parent, "free disk space, or name another folder"), atomic_folder(out) as folder:
        with (_shard_writer if shards else _file_writer)(folder) as write:
            for index, found in enumerate(in_threads(one, len(source), chunk=64)):
                if isinstance(found, Unreadable):
                    passed_over.append(found)
                else:
                    size, copied = found
                    name = _new_name(names[index], copied.suffix, taken)
                    write(name, copied.content)
                    files[name] = {"bytes": len(copied.content), "crc32": f"{zlib.crc32(copied.content):08x}"}
                    before, after, resized = before + size, after + len(copied.content), resized + copied.resized
                if on_progress is not None:
                    on_progress(index + 1, len(source))
        if not files:
            raise UserError(f"none of {len(names)} images can be read; the first: {': '.join(passed_over[0])}")
        os.sync()
        _check(folder, files, shards)
        others = dict(passed_over_in(source))
        record = {"shortest": shortest, "images": len(files), "unreadable": dict(passed_over), "no_images": others}
        write_json(folder / MANIFEST, {**record, "files": files})
    return Shrunk(len(files), resized, before, after, passed_over)


def _copy(content: bytes, name: str, suffix: str, reading: Reading, shortest: int, quality: int) -> Copied:
    """One image, smaller where it is larger than asked for. Raises ``UnreadableImage``, of a copy too that does not
    read as what was written."""
    pixels = to_tensor(decode_bytes(content, name, reading))
    suffix = suffix or _suffix_of(content)
    if min(pixels.shape[1:]) <= shortest:
        return Copied(content, suffix, False)
    smaller = _resized(pixels, shortest)
    deep = pixels.is_floating_point() and _is_16_bits(pixels)
    if deep:
        smaller = _in_16_bits(smaller)
    encoded, ending, exact = _encoded(smaller, suffix, quality, deep=deep)
    again = to_tensor(decode_bytes(encoded, f"the copy of {name}", reading._replace(channels=len(smaller))))
    same = again.shape == smaller.shape and (not exact or torch.equal(again.nan_to_num(), smaller.nan_to_num()))
    if not same:
        raise UnreadableImage(name, "its copy did not read as what was written; please report this file")
    return Copied(encoded, ending, True)


def _resized(pixels: Tensor, shortest: int) -> Tensor:
    """(C, H, W) with ``shortest`` as its shorter side (bicubic, antialiased); floats stay within their range, and a
    pixel has data where most of what it came from has."""
    height, width = pixels.shape[1:]
    scale = shortest / min(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if not pixels.is_floating_point():
        return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    missing = pixels.isnan()
    filled = pixels.nan_to_num(nan=float(pixels[~missing].mean()) if not missing.all() else 0.0)
    low, high = filled.aminmax()
    smaller = interpolate(filled[None], size, mode="bicubic", antialias=True)[0].clamp(low, high)
    if not missing.any():
        return smaller
    share = interpolate(missing.float()[None], size, mode="bilinear", antialias=True)[0]
    return smaller.masked_fill(share > 0.5, float("nan"))


def _is_16_bits(pixels: Tensor) -> bool:
    """Whether floats are shares of the largest 16-bit number: read from such integers."""
    inside = bool(((pixels >= 0) & (pixels <= 1)).all())
    return inside and torch.equal(_in_16_bits(pixels), pixels)


def _in_16_bits(pixels: Tensor) -> Tensor:
    whole = (pixels.double() * DEEP).round()
    return (whole / DEEP).float()


def _encoded(smaller: Tensor, suffix: str, quality: int, *, deep: bool) -> tuple[bytes, str, bool]:
    """(bytes, ending, whether they are exact) of an image; with ``deep`` its floats are shares of 16-bit numbers."""
    file = BytesIO()
    if smaller.dtype == torch.uint8 and len(smaller) in (1, 3):
        picture = Image.fromarray(smaller[0].numpy() if len(smaller) == 1 else smaller.permute(1, 2, 0).numpy())
        lossy = suffix in _JPEGS
        picture.save(file, "JPEG", quality=quality) if lossy else picture.save(file, "PNG")
        return file.getvalue(), suffix if lossy else ".png", not lossy
    if smaller.is_floating_point() and bool(smaller.isnan().any()):
        import tifffile

        planes: dict[str, Any] = {} if len(smaller) == 1 else {"planarconfig": "separate"}
        array = smaller[0].numpy() if len(smaller) == 1 else smaller.numpy()
        tags = [(_NO_DATA_TAG, "s", 0, "nan", True)]
        tifffile.imwrite(file, array, photometric="minisblack", metadata=None, extratags=tags, **planes)
        return file.getvalue(), ".tif", True
    array = smaller.permute(1, 2, 0).contiguous().numpy()
    if deep:
        array = (array.astype(np.float64) * DEEP).round().astype(np.uint16)
    np.save(file, array[:, :, 0] if array.shape[2] == 1 else array)
    return file.getvalue(), ".npy", True


def _suffix_of(content: bytes) -> str:
    """The ending of an image without a name, such as a row of a table."""
    try:
        with Image.open(BytesIO(content)) as image:
            usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
            return usual.get(image.format or "", f".{image.format}".lower())
    except Exception:
        return ".npy" if content.startswith(b"\x93NUMPY") else ".tif"


def _new_name(name: str, suffix: str, taken: set[str]) -> str:
    """A path below the copy: no root, no way up, no dot in what names it (webdataset takes all after the first dot for
    an ending), and not one of ``taken``, to which it is added without regard to case: disks exist that have none."""
    parts = [part.replace(".", "_").lstrip("_") or "_" for part in PurePosixPath(name).parts if part not in ("/", "..")]
    stem = PurePosixPath(name).stem.replace(".", "_").lstrip("_") or "_"
    base = "/".join([*parts[:-1], stem])
    number, found = 1, f"{base}{suffix}"
    while found.casefold() in taken:
        number += 1
        found = f"{base}-{number}{suffix}"
    taken.add(found.casefold())
    return found


Write = Callable[[str, bytes], None]


@contextmanager
def _file_writer(folder: Path) -> Iterator[Write]:
    def write(name: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    yield write


@contextmanager
def _shard_writer(folder: Path) -> Iterator[Write]:
    """Tar files of about ``SHARD_BYTES``, in the layout of webdataset."""
    open_shards: list[tarfile.TarFile] = []
    count = 0

    def write(name: str, content: bytes) -> None:
        nonlocal count
        if open_shards and open_shards[0].offset + len(content) > SHARD_BYTES:
            open_shards.pop().close()
        if not open_shards:
            open_shards.append(tarfile.open(folder / f"shard-{count:05d}.tar", "w"))
            count += 1
        member = tarfile.TarInfo(name)
        member.size = len(content)
        open_shards[0].addfile(member, BytesIO(content))

    try:
        yield write
    finally:
        for shard in open_shards:
            shard.close()


def _check(folder: Path, files: dict[str, dict[str, int | str]], shards: bool) -> None:
    """Read everything back from the disk. Raises ``UserError`` where a checksum is another."""

    def compare(name: str, content: bytes) -> None:
        if f"{zlib.crc32(content):08x}" != files[name]["crc32"]:
            raise UserError(f"{name} reads back from the disk with another checksum; nothing was kept, check the disk")

    seen = 0
    for shard in sorted(folder.glob("*.tar")) if shards else ():
        fsync_path(shard)
        with tarfile.open(shard) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                compare(member.name, content.read())
                seen += 1
    for name in () if shards else files:
        compare(name, (folder / name).read_bytes())
        seen += 1
    if seen != len(files):
        raise UserError(f"{seen} of {len(files)} files read back from the disk; nothing was kept, check the disk")
