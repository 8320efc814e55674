"""The `longshore` command: its own subcommands, and those that the tiers register as entry points.

Imports no tier: an entry point's module is light, and what is heavy loads when its command runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longshore import __version__
from longshore.errors import LongshoreError

ENTRY_POINT_GROUP = "longshore.commands"
_EXTRAS = {
    "device": ("onnxruntime", "tokenizers"),
    "edge": ("granian", "aiohttp", "maxminddb"),
    "server": ("torch", "transformers", "fastapi"),
    "export": ("torch", "onnx", "onnxscript"),
}
_INTERRUPTED = 130
_DEMO_STOP_S = 60.0

Subparsers = Any  # argparse's own type is private


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when it did what it was asked, 2 after one line that says why it did not."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    run = getattr(options, "run", None)
    if run is None:
        parser.print_help()
        return 2
    try:
        return int(run(options))
    except LongshoreError as error:
        print(f"longshore: {' '.join(error.message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `longshore ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command that is installed."""
    parser = argparse.ArgumentParser(
        prog="longshore", description="Language-model requests between device, edge and core."
    )
    parser.add_argument("--version", action="version", version=f"longshore {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    _register_own(subparsers)
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda item: item.name):
        _register_tier(entry_point, subparsers)
    return parser


def _register_own(subparsers: Subparsers) -> None:
    from longshore.chat import register as register_chat

    register_chat(subparsers)
    demo = subparsers.add_parser("demo", help="start every tier with the demo models and check what they do")
    demo.add_argument("--keep", action="store_true", help="leave the tiers running and say how to reach them")
    demo.add_argument("--seed", type=int, default=None, help="draw the questions from this seed")
    demo.set_defaults(run=_demo)
    version = subparsers.add_parser("version", help="the version, and which extras are installed")
    version.set_defaults(run=_version)


def _register_tier(entry_point: EntryPoint, subparsers: Subparsers) -> None:
    """A tier whose package is missing keeps its command, which says so."""
    try:
        register = entry_point.load()
    except ImportError as error:
        words = f"`longshore {entry_point.name}` can't be loaded: {error}"
        broken = subparsers.add_parser(entry_point.name, help="not installed")
        broken.set_defaults(run=lambda _: _refuse(words))
        return
    register(subparsers)


def _refuse(words: str) -> int:
    print(f"longshore: {words}", file=sys.stderr)
    return 2


# -- demo --------------------------------------------------------------------------------------


def find_examples(package_file: str) -> Path | None:
    """The clone's examples folder, from the path of this package's `__init__.py`; None in an install."""
    examples = Path(package_file).resolve().parents[2] / "examples"
    return examples if (examples / "demo" / "__main__.py").is_file() else None


def _demo(options: argparse.Namespace) -> int:
    import longshore

    examples = find_examples(longshore.__file__)
    if examples is None:
        return _refuse("the demo is not part of an install; clone the repository and run `make demo` there")
    command = [sys.executable, "-m", "demo"]
    command += ["--keep"] if options.keep else []
    command += ["--seed", str(options.seed)] if options.seed is not None else []
    path = os.pathsep.join(part for part in (str(examples), os.environ.get("PYTHONPATH")) if part)
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as demo:
        try:
            return demo.wait()
        except KeyboardInterrupt:  # the demo got it too, and stops the tiers that it started
            return demo.wait(timeout=_DEMO_STOP_S)


# -- version -----------------------------------------------------------------------------------


def _version(_: argparse.Namespace) -> int:
    print(f"longshore {__version__} (Python {sys.version.split()[0]})")
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        print(f"  {extra}: " + (f"needs {', '.join(missing)}" if missing else "installed"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
