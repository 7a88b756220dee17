"""Losses and gradients that are not finite: their step is skipped; weights with NaN or infinity are never written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from mae_core.data.decoding import LARGEST_PIXEL
from mae_core.errors import UserError

MOST_IN_A_ROW = 10
LARGEST_SHARE = 0.25
"""Of the steps since the start that may be skipped, counted from ``FEWEST_STEPS`` steps on."""
FEWEST_STEPS = 40
ADVICE = (
    "continue from the last checkpoint with --resume and a lower optim.base_lr; if that does not help, start "
    "again with a lower optim.base_lr, in another folder with output=FOLDER"
)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar tensor on their device; finite exactly where no gradient is NaN,
    infinite, or too large to square."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale all gradients, in shards or whole, so that their ``norm`` becomes ``largest`` where it is larger, as
    ``torch.nn.utils.clip_grad_norm_`` does."""
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (shards if isinstance(parameter.grad, DTensor) else whole).append(parameter)
    if whole:
        nn.utils.clip_grads_with_norm_(whole, largest, norm)
    for shard in shards:
        grad = shard.grad
        assert isinstance(grad, DTensor)
        grad.to_local().mul_(torch.clamp(largest / (norm + 1e-6), max=1.0))


def non_finite(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floats = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return [name for name, x in floats.items() if not bool(torch.isfinite(x).all())]


def refuse_non_finite(state: Mapping[str, Any], what: str, advice: str = ADVICE) -> None:
    """Raise ``UserError`` where weights hold NaN or infinity, so that ``what`` is never written with them."""
    bad = non_finite(state)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(state)} tensors of the model hold NaN or infinity, such as {bad[0]}; {what} is not "
            f"written; {advice}"
        )


class RunningStatistics:
    """The running statistics of a model's batch norms before a step: a forward pass changes them, taken or not."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember them as they are."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    def put_back(self, unless: Tensor | None = None) -> None:
        """As they were at the last ``keep``; on their device, where a scalar ``unless`` is false there."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept if unless is None else torch.where(unless, buffer, kept))


class SkippedSteps:
    """Counts, logs and reports the skipped steps, and stops a run that has too many of them.

    record  takes an entry of the log
    say     takes a line for the screen
    advice  what to do, at the end of the message that stops the run
    """

    def __init__(
        self, record: Callable[[Mapping[str, Any]], None], say: Callable[[str], None], advice: str = ADVICE
    ) -> None:
        self.record, self.say, self.advice = record, say, advice
        self.in_a_row = self.total = self.steps = 0
        self.files: dict[str, None] = {}

    def taken(self) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0
        self.steps += 1

    def skip(self, step: int, loss: float | None, norm: float, files: Sequence[str] = ()) -> None:
        """Count a step that was not taken; all ranks must call it with the same numbers.

        files  those whose pixels are the cause
        Raises ``UserError`` for too many in a row, or too large a share of all.
        """
        self.in_a_row += 1
        self.total += 1
        self.steps += 1
        self.files.update(dict.fromkeys(files))
        what = "gradient" if loss is None or math.isfinite(loss) else "loss"
        numbers = {"loss": str(loss), "gradient_norm": str(norm)}  # as texts: JSON has no NaN
        entry = {"event": f"non-finite {what}, step skipped", "step": step, "numbers": numbers}
        self.record({**entry, "files": list(files)} if files else entry)
        cause = f"; pixels that are not finite, or too large, in {listed(files)}" if files else ""
        self.say(f"step {step}: the {what} is not finite; the step is skipped{cause}")
        if self.in_a_row == MOST_IN_A_ROW:
            raise UserError(
                f"the {what} was not finite for {MOST_IN_A_ROW} steps in a row, up to step {step}; {self.remedy}"
            )
        if self.steps >= FEWEST_STEPS and self.total > LARGEST_SHARE * self.steps:
            raise UserError(
                f"{self.total} of {self.steps} steps, up to step {step}, had a {what} that is not finite; {self.remedy}"
            )

    @property
    def remedy(self) -> str:
        """What to do about steps that are skipped."""
        if self.files:
            return f"remove or correct the images whose pixels are the cause: {listed(list(self.files))}"
        return self.advice

    def summary(self) -> None:
        """Say at the end how many steps were not taken, where there are any."""
        if self.total:
            named = f"; pixels of {listed(list(self.files))} are the cause" if self.files else ""
            self.say(
                f"{self.total} of {self.steps} steps were skipped because the loss or gradient was not finite{named}"
            )


def listed(files: Sequence[str]) -> str:
    """The first three, and how many there are besides."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} others" if len(files) > 3 else "")


def bad_samples(pixels: Tensor) -> list[int]:
    """Positions in a batch (B, ...) of the samples with a value that is not finite or far from any picture's."""
    largest = pixels.flatten(1).abs().amax(1)
    return torch.nonzero(~(largest <= LARGEST_PIXEL)).flatten().tolist()
