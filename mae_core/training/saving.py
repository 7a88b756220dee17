"""Checkpoints that are written while the training goes on: from a copy, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mae_core.training.memory import available_memory

ROOM = 0.5
"""Share of the free memory that a copy may take."""


class Beside:
    """Work in a thread of its own. The process does not end before it, and its error is raised by ``wait``."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin, after what was begun before. Raises its error."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # whatever it is, it is raised where somebody waits
                self._error = error

        self._thread = Thread(target=run, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, and keep its error for ``wait``."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait for the end. Raises the error of the work, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def copied(value: Any) -> Any:
    """A tensor, or what holds tensors, in memory of its own that the training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return type(value)(copied(inner) for inner in value) if isinstance(value, list | tuple) else value


def copy_fits(*values: Any) -> bool:
    """Whether there is room for a copy."""
    return sum(map(_bytes, values)) < ROOM * available_memory(torch.device("cpu"))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inner))
