"""What trainers wrap around an encoder: mappings and beginnings of names. And which encoder of a file is meant, where
it holds several."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.files import WeightsFile
from mae_core.weights.formats import BESIDE, INNER_WRAPPERS, WRAPPERS
from mae_core.weights.rename import fit_names, readings, recognise

ASKED_IN_CONFIG = "branch={}"
"""How a configuration asks for a branch; ``asked_as`` is that of another caller."""


@dataclass
class Branch:
    """An encoder of a file, and what came with it.

    words    what leads to it: keys of mappings and beginnings of names
    state    its tensors without them
    beside   other tensors of the file -> why they are left out
    dropped  names in the file of what ``drop`` leaves out
    notes    what was taken off
    """

    words: tuple[str, ...]
    state: dict[str, Tensor]
    beside: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_branch(
    file: WeightsFile,
    source: str | None = None,
    drop: Sequence[str] = (),
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
) -> Branch:
    """The encoder of a file without what is wrapped around it, as far as no format (or not ``source``) knows the names
    with it.

    ``drop``: patterns of tensors to leave out, which hold for a name as it is in the file and for what is left of it.
    ``branch``: which encoder, by the word that tells it from the others; ``asked_as``: how the user writes that.
    Raises ``UserError`` where a file holds several and ``branch`` names none of them, and where it names one of a file
    that holds a single one.
    """

    found: list[Branch] = []
    for keys, wrapped in (file.branches or {(): file.state}).items():
        state, notes = _without_inner(wrapped)
        for each in _split(Branch((), state), drop, source):
            each.notes = notes + _prefix_notes(each.words)
            found.append(replace(each, words=(*keys, *each.words)))
    encoders = [each for each in found if len(found) > 1 and _is_encoder(each.state, source)] or found[:1]
    names = short_names([each.words for each in encoders])
    chosen = encoders[position_of(branch, names, [each.words for each in encoders], asked_as)]
    for each in found:
        why = "of another encoder in the file" if each in encoders else "no encoder"
        if each is not chosen:
            taken = "".join(f"{word}." for word in each.words)
            chosen.beside |= {taken + name: why for name in each.state}
    return chosen


def position_of(branch: str | None, names: Sequence[str], paths: Sequence[Sequence[str]], asked_as: str) -> int:
    """Which of several encoders is asked for. Raises ``UserError`` where it is none of them, and where none is."""
    if branch is None and len(names) > 1:
        options = " or ".join(asked_as.format(name) for name in names)
        raise UserError(f"it holds {len(names)} encoders ({', '.join(names)}); choose one with {options}")
    if branch is None or branch in names:
        return 0 if branch is None else names.index(branch)
    matches = [number for number, words in enumerate(paths) if branch in words]
    if len(matches) != 1:
        known = f"choose one of {', '.join(names)}" if len(names) > 1 else "it holds a single encoder; leave it out"
        raise UserError(f"{asked_as.format(branch)} was given, but the file has no such encoder; {known}")
    return matches[0]


def _without_inner(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What wrappers of single layers put into names, taken out. Raises ``UserError`` for FSDP's flat shards."""
    flat = next((name for name in state if name.rsplit(".", 1)[-1].lstrip("_").startswith("flat_param")), None)
    if flat is not None:
        raise UserError(
            f"{flat} is a shard of FSDP, which tells no names of tensors; save the whole model, with the option "
            "full_state_dict of torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    plain = {"".join(re.split("|".join(map(re.escape, INNER_WRAPPERS)), name)): each for name, each in state.items()}
    if plain.keys() == state.keys() or len(plain) != len(state):
        return dict(state), []
    inside = [word for word in INNER_WRAPPERS if any(word in name for name in state)]
    return plain, [f"removed {' and '.join(map(repr, inside))} from the names"]


def _split(branch: Branch, drop: Sequence[str], source: str | None) -> list[Branch]:
    """The branches of a branch; itself where no format explains what is behind a wrapper."""

    def explained(names: Sequence[str]) -> bool:
        return any(fit_names(names, reading).cost[0] == 0 for reading in readings(source))

    taken, state = "".join(f"{word}." for word in branch.words), dict(branch.state)
    lost = [name for name in state if any(fnmatch.fnmatchcase(name, pattern) for pattern in drop)]
    for name in lost:
        del state[name]
    branch = replace(branch, state=state, dropped=[*branch.dropped, *(taken + name for name in lost)])
    if not state or explained(list(state)):
        return [branch]
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head if rest else "", {})[rest or name] = tensor
    inside = [word for word in groups if word in WRAPPERS]
    if len(inside) < 2 and _is_encoder(state, source):  # damaged, and its names as they are tell where
        return [branch]
    others = [name for name in state if name.partition(".")[0] not in inside]
    why = {name: _beside(name) for name in others}
    if inside and None not in why.values():
        beside = {**branch.beside, **{taken + name: str(reason) for name, reason in why.items()}}
        parts = [Branch((*branch.words, word), groups[word], beside, branch.dropped) for word in inside]
        found = [each for part in parts for each in _split(part, drop, source)]
        if len(found) == 1 or all(_is_encoder(each.state, source) for each in found):
            return found
    first = next(iter(state))
    for match in list(re.finditer(r"\.", first))[:3]:
        head = first[: match.end()]
        if all(name.startswith(head) for name in state):
            bare = {name.removeprefix(head): tensor for name, tensor in state.items()}
            if explained(list(bare)):
                return [replace(branch, words=(*branch.words, head[:-1]), state=bare)]
    return [branch]


def _beside(name: str) -> str | None:
    return next((why for pattern, why in BESIDE.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _is_encoder(state: Mapping[str, Tensor], source: str | None) -> bool:
    try:
        recognise(list(state), source)
    except UserError:
        return False
    return True


def _prefix_notes(words: Sequence[str]) -> list[str]:
    told = " and ".join(repr(f"{word}.") for word in words)
    return [f"removed the prefix {told} from every name"] if words else []


def short_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """What tells each path from the others: the first word that differs where that is enough, else the path."""
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    short = [path[shared] if len(path) > shared else "" for path in paths]
    return short if len(set(short)) == len(short) and all(short) else [".".join(path) for path in paths]
