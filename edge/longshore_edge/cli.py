"""`longshore edge`: reads the settings and runs the server. Importing it imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import ConfigError

if TYPE_CHECKING:
    from longshore_edge.config import EdgeConfig


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser("edge", help="run an edge in front of the cores")
    parser.add_argument("--config", type=Path, help="the settings, a TOML file")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    parser.add_argument("--workers", type=int, help="worker processes")
    parser.add_argument("--node", help="this edge's name, also in its assertions")
    parser.add_argument(
        "--core", action="append", metavar="[NAME=]URL", help="a core, instead of the file's; may be repeated"
    )
    parser.add_argument("--student-bundle", metavar="DIR", help="the bundle of the edge's own small model")
    parser.add_argument(
        "--student-trust",
        metavar="FILE",
        help="a trust store, one of whose keys must have signed that bundle",
    )
    parser.add_argument("--print-config", action="store_true", help="print the effective settings and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the edge until it is told to stop; returns the exit code. Raises ConfigError."""
    config = effective_config(args)
    if args.print_config:
        print(json.dumps(config.masked(), indent=2))
        return 0
    try:
        from longshore_edge.server import serve
    except ImportError as error:
        raise ConfigError(f"the edge needs longshore[edge]: {error}") from None
    return serve(config)


def effective_config(args: argparse.Namespace) -> EdgeConfig:
    """The settings of file, environment and flags together."""
    from longshore_edge.config import load_config

    flags: dict[str, Any] = {
        "host": args.host,
        "port": args.port,
        "workers": args.workers,
        "node": args.node,
        "student_bundle": args.student_bundle,
        "student_trust": args.student_trust,
        "cores": [_core(text, number) for number, text in enumerate(args.core, 1)] if args.core else None,
    }
    return load_config(args.config, environment=os.environ, flags=flags)


def _core(text: str, number: int) -> dict[str, str]:
    """`NAME=URL`, or a URL alone, which gets a name by its place."""
    name, equals, url = text.partition("=")
    if equals and "/" not in name:
        return {"name": name, "url": url}
    return {"name": f"core-{number}", "url": text}
