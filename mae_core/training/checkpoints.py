"""Training checkpoints: written completely or not at all, and verified before they are loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.atomic import checksum, fsync_path, write_text
from mae_core.errors import UserError, first_line, why_not_loaded
from mae_core.layout import (
    CHECKPOINT_FORMAT,
    CHECKPOINTS,
    COMPLETE,
    MODEL,
    TRAINING_STATE,
    best_checkpoint,
    checkpoint_folders,
    complete_checkpoints,
    is_complete,
    marker_of,
)
from mae_core.training.finite import non_finite
from mae_core.weights.files import read_weights, write_weights

LITTLE = 1 << 20
"""Bytes; a disk that has no more is full."""
MAY_DIFFER = ("params", "lr", "initial_lr")
"""Keys of an optimizer's groups that the schedule sets, or that are compared by themselves."""


class Checkpoint(NamedTuple):
    """What a resume needs: steps done, the model's tensors, the optimizer's state."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


class Keep(NamedTuple):
    """Which checkpoints of a run stay: the last ones, those of every so many steps, and the best by a measure."""

    last: int
    every: int | None = None
    best: str | None = None


class Damaged(Exception):
    """Why a checkpoint is not believed."""


def save_checkpoint(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    keep: Keep,
    measured: Mapping[str, float] | None = None,
) -> Path:
    """Write ``checkpoints/step_<step>`` in a temporary sibling, flush it to disk, rename it; then delete all but those
    of ``keep``.

    The COMPLETE marker is written last and names the size and the CRC-32 of each file, so that a reader recognises a
    torn or damaged folder, and what was ``measured`` at this step. A failure leaves the earlier ones whole, and nothing
    of this one.
    """
    root = run / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    for leftover in root.glob(".writing_*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        _write_files(temporary, step, model, optimizer, metadata, measured or {})
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(root)
    _delete_others(run, keep)
    return final


def _delete_others(run: Path, keep: Keep) -> None:
    best = best_checkpoint(run, keep.best) if keep.best else None
    for old in complete_checkpoints(run)[: -keep.last]:
        regular = keep.every and int(old.name.removeprefix("step_")) % keep.every == 0
        if not regular and (best is None or old != best[0]):
            shutil.rmtree(old)


def _write_files(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    metadata: Mapping[str, Any],
    measured: Mapping[str, float],
) -> None:
    write_weights(folder / MODEL, model, {**metadata, "step": step})
    state = {"format": CHECKPOINT_FORMAT, "step": step, "optimizer": optimizer}
    try:
        torch.save(state, folder / TRAINING_STATE)
    except RuntimeError as error:  # torch hides what the disk said
        full = shutil.disk_usage(folder).free < LITTLE
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC) if full else first_line(error)) from None
    fsync_path(folder / TRAINING_STATE)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": checksum(folder / name)}
        for name in (MODEL, TRAINING_STATE)
    }
    marker = {"format": CHECKPOINT_FORMAT, "step": step, "files": files}
    marker |= {"measured": dict(measured)} if measured else {}
    write_text(folder / COMPLETE, json.dumps(marker))
    fsync_path(folder)


def load_checkpoint(
    run: Path,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Checkpoint:
    """The last checkpoint of a run that is whole, and that fits ``model`` and ``optimizer`` where they are given; the
    others are passed over with a sentence.

    Raises ``UserError`` where there is none, and for one that a newer version of the toolkit wrote.
    """
    passed_over = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            return _read(folder, model, optimizer)
        except Damaged as damage:
            passed_over.append(f"{folder.name} {damage}")
            say(f"checkpoint {folder} is passed over: it {damage}")
    if passed_over:
        raise UserError(
            f"nothing to resume: {run} has no complete checkpoint that can be used ({'; '.join(passed_over[:3])}); "
            "start a new run with output=FOLDER"
        )
    raise UserError(f"nothing to resume: {run} has no complete checkpoint; --resume auto starts or continues")


def _read(folder: Path, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Checkpoint:
    """One checkpoint. Raises ``Damaged``."""
    if not is_complete(folder):
        raise Damaged("was not written to the end, or a file in it has another size")
    marker = marker_of(folder)
    if marker.format > CHECKPOINT_FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {marker.format}, and this version of the toolkit reads formats up to "
            f"{CHECKPOINT_FORMAT}; update it, or start a new run with output=FOLDER"
        )
    for name, (_, crc) in marker.files.items():
        if crc is not None and checksum(folder / name) != crc:
            raise Damaged(f"has a {name} whose checksum is not the one written with it")
    try:
        tensors, stated = read_weights(folder / MODEL)
        state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
        step, optimizer_state = state["step"], state["optimizer"]
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        raise Damaged(f"cannot be read ({why_not_loaded(error)})") from None
    if not isinstance(step, int) or folder.name != f"step_{step:08d}" or stated.get("step") != step:
        raise Damaged(f"is named {folder.name} and holds the state of steps {step} and {stated.get('step')}")
    fault = model_fault(tensors, model) or (optimizer_fault(optimizer_state, optimizer, step) if optimizer else None)
    if fault:
        raise Damaged(fault)
    return Checkpoint(step, tensors, optimizer_state)


def model_fault(tensors: Mapping[str, Tensor], model: nn.Module | None) -> str | None:
    """Why the tensors of a checkpoint are not those of ``model``, or cannot be computed with; None where they are."""
    bad = non_finite(tensors)
    if bad:
        return f"holds NaN or infinity in {len(bad)} tensors, such as {bad[0]}"
    return None if model is None else _shape_fault(tensors, model.state_dict(), "model")


def _shape_fault(found: Any, wanted: Mapping[str, Any], what: str) -> str | None:
    if not isinstance(found, Mapping) or found.keys() != wanted.keys():
        names = set(found) ^ set(wanted) if isinstance(found, Mapping) else {"all"}
        return f"holds other tensors than the {what} has, such as {min(map(str, names))}"
    for name, tensor in wanted.items():
        if isinstance(tensor, Tensor) and (not isinstance(found[name], Tensor) or found[name].shape != tensor.shape):
            return f"holds {name} in another shape than the {what} has"
    return None


def optimizer_fault(state: Any, optimizer: torch.optim.Optimizer, step: int) -> str | None:
    """Why the state of a checkpoint is not one of ``optimizer`` after ``step`` steps; None where it is.

    Torch does not compare shapes when it loads: a fused step with a moment of another shape writes outside of it.
    """
    own = optimizer.state_dict()
    if not isinstance(state, Mapping) or state.keys() != own.keys():
        return "holds the state of another optimizer"
    for name in own.keys() - {"state", "param_groups"}:
        if fault := _shape_fault(state[name], own[name], f"optimizer's {name}"):
            return fault
    groups, entries = state["param_groups"], state["state"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]) or not isinstance(entries, Mapping):
        return "holds other parameter groups than the optimizer has"
    for group, wanted in zip(groups, own["param_groups"], strict=True):
        if not isinstance(group, Mapping) or group.get("params") != wanted["params"]:
            return "holds other parameter groups than the optimizer has"
        for key in (key for key in wanted if key not in MAY_DIFFER and key in group):
            if group[key] != wanted[key]:
                return f"holds {key}={group[key]} of the optimizer, but the configuration sets {wanted[key]}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = {tuple(sorted(entry)) for entry in entries.values() if isinstance(entry, Mapping)}
    if len(kinds) > 1 or not entries.keys() <= set(range(len(parameters))):
        return "holds the state of other parameters than the optimizer has"
    for number, entry in entries.items():
        for name, value in entry.items() if isinstance(entry, Mapping) else [("entry", None)]:
            if fault := _moment_fault(name, value, parameters[number], step):
                return f"holds a {name} of parameter {number} of the optimizer that {fault}"
    return None


def _moment_fault(name: str, value: Any, parameter: Tensor, step: int) -> str | None:
    if name == "step":
        count = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        return None if isinstance(count, int | float) and 0 <= count <= step else "is not its step count"
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return "is no tensor"
    if value.shape != parameter.shape or value.is_floating_point() != parameter.is_floating_point():
        return "has another shape or type"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "claims more numbers than it holds"
    return None if bool(torch.isfinite(value).all()) else "is not finite"
