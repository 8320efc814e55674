"""The core's settings: one frozen dataclass, read once at start from a TOML file, the environment and flags.

Owns names, bounds, precedence (flag over environment over file over default) and printing with secrets
masked. It opens no socket and looks at no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, Len, Predicate

from longshore.errors import ConfigError, InvalidRequestError
from longshore.wire import decode, limits
from longshore.wire.request import Lane
from longshore_server.native.attention.sparsity import parse_sparsity
from longshore_server.native.errors import ConfigError as NativeConfigError
from longshore_server.native.offload.spec import parse_kv_swap

ENVIRONMENT_PREFIX = "LONGSHORE_CORE_"
API_KEY_VARIABLE = "LONGSHORE_API_KEY"
_CLIENTS_VARIABLE = "LONGSHORE_CORE_URL"  # where a client finds this tier: no setting of ours
DEFAULT_TENANT = "default"
_MASK = "***"

_PUBLIC_KEY = re.compile(r"[A-Za-z0-9_-]{43}\Z")
_SHA256_HEX = re.compile(r"[0-9a-f]{64}\Z")
_SECRET_FIELDS = frozenset({"key_sha256"})


def _is_sha256_hex(value: str) -> bool:
    return _SHA256_HEX.match(value) is not None


def _is_public_key(value: str) -> bool:
    return _PUBLIC_KEY.match(value) is not None


Name = Annotated[str, Len(1, limits.MAX_MODEL_CHARS)]
Tenant = Annotated[str, Len(1, 64)]
Seconds = Annotated[float, Interval(ge=0, le=86_400)]
Count = Annotated[int, Interval(ge=1, le=1 << 20)]


@dataclass(frozen=True, slots=True)
class KeySetting:
    """A client key, known by the SHA-256 of its text, and what it permits."""

    tenant: Tenant
    key_sha256: Annotated[str, Predicate(_is_sha256_hex)] = field(repr=False)
    best_lane: Lane = "standard"
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None


@dataclass(frozen=True, slots=True)
class EdgeSetting:
    """An edge whose assertions are believed: its name and its Ed25519 public key in base64url."""

    issuer: Annotated[str, Len(1, 64)]
    public_key: Annotated[str, Predicate(_is_public_key)]


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Everything that can be set on a core.

    `model` is a local folder; `tokenizer` another one that holds the tokenizer, where the model's does not.
    `aliases` maps further names to the served one. `workers` is the number of HTTP processes. `dtype`,
    `device` and the engine's sizes go to the native engine as they are. `default_max_tokens` None lets an
    answer fill the context; `default_deadline_s` bounds a request that names no deadline.
    `reader_timeout_s` is how long a client may take nothing of its answer before the answer is given up,
    `template_timeout_s` what one chat template may take. `engine_silence_s` is how long the engine process
    may give no sign of life, `engine_step_timeout_s` how long one step may take, `replay_wait_s` how long a
    request waits for the next engine after one has died. `num_threads` None leaves one core to the workers;
    the engine's ranks share them.
    """

    # where it listens and who it is
    host: Name = "127.0.0.1"
    port: Annotated[int, Interval(ge=0, le=65_535)] = 8000
    workers: Annotated[int, Interval(ge=1, le=64)] = 1
    node: Annotated[str, Len(1, 128)] = "core"
    region: Annotated[str, Len(0, 64)] = ""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    # the model
    model: str = ""
    tokenizer: str | None = None
    served_model_name: Name | None = None
    aliases: dict[str, Name] = field(default_factory=dict)

    # the engine
    engine: Literal["native", "remote"] = "native"
    remote_url: str | None = None
    load_format: Literal["auto", "random"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "fp8"] = "none"
    fuse_layers: bool | None = None
    gemm_plans: bool = True
    device: Name = "auto"
    max_model_len: Count | None = None
    block_size: Annotated[int, Interval(ge=1, le=1024)] = 16
    num_kv_blocks: Annotated[int, Interval(ge=1, le=2**31)] | None = None
    kv_memory_bytes: Annotated[int, Interval(ge=1, le=2**43)] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.95
    max_num_seqs: Annotated[int, Interval(ge=1, le=4096)] = 64
    max_num_batched_tokens: Count | None = None
    itl_target_ms: Annotated[float, Interval(gt=0, le=1e6)] | None = None
    max_waiting: Annotated[int, Interval(ge=0, le=1 << 20)] = 1024
    enable_prefix_cache: bool = True
    batch_invariant: bool | None = None
    attention_sparsity: Annotated[str, Len(1, 200)] = "dense"
    kv_swap: Annotated[tuple[Annotated[str, Len(1, 4096)], ...], Len(0, 8)] = ()
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    tensor_parallel_size: Annotated[int, Interval(ge=1, le=8)] = 1
    placement: Literal["tensor_parallel", "attention_feed_forward"] = "tensor_parallel"
    num_threads: Annotated[int, Interval(ge=1, le=1024)] | None = None
    max_replays: Annotated[int, Interval(ge=0, le=16)] = 1
    replay_wait_s: Seconds = 120.0
    engine_silence_s: Annotated[float, Interval(ge=2, le=3600)] = 10.0
    engine_step_timeout_s: Annotated[float, Interval(ge=1, le=86_400)] = 300.0
    engine_start_timeout_s: Annotated[float, Interval(ge=1, le=86_400)] = 1800.0
    engine_max_restarts: Annotated[int, Interval(ge=0, le=1000)] = 5
    engine_restart_window_s: Annotated[float, Interval(ge=1, le=86_400)] = 60.0

    # requests
    default_max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None
    default_deadline_s: Annotated[float, Interval(ge=0.001, le=limits.MAX_DEADLINE_MS / 1000)] = 600.0
    max_body_bytes: Annotated[int, Interval(ge=1024, le=limits.MAX_BODY_BYTES)] = limits.MAX_BODY_BYTES
    max_connections: Annotated[int, Interval(ge=1, le=1 << 20)] = 4096
    keepalive_s: Annotated[float, Interval(ge=0.1, le=3600)] = 10.0
    drain_timeout_s: Seconds = 10.0
    max_in_flight_per_tenant: Count = 256
    reader_timeout_s: Annotated[float, Interval(ge=1, le=3600)] = 60.0
    template_timeout_s: Annotated[float, Interval(ge=0.01, le=60)] = 1.0

    # who may ask
    open_metrics: bool = False
    keys: tuple[KeySetting, ...] = ()
    edges: tuple[EdgeSetting, ...] = ()

    @property
    def model_name(self) -> str:
        """The name that clients know the model by: the one set, else the folder's."""
        return self.served_model_name or Path(self.model).resolve().name

    @property
    def tokenizer_dir(self) -> Path:
        """The folder that holds tokenizer.json."""
        return Path(self.tokenizer or self.model)

    @property
    def model_names(self) -> frozenset[str]:
        """The served name and every alias."""
        return frozenset({self.model_name, *self.aliases})


def load_config(
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> CoreConfig:
    """The effective settings; raises ConfigError, in one line that names the setting and where it came from.

    `flags` holds values of the right type; those that are None were not given.
    """
    environ = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    layers = (
        (_from_file(file), str(file)),
        (_from_environment(environ), "the environment"),
        ({name: value for name, value in (flags or {}).items() if value is not None}, "the command line"),
    )
    for layer, origin in layers:
        _decode(layer, origin)  # each layer alone, so that an error names where the value was set
        values |= layer
    if api_key := environ.get(API_KEY_VARIABLE):
        values["keys"] = [*values.get("keys", []), _quick_key(api_key)]
    return _checked(_decode(values, "the settings"))


def to_json(config: CoreConfig) -> bytes:
    """The settings for another process of this core, secrets included; not for people."""
    return json.dumps(dataclasses.asdict(config)).encode()


def from_json(text: bytes | str) -> CoreConfig:
    """What `to_json` wrote; raises ConfigError on anything else."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the settings handed over are not JSON: {error}") from None
    return _checked(_decode(values, "the settings handed over"))


def render(config: CoreConfig) -> str:
    """The effective settings as TOML, secrets masked; settings without a value are comments."""
    lines: list[str] = []
    tables: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, dict):
            tables += _render_table(f"[{item.name}]", value)
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            lines.append(f"{item.name} = {json.dumps(value)}")
        elif isinstance(value, tuple):
            tables += [line for row in value for line in _render_table(f"[[{item.name}]]", _masked(row))]
        else:
            lines.append(f"# {item.name} =" if value is None else f"{item.name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


# -- layers ------------------------------------------------------------------------------------


def _from_file(file: str | os.PathLike[str] | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the settings file {file}: {error.strerror}") from None
    except ValueError as error:  # TOML syntax, or bytes that are not UTF-8
        raise ConfigError(f"the settings file {file} is not TOML: {error}") from None
    if isinstance(values.get("aliases"), list):
        raise ConfigError(f"aliases in {file} must be a table of alias = model")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(CoreConfig)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _CLIENTS_VARIABLE:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in names:
            raise ConfigError(f"unknown setting {variable} in the environment")
        values[name] = parse_setting(name, text, f"{variable} in the environment")
    return values


def parse_setting(name: str, text: str, origin: str) -> Any:
    """Text as the value of a setting: strings as they are, all else in TOML's syntax."""
    hint = typing.get_type_hints(CoreConfig).get(name)
    if hint is None:
        raise ConfigError(f"unknown setting {name[:80]} ({origin})")
    if _takes_text(hint):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        raise ConfigError(f"{origin} can't be read: {text[:80]!r}") from None


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_takes_text(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(typing.get_args(hint)[0], str)
    return hint is str


def _quick_key(api_key: str) -> dict[str, str]:
    return {"tenant": DEFAULT_TENANT, "key_sha256": hashlib.sha256(api_key.encode()).hexdigest()}


# -- checks ------------------------------------------------------------------------------------


def _decode(values: Any, origin: str) -> CoreConfig:
    try:
        return decode(CoreConfig, values)
    except InvalidRequestError as error:
        message = error.message.replace("is not a known parameter", "is not a known setting")
        raise ConfigError(f"{message} (in {origin})") from None


def _checked(config: CoreConfig) -> CoreConfig:
    """The settings, if they agree with one another; each setting alone is right already."""
    if config.engine == "remote":
        raise ConfigError('engine: "remote" is not available in this version; use "native"')
    if config.remote_url is not None:
        raise ConfigError('remote_url: only means something with engine = "remote"')
    if config.max_num_batched_tokens is not None and config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: {config.max_num_batched_tokens} is below "
            f"max_num_seqs {config.max_num_seqs}"
        )
    if config.num_kv_blocks is not None and config.kv_memory_bytes is not None:
        raise ConfigError("num_kv_blocks: give num_kv_blocks or kv_memory_bytes, not both")
    try:
        parse_kv_swap(config.kv_swap)
        parse_sparsity(config.attention_sparsity)
    except NativeConfigError as error:
        raise ConfigError(str(error)) from None
    _check_aliases(config)
    _check_unique("keys", [key.key_sha256 for key in config.keys])
    _check_unique("edges", [edge.issuer for edge in config.edges])
    return config


def _check_aliases(config: CoreConfig) -> None:
    for alias, target in config.aliases.items():
        if not 1 <= len(alias) <= limits.MAX_MODEL_CHARS:
            raise ConfigError(f"aliases: an alias has 1 to {limits.MAX_MODEL_CHARS} characters")
        if target != config.model_name:
            raise ConfigError(f"aliases.{alias}: {target!r} is not the served model {config.model_name!r}")


def _check_unique(name: str, values: list[str]) -> None:
    if len(set(values)) != len(values):
        raise ConfigError(f"{name}: two entries are the same")


# -- printing ----------------------------------------------------------------------------------


def _masked(row: Any) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    return {name: _MASK if name in _SECRET_FIELDS else value for name, value in values.items()}


def _render_table(head: str, values: Mapping[str, Any]) -> list[str]:
    given = {name: value for name, value in values.items() if value is not None}
    return (
        ["", head, *(f"{_key(name)} = {json.dumps(value)}" for name, value in given.items())] if given else []
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
