"""mmengine's runner with a quiet screen, CPU ranks, and errors of a user's in one sentence."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn

from mae_core.errors import UserError


def bare_model(model: nn.Module) -> nn.Module:
    """A model without the wrapping for several ranks."""
    return getattr(model, "module", model)


def trained_model(model: nn.Module) -> nn.Module:
    """The segmentor itself, without the wrappings for several ranks and for averaging over views."""
    model = bare_model(model)
    return model if hasattr(model, "backbone") else model.module


class SegmentationRunner(Runner):
    """mmengine's runner; dumps of many lines (environment, config, hooks) go to its log file alone."""

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """The run's logger, with a filter on what it shows on the screen."""
        logger = super().build_logger(*args, **options)
        for handler in logger.handlers:
            if not hasattr(handler, "baseFilename"):
                handler.addFilter(is_news)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """mmengine's wrapping for several ranks, which knows GPUs alone; on CPUs, batch norm is each rank's own."""
        if not self.distributed or torch.cuda.is_available() or model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(module=revert_sync_batchnorm(model), broadcast_buffers=False)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of mmengine's belongs on the screen: progress, metrics, checkpoints and most warnings."""
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        return not re.search(r"deprecated|The prefix is not set", message)
    return bool(re.match(r"Iter\(|Epoch\(|Saving checkpoint|resumed|Advance dataloader", message))


@contextmanager
def worker_errors() -> Iterator[None]:
    """A ``UserError`` of a data loader's worker arrives with its traceback as text; its sentence alone goes on."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
