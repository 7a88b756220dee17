"""Which format the names in a file are of, and what each name is called here: the tables of ``formats``, read both
ways. Names only; the tensors behind them are in ``parts`` and ``writing``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from mae_core.errors import UserError
from mae_core.weights.formats import (
    BLOCK_EXTRAS,
    DECODER_PARTS,
    FORMATS,
    KEPT_APART,
    MAE_CORE_FULL,
    OWN_ONLY,
    OWN_TENSORS,
    TENSORS,
    Format,
    Layout,
)

INDEX = re.compile(r"(?<=[._])\d+(?=\.)")


def split_index(name: str) -> tuple[str, int | None]:
    """``blocks.3.norm1.weight`` -> (``blocks.{}.norm1.weight``, 3); no number: (name, None)."""
    found = INDEX.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}{{}}{name[found.end() :]}", int(found.group())


def leaves(part: str) -> tuple[str, ...]:
    """What follows the name of a part: nothing for a tensor, weight and bias for a layer."""
    return ("",) if part in TENSORS or part.endswith(BLOCK_EXTRAS) else (".weight", ".bias")


def below(name: str, rest: str) -> str:
    """What is called ``rest`` below ``name``; behind a name that ends in ``_`` without a dot."""
    return name + rest.removeprefix(".") if name.endswith("_") else f"{name}.{rest.removeprefix('.')}" if rest else name


def natural(name: str) -> list[str | int]:
    """Sorts ``blocks.10`` behind ``blocks.9``."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def is_decoder(name: str) -> bool:
    """Whether our name is of the decoder."""
    return name.startswith("decoder_") or name == "mask_token"


class Slot(NamedTuple):
    """Where a tensor of a file belongs: a copy of ours or, with a place, that third of query, key and value."""

    ours: str
    place: int | None = None


@dataclass(frozen=True)
class Reading:
    """One way to name tensors: a layout of a format behind a prefix."""

    format: Format
    layout: Layout
    prefix: str

    @cached_property
    def rows(self) -> Mapping[str, Slot]:
        """Pattern of a name in the file -> slot; ``{}`` stands for the number of a block."""
        layout, trunk = self.layout, below(f"{self.prefix}{self.layout.blocks}", "{}")
        parts = [(ours, self.prefix + name) for table in (layout.aliases, layout.top) for ours, name in table.items()]
        parts += [("head", layout.head)] if layout.head else []
        parts += [(f"blocks.{{}}.{ours}", f"{trunk}.{name}") for ours, name in layout.extras.items()]
        parts += layout.decoder.items()
        rows = {theirs + leaf: Slot(ours + leaf) for ours, theirs in parts for leaf in leaves(ours)}
        blocks = {"blocks": trunk, "decoder_blocks": f"{layout.decoder_blocks}.{{}}"}
        for mine, theirs in list(blocks.items())[: 1 + bool(layout.decoder)]:
            for ours, part in layout.block.items():
                named = [(None, part)] if isinstance(part, str) else enumerate(part)
                for place, name in named:
                    for leaf in leaves(ours):
                        rows[below(f"{theirs}.{name}", leaf)] = Slot(f"{mine}.{{}}.{ours}{leaf}", place)
        if isinstance(layout.block["attn.qkv"], str):
            rows |= {f"{trunk}.attn.{n}": Slot("blocks.{}.attn.qkv.bias", place) for n, place in KEPT_APART.items()}
        return rows

    @cached_property
    def written(self) -> Mapping[str, tuple[str, ...]]:
        """Our pattern -> its name here, or the names of its thirds in their order. No aliases."""
        second = {self.prefix + part + leaf for part in self.layout.aliases.values() for leaf in leaves(part)}
        found: dict[str, tuple[str, ...]] = {}
        for theirs, slot in self.rows.items():
            apart = theirs.endswith(tuple(KEPT_APART))
            fused = slot.ours == "blocks.{}.attn.qkv.bias" and isinstance(self.layout.block["attn.qkv"], str)
            if theirs not in second and not (fused and apart != self.format.separate_bias):
                found[slot.ours] = (*found.get(slot.ours, ()), theirs)
        return found

    def slot(self, name: str) -> Slot | None:
        """Where ``name`` belongs; None where this reading does not know it."""
        if self.layout is MAE_CORE_FULL and name.startswith(OWN_TENSORS):
            return Slot(OWN_ONLY + name)
        pattern, index = split_index(name)
        slot = self.rows.get(pattern)
        return slot if slot is None or index is None else Slot(slot.ours.format(index), slot.place)

    def names(self, ours: str) -> list[str]:
        """What one of our tensors is called here; our name where it has none."""
        if ours.startswith(OWN_ONLY):
            return [ours.removeprefix(OWN_ONLY)]
        pattern, index = split_index(ours)
        return [name.format(index) for name in self.written.get(pattern, ())] or [ours]

    def dropped(self, name: str) -> str | None:
        """Why a conversion leaves ``name`` out; None where it may not."""
        return next((why for pattern, why in self.format.drops.items() if fnmatch.fnmatchcase(name, pattern)), None)

    def required(self, depth: int) -> set[str]:
        """Our names of what every encoder read so must have, for ``depth`` blocks."""
        parts = [part for part in self.layout.top if part not in ("norm", "fc_norm")]
        parts += [f"blocks.{index}.{part}" for index in range(depth) for part in self.layout.block]
        return {part + leaf for part in parts for leaf in leaves(part)}

    def without_decoder(self) -> str:
        """The options of ``mae convert`` that leave the decoder of such a file out."""
        patterns = (
            f"{name.split('.')[0]}.*" if "." in name else "decoder_*" if name.startswith("decoder_") else name
            for name in self.layout.decoder.values()
        )
        return " ".join(f"--drop '{pattern}'" for pattern in dict.fromkeys(patterns))


@lru_cache
def readings(source: str | None = None) -> tuple[Reading, ...]:
    """Every way to read a file, or every way to read one of the format ``source``."""
    formats = FORMATS.values() if source is None else [format_of(source)]
    return tuple(
        Reading(row, layout, prefix) for row in formats for layout in row.layouts for prefix in layout.prefixes
    )


def format_of(name: str) -> Format:
    """A row of the table. Raises ``UserError`` for an unknown name."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass
class Fit:
    """How well a reading explains the names of a file."""

    reading: Reading
    known: dict[str, Slot]
    dropped: dict[str, str]
    unknown: list[str]
    missing: list[str]

    @property
    def cost(self) -> tuple[int, int]:
        """Fewer is better: tensors that do not fit, then tensors left out."""
        return len(self.unknown) + len(self.missing), len(self.dropped)


def fit_names(names: Sequence[str], reading: Reading) -> Fit:
    """Match names to a reading."""
    fit = Fit(reading, {}, {}, [], [])
    for name in names:
        if (slot := reading.slot(name)) is not None:
            fit.known[name] = slot
        elif (why := reading.dropped(name)) is not None:
            fit.dropped[name] = why
        else:
            fit.unknown.append(name)
    found = {slot.ours for slot in fit.known.values()}
    depth = len(
        {name.split(".")[1] for name in found if name.startswith("blocks.") and not name.endswith(BLOCK_EXTRAS)}
    )
    fit.missing = sorted(reading.required(max(depth, 1)) - found, key=natural)
    signs = reading.layout.signs
    if signs and not any(name.endswith(signs) for name in found):
        fit.missing.append(f"blocks.0.{signs[0]}")
    return fit


def recognise(names: Sequence[str], source: str | None = None) -> tuple[Fit, list[str]]:
    """The reading that fits ``names``, and the other formats that name them alike.

    ``source`` limits the search to one format. Raises ``UserError`` where no format fits (the nearest and the first
    names that differ are named) and where two fit that disagree.
    """
    fits = [fit_names(names, reading) for reading in readings(source)]
    best = min(fits, key=lambda fit: fit.cost)  # min keeps the first of equals: the order of the table decides
    equal = [fit for fit in fits if fit.cost == best.cost]
    rivals = [fit for fit in equal if fit.known != best.known]
    if best.cost[0] == 0 and rivals:
        told = ", ".join(sorted({fit.reading.format.name for fit in (best, *rivals)}))
        raise UserError(
            f"the names fit several formats that read them differently ({told}); say which with mae convert --from"
        )
    trunk = {slot.ours for slot in best.known.values()} - set(DECODER_PARTS)
    near = len(trunk) >= 12 and len(best.missing) <= len(trunk) and len(best.unknown) <= len(best.known)
    if best.cost[0] == 0 or near:
        return best, sorted({fit.reading.format.name for fit in equal} - {best.reading.format.name})
    asked = "no MAE encoder in it"
    if source is not None:
        right = min((fit_names(names, reading) for reading in readings()), key=lambda fit: fit.cost)
        asked = f"no {source} checkpoint"
        asked += f", its names are those of {right.reading.format.name}" if right.cost[0] == 0 else ""
    lacking = f"; missing: {', '.join(best.missing[:3])}" if best.missing else ""
    raise UserError(
        f"{asked}: the nearest format, {best.reading.format.name}, knows {len(best.known)} of the "
        f"{len(names)} names; "
        f"unknown: {', '.join((best.unknown or list(names))[:4]) or 'none'}{lacking}"
    )
