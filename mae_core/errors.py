"""Errors for mistakes of the user: one sentence, and how a command reports it."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""After SIGTERM and SIGUSR1: not finished, saved, to be started again (``EX_TEMPFAIL`` of sysexits.h)."""


class UserError(ValueError):
    """A mistake of the user's: the message says what was asked, what was found and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the name of its class where the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def naming(path: object) -> Iterator[None]:
    """A ``UserError`` inside begins with the file that it is about, where it does not name it already."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Around the code of others, which raises what it likes: it becomes a ``UserError`` that begins with ``what``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from None


def refusal_note(check: Callable[[], object]) -> str:
    """A line with what ``check`` refuses, for a dry run that goes on all the same; empty where it refuses nothing."""
    try:
        check()
    except UserError as error:
        return f"note: {error}"
    return ""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around the body of a command: a ``UserError``, or memory that does not suffice, becomes ``error: ...`` on stderr
    and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        told = str(error)
    except (MemoryError, RuntimeError) as error:  # torch raises no MemoryError for that of the CPU
        wanted = re.search(r"allocate (\d+) bytes", str(error))
        if not isinstance(error, MemoryError) and "t allocate memory" not in str(error):
            raise
        size = f", {int(wanted[1]) / 2**30:.0f} GiB for one tensor" if wanted else ""
        told = f"out of memory{size}; use smaller images, fewer of them at once, or a smaller model"
    else:
        return
    print(f"error: {told}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR) from None


def why_not_loaded(error: Exception) -> str:
    """Why a torch file was refused, in a few words: torch's own message is a page on how to load it unprotected."""
    if isinstance(error, pickle.UnpicklingError):
        asked = what_it_asks_for(error)
        return f"holds more than tensors and plain values ({asked})" if asked else "is damaged, or no torch file"
    return first_line(error)[:200]


def what_it_asks_for(error: Exception) -> str | None:
    """The name in a torch file that its reader refused to import, as in "GLOBAL os.system"; None where it was another
    fault."""
    asked = re.search(r"(?:GLOBAL|attribute) (\S+)", str(error))
    return asked[0] if asked else None
