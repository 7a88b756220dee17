"""mmengine's runner with a quiet screen, CPU ranks, whole checkpoints, and errors of a user's in one sentence."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn

from mae_core.atomic import fsync_path, said_plainly
from mae_core.errors import UserError
from mae_core.training.checkpoints import model_fault, optimizer_fault
from mae_core.training.distributed import on_main, refuse_unused
from mae_core.training.run import ROOM
from transfer.segmentation.engine_mmseg.checkpoints import OURS, load_safely
from transfer.segmentation.engine_mmseg.exact import placed

WRITING = ".writing_"
"""How the name of a checkpoint begins that is not whole yet."""


def bare_model(model: nn.Module) -> nn.Module:
    """A model without the wrapping for several ranks."""
    return getattr(model, "module", model)


def trained_model(model: nn.Module) -> nn.Module:
    """The segmentor itself, without the wrappings for several ranks and for averaging over views."""
    model = bare_model(model)
    return model if hasattr(model, "backbone") else model.module


class SegmentationRunner(Runner):
    """mmengine's runner; dumps of many lines (environment, config, hooks) go to its log file alone."""

    _train_dataloader: Any
    seconds_saving = 0.0
    """Of all checkpoints so far."""

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """The run's logger, with a filter on what it shows on the screen."""
        logger = super().build_logger(*args, **options)
        for handler in logger.handlers:
            if not hasattr(handler, "baseFilename"):
                handler.addFilter(is_news)
        return logger

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """mmengine's; its checkpoints are ours, which are written by time and before a signal ends the run too."""
        if isinstance(hook, dict) and hook.get("type") in OURS:
            hook = {**hook, "type": OURS[hook["type"]]}
        super().register_hook(hook, priority)

    def build_train_loop(self, loop: Any) -> Any:
        """mmengine's, on samples whose randomness is the core's."""
        section = self._train_dataloader
        if isinstance(section, dict):
            different = self._randomness_cfg.get("diff_rank_seed", False)
            loader = self.build_dataloader(section, seed=self.seed, diff_rank_seed=different)
            self._train_dataloader = placed(loader, self.seed)
        return super().build_train_loop(loop)

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **more: Any) -> None:
        """mmengine's, in a file that takes its name when it is whole and on the disk."""
        temporary, final = Path(out_dir, WRITING + filename), Path(out_dir, filename)

        def write() -> None:
            try:
                with said_plainly(Path(out_dir), ROOM):
                    super(SegmentationRunner, self).save_checkpoint(out_dir, temporary.name, *args, **more)
                    fsync_path(temporary)
                    temporary.replace(final)
                    fsync_path(final.parent)
            finally:
                temporary.unlink(missing_ok=True)

        began = time.perf_counter()
        on_main(write, is_main=self.rank == 0)
        self.seconds_saving += time.perf_counter() - began

    def resume(self, filename: str, *args: Any, **more: Any) -> None:
        """mmengine's, of a checkpoint that fits the model and the optimizer; a lower rate of the config is honoured.

        Raises ``UserError`` for one of another model, and for a rate that is higher than the run's.
        """
        state, optimizer = load_safely(filename), self.optim_wrapper.optimizer
        stored = {name: state["optimizer"].get(name) for name in ("state", "param_groups")}
        step = state["meta"]["iter"]
        fault = model_fault(state["state_dict"], bare_model(self.model)) or optimizer_fault(stored, optimizer, step)
        if fault:
            raise UserError(f"checkpoint {filename} {fault}; resume with the configuration that the run started with")
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        super().resume(filename, *args, **more)
        lower_rates(optimizer, self.param_schedulers, rates)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """mmengine's wrapping for several ranks, which knows GPUs alone; on CPUs, batch norm is each rank's own."""
        if not self.distributed or torch.cuda.is_available() or model_wrapper_cfg is not None:
            return refuse_unused(super().wrap_model(model_wrapper_cfg, model))
        return refuse_unused(MMDistributedDataParallel(module=revert_sync_batchnorm(model), broadcast_buffers=False))


def lower_rates(optimizer: torch.optim.Optimizer, schedulers: Any, rates: list[float]) -> None:
    """Scale the rates of a resumed run where the config has a lower one than it started with: ``rates``, of its groups.

    Raises ``UserError`` where the config has a higher one.
    """
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        before = group.get("initial_lr", rate)
        if rate > before * (1 + 1e-9):
            raise UserError(
                f"optim_wrapper.optimizer.lr is higher than the run started with ({rate:g} against {before:g} in group "
                f"{number}); on a resume it may be lowered, and train_cfg.max_iters may change"
            )
        if rate < before * (1 - 1e-9):
            group["lr"], group["initial_lr"] = group["lr"] * rate / before, rate
            for scheduler in schedulers or ():
                scheduler.base_values[number] = rate


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of mmengine's belongs on the screen: metrics, checkpoints and most warnings. The progress of a
    training is shown by ``RunRecord``."""
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        return not re.search(r"deprecated|The prefix is not set", message)
    return bool(re.match(r"Iter\((?!train)|Epoch\(|Saving checkpoint|resumed|Advance dataloader", message))


@contextmanager
def worker_errors() -> Iterator[None]:
    """A ``UserError`` of a data loader's worker arrives with its traceback as text; its sentence alone goes on."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
