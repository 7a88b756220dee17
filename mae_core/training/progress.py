"""What a run says while it works: loss, images per second, the share of time spent waiting for data, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mae_core.counting import clock, speed_in_words
from mae_core.training.memory import memory_held

SLOW_DATA_SHARE = 0.3
SILENCE = 10.0
"""Seconds after which a line is due, whatever ``log.every`` says."""
NEAR_CHANCE = 0.01
"""Relative distance from the loss of knowing nothing within which a training has learnt nothing."""
STEPS_TO_LEARN = 200


class Listener(Protocol):
    """What a progress tells: a run, or who stands in for one. ``held_out``: the last loss on images kept out."""

    held_out: float | None

    def say(self, text: str) -> None:
        """Show a line."""

    def record(self, event: dict[str, Any]) -> None:
        """Keep an entry of the log."""

    def share_unreadable(self) -> None:
        """Bring together what the ranks could not read."""


@dataclass
class OtherWork:
    """Work between the steps of a run, or after the last one, that is no step: an evaluation, pictures, checkpoints.

    every   it comes after each so many steps, and after the last one
    worth   how many images of a training step take as long as it, for as long as none of it was measured
    """

    every: int
    worth: float = 0.0
    times: int = 0
    seconds: float = 0.0

    def left(self, done: int, total: int, seconds_an_image: float) -> float:
        """Seconds of those that are due from the end of step ``done`` on, its own included."""
        due = total // self.every - (done - 1) // self.every + (total % self.every > 0)
        return due * (self.seconds / self.times if self.times else self.worth * seconds_an_image)


class Progress:
    """Counts steps, images and waiting time; logs every ``every`` steps. ``chance_loss``: the loss of a prediction that
    does not depend on the image, at which a training that does not work stays. ``besides``: what the time that is left
    holds beside the steps."""

    def __init__(
        self,
        run: Listener,
        start_step: int,
        total_steps: int,
        every: int,
        chance_loss: float | None = None,
        besides: Sequence[OtherWork] = (),
    ) -> None:
        self.run, self.total, self.every, self.chance_loss = run, total_steps, every, chance_loss
        self.besides = list(besides)
        self.first = self.done = start_step
        self.loss = float("nan")
        self.seconds = self.images_per_second = 0.0
        self._images = 0
        self._started = time.perf_counter()
        self._interval = self._told = self._started
        self._waited = self._paused = self._all_paused = self._first_step = 0.0
        self._step_images = 0
        self._interval_images = 0
        self._interval_steps: int | Tensor = 0
        self._sums: dict[str, float | Tensor] = {}
        self._warned = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        before = time.perf_counter()
        yield
        self.waited(time.perf_counter() - before)

    def waited(self, seconds: float) -> None:
        """Count seconds of the wait for the next batch, where ``waiting`` cannot be around it."""
        self._waited += seconds

    @contextmanager
    def paused(self, beside: OtherWork | None = None) -> Iterator[None]:
        """Around work that is not training: pictures, evaluation, checkpoints; ``beside`` learns what it takes."""
        before = time.perf_counter()
        yield
        self.took(time.perf_counter() - before, beside)

    def took(self, seconds: float, beside: OtherWork | None = None) -> None:
        """Count seconds of such work, where ``paused`` cannot be around it."""
        self._paused += seconds
        self._all_paused += seconds
        if beside is not None:
            beside.times, beside.seconds = beside.times + 1, beside.seconds + seconds

    def step(self, done: int, images: int, losses: Mapping[str, Tensor], lr: float, counted: int | Tensor = 1) -> None:
        """Count a step; log if it is time to. ``counted``: 1, or 0 where its losses are none to average (a tensor stays
        on its device until then)."""
        self.done, self._step_images = done, images
        if done == self.first + 1:
            self._first_step = self._worked()
        self._interval_images += images
        if losses:
            self._interval_steps = self._interval_steps + counted
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        if done % self.every == 0 or done == self.total:
            self._log(lr)
            return
        silent = time.perf_counter() - self._told
        until_told = silent * min(self.every, self.total - self.first)
        if silent > SILENCE or (done == self.first + 1 and until_told > SILENCE):
            self._tell(lr)

    def _worked(self) -> float:
        return time.perf_counter() - self._started - self._all_paused

    def left(self) -> float:
        """Seconds to the end, by what steps took so far and what else is due. The first step, in which processes and
        libraries start, counts while it is the only one."""
        steps = self.done - self.first
        pace = (self._worked() - self._first_step) / (steps - 1) if steps > 1 else self._first_step
        rest = sum(beside.left(self.done, self.total, pace / max(self._step_images, 1)) for beside in self.besides)
        return (self.total - self.done) * pace + rest

    def _tell(self, lr: float) -> None:
        """A line on the screen alone, between those of the log: slow steps are seen to go on."""
        seconds = max(time.perf_counter() - self._interval - self._paused, 1e-9)
        loss = float(self._sums.get("loss", float("nan"))) / max(self._interval_steps, 1)
        self._say(loss, lr, self._interval_images / seconds, self._waited / seconds)

    def _say(self, loss: float, lr: float, rate: float, waiting: float) -> None:
        held_out = "" if self.run.held_out is None else f" (kept out {self.run.held_out:.4f})"
        self.run.say(
            f"step {self.done}/{self.total}  loss {loss:.4f}{held_out}  lr {lr:.2e}  {speed_in_words(rate)} images/s  "
            f"{memory_held() / 2**30:.1f} GiB  waiting for data {waiting:.0%}  {clock(self.left())} left"
        )
        self._told = time.perf_counter()

    def _log(self, lr: float) -> None:
        seconds = max(time.perf_counter() - self._interval - self._paused, 1e-9)
        self.seconds += seconds
        self._images += self._interval_images
        self.images_per_second = self._images / self.seconds
        self.run.share_unreadable()
        steps = int(self._interval_steps)
        means = {name: float(value) / steps for name, value in self._sums.items()} if steps else {}
        self.loss = means.get("loss", float("nan"))
        waiting = self._waited / seconds
        rate = self._interval_images / seconds
        self.run.record(
            {"step": self.done, **means, "lr": lr, "images_per_second": round(rate, 2), "data_wait": round(waiting, 4)}
        )
        self._say(self.loss, lr, rate, waiting)
        if waiting > SLOW_DATA_SHARE and not self._warned and self.done - self.first >= 2 * self.every:
            self._warned = True
            self.run.say(
                f"training waits {waiting:.0%} of its time for data: raise data.workers, or store smaller images"
            )
        self._warn_of_chance()
        self._interval = time.perf_counter()
        self._waited = self._paused = 0.0
        self._interval_images, self._interval_steps = 0, 0
        self._sums = {}

    def _warn_of_chance(self) -> None:
        if self.chance_loss is None or self.done < STEPS_TO_LEARN or self.done - self.first < 2 * self.every:
            return
        if abs(self.loss / self.chance_loss - 1) < NEAR_CHANCE:
            self.run.record({"event": "loss of predicting the mean", "step": self.done})
            self.run.say(
                f"the loss is still {self.chance_loss:.4f}, that of predicting the mean whatever the image shows: look "
                "at the pictures, the labels and optim.base_lr"
            )
            self.chance_loss = None
