"""How long a step takes, learnt from the steps so far, and how much prefill fits beside decodes in a time.

A pure model: durations are passed in, it reads no clock and knows no request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

WINDOW = 24  # steps; their pairwise slopes are taken anew after each
MIN_SAMPLES = 4
FIRST_TOKENS = 256  # of prefill beside decodes, until there is something to learn from
LEAST_DIFFERENCE = 16  # sizes closer than this part of the largest say nothing about a slope
MAX_GROWTH = 2  # over the largest step seen: a line is not trusted further than that


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step of n tokens takes `fixed_s + token_s * n`."""

    fixed_s: float
    token_s: float

    def seconds(self, num_tokens: int) -> float:
        return self.fixed_s + self.token_s * num_tokens

    def tokens_within(self, seconds: float) -> float:
        """How many tokens a step of so many seconds computes; 0 or less when not even an empty one fits."""
        if self.token_s > 0:
            return (seconds - self.fixed_s) / self.token_s
        return float("inf") if self.fixed_s <= seconds else 0.0


class StepTimes:
    """The last steps' sizes and durations, and the line through them.

    Steps that prefill have a line of their own: on a GPU they are launched in another way than steps of
    decodes alone, whose durations only help while all prefills are of one size. The line is Theil and Sen's,
    medians of slopes and of offsets, which one step in four may spoil (a compilation, say) without moving it.
    """

    def __init__(self) -> None:
        self._mixed: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._decodes: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._line: StepLine | None = None

    def note(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Takes a finished step in; one that took no time was not measured."""
        if seconds <= 0 or num_decodes + num_prefill_tokens == 0:
            return
        steps = self._mixed if num_prefill_tokens else self._decodes
        steps.append((num_decodes + num_prefill_tokens, seconds))
        if num_prefill_tokens:
            self._line = None

    @property
    def line(self) -> StepLine | None:
        """The line of steps that prefill; None before there are a few."""
        if self._line is None and len(self._mixed) >= MIN_SAMPLES:
            self._line = self._fit()
        return self._line

    def max_tokens(self, target_s: float) -> int:
        """The largest step with prefill whose predicted time is within `target_s`; may be 0 or less."""
        line = self.line
        if line is None:
            return FIRST_TOKENS
        largest = max(num_tokens for num_tokens, _ in self._mixed)
        return int(min(line.tokens_within(target_s), MAX_GROWTH * largest))

    def _fit(self) -> StepLine:
        steps = list(self._mixed)
        least = max(1, max(n for n, _ in steps) // LEAST_DIFFERENCE)
        slopes = [
            (late_s - early_s) / (late - early)
            for index, (late, late_s) in enumerate(steps)
            for early, early_s in steps[:index]
            if abs(late - early) >= least
        ]
        token_s = max(0.0, median(slopes)) if slopes else self._slope_from_decodes()
        return StepLine(max(0.0, median(s - token_s * n for n, s in steps)), token_s)

    def _slope_from_decodes(self) -> float:
        """Where all prefills have one size: over the decodes, or from nothing when there were none."""
        num_tokens, seconds = self._mixed[-1][0], median(s for _, s in self._mixed)
        if not self._decodes:
            return seconds / num_tokens
        num_rows = median(n for n, _ in self._decodes)
        if num_rows >= num_tokens:
            return 0.0
        return max(0.0, seconds - median(s for _, s in self._decodes)) / (num_tokens - num_rows)


class StepBudget:
    """How many tokens a step may compute that decodes as well, for a gap between tokens of `target_s`.

    Prefill always gets `min_prefill` tokens: a target below what a step takes slows it, and cannot stop it.
    """

    def __init__(self, times: StepTimes, target_s: float, min_prefill: int) -> None:
        self._times = times
        self._target_s = target_s
        self._min_prefill = min_prefill

    def tokens(self, num_decodes: int) -> int:
        """For a step with so many decodes, those included."""
        return max(self._times.max_tokens(self._target_s), num_decodes + self._min_prefill)
