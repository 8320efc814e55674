"""Settings of the SDK: frozen dataclasses whose numbers all stand here.

Checks them once; reads nothing but `LONGSHORE_API_KEY`, and opens nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from longshore.errors import ConfigError

if TYPE_CHECKING:
    import ssl

Mode = Literal["auto", "prefer-device", "prefer-core", "device-only", "edge-only", "core-only"]
MODES: tuple[Mode, ...] = ("auto", "prefer-device", "prefer-core", "device-only", "edge-only", "core-only")

API_KEY_VARIABLE = "LONGSHORE_API_KEY"
MAX_IMAGE_SIDE_PX = 4096


def _check_positive(settings: Any) -> None:
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1e9:
            raise ConfigError(f"{item.name} must be a number above 0, not {value!r}", param=item.name)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How edge and core are reached. `verify` is an SSL context of the caller's, or True for the system's."""

    connect_timeout_s: float = 2.0
    max_connections: int = 100
    keepalive_expiry_s: float = 30.0
    http2: bool = False
    trust_env: bool = True
    verify: ssl.SSLContext | bool = True

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """The numbers of the routing policy.

    Priors stand in for a tier that was not measured yet. A slow measurement loses half of its
    weight every `measure_half_life_s`, so that a tier that was slow is tried again. A silence of
    `hang_ms` or more counts as a failure of the tier, a shorter one as the caller's deadline.
    """

    edge_prior_ttft_ms: float = 120.0
    core_prior_ttft_ms: float = 200.0
    device_prior_ttft_ms: float = 400.0
    prior_ms_per_token: float = 20.0
    prior_answer_tokens: float = 64.0
    prior_crowding: float = 0.25
    measure_half_life_s: float = 20.0
    weight_up: float = 0.5
    weight_down: float = 0.3
    hang_ms: float = 5000.0
    breaker_failures: int = 3
    breaker_open_s: float = 0.5
    breaker_max_open_s: float = 30.0
    max_rounds: int = 3
    backoff_base_s: float = 0.1
    backoff_cap_s: float = 2.0
    retry_budget_ratio: float = 0.2
    retry_budget_reserve: float = 10.0

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.weight_up > 1 or self.weight_down > 1:
            raise ConfigError("the weights of a sample must be at most 1", param="weight_up")


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """One client's settings, after `Client(...)` took its arguments apart."""

    edge_urls: tuple[str, ...] = ()
    core_urls: tuple[str, ...] = ()
    has_device: bool = False
    api_key: str | None = field(default=None, repr=False)
    mode: Mode = "auto"
    deadline_s: float = 60.0
    ttft_target_ms: int = 300
    image_max_side_px: int = 1536
    http: HttpSettings = field(default_factory=HttpSettings)
    routing: RoutingSettings = field(default_factory=RoutingSettings)

    def __post_init__(self) -> None:
        _check_positive(self)
        if not (self.edge_urls or self.core_urls or self.has_device):
            raise ConfigError("a client needs at least one of edge_url, core_url and device")
        check_mode(self.mode)
        if self.image_max_side_px > MAX_IMAGE_SIDE_PX:
            raise ConfigError(f"must be at most {MAX_IMAGE_SIDE_PX}", param="image_max_side_px")
        needed = {"device-only": self.has_device, "edge-only": self.edge_urls, "core-only": self.core_urls}
        if not needed.get(self.mode, True):
            raise ConfigError(f"mode {self.mode!r} needs that tier to be configured", param="mode")


def check_mode(mode: str) -> None:
    """Raises ConfigError for a mode that does not exist."""
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, not {mode!r}", param="mode")


def base_urls(value: str | Iterable[str] | None, name: str) -> tuple[str, ...]:
    """The addresses of a tier without trailing slash or `/v1`, each one once, in order."""
    if value is None:
        return ()
    urls = [value] if isinstance(value, str) else list(value)
    return tuple(dict.fromkeys(_base_url(url, name) for url in urls))


def _base_url(url: object, name: str) -> str:
    if not isinstance(url, str):
        raise ConfigError(f"{name} must be a string, not {type(url).__name__}", param=name)
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError when it is no number up to 65535
    except ValueError as error:
        raise ConfigError(f"{name} {url!r} is not a URL: {error}", param=name) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name} must be an http:// or https:// address, not {url!r}", param=name)
    if parts.query or parts.fragment or parts.username or not url.isprintable() or " " in url:
        raise ConfigError(f"{name} must be a plain address: scheme, host, port and path", param=name)
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def api_key_or_env(api_key: str | None) -> str | None:
    """The key given, else the environment's; a key must fit into an HTTP header."""
    key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE) or None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError("api_key must be printable ASCII without spaces", param="api_key")
    return key
