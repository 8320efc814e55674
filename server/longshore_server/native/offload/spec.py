"""The setting `kv_swap`: which memories take KV blocks off the device, fastest first. It opens none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from longshore_server.native.errors import ConfigError

FIELD = "kv_swap"
MAX_TIERS = 8
MAX_TIER_BYTES = 1 << 46
_UNIT_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_FORM = re.compile(r"(?:host|file:(?P<path>[^\0\n]{1,4000})):(?P<count>[0-9]{1,9})(?P<unit>[KMGT]iB)")


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier: host memory, or a file when `path` names one."""

    path: str | None
    num_bytes: int


def parse_kv_swap(entries: Sequence[str]) -> tuple[TierSpec, ...]:
    """Raises ConfigError, in one line, for the first wrong entry."""
    if isinstance(entries, str) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(FIELD, 'is a list such as ["host:32GiB", "file:/mnt/nvme/kv:256GiB"]')
    if len(entries) > MAX_TIERS:
        raise ConfigError(FIELD, f"has {len(entries)} tiers, at most {MAX_TIERS} are allowed")
    tiers = tuple(_parse(entry) for entry in entries)
    if sum(tier.path is None for tier in tiers) > 1 or any(tier.path is None for tier in tiers[1:]):
        raise ConfigError(FIELD, "may name host memory once, as the first tier")
    paths = [tier.path for tier in tiers if tier.path is not None]
    if len(set(paths)) != len(paths):
        raise ConfigError(FIELD, "names one file twice")
    return tiers


def _parse(entry: str) -> TierSpec:
    match = _FORM.fullmatch(entry)
    if match is None:
        raise ConfigError(
            FIELD, f'a tier is "host:SIZE" or "file:PATH:SIZE", SIZE as 32GiB, got {entry[:80]!r}'
        )
    num_bytes = int(match["count"]) * _UNIT_BYTES[match["unit"]]
    if not 1 <= num_bytes <= MAX_TIER_BYTES:
        raise ConfigError(FIELD, f"{entry[:80]!r} is not between 1 byte and 64 TiB")
    return TierSpec(match["path"], num_bytes)
