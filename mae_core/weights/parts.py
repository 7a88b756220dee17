"""An encoder and what came with it under our names: read from any format, shape-checked, every tensor accounted for."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import timm
import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import WeightsFile
from mae_core.weights.formats import KEPT_APART, OTHER_TRUNKS, OWN_ONLY, SHAPES, TIMM_SIZES
from mae_core.weights.rename import (
    Fit,
    Slot,
    fit_names,
    is_decoder,
    natural,
    readings,
    recognise,
    split_index,
)
from mae_core.weights.report import LoadReport
from mae_core.weights.wrappers import ASKED_IN_CONFIG, choose_branch

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of numbers that are weights: no other can be computed with as they are, or say at what scale they are."""
LEFT_OUT = "left out as requested"
LACKING = "missing from the file"
UNKNOWN = "the model has no such tensor"


@dataclass
class Parts:
    """An encoder and what came with it under our names, and every fact of it.

    file         as it was read
    fit, others  how its names were read, and the formats that name its tensors alike
    words        what wraps the encoder in the file: keys and beginnings of names
    state        its tensors without them
    tensors      our name -> values
    sources      our name -> the names they have in the file
    info         what the file, what lies beside it, and its shapes say
    assumptions  what none of them says and was assumed; also among the report's notes
    undecided    what none of them says and cannot be assumed: a refusal for whoever needs it
    """

    file: WeightsFile
    fit: Fit
    others: list[str]
    words: tuple[str, ...]
    state: dict[str, Tensor]
    report: LoadReport
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    info: EncoderInfo = field(default_factory=EncoderInfo)
    assumptions: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def format(self) -> str:
        """Name of the format that was read."""
        return self.fit.reading.format.name

    @property
    def has_decoder(self) -> bool:
        """Whether there is anything of a decoder."""
        return any(is_decoder(name) for name in self.tensors)

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len({name.split(".")[1] for name in self.tensors if name.startswith("blocks.")})

    def check_decided(self) -> None:
        """Raise ``UserError`` where a fact that changes the features is not known."""
        if self.undecided:
            raise UserError(f"{self.path}: {self.undecided[0]}")


def read_parts(
    file: WeightsFile,
    source: str | None = None,
    *,
    drop: Sequence[str] = (),
    needless: Sequence[str] = (),
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
) -> Parts:
    """A file's tensors under our names, completely accounted for.

    ``drop``: patterns of tensors that the user wants left out. ``needless``: parts that may be missing. ``branch``,
    ``asked_as``: which of several encoders, see ``choose_branch``. Raises ``UserError`` where a tensor is missing, left
    over, not finite, or of a shape that contradicts the others.
    """
    found = choose_branch(file, source, drop, branch, asked_as)
    state = found.state
    check_not_empty(state)
    report = LoadReport(str(file.path), notes=[*file.notes, *found.notes])
    check_trunk(state, source)
    fit, others = recognise(list(state), source)
    if EncoderInfo.from_metadata(file.metadata).cls_token is False:
        needless = (*needless, "cls_token")
    fit.missing = [name for name in fit.missing if not name.startswith(tuple(needless))]
    report.unused = {**dict.fromkeys(found.dropped, LEFT_OUT), **found.beside, **fit.dropped}
    parts = Parts(file, fit, others, found.words, state, report)
    thirds: dict[str, dict[int, str]] = {}
    for name, (ours, place) in fit.known.items():
        values = state[name]
        parts.sources.setdefault(ours, []).append(name)
        if values.layout != torch.strided:
            report.refused[name] = f"it is {str(values.layout).removeprefix('torch.')}"
        elif values.dtype not in PRECISIONS and not ours.startswith(OWN_ONLY):
            report.refused[name] = f"its numbers are {str(values.dtype).removeprefix('torch.')}"
        if place is not None:
            thirds.setdefault(ours, {})[place] = name
        elif ours in parts.tensors:
            report.refused[name] = f"a duplicate of {ours}, which {parts.sources[ours][0]} already gives"
        else:
            parts.tensors[ours] = values
    for ours, names in thirds.items():
        _join(parts, ours, names)
    if fit.reading.prefix not in ("", fit.reading.layout.prefixes[0]):
        report.notes.append(f"removed the prefix {fit.reading.prefix!r} from the encoder's names")
    _refuse_unfit(parts)
    check_finite({parts.sources[name][0]: tensor for name, tensor in parts.tensors.items()})
    return parts


def _join(parts: Parts, ours: str, names: Mapping[int, str]) -> None:
    """Query, key and value as one tensor; of BEiT's biases the key's is zero."""
    if ours in parts.tensors:
        parts.report.refused.update(dict.fromkeys(names.values(), f"a duplicate of {ours}"))
        return
    only_biases = next(iter(names.values())).endswith(tuple(KEPT_APART))
    missing = (set(KEPT_APART.values()) if only_biases else {0, 1, 2}) - names.keys()
    if missing:
        pattern, index = split_index(ours)
        lost = [row for row, slot in parts.fit.reading.rows.items() if slot in [Slot(pattern, n) for n in missing]]
        parts.report.refused.update(dict.fromkeys((row.format(index) for row in lost), LACKING))
        return
    values = {place: parts.state[name] for place, name in names.items()}
    query = values[0]
    key = torch.zeros_like(query) if only_biases else values[1]
    parts.tensors[ours] = torch.cat([query, key.to(query.dtype), values[2].to(query.dtype)])


def _refuse_unfit(parts: Parts) -> None:
    tensors, fit, refused = parts.tensors, parts.fit, parts.report.refused
    refused.update(dict.fromkeys(fit.unknown, UNKNOWN))
    lost = list(fit.missing)
    for layer in ("norm", "fc_norm", "head"):
        absent = {f"{layer}.weight", f"{layer}.bias"} - tensors.keys()
        lost += absent if len(absent) == 1 else ()
    for ours in lost:
        refused.update(dict.fromkeys(fit.reading.names(ours), LACKING))
    refused.update({parts.sources[name][0]: why for name, why in wrong_shapes(tensors).items()})
    if not refused:
        return
    bare = {"pos_embed", "patch_embed.proj.weight"} & set(fit.missing)
    unknown = [name for name, why in refused.items() if why == UNKNOWN]
    remedy = leave_out(unknown) if len(unknown) == len(refused) else "copy or export the file again"
    raise UserError(
        f"{'no MAE encoder in it: ' if bare else ''}read as {fit.reading.format.name} ({fit.reading.layout.about}), "
        f"{describe_refused(refused)}; {remedy}"
    )


def check_trunk(state: Mapping[str, Tensor], source: str | None = None) -> None:
    """Raise ``UserError`` where a tensor shows what our ViT does not compute, and no format knows it."""
    shown = next((pattern for pattern in OTHER_TRUNKS if fnmatch.filter(state, pattern)), None)
    if shown is not None and not any(fit_names(list(state), each).cost[0] == 0 for each in readings(source)):
        widths = [tensor.shape[-1] for name, tensor in state.items() if name.endswith("cls_token")]
        raise UserError(told_trunk(shown, *widths[:1]))


def told_trunk(shown: str, width: int = 768) -> str:
    """A refusal: what the row ``shown`` of ``OTHER_TRUNKS`` says, and the model of timm of that width, or its base."""
    fact, pattern = OTHER_TRUNKS[shown]
    name = pattern.format(TIMM_SIZES.get(width, "base"))
    if not timm.is_model(name):
        name = pattern.format("base")
    return f"{fact}, which the toolkit's own ViT does not compute; take timm's with model.trunk=timm:{name}"


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
    depth = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    wanted = {name.format(index) for name in SHAPES if is_decoder(name) for index in range(max(depth, 1))}
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
    letters = {name: SHAPES[pattern] for name in tensors if (pattern := split_index(name)[0]) in SHAPES}
    sizes, wrong = sizes_of(tensors), set()
    for name in [name for name in letters if _shape(letters[name], sizes) != tensors[name].shape]:
        wrong.add(name)
        rivals = {n for n in letters if n != name and PAIRED & set(letters[name]) & set(letters[n])}
        if _shape(letters[name], _sizes_without(rivals, tensors)) == tensors[name].shape:
            wrong |= rivals
    told = {}
    for name in wrong:
        shape, wanted = tuple(tensors[name].shape), _shape(letters[name], _sizes_without({name}, tensors))
        told[name] = f"file {shape}, model ({', '.join(map(str, wanted))}{',' if len(shape) == 1 else ''})"
    return told


def _sizes_without(names: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return sizes_of({name: values for name, values in tensors.items() if name not in names})


def _shape(letters: Sequence[str], sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """A letter that no tensor tells stays a letter."""
    found = [(letter, 1 if letter == "1" else sizes.get(letter.removeprefix("3"))) for letter in letters]
    return tuple(letter if size is None else size * (3 if letter[0] == "3" else 1) for letter, size in found)


def num_parameters(tensors: Mapping[str, Tensor]) -> int:
    """Numbers in all of them."""
    return sum(prod(values.shape) for values in tensors.values())
