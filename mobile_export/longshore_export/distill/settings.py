"""The settings of a distillation: one frozen dataclass, checked when made. It reads no file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from longshore.errors import ConfigError
from longshore_export.distill.losses import DistillWeights

Start = Literal["random", "layer-drop", "weights"]

# What may differ between a run and its resumption.
_FREE = frozenset({"out", "checkpoint_every", "log_every"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """One run. `student` is a config.json, or a folder with one and, where it differs, a tokenizer.

    `start` says where the student's first weights come from: drawn from `seed`, evenly spaced layers of the
    teacher ("layer-drop"; all widths must be the teacher's), or the student folder's own. From
    `on_policy_from` (0..1) of the run on, a share `on_policy_share` of the steps is on-policy. Rows are per
    process. Raises ConfigError naming a wrong field.
    """

    teacher: Path
    student: Path
    data: Path
    out: Path
    start: Start = "random"
    num_steps: int = 1000
    num_rows: int = 8
    max_tokens: int = 512
    learning_rate: float = 3e-4
    warmup_steps: int = 50
    seed: int = 0
    hard_weight: float = 0.5
    soft_weight: float = 0.5
    hidden_weight: float = 2.0
    attention_weight: float = 0.0
    hidden_until: float = 0.6
    temperature: float = 1.0
    on_policy_from: float = 1.0
    on_policy_share: float = 0.5
    on_policy_tokens: int = 64
    on_policy_beta: float = 0.5
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "num_rows",
            "max_tokens",
            "on_policy_tokens",
            "checkpoint_every",
            "log_every",
        ):
            _check(name, getattr(self, name), 1, 1 << 31)
        for name in ("hard_weight", "soft_weight", "hidden_weight", "attention_weight"):
            _check(name, getattr(self, name), 0.0, 1e6)
        for name in ("on_policy_from", "on_policy_share"):
            _check(name, getattr(self, name), 0.0, 1.0)
        _check("warmup_steps", self.warmup_steps, 0, 1 << 31)
        _check("learning_rate", self.learning_rate, 1e-9, 1.0)
        _check("hidden_until", self.hidden_until, 1e-6, 1.0)
        _check("temperature", self.temperature, 0.01, 100.0)
        _check("on_policy_beta", self.on_policy_beta, 0.01, 0.99)
        _check("seed", self.seed, 0, 2**63 - 1)
        if not (self.hard_weight or self.soft_weight or self.hidden_weight or self.attention_weight):
            raise ConfigError("every loss has the weight 0: there is nothing to learn from")

    @property
    def weights(self) -> DistillWeights:
        """The weights in the form that the losses take."""
        return DistillWeights(
            hard=self.hard_weight,
            soft=self.soft_weight,
            hidden=self.hidden_weight,
            attention=self.attention_weight,
            hidden_until=self.hidden_until,
            temperature=self.temperature,
            jsd_beta=self.on_policy_beta,
        )

    @property
    def digest(self) -> str:
        """Changes with every setting that a resumed run must share with the one it goes on with."""
        values = {name: str(value) for name, value in asdict(self).items() if name not in _FREE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}: must be {least:g} to {most:g}, not {value!r}")
