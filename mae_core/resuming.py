"""``--resume`` and ``--resume auto``, which every command that trains takes, whatever reads its command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Resume = bool | Literal["auto"]
"""False starts a run, True continues one, "auto" continues where there is a checkpoint and else starts."""
AUTO = "auto"
HELP = "Continue the run in the output folder from its last checkpoint; --resume auto starts it where there is none."
_MEANINGS: dict[str, Resume] = {"no": False, "yes": True, AUTO: "auto"}


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
    """What the value of ``--resume`` asks for. Raises ``ValueError`` for another than auto."""
    if value not in _MEANINGS:
        raise ValueError(f"--resume {value} is not known; write --resume, or --resume auto")
    return _MEANINGS[value]
