"""The commands of docs/bundles.md, run as they stand in one folder, print what stands below them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bundles import FILES, write_plain
from longshore.cli import main

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def session() -> list[tuple[str, list[str]]]:
    """Each command with the lines that the page shows for it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(_FENCE.findall((ROOT / "docs" / "bundles.md").read_text())).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def test_the_commands_do_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plain(tmp_path / "build" / "shop-student", name="shop-student", files=FILES)
    monkeypatch.chdir(tmp_path)
    assert len(session()) > 10
    for command, shown in session():
        program, *arguments = command.split()
        code = main(arguments)
        printed = capsys.readouterr()
        assert program == "longshore" and code == 0, f"{command}\n{printed.err}"
        for line in shown:
            assert line in printed.out, f"{command}\n{printed.out}"
    for name in ("ops.key", "next.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
