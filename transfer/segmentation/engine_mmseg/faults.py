"""The hook under whose eyes mmengine's loop follows the core's laws for numbers that go wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mae_core import layout
from mae_core.training.finite import RunningStatistics, SkippedSteps, gradient_norm, refuse_non_finite
from transfer.segmentation.config import WORK_DIR

ADVICE = (
    "continue from the last checkpoint with --resume and a lower optim_wrapper.optimizer.lr; if that does not help, "
    f"start again with a lower one, in another {WORK_DIR}"
)


class Faults(Hook):
    """Skips a step whose gradient is not finite, with a record, and lets no checkpoint with NaN be written.

    After a backward pass on several ranks all have the same gradients, and so decide the same.
    """

    priority = "VERY_HIGH"  # before the hooks that look at the weights

    def __init__(self) -> None:
        self.norm: float | None = None

    def before_train(self, runner: Runner) -> None:
        """Test the gradients before every step of the optimizer."""
        self.statistics = RunningStatistics(runner.model)
        self.skipped = SkippedSteps(lambda entry: _record(runner, entry), _say, ADVICE)
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        norm = gradient_norm(parameter for group in optimizer.param_groups for parameter in group["params"])
        if not bool(torch.isfinite(norm)):
            self.norm = float(norm)
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left as they are

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remember what a forward pass changes."""
        self.norm = None
        self.statistics.keep()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count the step; of one that was not taken, put the running statistics back."""
        if self.norm is None:
            self.skipped.taken()
            return
        self.statistics.put_back()
        loss = (outputs or {}).get("loss")
        self.skipped.skip(runner.iter + 1, None if loss is None else float(loss.detach()), self.norm)

    def after_train(self, runner: Runner) -> None:
        """Say how many were not taken."""
        self.skipped.summary()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite."""
        refuse_non_finite(checkpoint["state_dict"], f"the checkpoint of step {runner.iter + 1}", ADVICE)


def _record(runner: Runner, entry: Mapping[str, Any]) -> None:
    if is_main_process():
        with Path(runner.work_dir, layout.LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)
