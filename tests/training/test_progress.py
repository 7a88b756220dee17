"""When a run says something: by steps, and by seconds where steps are slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mae_core.counting import speed_in_words
from mae_core.training import progress as module
from mae_core.training.progress import OtherWork, Progress


class Listener:
    """Takes what a run says and records; the clock that the progress reads stands still but for ``step``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.recorded: list[dict[str, Any]] = []
        self.now, self.held_out = 0.0, None
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def say(self, line: str) -> None:
        self.said.append(line)

    def record(self, values: dict[str, Any]) -> None:
        self.recorded.append(values)

    def share_unreadable(self) -> None:
        """Nothing was unreadable."""


def steps_told(monkeypatch: pytest.MonkeyPatch, seconds: float, *, total: int, every: int) -> tuple[list[str], list]:
    listener = Listener(monkeypatch)
    run: Any = listener
    counted = Progress(run, 0, total, every)
    for done in range(1, total + 1):
        listener.now += seconds
        counted.step(done, 4, {"loss": torch.tensor(float(done))}, 0.1)
    return listener.said, listener.recorded


@pytest.mark.parametrize(
    "seconds, steps",
    [
        (0.1, [20, 40]),
        (1.0, [1, 12, 20, 31, 40]),  # after the first step, and then no silence of more than 10 s
        (30.0, list(range(1, 41))),
    ],
)
def test_a_line_comes_by_steps_and_by_seconds(seconds, steps, monkeypatch):
    said, recorded = steps_told(monkeypatch, seconds, total=40, every=20)
    assert [int(line.split()[1].partition("/")[0]) for line in said] == steps
    assert [values["step"] for values in recorded] == [20, 40]  # the log does not depend on the clock
    assert recorded[0]["loss"] == 10.5 and recorded[1]["images_per_second"] == pytest.approx(4 / seconds, abs=0.005)


def test_the_time_left_is_known_after_the_first_step(monkeypatch):
    said, _ = steps_told(monkeypatch, 30.0, total=11, every=20)
    assert said[0].split()[:2] == ["step", "1/11"]
    assert "0.13 images/s" in said[0] and said[0].endswith("5:00 left")


def seconds_left(line: str) -> int:
    *hours, minutes, seconds = map(int, line.split()[-2].split(":"))
    return 3600 * sum(hours) + 60 * minutes + seconds


@pytest.mark.parametrize("total, every", [(100, 25), (40, 100)])
def test_the_time_left_counts_evaluations_checkpoints_and_the_end(total, every, monkeypatch):
    """From a tenth on it is right to 15 %: a slow first step, and work between and after the steps that takes
    half as long again as its guess, or has none."""
    listener, takes = Listener(monkeypatch), {"evaluation": 15.0, "checkpoint": 0.5, "scoring": 12.0}
    evaluation, checkpoint, scoring = OtherWork(every, worth=40), OtherWork(5), OtherWork(total, worth=40)
    counted = Progress(listener, 0, total, 1, besides=[evaluation, checkpoint, scoring])
    shown: list[tuple[int, float, int]] = []
    for done in range(1, total + 1):
        listener.now += 20.0 if done == 1 else 1.0
        counted.step(done, 4, {"loss": torch.tensor(1.0)}, 0.1)
        shown.append((done, listener.now, seconds_left(listener.said[-1])))
        for name, beside in (("evaluation", evaluation), ("checkpoint", checkpoint)):
            if done % beside.every == 0 or done == total:
                with counted.paused(beside):
                    listener.now += takes[name]
    end = listener.now + takes["scoring"]
    errors = [(at + left - end) / end for done, at, left in shown if done >= total / 10]
    assert max(map(abs, errors)) < 0.15
    assert shown[-1][2] >= 20  # after the last step, the evaluation and the scoring are still to come
    assert counted.seconds == pytest.approx(20 + total - 1)  # training alone


@pytest.mark.parametrize("rate, words", [(0.134, "0.13"), (9.96, "10"), (3.0, "3"), (123.4, "123")])
def test_slow_rates_keep_two_digits(rate, words):
    assert speed_in_words(rate) == words
