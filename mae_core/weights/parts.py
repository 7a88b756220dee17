"""An encoder and what came with it under our names: read from any format, shape-checked, every tensor accounted for."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

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
LEFT_OUT = "left out as asked"
LACKING = "missing from the file"
UNKNOWN = "the model has no such tensor"


def strip_prefixes(
    state: Mapping[str, Tensor], source: str | None = None, drop: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Take off what wrappers put before every name, as far as no format (or not ``source``) knows the names with it.

    Returns the state, the prefixes taken off, and the names in the file of what ``drop`` leaves out: its patterns hold
    for a name as it is in the file and for what is left of it. A prefix that is not a known wrapper's goes too, where
    all names carry it and a format explains every name behind it.
    """
    taken: list[str] = []
    dropped: list[str] = []
    state = dict(state)
    while True:
        for name in [name for name in state if any(fnmatch.fnmatchcase(name, pattern) for pattern in drop)]:
            dropped.append("".join(taken) + name)
            del state[name]
        if not state or any(fit_names(list(state), reading).cost[0] == 0 for reading in readings(source)):
            return state, taken, dropped
        first = next(iter(state))
        heads = [first[: match.end()] for match in re.finditer(r"\.", first)]
        for head in heads[:3]:
            if not all(name.startswith(head) for name in state):
                continue
            behind = [name[len(head) :] for name in state]
            if head in OUTER_PREFIXES or min(fit_names(behind, r).cost[0] for r in readings(source)) == 0:
                break
        else:
            return state, taken, dropped
        state = {name[len(head) :]: tensor for name, tensor in state.items()}
        taken.append(head)


@dataclass
class Parts:
    """An encoder, and what came with it, under our names.

    tensors   our name -> values
    sources   our name -> the names they have in the file
    fit       how the file was read
    others    formats that name these tensors alike
    state     the file's tensors without outer prefixes
    """

    tensors: dict[str, Tensor]
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
    check_not_empty(state)
    state, taken, dropped = strip_prefixes(state, source, drop)
    if taken:
        report.notes.append(f"took {' and '.join(repr(prefix) for prefix in taken)} off every name")
    report.unused.update(dict.fromkeys(dropped, LEFT_OUT))
    fit, others = recognise(list(state), source)
    fit.missing = [name for name in fit.missing if not name.startswith(tuple(needless))]
    report.unused.update(fit.dropped)
    tensors: dict[str, Tensor] = {}
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
        tensors[ours] = torch.cat([places[place].to(places[0].dtype) for place in (0, 1, 2)])
    if fit.reading.prefix not in ("", fit.reading.layout.prefixes[0]):
        report.notes.append(f"took {fit.reading.prefix!r} off the encoder's names")
    _refuse_unfit(tensors, sources, fit, report)
    check_finite({sources[name][0]: tensor for name, tensor in tensors.items()})
    return Parts(tensors, sources, fit, others, state)


def _refuse_unfit(
    tensors: Mapping[str, Tensor], sources: Mapping[str, list[str]], fit: Fit, report: LoadReport
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
        wanted = [name for name, why in report.refused.items() if why == UNKNOWN]
        remedy = f"; {leave_out(wanted)}" if len(wanted) == len(report.refused) else "; copy or export the file again"
        raise UserError(
            f"{'no MAE encoder in it: ' if bare else ''}as {reading.format.name} ({reading.layout.about}) "
            f"{describe_refused(report.refused)}{remedy}"
        )


def leave_out(names: Sequence[str]) -> str:
    """How to go on without tensors that no encoder takes: advice that works for a caller without ``--drop`` too."""
    groups = dict.fromkeys(name if "." not in name else f"{name.split('.')[0]}.*" for name in names)
    if any(group.startswith(("blocks.", "layers.", "backbone.", "encoder.", "vit.")) for group in groups):
        groups = dict.fromkeys(names)
    options = " ".join(f"--drop '{pattern}'" for pattern in list(groups)[:6])
    command = f"mae convert FILE --to mae_core --out encoder.safetensors {options}"
    return f"leave them out with {command}, and use the file it writes"


def check_not_empty(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` where parameters have no numbers, as in a file of one rank of DeepSpeed ZeRO-3."""
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise UserError(
            f"{len(empty)} of {len(tensors)} tensors are empty, such as {empty[0]}: DeepSpeed ZeRO-3 saved them "
            "without gathering them; make a whole file with DeepSpeed's zero_to_fp32.py"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` where a tensor holds NaN or infinite numbers; one pass over all of them."""
    bad = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue  # NaN and infinity survive a sum; numbers so large that only their sum is infinite are looked at
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            bad.append(f"{name} ({wrong} of {tensor.numel()} numbers)")
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise UserError(
            f"NaN or infinite numbers in {', '.join(bad[:3])}{more}: the training that wrote the file had diverged; "
            "use an earlier checkpoint"
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


def missing_decoder(tensors: Mapping[str, Tensor]) -> list[str]:
    """Our names of what a decoder lacks that has at least one tensor."""
    indices = {name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")}
    wanted = {part + leaf for part in DECODER_PARTS for leaf in leaves(part)}
    blocks = [pattern for pattern in SHAPES if pattern.startswith("decoder_blocks.{}")]
    wanted |= {pattern.format(index) for index in range(max(len(indices), 1)) for pattern in blocks}
    if f"{OWN_ONLY}mask_token" in tensors:  # hidden patches pass the encoder, so the decoder has no token for them
        wanted.discard("mask_token")
    return sorted(wanted - tensors.keys(), key=natural)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
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


def wrong_shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
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


def _fits(values: Tensor, letters: Sequence[str], sizes: Mapping[str, int]) -> bool:
    return tuple(values.shape) == tuple(_number(letter, sizes) for letter in letters)


def _number(letter: str, sizes: Mapping[str, int]) -> int | str:
    if letter == "1":
        return 1
    size = sizes.get(letter.removeprefix("3"))
    return letter if size is None else size * (3 if letter.startswith("3") else 1)


def _told(name: str, tensors: Mapping[str, Tensor]) -> str:
    others = sizes_of({other: values for other, values in tensors.items() if other != name})
    wanted = (str(_number(letter, others)) for letter in SHAPES[split_index(name)[0]])
    shape = tuple(tensors[name].shape)
    return f"file {shape}, model ({', '.join(wanted)}{',' if len(shape) == 1 else ''})"


def num_parameters(tensors: Mapping[str, Tensor]) -> int:
    """Numbers in all of them."""
    return sum(prod(values.shape) for values in tensors.values())
