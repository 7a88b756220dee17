"""An encoder and what came with it under our names: read from any format, shape-checked, every tensor accounted for."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.formats import DECODER_PARTS, KEPT_APART, OWN_ONLY, SHAPES
from mae_core.weights.rename import (
    OUTER_PREFIXES,
    Fit,
    fit_names,
    is_decoder,
    leaves,
    natural,
    readings,
    recognise,
    split_index,
    their_names,
)
from mae_core.weights.report import LoadReport

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of numbers that are weights: no other can be computed with as they are, or say at what scale they are."""
LACKING = "missing from the file"
UNKNOWN = "the model has no such tensor"


class Joined:
    """Rows of several tensors, joined when they are written: a converted file never lies in memory twice."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> torch.Size:
        """As of the joined tensor."""
        rows = sum(part.shape[0] for part in self.parts)
        return torch.Size((rows, *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first part."""
        return self.parts[0].dtype

    def tensor(self) -> Tensor:
        """The rows in one tensor."""
        return torch.cat([part.to(self.dtype) for part in self.parts])


Values: TypeAlias = "Tensor | Joined"


def as_tensor(values: Values) -> Tensor:
    """A tensor of its own, whatever it was."""
    return values.tensor() if isinstance(values, Joined) else values


def strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take off what wrappers put before every name, as far as no format knows the names with it.

    Returns the state and the prefixes taken off. A prefix that is not a known wrapper's goes too, where all names
    carry it and a format explains every name behind it.
    """
    taken: list[str] = []
    state = dict(state)
    while state and not any(fit.cost[0] == 0 for fit in map(lambda r: fit_names(list(state), r), readings())):
        first = next(iter(state))
        heads = [first[: match.end()] for match in re.finditer(r"\.", first)]
        for head in heads[:3]:
            if not all(name.startswith(head) for name in state):
                continue
            behind = [name[len(head) :] for name in state]
            if head in OUTER_PREFIXES or min(fit_names(behind, r).cost[0] for r in readings()) == 0:
                break
        else:
            break
        state = {name[len(head) :]: tensor for name, tensor in state.items()}
        taken.append(head)
    return state, taken


@dataclass
class Parts:
    """An encoder, and what came with it, under our names.

    tensors   our name -> values
    sources   our name -> the names they have in the file
    fit       how the file was read
    others    formats that name these tensors alike
    state     the file's tensors without outer prefixes
    """

    tensors: dict[str, Values]
    sources: dict[str, list[str]]
    fit: Fit
    others: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """Name of the format that was read."""
        return self.fit.reading.format.name

    @property
    def has_decoder(self) -> bool:
        """Whether there is anything of a decoder."""
        return any(is_decoder(name) for name in self.tensors)


def read_parts(
    state: Mapping[str, Tensor],
    report: LoadReport,
    source: str | None = None,
    *,
    drop: Sequence[str] = (),
    needless: Sequence[str] = (),
) -> Parts:
    """Names of a file -> ``Parts``, completely accounted for in ``report``.

    ``drop``: patterns of tensors that the user wants left out. ``needless``: parts that may be missing, because whoever
    asks has no use for them. Raises ``UserError`` where a tensor is missing, left
    over, or of a shape that contradicts the others.
    """
    state, taken = strip_prefixes(state)
    if taken:
        report.notes.append(f"took {' and '.join(repr(prefix) for prefix in taken)} off every name")
    for name in list(state):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            report.unused[name] = "left out as asked"
            del state[name]
    fit, others = recognise(list(state), source)
    fit.missing = [name for name in fit.missing if not name.startswith(tuple(needless))]
    report.unused.update(fit.dropped)
    tensors: dict[str, Values] = {}
    sources: dict[str, list[str]] = {}
    apart: dict[str, dict[int, Tensor]] = {}
    for name, slot in fit.known.items():
        values = state[name]
        sources.setdefault(slot.ours, []).append(name)
        if values.layout != torch.strided:
            report.refused[name] = f"it is {str(values.layout).removeprefix('torch.')}"
        elif values.dtype not in PRECISIONS and not slot.ours.startswith(OWN_ONLY):
            report.refused[name] = f"its numbers are {str(values.dtype).removeprefix('torch.')}"
        if slot.place is None and slot.ours in tensors:
            report.refused[name] = f"a second {slot.ours} beside {sources[slot.ours][0]}"
        elif slot.place is None:
            tensors[slot.ours] = values
        else:
            apart.setdefault(slot.ours, {})[slot.place] = values
    for ours, places in apart.items():
        beside = [name for name in sources[ours] if fit.known[name].place is not None]
        if ours in tensors:
            report.refused.update(dict.fromkeys(beside, f"a second {ours}"))
            continue
        only_biases = beside[0].endswith(tuple(KEPT_APART))
        missing = (set(KEPT_APART.values()) if only_biases else {0, 1, 2}) - places.keys()
        if missing:
            report.refused.update(dict.fromkeys(their_names(fit.reading, ours, missing), LACKING))
            continue
        if only_biases:
            places[1] = torch.zeros_like(places[0])
        tensors[ours] = Joined([places[0], places[1], places[2]])
    if fit.reading.prefix not in ("", fit.reading.layout.prefixes[0]):
        report.notes.append(f"took {fit.reading.prefix!r} off the encoder's names")
    _refuse_unfit(tensors, sources, fit, report)
    return Parts(tensors, sources, fit, others, state)


def _refuse_unfit(
    tensors: Mapping[str, Values], sources: Mapping[str, list[str]], fit: Fit, report: LoadReport
) -> None:
    reading = fit.reading
    report.refused.update({name: UNKNOWN for name in fit.unknown})
    for ours in fit.missing:
        report.refused.update(dict.fromkeys(their_names(reading, ours), LACKING))
    groups = [("norm.",), ("fc_norm.",), ("head.",)]
    for group in groups:
        have = {name for name in tensors if name.startswith(group)}
        if len(have) == 1:
            lost = next(iter({f"{group[0]}weight", f"{group[0]}bias"} - have))
            report.refused.update(dict.fromkeys(their_names(reading, lost), LACKING))
    for name, why in wrong_shapes(tensors).items():
        report.refused[sources[name][0]] = why
    if report.refused:
        bare = {"pos_embed", "patch_embed.proj.weight"} & set(fit.missing)
        raise UserError(
            f"{'no MAE encoder in it: ' if bare else ''}as {reading.format.name} ({reading.layout.about}) "
            f"{describe_refused(report.refused)}; mend the file, or leave tensors out with --drop"
        )


def describe_refused(refused: Mapping[str, str]) -> str:
    """How many tensors fit nowhere, the first two of every kind with the reason: names that are not known, tensors
    that are missing, tensors that are not as they should be."""
    kinds: dict[str, list[str]] = {}
    for name, why in sorted(refused.items(), key=lambda row: natural(row[0])):
        kinds.setdefault(why if why in (UNKNOWN, LACKING) else "", []).append(f"{name}: {why}")
    shown = [line for kind in (UNKNOWN, LACKING, "") for line in kinds.get(kind, [])[:2]]
    count = "1 tensor does not fit" if len(refused) == 1 else f"{len(refused)} tensors do not fit"
    return f"{count} ({'; '.join(shown)})"


def missing_decoder(tensors: Mapping[str, Values]) -> list[str]:
    """Our names of what a decoder lacks that has at least one tensor."""
    indices = {name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")}
    wanted = {part + leaf for part in DECODER_PARTS for leaf in leaves(part)}
    blocks = [pattern for pattern in SHAPES if pattern.startswith("decoder_blocks.{}")]
    wanted |= {pattern.format(index) for index in range(max(len(indices), 1)) for pattern in blocks}
    if f"{OWN_ONLY}mask_token" in tensors:  # hidden patches pass the encoder, so the decoder has no token for them
        wanted.discard("mask_token")
    return sorted(wanted - tensors.keys(), key=natural)


def sizes_of(tensors: Mapping[str, Values]) -> dict[str, int]:
    """Letter of ``SHAPES`` -> its number: what most tensors say, so that one bad tensor cannot speak for the rest."""
    votes: dict[str, Counter[int]] = {}
    for name, values in tensors.items():
        wanted = SHAPES.get(split_index(name)[0])
        if wanted is None or len(wanted) != len(values.shape):
            continue
        for letter, size in zip(wanted, values.shape, strict=True):
            times = 3 if letter.startswith("3") else 1
            if letter != "1" and size % times == 0:
                votes.setdefault(letter.removeprefix("3"), Counter())[size // times] += 1
    sizes = {letter: counts.most_common(1)[0][0] for letter, counts in votes.items() if letter != "T"}
    if "T" in votes:  # two tensors that disagree: most decoders predict the pixels of a patch
        votes["T"][sizes.get("P", 0) ** 2 * sizes.get("C", 0)] += 1
        sizes["T"] = votes["T"].most_common(1)[0][0]
    return sizes


PAIRED = {"N", "K"}
"""Letters of ``SHAPES`` that two tensors tell: encoder and decoder positions, weight and bias of the head."""


def wrong_shapes(tensors: Mapping[str, Values]) -> dict[str, str]:
    """Our name -> its shape and what the rest of the file asks for, of every tensor that does not go with the rest; a
    letter (N positions, C channels, ...) stands for a number that no other tensor tells. Where two tensors contradict
    each other and no third one decides, it is both."""
    sizes = sizes_of(tensors)
    wrong = {}
    for name, values in tensors.items():
        letters = SHAPES.get(split_index(name)[0])
        if letters is None or _fits(values, letters, sizes):
            continue
        wrong[name] = values
        rivals = [n for n in tensors if n != name and PAIRED & set(letters) & set(SHAPES.get(split_index(n)[0], ()))]
        if _fits(values, letters, sizes_of({n: tensors[n] for n in tensors if n not in rivals})):
            wrong.update({other: tensors[other] for other in rivals})
    return {name: _told(name, tensors) for name in wrong}


def _fits(values: Values, letters: Sequence[str], sizes: Mapping[str, int]) -> bool:
    return tuple(values.shape) == tuple(_number(letter, sizes) for letter in letters)


def _number(letter: str, sizes: Mapping[str, int]) -> int | str:
    if letter == "1":
        return 1
    size = sizes.get(letter.removeprefix("3"))
    return letter if size is None else size * (3 if letter.startswith("3") else 1)


def _told(name: str, tensors: Mapping[str, Values]) -> str:
    others = sizes_of({other: values for other, values in tensors.items() if other != name})
    wanted = (str(_number(letter, others)) for letter in SHAPES[split_index(name)[0]])
    shape = tuple(tensors[name].shape)
    return f"file {shape}, model ({', '.join(wanted)}{',' if len(shape) == 1 else ''})"


def num_parameters(tensors: Mapping[str, Values]) -> int:
    """Numbers in all of them."""
    return sum(prod(values.shape) for values in tensors.values())
