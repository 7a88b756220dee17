"""Signals that end a training in good order: the step is finished, saved on all ranks, and said."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from mae_core.errors import EXIT_PREEMPTED
from mae_core.training.distributed import OnItsWay, sum_over_ranks, world_size

EXIT_INTERRUPTED = 130
"""Exit code after SIGINT (Ctrl-C), as shells give it."""
TOGETHER = 2.0
"""Seconds within which signals count as one: torchrun passes on what the whole group of processes was sent already."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """A training that a signal ended after it was saved; ``code`` is the exit code of the command."""


class Signals:
    """While it is entered, the first signal of ``SIGNALS`` is noted in ``received``, and a second ends at once.

    In other threads than the main one nothing changes, for Python takes signals in that one alone.

    limit  seconds from the first signal after which the process ends, saved or not; 0: none
    """

    def __init__(self, limit: float = 0) -> None:
        self.limit = limit
        self.received: signal.Signals | None = None
        self.saved = False
        """Whether the training is saved, so that what comes after the limit loses nothing."""
        self._timer: threading.Timer | None = None
        self._at = 0.0
        self._flags: OnItsWay | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            if self.limit:
                self._timer = threading.Timer(self.limit, self._give_up)
                self._timer.daemon = True
                self._timer.start()
        elif time.monotonic() - self._at > TOGETHER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, due: bool, device: torch.device, *, deferred: bool = False) -> tuple[bool, bool]:
        """Whether any rank was sent a signal, and whether any finds a checkpoint due: the same on all ranks, which must
        all call it; with ``deferred`` as it was at the last call, so that nobody waits for a GPU."""
        stop = self.received is not None
        if world_size() == 1:
            return stop, due
        own = torch.tensor([float(stop), float(due)], pin_memory=device.type == "cuda")
        flags = OnItsWay(sum_over_ranks(own.to(device, non_blocking=True)))
        found, self._flags = self._flags if deferred else flags, flags
        stopping, late = (0.0, 0.0) if found is None else found.read()
        if late > 0:
            self._flags = None  # sent before the checkpoint that this call brings, and would bring another
        return stopping > 0, late > 0

    def told(self, done: int, total: int) -> str:
        """What a training that is stopped and saved after ``done`` steps says."""
        what = self.received.name if self.received else "a signal to another rank"
        return f"{what}: stopped after step {done} of {total}, which is saved; the same command with --resume continues"

    def stopped(self) -> Stopped:
        """The exception that ends the command, on a rank that got no signal itself as on the others."""
        return Stopped(self._code())

    def _code(self) -> int:
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED

    def _give_up(self) -> None:
        """End while there is still time to say so; files are written whole or not at all."""
        name = self.received.name if self.received else "a signal"
        what = "saved, but not ended" if self.saved else "not saved"
        print(
            f"{name}: {what} within the {self.limit:g} s of stop_seconds; the same command with --resume auto goes on "
            "from the last whole checkpoint",
            flush=True,
        )
        os._exit(self._code())
