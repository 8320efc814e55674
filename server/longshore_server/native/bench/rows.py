"""The rows of a benchmark: what one line of the table measures, and how it is written on the command line.

decode:STREAMS[:IN:OUT]             that many answers at once (128 in, 256 out)
ttft:IN[:IDLE_MS]                   first token of one prompt on an engine that was idle for so long
mixed:REQUESTS[:LOW:HIGH]           prompts and answers of random lengths, all given at once (100, 1024)
poisson:RATE[:IN:SHARED:OUT]        arrivals at random, RATE a second; SHARED of the IN tokens are one of
                                    a few prefixes (512, 384, 64)
poisson-search[:IN:SHARED:OUT]      the highest such rate whose P99 time to first token is in bounds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longshore_server.native.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Decode:
    kind: ClassVar[str] = "decode"
    num_streams: int
    num_prompt: int = 128
    num_answer: int = 256

    @property
    def max_tokens(self) -> int:
        return self.num_prompt + self.num_answer

    @property
    def max_seqs(self) -> int:
        return self.num_streams


@dataclass(frozen=True, slots=True)
class FirstToken:
    kind: ClassVar[str] = "ttft"
    num_prompt: int
    idle_ms: int = 0  # a chip at its power limit is slower than one that had a pause

    @property
    def max_tokens(self) -> int:
        return self.num_prompt + 1

    @property
    def max_seqs(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Mixed:
    kind: ClassVar[str] = "mixed"
    num_requests: int
    low: int = 100
    high: int = 1024

    @property
    def max_tokens(self) -> int:
        return 2 * self.high

    @property
    def max_seqs(self) -> int:
        return self.num_requests


@dataclass(frozen=True, slots=True)
class Poisson:
    """A `rate_per_s` of None is searched for."""

    kind: ClassVar[str] = "poisson"
    rate_per_s: float | None
    num_prompt: int = 512
    num_shared: int = 384
    num_answer: int = 64

    @property
    def max_tokens(self) -> int:
        return self.num_prompt + self.num_answer

    @property
    def max_seqs(self) -> int:
        return 256


Row = Decode | FirstToken | Mixed | Poisson

MAX_IDLE_MS = 60_000

DEFAULT_ROWS = {
    "cpu": ("decode:1", "decode:8", "decode:32", "ttft:512"),
    "cuda": ("decode:1", "decode:32", "decode:128", "ttft:4096", "mixed:256", "poisson-search"),
}


def parse_row(text: str) -> Row:
    """The row that `text` writes; raises ConfigError naming it."""
    kind, *fields = text.split(":")
    try:
        return _check(_parse(kind, fields))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("rows", f"{text!r} is not a row: decode:32, ttft:4096, mixed:256, ...") from None


def _parse(kind: str, fields: list[str]) -> Row:
    if kind == "poisson":
        return Poisson(float(fields[0]), *map(int, fields[1:]))
    if kind == "poisson-search":
        return Poisson(None, *map(int, fields))
    classes: dict[str, type[Decode] | type[FirstToken] | type[Mixed]]
    classes = {"decode": Decode, "ttft": FirstToken, "mixed": Mixed}
    return classes[kind](*map(int, fields))


def _check(row: Row) -> Row:
    numbers = [getattr(row, name) for name in row.__slots__ if name != "idle_ms"]
    if any(number is not None and not 0 < number < 2**31 for number in numbers):
        raise ConfigError("rows", f"{row} holds a number that is not above 0")
    if isinstance(row, FirstToken) and not 0 <= row.idle_ms <= MAX_IDLE_MS:
        raise ConfigError("rows", f"{row}: a pause is 0 to {MAX_IDLE_MS} ms")
    if isinstance(row, Mixed) and row.low > row.high:
        raise ConfigError("rows", f"{row}: the lowest length is above the highest")
    if isinstance(row, Poisson) and row.num_shared >= row.num_prompt:
        raise ConfigError("rows", f"{row}: the shared prefix leaves no token of its own")
    return row


def name_of(row: Row) -> str:
    """A short name with the numbers that matter."""
    if isinstance(row, Decode):
        return f"decode {row.num_streams} x {row.num_prompt} in {row.num_answer} out"
    if isinstance(row, FirstToken):
        return f"ttft {row.num_prompt} in" + (f" after {row.idle_ms} ms idle" if row.idle_ms else "")
    if isinstance(row, Mixed):
        return f"mixed {row.num_requests} x {row.low}-{row.high}"
    rate = "search" if row.rate_per_s is None else f"{row.rate_per_s:g}/s"
    return f"poisson {rate}, {row.num_prompt} in ({row.num_shared} shared) {row.num_answer} out"
