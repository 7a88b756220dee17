"""Which format the names in a file are of, and what each name is called here: the tables of ``formats``, read both
ways. Names only; the tensors behind them are in ``parts``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

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

INDEX = re.compile(r"\.(\d+)\.")
OUTER_PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "ema.", "student.", "encoder.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, trainers, averaged weights."""


def split_index(name: str) -> tuple[str, int | None]:
    """``blocks.3.norm1.weight`` -> (``blocks.{}.norm1.weight``, 3); no number: (name, None)."""
    found = INDEX.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}.{{}}.{name[found.end() :]}", int(found.group(1))


def leaves(part: str) -> tuple[str, ...]:
    """What follows the name of a part: nothing for a tensor, weight and bias for a layer."""
    alone = part in TENSORS or any(part.endswith(extra) for extra in BLOCK_EXTRAS)
    return ("",) if alone else (".weight", ".bias")


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a file belongs: our name, and which third of it where query, key and value are apart."""

    ours: str
    place: int | None = None


@dataclass(frozen=True)
class Reading:
    """One way to read names: a layout of a format behind a prefix."""

    format: Format
    layout: Layout
    prefix: str

    @cached_property
    def rows(self) -> Mapping[str, Slot]:
        """Pattern of a name in the file -> slot; ``{}`` stands for the number of a block."""
        return dict(_rows(self.layout, self.prefix))

    def slot(self, name: str) -> Slot | None:
        """Where ``name`` belongs; None where this reading does not know it."""
        if self.layout is MAE_CORE_FULL and name.startswith(OWN_TENSORS):
            return Slot(OWN_ONLY + name)
        pattern, index = split_index(name)
        slot = self.rows.get(pattern)
        if slot is None:
            return None
        return slot if index is None else Slot(slot.ours.format(index), slot.place)

    def dropped(self, name: str) -> str | None:
        """Why a conversion leaves ``name`` out; None where it may not."""
        return next((why for pattern, why in self.format.drops.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _rows(layout: Layout, prefix: str) -> Iterator[tuple[str, Slot]]:
    def row(ours: str, theirs: str | tuple[str, ...]) -> Iterator[tuple[str, Slot]]:
        for leaf in leaves(ours):
            if isinstance(theirs, tuple):
                yield from ((f"{name}{leaf}", Slot(ours + leaf, place)) for place, name in enumerate(theirs))
            else:
                yield f"{theirs}{leaf}", Slot(ours + leaf)

    for top in (layout.aliases, layout.top):
        for ours, name in top.items():
            yield from row(ours, prefix + name)
    if layout.head is not None:
        yield from row("head", layout.head)
    trunk = f"{prefix}{layout.blocks}.{{}}"
    for ours, name in layout.extras.items():
        yield from row(f"blocks.{{}}.{ours}", f"{trunk}.{name}")
    for ours, name in layout.decoder.items():
        yield from row(ours, name)
    places = [("blocks.{}", trunk)]
    if layout.decoder:
        places.append(("decoder_blocks.{}", f"{layout.decoder_blocks}.{{}}"))
    for mine, theirs in places:
        for ours, part in layout.block.items():
            named = tuple(f"{theirs}.{name}" for name in part) if isinstance(part, tuple) else f"{theirs}.{part}"
            yield from row(f"{mine}.{ours}", named)
    if isinstance(layout.block["attn.qkv"], str):
        for name, place in KEPT_APART.items():
            yield f"{trunk}.attn.{name}", Slot("blocks.{}.attn.qkv.bias", place)


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


def required(reading: Reading, depth: int) -> set[str]:
    """Our names of what every encoder read so must have, for ``depth`` blocks."""
    layout = reading.layout
    parts = [part for part in layout.top if part not in ("norm", "fc_norm")]
    parts += [f"blocks.{index}.{part}" for index in range(depth) for part in layout.block]
    return {part + leaf for part in parts for leaf in leaves(part)}


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

    @property
    def meaning(self) -> dict[str, Slot]:
        """Two readings with one meaning put every tensor in the same place."""
        return self.known


def fit_names(names: Sequence[str], reading: Reading) -> Fit:
    """Match names to a reading."""
    known: dict[str, Slot] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        slot = reading.slot(name)
        if slot is not None:
            known[name] = slot
        elif (why := reading.dropped(name)) is not None:
            dropped[name] = why
        else:
            unknown.append(name)
    indices = {
        int(slot.ours.split(".")[1])
        for slot in known.values()
        if slot.ours.startswith("blocks.") and slot.ours.split(".", 2)[2] not in BLOCK_EXTRAS
    }
    depth = len(indices)
    found = {slot.ours for slot in known.values()}
    missing = sorted(required(reading, max(depth, 1)) - found, key=natural)
    signs = reading.layout.signs
    if signs and not any(name.endswith(signs) for name in found):
        missing.append(f"blocks.0.{signs[0]}")
    return Fit(reading, known, dropped, unknown, missing)


def natural(name: str) -> list[str | int]:
    """Sorts ``blocks.10`` behind ``blocks.9``."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def recognise(names: Sequence[str], source: str | None = None) -> tuple[Fit, list[str]]:
    """The reading that fits ``names``, and the other formats that name them alike.

    ``source`` limits the search to one format. Raises ``UserError`` where no format fits (the nearest and the first
    names that differ are named) and where two fit that disagree.
    """
    fits = [fit_names(names, reading) for reading in readings(source)]
    best = min(fits, key=lambda fit: fit.cost)  # min keeps the first of equals: the order of the table decides
    equal = [fit for fit in fits if fit.cost == best.cost]
    others = sorted({fit.reading.format.name for fit in equal} - {best.reading.format.name})
    if best.cost[0] == 0:
        rivals = [fit for fit in equal if fit.meaning != best.meaning]
        if rivals:
            told = ", ".join(sorted({fit.reading.format.name for fit in (best, *rivals)}))
            raise UserError(f"the names fit several formats that read them differently ({told}); say which with --from")
        return best, others
    trunk = {slot.ours for slot in best.known.values()} - set(DECODER_PARTS)
    if len(trunk) < 12 or len(best.missing) > len(trunk) or len(best.unknown) > len(best.known):
        asked = "no MAE encoder in it"
        if source is not None:
            right = min((fit_names(names, reading) for reading in readings()), key=lambda fit: fit.cost)
            known = f", it is named as {right.reading.format.name}" if right.cost[0] == 0 else ""
            asked = f"no {source} checkpoint{known}"
        lacking = f"; missing: {', '.join(best.missing[:3])}" if best.missing else ""
        raise UserError(
            f"{asked}: of {len(names)} names the nearest format, {best.reading.format.name}, knows {len(best.known)}; "
            f"unknown: {', '.join((best.unknown or list(names))[:4]) or 'none'}{lacking}"
        )
    return best, others


def their_names(reading: Reading, ours: str, places: Collection[int] | None = None) -> list[str]:
    """What a reading calls one of our tensors, or those thirds of it; our name where it has none."""
    pattern, index = split_index(ours)
    found = [theirs for theirs, slot in reading.rows.items() if slot.ours == pattern]
    if places is not None:
        found = [theirs for theirs in found if reading.rows[theirs].place in places]
    else:
        found = [theirs for theirs in found if theirs.rsplit(".", 1)[-1] not in KEPT_APART]
    return [theirs if index is None else theirs.format(index) for theirs in found] or [ours]


def without_decoder(reading: Reading) -> str:
    """The options of ``mae convert`` that leave the decoder of such a file out."""
    patterns = (
        f"{name.split('.')[0]}.*" if "." in name else "decoder_*" if name.startswith("decoder_") else name
        for name in reading.layout.decoder.values()
    )
    return " ".join(f"--drop '{pattern}'" for pattern in dict.fromkeys(patterns))


def is_decoder(name: str) -> bool:
    """Whether our name is of the decoder."""
    return name.startswith("decoder_") or name == "mask_token"
