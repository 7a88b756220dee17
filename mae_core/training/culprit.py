"""Which module made numbers that are not finite, and ``events/nonfinite_*.pt``, which lets the step be done again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.atomic import atomic_path, said_plainly
from mae_core.config.load import dump_config
from mae_core.errors import UserError, first_line, why_not_loaded
from mae_core.layout import EVENTS
from mae_core.training.distributed import gather
from mae_core.training.finite import RunningStatistics, gradient_norm
from mae_core.training.run import ROOM, Run

DUMP_FORMAT = 1


class Replay(NamedTuple):
    """A step done again: its losses and gradient norm; the first module, in the order of the pass, whose output in the
    forward pass, and whose gradient in the backward pass, is not finite (None where all are; a parameter where no
    gradient between modules shows it)."""

    losses: dict[str, float]
    norm: float
    forward: str | None
    backward: str | None

    def __str__(self) -> str:
        if self.forward is not None:
            return f"the output of {self.forward} is the first that is not finite"
        if self.backward is not None:
            return f"all outputs are finite, and the gradient of {self.backward} is the first that is not"
        return "all outputs and gradients of modules are finite"


def replay_step(model: nn.Module, compute: Callable[[nn.Module], Mapping[str, Tensor]]) -> Replay:
    """Do a step again and watch every module; weights and running statistics stay as they are.

    compute  (model) -> losses, after the backward pass
    """
    found: dict[str, str] = {}
    handles = []
    for name, module in model.named_modules():
        if name and not any(module.children()):
            handles.append(module.register_forward_hook(_watch(found, "forward", name)))
            handles.append(module.register_full_backward_hook(_watch(found, "backward", name)))
    statistics = RunningStatistics(model)
    statistics.keep()
    model.zero_grad(set_to_none=True)
    try:
        losses = {name: float(value) for name, value in compute(model).items()}
        norm = float(gradient_norm(model.parameters()))
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if bad:
            found.setdefault("backward", bad[-1])
    finally:
        for handle in handles:
            handle.remove()
        statistics.put_back()
        model.zero_grad(set_to_none=True)
    return Replay(losses, norm, found.get("forward"), found.get("backward"))


def _watch(found: dict[str, str], kind: str, name: str) -> Callable[..., None]:
    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        values = inputs if kind == "backward" else outputs
        values = values if isinstance(values, tuple | list) else (values,)
        bad = any(isinstance(v, Tensor) and v.is_floating_point() and not bool(v.isfinite().all()) for v in values)
        if bad and kind not in found:
            found[kind] = name

    return look


def write_dump(
    run: Run,
    step: int,
    model: nn.Module,
    compute: Callable[[nn.Module], Mapping[str, Tensor]],
    *,
    places: list[tuple[int, int]],
    files: list[str],
    step_seed: int,
) -> str:
    """Do the step after ``step - 1`` again, write what it shows on each rank, and return what to tell; all ranks must
    call it.

    places  (epoch, index) of this rank's images; files: their names
    """
    try:
        replay = replay_step(model, compute)
        seen: dict[str, Any] = {**replay._asdict(), "places": places, "files": files, "seed": step_seed, "error": None}
        told = str(replay)
    except (RuntimeError, ValueError, FloatingPointError) as error:  # such as no memory for hooks
        seen = {"places": places, "files": files, "seed": step_seed, "error": first_line(error)}
        told = f"it could not be replayed ({first_line(error)})"
    ranks = gather(seen)
    path = run.folder / EVENTS / f"nonfinite_{step:08d}.pt"
    if run.is_main:
        content = {
            **{"format": DUMP_FORMAT, "step": step, "kind": type(run.config).__name__, "ranks": ranks},
            **{"config": dump_config(run.config), "precision": str(run.precision)},
        }
        with said_plainly(run.folder, ROOM), atomic_path(path) as temporary:
            torch.save(content, temporary)
    return f"{told}; mae replay {path} does the step again"


def read_dump(path: Path) -> dict[str, Any]:
    """What ``write_dump`` wrote. Raises ``UserError`` for another file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        newest = content["format"]
        ranks = content["ranks"]
        known = all(isinstance(rank["places"], list) and isinstance(rank["seed"], int) for rank in ranks)
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        raise UserError(
            f"{path} is no dump of a step ({why_not_loaded(error)}); give an events/nonfinite_*.pt of a run"
        ) from None
    if newest > DUMP_FORMAT or not known:
        raise UserError(f"{path} has format {newest}, and this version of the toolkit reads {DUMP_FORMAT}; update it")
    return dict(content)


def same_number(one: float, other: float) -> bool:
    """Whether two numbers are equal to rounding, or both not finite."""
    if not math.isfinite(one) or not math.isfinite(other):
        return math.isfinite(one) == math.isfinite(other)
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-8)
