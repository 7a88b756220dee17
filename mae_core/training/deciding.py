"""Whether an optimizer step is taken: only with a finite loss and gradient, decided on a GPU without waiting for it.

There the step is left out on the device, and the host hears of it a step later, when the numbers have long been there.
That needs a fused optimizer, which knows of ``found_inf``, and nothing that follows its steps, such as an average of
the weights. On a CPU, where nothing is gained, each step is looked at as it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_core.data.loading import Batch
from mae_core.errors import UserError
from mae_core.training.distributed import OnItsWay
from mae_core.training.finite import RunningStatistics, SkippedSteps, clip_gradients
from mae_core.training.sharding import is_sharded

DEFERRED_ON: tuple[str, ...] = ("cuda",)

Losses = dict[str, Tensor]
FilesOf = Callable[[Batch, int], Sequence[str]]
"""(batch, step) -> names of the images whose pixels are not finite, on all ranks, which must all call it."""
Ending = Callable[[Batch, int], str]
"""(batch, step) -> what is saved of a step that ends the run, to be told; the model is as it was before that step."""


class Outcome(NamedTuple):
    """Of a step that was given to the device; the numbers are 1 for finite or 0, loss and norm of the gradient."""

    step: int
    batch: Batch
    numbers: OnItsWay


class Decisions:
    """Takes optimizer steps, or leaves them out and records why; see ``SkippedSteps`` for when that ends the run."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        skipped: SkippedSteps,
        *,
        files_of: FilesOf,
        ending: Ending,
        device: torch.device,
        clip_grad: float | None,
    ) -> None:
        self.model, self.optimizer, self.skipped = model, optimizer, skipped
        self.files_of, self.ending = files_of, ending
        self.clip_grad, self.statistics = clip_grad, RunningStatistics(model)
        followed = bool(getattr(optimizer, "_optimizer_step_post_hooks", None))
        plain = bool(optimizer.defaults.get("fused")) and not followed and not is_sharded(model)
        self.deferred = device.type in DEFERRED_ON and plain
        self._outcome: Outcome | None = None

    def take(self, step: int, batch: Batch, losses: Losses, norm: Tensor) -> tuple[Losses, int | Tensor]:
        """The step of the gradients that the model has -> the losses to be averaged, and 1 or 0 for whether they are;
        all ranks must call it with the same losses and norm."""
        finite = torch.isfinite(losses["loss"]) & torch.isfinite(norm)
        outcome = Outcome(step, batch, OnItsWay(torch.stack([finite.float(), losses["loss"].float(), norm.float()])))
        if not self.deferred:
            return (losses, 1) if self._settle(outcome, take=True) else ({}, 0)
        self.settle()
        self._clip(norm)
        self.optimizer.found_inf = (~finite).float()  # as torch's gradient scaler says it
        self.optimizer.step()
        del self.optimizer.found_inf
        self.statistics.put_back(unless=finite)
        self._outcome = outcome
        return {name: torch.where(finite, value, torch.zeros_like(value)) for name, value in losses.items()}, finite

    def settle(self) -> None:
        """Hear of the last step, where that is still to come: before anything is written."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._settle(outcome, take=False)

    def _settle(self, outcome: Outcome, *, take: bool) -> bool:
        finite, loss, norm = outcome.numbers.read()
        if finite:
            if take:
                self._clip(torch.tensor(norm))
                self.optimizer.step()
            self.skipped.taken()
            return True
        if take:
            self.statistics.put_back()
        files = self.files_of(outcome.batch, outcome.step)
        try:
            self.skipped.skip(outcome.step + 1, loss, norm, files)
        except UserError as error:
            raise UserError(f"{error}; {self.ending(outcome.batch, outcome.step)}") from None
        return False

    def _clip(self, norm: Tensor) -> None:
        if self.clip_grad is not None:
            clip_gradients(self.model.parameters(), self.clip_grad, norm)
