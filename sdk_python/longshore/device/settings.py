"""The settings of the device tier, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longshore.errors import ConfigError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """How the student runs.

    `num_threads` 0 has the number measured at every start, which takes that much longer.
    `memory_limit_bytes` caps the child process's private memory (interpreter, weights, cache and work space
    together). `max_waiting` bounds the requests that wait while one is answered. `prefill_chunk_tokens` is
    how much of a prompt is computed between two looks at cancellation. `variant` names one of the bundle's
    graphs; None takes the first. `speculation` has tokens guessed by prompt lookup and checked together, in
    variants that compute each row by itself (fp32, int4); answers stay as they are. `draft` is the folder of
    another bundle with the same tokens, whose smaller model guesses instead; it is checked as the main one is
    and shares its memory limit. `cancel_grace_s` is how
    long a step may go on after a cancel before the child is ended.
    `image_budget_ms` is the time to the first token that sizes of pictures are chosen for: the largest whose
    predicted time is inside it; of a request with a deadline, at most half of what remains.
    `trust` is a trust store of operators' keys, one of which must have signed the bundle; without it the
    files are checked against the manifest alone.
    """

    num_threads: int = 1
    memory_limit_bytes: int = 1024 * MIB
    max_waiting: int = 8
    prefill_chunk_tokens: int = 256
    calibration_s: float = 0.2
    start_timeout_s: float = 60.0
    cancel_grace_s: float = 5.0
    variant: str | None = None
    trust: Path | None = None
    speculation: bool = True
    draft: Path | None = None
    image_budget_ms: float = 1000.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_threads", 0, 256),
            ("memory_limit_bytes", MIB, 2**50),
            ("max_waiting", 0, 10_000),
            ("prefill_chunk_tokens", 1, 65_536),
            ("calibration_s", 0.0, 10.0),
            ("start_timeout_s", 0.1, 3600.0),
            ("cancel_grace_s", 0.1, 600.0),
            ("image_budget_ms", 0.0, 3_600_000.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"device setting {name} must be {low} to {high}, not {getattr(self, name)}")
