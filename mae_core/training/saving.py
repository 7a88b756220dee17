"""Checkpoints that are written while the training goes on: from a copy, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mae_core.training.memory import available_memory
from mae_core.weights.files import tensors_below

ROOM = 0.5
"""Share of the free memory that a copy may take."""


class Beside:
    """Work in a thread of its own, one at a time. The process does not end before it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        """Why the last work failed, until ``take_error``."""
        self.seconds = 0.0
        """What the last work took."""
        self._thread: Thread | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin, after what was begun before."""
        self.join()

        def run() -> None:
            began = time.monotonic()
            try:
                work()
            except Exception as error:  # whatever it is, the training's own thread has to know
                self.error = error
            self.seconds = time.monotonic() - began

        self._thread = Thread(target=run, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> Exception | None:
        """Wait for the end -> why the work failed, told once; None where it did not."""
        self.join()
        error, self.error = self.error, None
        return error


def copied(value: Any) -> Any:
    """A tensor, or what holds tensors, in memory of its own that the training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return type(value)(copied(inner) for inner in value) if isinstance(value, list | tuple) else value


def copy_fits(*values: Any) -> bool:
    """Whether there is room for a copy."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors_below(values))
    return needed < ROOM * available_memory(torch.device("cpu"))
