"""The command `longshore bench`: registers what it can measure. Importing it loads nothing heavy."""

from __future__ import annotations

import argparse
from typing import Any

from longshore.errors import ConfigError


def register(subparsers: Any) -> None:
    """Adds `bench` to the `longshore` command."""
    from longshore_server.native.bench.command import add_arguments

    parser = subparsers.add_parser("bench", help="measure the speed of a tier on this machine")
    parser.set_defaults(run=lambda _: _print_help(parser))
    parts = parser.add_subparsers(metavar="PART")
    core = parts.add_parser("core", help="the engine by itself: tokens a second, time to first token")
    add_arguments(core)
    core.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures; raises ConfigError for anything that stops the start."""
    from importlib.util import find_spec

    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise ConfigError(f"bench core needs the package {package}: pip install 'longshore[server]'")
    from longshore_server.native.bench.command import run as measure
    from longshore_server.native.errors import NativeEngineError

    try:
        return measure(arguments)
    except NativeEngineError as error:
        raise ConfigError(str(error)) from None


def _print_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2
