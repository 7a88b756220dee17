"""Progress of work that is counted in items, and times and speeds as people read them."""

from __future__ import annotations

import sys
import time


def speed_in_words(rate: float) -> str:
    """Two digits below ten, whole numbers above."""
    return f"{rate:.2g}" if rate < 10 else f"{rate:.0f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Counter:
    """Progress of work that is counted in items: a line every few seconds, or one line rewritten on a terminal."""

    def __init__(self, what: str, *, seconds_between: float = 2.0) -> None:
        self.what, self.between = what, seconds_between
        self._started = self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Report ``done`` of ``total``."""
        now = time.perf_counter()
        if now - self._last < self.between and done < total:
            return
        self._last = now
        rate = done / max(now - self._started, 1e-9)
        line = f"{self.what} {done}/{total}  {speed_in_words(rate)}/s  {clock((total - done) / max(rate, 1e-9))} left"
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end="\n" if done == total else "", flush=True)
        else:
            print(line, flush=True)
