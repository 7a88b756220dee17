"""``--resume`` and ``--resume auto``, which every command that trains takes, whatever reads its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from mae_core.errors import UserError

Resume = bool | Literal["auto"]
"""False starts a run, True continues one, "auto" continues where there is a checkpoint and else starts."""
AUTO = "auto"
HELP = "Continue the run in the output folder from its last checkpoint; --resume auto starts it where there is none."
_MEANINGS: dict[str, Resume] = {"no": False, "yes": True, AUTO: "auto"}


class UnknownResume(UserError, argparse.ArgumentTypeError):
    """A value of ``--resume`` that means nothing; argparse prints its text as it is."""


def one_word(arguments: Sequence[str]) -> list[str]:
    """A command line in which ``--resume`` has its value in the same word: what follows it is an option's value only
    where it is ``auto``."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            return [*words, word, *rest]
        if word == AUTO and words and words[-1] == "--resume=yes":
            words[-1] = f"--resume={AUTO}"
        else:
            words.append("--resume=yes" if word == "--resume" else word)
    return words


def meaning(value: str) -> Resume:
    """What the value of ``--resume`` asks for. Raises ``UnknownResume`` for another than auto."""
    if value not in _MEANINGS:
        raise UnknownResume(f"--resume {value} is not known; write --resume, or --resume auto")
    return _MEANINGS[value]
