"""What a report says: the results of two arms per task, how they compare, and the sentence that sums them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

AHEAD, WITHIN_SPREAD, BEHIND, ONE_SEED = "ahead", "within spread", "behind", "one seed"

VERDICT_TEXTS = {
    AHEAD: "yes",
    WITHIN_SPREAD: "no: within the spread",
    BEHIND: "no: behind",
    ONE_SEED: "cannot tell: needs two seeds",
}

COLUMNS = (
    "Task",
    "Metric",
    "Scratch",
    "Pre-trained",
    "Difference",
    "Spread over seeds",
    "Ahead by more than the spread",
)

SPREAD_MEANING = (
    "Means over seeds; ± is half the distance between an arm's best and worst seed. The spread over seeds is the whole "
    "of that distance, in the arm where it is larger. Pre-training counts as ahead only where the difference of the "
    "means is larger than that spread."
)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, a value per seed in each arm.

    metric            what was measured and its unit, as a reader should see it ("top-1 accuracy (%)")
    scratch           the network trained from random weights
    pretrained        the same network, budget and seeds, started from the pre-trained encoder
    note              the budget in a few words, shown beside the numbers

    Raises ValueError when an arm is empty or holds a value that is not finite.
    """

    metric: str
    scratch: list[float]
    pretrained: list[float]
    note: str = ""
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        for arm, values in (("scratch", self.scratch), ("pretrained", self.pretrained)):
            if not values:
                raise ValueError(f"{self.metric}: arm {arm!r} holds no value; give one per seed")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{self.metric}: arm {arm!r} holds {values}; every value has to be finite")


@dataclass(frozen=True)
class Comparison:
    """How the arms of one task compare.

    difference   mean of pre-trained minus mean of scratch, in the metric's unit
    spread       the larger of the two arms' (max - min) over seeds; None when an arm has a single seed
    verdict      AHEAD, WITHIN_SPREAD, BEHIND or ONE_SEED
    """

    scratch_mean: float
    pretrained_mean: float
    difference: float
    spread: float | None
    verdict: str


def compare(result: TaskResult) -> Comparison:
    """Compare the arms of ``result``: ahead and behind mean by more than the spread over seeds."""
    scratch_mean, pretrained_mean = fmean(result.scratch), fmean(result.pretrained)
    difference = pretrained_mean - scratch_mean
    if min(len(result.scratch), len(result.pretrained)) < 2:
        return Comparison(scratch_mean, pretrained_mean, difference, None, ONE_SEED)
    spread = max(max(values) - min(values) for values in (result.scratch, result.pretrained))
    gain = difference if result.higher_is_better else -difference
    verdict = AHEAD if gain > spread else BEHIND if gain < -spread else WITHIN_SPREAD
    return Comparison(scratch_mean, pretrained_mean, difference, spread, verdict)


def headline(tasks: dict[str, TaskResult]) -> str:
    """Answer "did pre-training help?" in one or two sentences, from the numbers alone."""
    if not tasks:
        return "No task was run, so there is nothing to compare."
    verdicts = {name: compare(result).verdict for name, result in tasks.items()}
    texts = {WITHIN_SPREAD: "within the spread over seeds", BEHIND: "behind", ONE_SEED: "open, with one seed"}

    def named(kind: str) -> list[str]:
        return [name_and_difference(name, tasks[name]) for name in tasks if verdicts[name] == kind]

    reasons = "; ".join(
        f"{join_words(names)} {'is' if len(names) == 1 else 'are'} {text}"
        for kind, text in texts.items()
        if (names := named(kind))
    )
    reasons, ahead, num_ahead = sentence(reasons), join_words(named(AHEAD)), len(named(AHEAD))
    if num_ahead == 0:
        opening = "Cannot tell" if set(verdicts.values()) == {ONE_SEED} else "No"
        return f"{opening}: in no task is the pre-trained encoder ahead by more than the spread over seeds. {reasons}"
    beats = "the pre-trained encoder beats the same network from scratch"
    margin = "by more than the spread over seeds."
    if num_ahead < len(tasks):
        share = f"In {count_word(num_ahead)} of {count_word(len(tasks))} tasks"
        return f"{share}: {beats} in {ahead}, {margin} {reasons}"
    scope = f"all {count_word(num_ahead)} tasks, {ahead}" if num_ahead > 1 else ahead
    return f"Yes: {beats} in {scope}, {margin}"


def name_and_difference(name: str, result: TaskResult) -> str:
    """Return "detection (+12.7)"."""
    return f"{name} ({signed(compare(result).difference, decimals([*result.scratch, *result.pretrained]))})"


def decimals(values: Sequence[float]) -> int:
    """Return how many decimals a metric is shown with: three for fractions of one, one for percentages and the like."""
    return 3 if all(abs(value) <= 1.5 for value in values) else 1


def mean_and_half_range(values: Sequence[float], digits: int) -> str:
    """Return "61.3 ± 0.4"; a single value stands alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a true minus, and no sign for what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def duration(seconds: float) -> str:
    """Return "8.4 s", "6 min 12 s" or "1 h 05 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_word(count: int) -> str:
    """Return a small number as a word."""
    words = ("no", "one", "two", "three", "four", "five", "six")
    return words[count] if count < len(words) else str(count)


def join_words(words: Sequence[str]) -> str:
    """Return "", "a", "a and b" or "a, b and c"."""
    return "".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(text: str) -> str:
    """Return ``text`` with a capital first letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."
