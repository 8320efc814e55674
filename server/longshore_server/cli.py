"""The command `longshore serve`: flags to settings, settings to a running core. Importing loads nothing."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from longshore.errors import ConfigError

if TYPE_CHECKING:
    from longshore_server.config import CoreConfig

_FLAGS = {
    "model": "folder of the model (Hugging Face layout, safetensors)",
    "tokenizer": "folder of the tokenizer, where it is not the model's",
    "served_model_name": "name that clients use; the folder's name by default",
    "host": "address to listen on",
    "port": "port to listen on; 0 takes a free one",
    "workers": "number of HTTP processes",
    "node": "name of this core in reports",
    "region": "where this core stands",
    "load_format": "auto, or random for random weights",
    "dtype": "auto, float32, bfloat16 or float16",
    "quantization": "none, or fp8 for layer weights of half the size",
    "device": "auto, cpu, cuda, ...",
    "tensor_parallel_size": "processes, each with a GPU of its own, that share every layer",
    "placement": "tensor_parallel, or attention_feed_forward: two processes, one for each kind of layer",
    "max_model_len": "longest prompt and answer together, in tokens",
    "kv_memory_bytes": "memory for the KV cache",
    "max_num_seqs": "requests that run at once",
    "kv_cache_dtype": "auto, or fp8 for a KV cache of half the size, on a GPU",
    "gpu_memory_fraction": "share of a GPU's memory that is used, 0.95 by default",
    "max_num_batched_tokens": "tokens in one step; 512 on a CPU and 8192 on a GPU by default",
    "itl_target_ms": "milliseconds between two tokens that other prompts may not stretch",
    "max_waiting": "requests that may wait",
    "drain_timeout_s": "how long a stop waits for answers under way",
    "log_level": "debug, info, warning or error",
}


def register(subparsers: Any) -> None:
    """Adds `serve` to the `longshore` command."""
    parser = subparsers.add_parser("serve", help="serve a model: the core tier")
    parser.add_argument("--config", metavar="FILE", help="settings in TOML")
    for name, words in _FLAGS.items():
        parser.add_argument(_flag(name), dest=name, metavar=name.split("_")[-1].upper(), help=words)
    parser.add_argument(
        "--alias", action="append", metavar="NAME[=MODEL]", help="another name for the model; may be repeated"
    )
    parser.add_argument(
        "--edge",
        action="append",
        metavar="ISSUER=PUBLIC_KEY",
        help="an edge whose assertions are believed, instead of the file's; may be repeated",
    )
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any other setting, in TOML's syntax"
    )
    parser.add_argument("--open-metrics", action="store_true", help="serve /metrics without a key")
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings, secrets masked, and stop"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until stopped; raises ConfigError for anything that stops the start."""
    from longshore_server.config import render

    config = _config(arguments)
    if arguments.print_config:
        sys.stdout.write(render(config))
        return 0
    return _serve(config)


def _serve(config: CoreConfig) -> int:
    from importlib.util import find_spec

    for package in ("granian", "torch", "transformers", "fastapi"):
        if find_spec(package) is None:
            raise ConfigError(f"serve needs the package {package}: pip install 'longshore[server]'")
    from longshore_server.supervisor import serve

    return serve(config)


def _config(arguments: argparse.Namespace) -> CoreConfig:
    try:
        from longshore_server.config import load_config, parse_setting
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'longshore[server]'") from None

    given = {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    flags = {name: parse_setting(name, text, _flag(name)) for name, text in given.items()}
    for item in arguments.set or ():
        name, text = _pair(item, "--set")
        flags[name] = parse_setting(name, text, f"--set {name}")
    if arguments.edge:
        flags["edges"] = [_edge(item) for item in arguments.edge]
    if arguments.open_metrics:
        flags["open_metrics"] = True
    config = load_config(file=arguments.config, flags=flags)
    if not arguments.alias:
        return config
    added = dict(_alias(item, config.model_name) for item in arguments.alias)
    return load_config(file=arguments.config, flags={**flags, "aliases": {**config.aliases, **added}})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pair(item: str, flag: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{flag} takes NAME=VALUE, not {item[:80]!r}")
    return name, value


def _edge(item: str) -> dict[str, str]:
    issuer, public_key = _pair(item, "--edge")
    return {"issuer": issuer, "public_key": public_key}


def _alias(item: str, model_name: str) -> tuple[str, str]:
    return _pair(item, "--alias") if "=" in item else (item, model_name)
