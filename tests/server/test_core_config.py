"""Settings: where they come from, which one wins, what stops a start, and that secrets stay hidden."""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from pathlib import Path
from typing import Any

import pytest

from longshore.errors import ConfigError
from longshore.signing import PrivateKey
from longshore_server.config import CoreConfig, from_json, load_config, parse_setting, render, to_json
from longshore_server.engine_process import native_settings
from longshore_server.native import EngineConfig

KEY_SHA256 = hashlib.sha256(b"a key").hexdigest()


def _file(folder: Path, text: str) -> Path:
    path = folder / "core.toml"
    path.write_text(text)
    return path


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = _file(tmp_path, "port = 1\nworkers = 2\nmax_waiting = 3\n")
    environment = {"LONGSHORE_CORE_PORT": "4", "LONGSHORE_CORE_WORKERS": "5"}
    config = load_config(file=file, environment=environment, flags={"port": 6, "host": None})
    assert (config.port, config.workers, config.max_waiting, config.block_size) == (6, 5, 3, 16)


def test_the_environment_is_read_by_each_settings_type() -> None:
    config = load_config(
        environment={
            "LONGSHORE_CORE_MODEL": "007",
            "LONGSHORE_CORE_OPEN_METRICS": "true",
            "LONGSHORE_CORE_DRAIN_TIMEOUT_S": "2",
            "LONGSHORE_CORE_KEYS": f'[{{tenant = "acme", key_sha256 = "{KEY_SHA256}"}}]',
            "LONGSHORE_CORE_ALIASES": '{"gpt 4" = "007"}',
        }
    )
    assert (config.model, config.open_metrics, config.drain_timeout_s) == ("007", True, 2.0)
    assert config.keys[0].tenant == "acme"
    assert config.model_names == {"007", "gpt 4"}


def test_the_quick_start_key_is_added_to_the_others(tmp_path: Path) -> None:
    file = _file(tmp_path, f'[[keys]]\ntenant = "acme"\nkey_sha256 = "{KEY_SHA256}"\n')
    config = load_config(file=file, environment={"LONGSHORE_API_KEY": "b key"})
    assert [key.tenant for key in config.keys] == ["acme", "default"]
    assert config.keys[1].key_sha256 == hashlib.sha256(b"b key").hexdigest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "prot: is not a known setting"),
        ("port = 70000", "port: must be at most 65535"),
        ('port = "8000"', "port: must be a whole number"),
        ("port = true", "port: must be a whole number"),
        ("drain_timeout_s = nan", "drain_timeout_s: must be a finite number"),
        ('dtype = "int4"', "dtype: must be one of"),
        ("port = ", "is not TOML"),
        ('[[keys]]\ntenant = "a"\nkey_sha256 = "plain text"', "keys[0].key_sha256"),
        ('[[keys]]\ntenant = "a"', "keys[0].key_sha256: is required"),
        ('[[edges]]\nissuer = "e"\npublic_key = "short"', "edges[0].public_key"),
        (f'[[edges]]\nissuer = "e"\npublic_key = "{"!" * 43}"', "edges[0].public_key"),
        ('model = "m"\n[aliases]\na = "other"', "aliases.a: 'other' is not the served model"),
        ('aliases = ["a"]', "aliases"),
        ('engine = "remote"', 'engine: "remote" is not available'),
        ('remote_url = "http://x"', "remote_url"),
        ("max_num_seqs = 600\nmax_num_batched_tokens = 512", "max_num_batched_tokens"),
        ("gpu_memory_fraction = 0.0", "gpu_memory_fraction"),
        ("num_kv_blocks = 1\nkv_memory_bytes = 1", "num_kv_blocks"),
        ('kv_swap = ["host:32GB"]', "kv_swap: a tier is"),
        ('kv_swap = "host:32GiB"', "kv_swap"),
        ('attention_sparsity = "window"', "attention_sparsity: is"),
        (f'[[keys]]\ntenant = "a"\nkey_sha256 = "{KEY_SHA256}"\n' * 2, "keys: two entries are the same"),
    ],
)
def test_a_wrong_setting_stops_with_one_line_that_names_it(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(file=_file(tmp_path, text), environment={})
    assert words in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "environment",
    [{"LONGSHORE_CORE_PROT": "1"}, {"LONGSHORE_CORE_PORT": "x"}, {"LONGSHORE_CORE_PORT": ""}],
)
def test_a_wrong_variable_stops_the_start(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="LONGSHORE_CORE_"):
        load_config(environment=environment)


def test_a_missing_file_and_one_that_is_not_text_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the settings file"):
        load_config(file=tmp_path / "none.toml", environment={})
    (tmp_path / "core.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(file=tmp_path / "core.toml", environment={})


def test_what_is_handed_over_arrives_the_same() -> None:
    public_key = PrivateKey.generate().public_key.text
    environment = {
        "LONGSHORE_API_KEY": "secret",
        "LONGSHORE_CORE_EDGES": f'[{{issuer = "edge-1", public_key = "{public_key}"}}]',
    }
    config = load_config(environment=environment, flags={"model": "m", "aliases": {"a": "m"}})
    assert from_json(to_json(config)) == config
    with pytest.raises(ConfigError):
        from_json(b"{")
    with pytest.raises(ConfigError):
        from_json(b'{"prot": 1}')


def test_printing_masks_secrets_and_reads_back_as_toml() -> None:
    config = load_config(
        environment={"LONGSHORE_API_KEY": "secret"}, flags={"model": "m", "aliases": {"a b": "m"}}
    )
    text = render(config)
    assert "secret" not in text
    assert config.keys[0].key_sha256 not in text
    assert config.keys[0].key_sha256 not in repr(config)
    values = tomllib.loads(text)
    assert values["keys"] == [{"tenant": "default", "key_sha256": "***", "best_lane": "standard"}]
    assert values["aliases"] == {"a b": "m"}
    assert set(values) <= set(CoreConfig.__dataclass_fields__)


def test_tiers_for_kv_blocks_are_handed_over_and_printed() -> None:
    tiers = ("host:1GiB", "file:/mnt/nvme/kv:2GiB")
    environment = {"LONGSHORE_CORE_KV_SWAP": '["host:1GiB", "file:/mnt/nvme/kv:2GiB"]'}
    config = load_config(environment=environment, flags={"model": "m", "attention_sparsity": "window=8"})
    assert config.kv_swap == tiers and from_json(to_json(config)) == config
    values = tomllib.loads(render(config))
    assert (tuple(values["kv_swap"]), values["attention_sparsity"]) == (tiers, "window=8")


def test_every_setting_of_the_native_engine_is_one_of_the_core_and_is_handed_over() -> None:
    names = {each.name for each in dataclasses.fields(EngineConfig)}
    assert names - {each.name for each in dataclasses.fields(CoreConfig)} == {"max_num_waiting"}
    told: dict[str, Any] = {
        "model": "m", "load_format": "random", "dtype": "bfloat16", "device": "cuda:0", "block_size": 32,
        "num_kv_blocks": 9, "kv_cache_dtype": "fp8", "gpu_memory_fraction": 0.5, "max_model_len": 77,
        "max_num_seqs": 3, "max_num_batched_tokens": 99, "enable_prefix_cache": False,
        "batch_invariant": False, "quantization": "fp8", "fuse_layers": True, "gemm_plans": False, "seed": 4,
    }  # fmt: skip
    settings = native_settings(CoreConfig(**told, max_waiting=5))
    assert {name: getattr(settings, name) for name in told} == told
    assert settings.max_num_waiting == 5


def test_a_setting_from_a_flag_is_named_when_it_is_wrong() -> None:
    assert parse_setting("max_replays", "2", "--set max_replays") == 2
    with pytest.raises(ConfigError, match="unknown setting prot"):
        parse_setting("prot", "2", "--set prot")
    with pytest.raises(ConfigError, match="--port can't be read"):
        parse_setting("port", "eight", "--port")
