"""Text files that users write, and the file names in them: encodings, and the ways one name is spelled."""

from __future__ import annotations

import codecs
import difflib
import os
import shlex
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from mae_core.errors import UserError

_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks, longer ones first: UTF-32's starts as UTF-16's does."""


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark; line ends as they are.

    Raises ``UserError`` for a file that cannot be read or is in another encoding, with the command that converts it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    return decode_text(content, path)


def decode_text(content: bytes, path: Path) -> str:
    """``read_text`` of bytes that were read from ``path``."""
    wide = next((name for mark, name in _WIDE.items() if content.startswith(mark)), None)
    if wide is None and b"\0" in content[:1000]:
        halves = {"UTF-16BE": content[0:1000:2], "UTF-16LE": content[1:1000:2]}
        wide = next((name for name, half in halves.items() if 2 * half.count(0) > len(half)), None)
        if wide is None:
            raise UserError(f"{path} is not a text file; give one in UTF-8")
    try:
        if wide is None:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        found = f"line {line} holds the byte 0x{byte:02x}, {chr(byte)!r} in Latin-1"
        raise UserError(f"{path} is not in UTF-8 ({found}); {_conversion('LATIN1', path)}") from None
    raise UserError(f"{path} is in {wide}, not in UTF-8; {_conversion(wide, path)}")


def _conversion(encoding: str, path: Path) -> str:
    return f"save it as UTF-8, in an editor or by: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW"


def read_lines(path: Path) -> list[str]:
    """The lines of ``read_text`` without their ends."""
    return read_text(path).replace("\r\n", "\n").split("\n")


def find_named(folder: Path, name: str) -> Path | None:
    """The file or folder that a text calls ``name``, relative to ``folder``; None where there is none.

    Where no such path exists, one is taken that differs from it only in backslashes for slashes, in the Unicode form
    of its letters (macOS decomposes them) or in upper and lower case, if there is exactly one.
    """
    exact = folder / name
    if _exists(exact):
        return exact
    here = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        if not _exists(here / part):
            alike = _spellings(here).get(_spelled(part), ())
            if len(alike) != 1:
                return None
            part = alike[0]
        here = here / part
    return here


def missing_hint(folder: Path, name: str) -> str:
    """Why ``find_named`` may have found nothing, as the end of a sentence that begins with the missing path."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    parent = find_named(folder, str(wanted.parent))
    if parent is None:
        return f", nor does its folder {folder / wanted.parent}"
    present = _spellings(parent)
    alike = present.get(_spelled(wanted.name), ())
    if len(alike) > 1:
        return f"; {' and '.join(sorted(alike))} do, which differ from it in upper and lower case or Unicode form"
    stem = _spelled(wanted.stem)
    near = [found for key, names in present.items() if PurePosixPath(key).stem == stem for found in names]
    if not near and present:
        near = [present[key][0] for key in difflib.get_close_matches(_spelled(wanted.name), present, n=1, cutoff=0.8)]
    return f"; there is {near[0]}" if near else ""


def shortened(names: Sequence[object], most: int = 5) -> str:
    """The first ``most`` of ``names``, and dots where there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def same_spelling(one: str, other: str) -> bool:
    """Whether two names look the same: they differ at most in the Unicode form of their letters."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _spelled(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a file system allows, or with a NUL
        return False


def _spellings(folder: Path) -> dict[str, tuple[str, ...]]:
    """What is in a folder, by ``_spelled``."""
    try:
        return _spellings_at(str(folder), os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=64)
def _spellings_at(folder: str, changed: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in os.listdir(folder):
        found[_spelled(name)] = (*found.get(_spelled(name), ()), name)
    return found
