"""What copying a unit and computing a token take, as measured while serving, and which is faster."""

from __future__ import annotations

WEIGHT_OF_NEW = 0.2


class Rate:
    """Seconds per piece, as a moving average weighted by size; None until something was measured."""

    def __init__(self) -> None:
        self.seconds_each: float | None = None

    def note(self, count: int, seconds: float) -> None:
        if count <= 0 or seconds <= 0:
            return
        new = seconds / count
        old = self.seconds_each
        self.seconds_each = new if old is None else old + WEIGHT_OF_NEW * (new - old)


class Speeds:
    """Predicts; what has not been measured yet is tried, so that it will be."""

    def __init__(self) -> None:
        self.save_unit = Rate()
        self.load_unit = Rate()
        self.compute_token = Rate()

    def is_load_faster(self, num_units: int, num_tokens: int) -> bool:
        """Whether bringing `num_units` in beats computing the `num_tokens` that they hold."""
        load_s, compute_s = self.load_unit.seconds_each, self.compute_token.seconds_each
        return load_s is None or compute_s is None or num_units * load_s < num_tokens * compute_s

    def is_swap_faster(self, num_units: int, num_tokens: int) -> bool:
        """The same with the way out counted."""
        save_s, compute_s = self.save_unit.seconds_each, self.compute_token.seconds_each
        load_s = self.load_unit.seconds_each if self.load_unit.seconds_each is not None else save_s
        if save_s is None or load_s is None or compute_s is None:
            return True
        return num_units * (save_s + load_s) < num_tokens * compute_s
