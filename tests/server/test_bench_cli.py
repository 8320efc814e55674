"""`longshore bench core` as the longshore command sees it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from longshore.errors import ConfigError
from longshore_server.bench_cli import register


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return parser


def test_what_stops_the_start_is_the_commands_own_error(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    options = parser.parse_args(["bench", "core", "--model", str(tmp_path), "--rows", "decode:1"])
    with pytest.raises(ConfigError, match=r"config\.json"):
        options.run(options)


def test_bench_alone_says_what_there_is(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parser.parse_args(["bench"])
    assert options.run(options) == 2
    assert "core" in capsys.readouterr().out
