"""What the values in label maps mean: which value is which class, which are ignored, and what looks like a mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mae_core.errors import UserError
from mae_core.texts import shortened

BYTE, WORD = 255, 65535
"""The usual value of ignored pixels in maps of 8 and of 16 bits."""
Names = Literal["unknown", "dataset", "written"]
"""Where the names of the classes come from: they are not named, the type of the data set fixes them, or the user has
written them down one by one."""


@dataclass(frozen=True)
class LabelCoding:
    """Which values of a label map are a class, in the order of the classes, and which are ignored.

    classes   the values of each class; most have one
    ignored   values without a class
    written   the user has said which values are ignored or a class, one by one: nothing is guessed about them
    reduced   the value 0 is void and the classes count from 1 (``reduce_zero_label``)
    """

    classes: tuple[tuple[int, ...], ...]
    ignored: frozenset[int]
    written: bool = False
    reduced: bool = False

    @classmethod
    def of(
        cls,
        num_classes: int,
        *,
        reduce_zero_label: bool = False,
        label_values: Sequence[int | Sequence[int]] | None = None,
        ignored_values: int | Sequence[int] | None = None,
    ) -> LabelCoding:
        """The coding that a configuration describes.

        label_values    the value of each class, in order; a list in place of a value joins several to one class. None:
                        0..num_classes-1, or 1..num_classes with ``reduce_zero_label``
        ignored_values  None: 255, or 65535 where 255 is a class; and 0 with ``reduce_zero_label``

        Raises ``UserError`` where they contradict each other.
        """
        if not 0 < num_classes <= WORD:
            raise UserError(f"num_classes is {num_classes}; give a number from 1 to {WORD}")
        if label_values is not None and reduce_zero_label:
            raise UserError(
                "label_values says which values are classes, so reduce_zero_label=True has no meaning; leave it out"
            )
        first = 1 if reduce_zero_label else 0
        given = range(first, first + num_classes) if label_values is None else label_values
        if isinstance(given, int):
            raise UserError(f"label_values is {given!r}; give a list, such as label_values=[0,1]")
        classes = tuple(_integers("label_values", entry) for entry in given)
        if len(classes) != num_classes:
            raise UserError(
                f"label_values holds {len(classes)} entries, and num_classes is {num_classes}; give a value for each "
                "class"
            )
        values = [value for entry in classes for value in entry]
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"label_values holds {twice[0]} twice; give each value one class")
        if ignored_values is not None:
            ignored = frozenset(_integers("ignored_values", ignored_values))
        else:
            ignored = frozenset({WORD if BYTE in values else BYTE})
        if both := ignored & set(values):
            raise UserError(f"the value {min(both)} is a class and in ignored_values; take it out of one of them")
        if reduce_zero_label:
            ignored |= {0}
        return cls(classes, ignored, label_values is not None or ignored_values is not None, reduce_zero_label)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def values(self) -> list[int]:
        """The value that each class is written as: the first of its values."""
        return [values[0] for values in self.classes]

    @property
    def ignore_index(self) -> int:
        """What stands for ignored pixels among the classes 0..num_classes-1: 255, or 65535 where that is a class."""
        return BYTE if self.num_classes <= BYTE else WORD

    @property
    def meaning(self) -> str:
        """Which values are allowed, for a message."""
        values = [value for entry in self.classes for value in entry]
        counted = [*range(values[0], values[0] + self.num_classes)] == values
        shown = f"{values[0]}..{values[-1]}" if counted else shortened(values)
        ignored = sorted(self.ignored, key=lambda value: (value != 0, value))
        tail = "".join(f", {value} = ignored" for value in ignored[:-1]) + f" and {ignored[-1]} = ignored"
        return f"{f'num_classes={self.num_classes}' if counted else 'label_values'} allows {shown}{tail}"

    @cached_property
    def _table(self) -> dict[int, int]:
        known = {value: index for index, values in enumerate(self.classes) for value in values}
        return {**known, **dict.fromkeys(self.ignored, self.ignore_index)}

    @cached_property
    def _lookup(self) -> np.ndarray:
        """The class of each value of 16 bits, -1 for those without."""
        table: np.ndarray = np.full(WORD + 1, -1, dtype=np.int32)
        for value, index in self._table.items():
            if 0 <= value <= WORD:
                table[value] = index
        return table

    def unknown(self, values: Iterable[int]) -> list[int]:
        """Those of ``values`` that are neither a class nor ignored."""
        return [value for value in values if value not in self._table]

    def encode(self, values: np.ndarray, path: Path | str) -> np.ndarray:
        """(H, W) integers as stored -> (H, W) classes, uint8, or uint16 where there are more than 255 of them; ignored
        pixels are ``ignore_index``. Raises ``UserError``, with the file, for a value that is neither."""
        if values.size and 0 <= values.min() and values.max() <= WORD:
            classes = self._lookup[values]
        else:
            found, places = np.unique(values, return_inverse=True)
            classes = np.array([self._table.get(value, -1) for value in found.tolist()], np.int32)[places]
            classes = classes.reshape(values.shape)
        if values.size and classes.min() < 0:
            raise UserError(self.refusal(path, np.unique(values[classes < 0]).tolist()))
        return classes.astype(np.uint8 if self.ignore_index == BYTE else np.uint16)

    def refusal(self, path: Path | str, wrong: Sequence[int]) -> str:
        """A sentence about a label map with values that are neither a class nor ignored."""
        remedy = f"correct the map, num_classes or {'label_values' if self.written else 'reduce_zero_label'}"
        if max(wrong) < 0:
            ignored = ",".join(map(str, [*sorted(wrong), *sorted(self.ignored - {0})]))
            remedy = f"set ignored_values=[{ignored}] if that is void"
        return f"label map {path} holds the value {shortened(wrong)}, but {self.meaning}; {remedy}"


def written_values(values: Sequence[int]) -> list[int]:
    """What the classes of a predicted label map are written as: ``values``, or 0, 1, ... where one of them does not fit
    into 16 bits."""
    return list(values) if 0 <= min(values) and max(values) <= WORD else list(range(len(values)))


def as_values(classes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """(H, W) classes -> the ``written_values`` of a label map, uint8 or, where one needs it, uint16."""
    written = written_values(values)
    return np.array(written, dtype=np.uint8 if max(written) <= BYTE else np.uint16)[classes]


def _integers(name: str, given: Any) -> tuple[int, ...]:
    entries = [given] if not isinstance(given, list | tuple) else given
    if not entries or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise UserError(f"{name} holds {given!r}; give integers, such as {name}=[0,255]")
    return tuple(entries)


def coding_mistake(values: Collection[int], coding: LabelCoding, *, names: Names = "unknown") -> str | None:
    """A sentence where the ``values`` that occur in a set of label maps show that they mean something else than
    ``coding`` says, else None.

    Kept though every value may be allowed: with the wrong coding each class would silently be trained as its neighbour,
    or not at all. Where the type of the data set names the classes, a rare last one may be absent: it takes all of the
    others to occur.
    """
    if coding.written or not values:
        return None
    return _zero_label(values, coding, names) or _grey_levels(values, coding)


def _grey_levels(values: Collection[int], coding: LabelCoding) -> str | None:
    """Maps made for the eye, whose classes are grey levels such as 0 and 255: hardly a value is a class."""
    present = sorted(values)
    strange = {BYTE, *coding.unknown(present)} & set(present)
    known = set(present) & set(coding.values)
    if len(present) < 2 or not strange or len(known) >= min(2, coding.num_classes):
        return None
    number = len(present)
    options = f"label_values=[{','.join(map(str, present))}] num_classes={number}"
    if coding.reduced:
        options += " reduce_zero_label=False"
    void = f"; if {BYTE} is void, set ignored_values={BYTE}" if strange == {BYTE} else ""
    many = f", and {coding.meaning}, which leaves {len(known) or 'no'} class{'' if len(known) == 1 else 'es'} to train"
    shown = shortened(present)
    return f"the values that occur are {shown}{many}; if each of them is a class, set {options}{void}"


def _zero_label(values: Collection[int], coding: LabelCoding, names: Names) -> str | None:
    """``reduce_zero_label`` the wrong way round."""
    num_classes, present = coding.num_classes, set(values) - (coding.ignored - {0})
    if not present:
        return None
    if not coding.reduced and max(present) == num_classes:
        return (
            f"the values run from {min(present)} to {num_classes}, one more than the {num_classes} classes: "
            "if 0 is void, as in ADE20K, set reduce_zero_label=True; if it is a class, set "
            f"num_classes={num_classes + 1}"
        )
    as_classes = max(present) == num_classes - 1 if names == "unknown" else present == set(range(num_classes))
    if coding.reduced and 0 in present and as_classes and names != "written":
        return (
            f"the values run from 0 to {num_classes - 1}, as many as there are classes: with reduce_zero_label=True, 0 "
            "would be ignored and the last class never occur; set reduce_zero_label=False, or num_classes="
            f"{num_classes - 1} if 0 is void, or name the classes in classes.txt if this is meant"
        )
    return None
