"""The loop of one training run: steps, its schedule, the wall time that counts, the lines of its curve.

It knows neither model nor data; whoever derives from it gives losses and says what a line holds.
"""

from __future__ import annotations

import contextlib
import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from shop.optim import lr_factor

STEPS_AT_ONCE = 25  # between two looks at the clock, which wait for the GPU


class Schedule(Protocol):
    """When a run ends, at `num_steps` or `max_seconds`, and its learning rates, by the nearer of the two."""

    @property
    def out(self) -> Path: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_fraction(self) -> float: ...


ScheduleT = TypeVar("ScheduleT", bound=Schedule)


class TrainingLoop(ABC, Generic[ScheduleT]):
    """What changes during one run; a derived class sets `model` and `optimisers`."""

    untimed_steps: ClassVar[int]  # compilation happens in the first ones and is no part of the time compared
    model: nn.Module
    optimisers: list[torch.optim.Optimizer]

    def __init__(self, run: ScheduleT, device: str) -> None:
        self.run, self.device = run, device
        self.step, self.train_s, self.last_steps_s = 0, 0.0, 0.0
        run.out.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def next_losses(self) -> dict[str, Tensor]:
        """Those of the next batch; "total" is what is minimised."""

    @property
    def progress(self) -> float:
        return max(self.step / self.run.num_steps, self.train_s / self.run.max_seconds)

    def autocast(self) -> Any:
        return (
            torch.autocast(self.device, torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()
        )

    def train_step(self) -> dict[str, Tensor]:
        factor = lr_factor(self.step, self.progress, self.run.warmup_steps, self.run.decay_fraction)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("full_lr", group["lr"]) * factor
        with self.autocast():
            losses = self.next_losses()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def advance(self) -> dict[str, Tensor]:
        """STEPS_AT_ONCE steps, or as many as are left, or at the start the untimed ones; the last losses."""
        started_s, is_timed = self._clock_s(), self.step > 0
        until = min(self.run.num_steps, self.step + (STEPS_AT_ONCE if is_timed else self.untimed_steps))
        losses: dict[str, Tensor] = {}
        while self.step < until and self.progress < 1.0:
            losses = self.train_step()
        self.last_steps_s = self._clock_s() - started_s
        if is_timed:
            self.train_s += self.last_steps_s
        return losses

    def write_line(self, line: dict[str, Any], losses: dict[str, Tensor], exact: Any) -> dict[str, Any]:
        """Adds step, time, losses and exact match, and the line to the curve."""
        line |= {
            "step": self.step,
            "train_s": round(self.train_s, 2),
            "loss": {name: round(float(loss), 4) for name, loss in losses.items()},
            "exact": exact,
        }
        with (self.run.out / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    def _clock_s(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
