"""The edge's settings: from a TOML file, the environment (LONGSHORE_EDGE_<FIELD>) and flags, in this order.

Read once at start; an unknown or unparsable setting is a ConfigError of one line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Interval, Len, MaxLen, Predicate

from longshore.errors import ConfigError, InvalidRequestError
from longshore.signing import PrivateKey
from longshore.wire import Lane, decode, limits

ENVIRONMENT_PREFIX = "LONGSHORE_EDGE_"
API_KEY_VARIABLE = "LONGSHORE_API_KEY"
_CLIENTS_VARIABLE = "LONGSHORE_EDGE_URL"  # where a client finds this tier: no setting of ours
_MASK = "***"
_SECRETS = frozenset({"api_key", "signing_key", "key_sha256"})


def _is_sha256(value: str) -> bool:
    return len(value) == 64 and all(char in "0123456789abcdef" for char in value)


def _is_http_url(value: str) -> bool:
    parts = urlsplit(value)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query


Name = Annotated[str, Len(1, 64)]
Seconds = Annotated[float, Interval(ge=0.01, le=3600)]
Count = Annotated[int, Interval(ge=1, le=1_000_000)]
Port = Annotated[int, Interval(ge=0, le=65535)]
PolicyName = Literal["peak-ewma", "weighted-least-connections"]
SampledCaching = Literal["never", "last-resort", "always"]


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """A core: where it is, and how much it can carry against the others."""

    name: Name
    url: Annotated[str, Predicate(_is_http_url)]
    weight: Annotated[float, Interval(ge=0.01, le=1000)] = 1.0
    latitude: Annotated[float, Interval(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Interval(ge=-180, le=180)] | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        if (self.latitude is None) != (self.longitude is None):
            raise InvalidRequestError("must stand together with longitude", param="latitude")


@dataclass(frozen=True, slots=True)
class KeySettings:
    """A client's key by its SHA-256, and what it permits; None is no limit of the edge's own."""

    tenant: Name
    key_sha256: Annotated[str, Predicate(_is_sha256)]
    best_lane: Lane = "standard"
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None
    max_concurrency: Count | None = None
    requests_per_minute: Count | None = None


@dataclass(frozen=True, slots=True)
class BundleSettings:
    """A bundle's folder that is served to devices."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """Everything that an edge is told. Times in the unit of their names; sizes in bytes."""

    # where it listens and who it is; `node` is also the issuer of its assertions
    host: Annotated[str, Len(1, 255)] = "127.0.0.1"
    port: Port = 8080
    workers: Annotated[int, Interval(ge=1, le=256)] = 1
    node: Name = "edge"
    signing_key: str | None = None
    signing_key_file: str | None = None
    drain_s: Annotated[int, Interval(ge=1, le=600)] = 10

    # which core
    cores: Annotated[tuple[CoreSettings, ...], MaxLen(64)] = ()
    policy: PolicyName = "peak-ewma"
    num_candidates: Annotated[int, Interval(ge=1, le=64)] = 4
    prior_ttft_ms: Annotated[float, Interval(ge=0.1, le=limits.MAX_DEADLINE_MS)] = 100.0
    ttft_target_ms: Annotated[int, Interval(ge=1, le=limits.MAX_DEADLINE_MS)] | None = None
    max_tries: Annotated[int, Interval(ge=1, le=16)] = 3
    geo_db: str | None = None
    trusted_proxies: Annotated[tuple[str, ...], MaxLen(64)] = ()

    # health: active checks, and a breaker that opens after so many failures in a row
    health_interval_s: Seconds = 2.0
    health_timeout_s: Seconds = 2.0
    failure_threshold: Annotated[int, Interval(ge=1, le=100)] = 3
    cooldown_s: Seconds = 1.0

    # bounds
    connect_timeout_s: Seconds = 1.0
    first_event_timeout_s: Seconds = 60.0
    idle_timeout_s: Seconds = 30.0
    client_timeout_s: Seconds = 30.0
    max_in_flight: Count = 1024
    max_sockets: Count = 1024
    max_body_bytes: Annotated[int, Interval(ge=1024, le=limits.MAX_BODY_BYTES)] = limits.MAX_BODY_BYTES
    max_answer_bytes: Annotated[int, Interval(ge=1024, le=2**30)] = 32 * 1024 * 1024

    # the exact cache; without a path it lives as long as the edge does
    cache: bool = True
    cache_path: str | None = None
    cache_memory_bytes: Annotated[int, Interval(ge=0, le=2**40)] = 64 * 1024 * 1024
    cache_disk_bytes: Annotated[int, Interval(ge=0, le=2**44)] = 512 * 1024 * 1024
    cache_max_entry_bytes: Annotated[int, Interval(ge=1, le=2**30)] = 1024 * 1024
    cache_ttl_s: Annotated[float, Interval(ge=0.01, le=10**9)] = 3600.0
    cache_sampled: SampledCaching = "never"

    # the edge's own small model; `student_model_name` is the one model it stands in for, None is any;
    # `student_trust` is a trust store (docs/bundles.md): with it only what its keys signed is loaded
    student_bundle: str | None = None
    student_model_name: Annotated[str, Len(1, limits.MAX_MODEL_CHARS)] | None = None
    student_trust: str | None = None
    student_allow_unsigned: bool = False
    student_max_waiting: Annotated[int, Interval(ge=0, le=1024)] = 8
    student_num_threads: Annotated[int, Interval(ge=1, le=256)] = 1

    # who may ask, and what else is served
    keys: Annotated[tuple[KeySettings, ...], MaxLen(10_000)] = ()
    bundles: Annotated[tuple[BundleSettings, ...], MaxLen(64)] = ()
    open_metrics: bool = False
    open_bundles: bool = False
    allowed_origins: Annotated[tuple[str, ...], MaxLen(64)] = ()  # pages that may call from a browser

    def __post_init__(self) -> None:
        if self.signing_key is not None and self.signing_key_file is not None:
            raise InvalidRequestError("can't stand beside signing_key_file", param="signing_key")

    def private_key(self) -> PrivateKey | None:
        """The assertion key; raises ConfigError when its file can't be read."""
        if self.signing_key_file is None:
            return None if self.signing_key is None else PrivateKey(self.signing_key)
        path = Path(self.signing_key_file)
        try:
            return PrivateKey(path.read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"signing_key_file: {path} can't be read: {error}") from None

    def masked(self) -> dict[str, Any]:
        """The effective settings as plain data, secrets replaced."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)), object_hook=_mask)
        return plain


def load_config(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> EdgeConfig:
    """The effective settings; `flags` override the environment, which overrides the file.

    Raises ConfigError, its message one line naming the setting.
    """
    values = _read_toml(path) if path is not None else {}
    values |= _from_environment(environment or {})
    values |= {name: value for name, value in (flags or {}).items() if value is not None}
    api_key = (environment or {}).get(API_KEY_VARIABLE)
    if api_key:
        values["keys"] = [*_list(values, "keys"), _default_key(api_key)]
    try:
        config = decode(EdgeConfig, values)
    except InvalidRequestError as error:
        raise ConfigError(f"the edge's settings: {error.message}") from None
    _check(config)
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name, [])
    if not isinstance(value, list):
        raise ConfigError(f"the edge's settings: {name} must be a list of tables")
    return value


def _default_key(api_key: str) -> dict[str, Any]:
    digest = hashlib.sha256(api_key.encode()).hexdigest()
    return {"tenant": "default", "key_sha256": digest, "best_lane": "vip"}


# -- environment -------------------------------------------------------------------------------


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(EdgeConfig)
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _CLIENTS_VARIABLE:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in hints:
            raise ConfigError(f"{variable} is not a setting of the edge")
        values[name] = _parse(variable, text, hints[name])
    return values


def _parse(variable: str, text: str, hint: Any) -> Any:
    """Text settings as they stand, everything else as JSON."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if hint is str or typing.get_origin(hint) is Literal or (is_union and str in typing.get_args(hint)):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{variable}={text[:60]!r} can't be read as a value of this setting") from None


# -- rules between settings --------------------------------------------------------------------


def _check(config: EdgeConfig) -> None:
    _check_unique("cores", [core.name for core in config.cores])
    _check_unique("keys", [key.key_sha256 for key in config.keys])
    if not config.keys:
        raise ConfigError(f"no client could ask: give [[keys]] or set {API_KEY_VARIABLE}")
    if not config.cores and config.student_bundle is None:
        raise ConfigError("there is nothing to answer: give [[cores]] or student_bundle")
    if config.student_trust is not None and config.student_bundle is None:
        raise ConfigError("student_trust needs a student_bundle")
    key = config.private_key()
    for core in config.cores:
        if core.api_key is None and key is None:
            raise ConfigError(f"core {core.name} needs an api_key, or the edge a signing_key")
    for network in config.trusted_proxies:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError as error:
            raise ConfigError(f"trusted_proxies: {error}") from None
    if key is not None:
        key.public_key  # noqa: B018  raises ConfigError for a key that is none


def _check_unique(what: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{what}: {name[:12]} stands twice")


def _mask(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _MASK if name in _SECRETS and value else value for name, value in fields.items()}
