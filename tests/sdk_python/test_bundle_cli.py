"""`longshore bundle ...` from verify to rollback, as the command line runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bundles import write_plain
from longshore import bundle_cli
from longshore.bundle_cli import register
from longshore.errors import BundleError, BundleRollbackError, ConfigError
from longshore.signing import PrivateKey


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args(["bundle", *map(str, words)])
    code: int = args.run(args)
    return code


def test_install_list_and_roll_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    for version in (1, 2):
        write_plain(tmp_path / str(version), version=version)
        assert run("verify", tmp_path / str(version)) == 0
        assert run("install", tmp_path / str(version), "--store", store) == 0
    assert run("list", "--store", store) == 0
    out = capsys.readouterr().out
    assert "plain 1: 3 files" in out and "  plain 1" in out and "* plain 2" in out
    assert run("rollback", "plain", "--store", store) == 0
    assert run("list", "--store", store) == 0
    assert "* plain 1" in capsys.readouterr().out
    assert run("install", tmp_path / "2", "--store", store) == 0
    with pytest.raises(BundleRollbackError):
        run("install", tmp_path / "1", "--store", store)


def test_an_empty_store_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--store", tmp_path) == 0
    assert "no bundle" in capsys.readouterr().out


def test_keys_are_asked_for(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    write_plain(tmp_path / "signed", sign_with=("ops", key))
    assert run("verify", tmp_path / "signed", "--trusted-key", f"ops={key.public_key.text}") == 0
    with pytest.raises(BundleError):
        run("verify", tmp_path / "signed", "--trusted-key", f"other={key.public_key.text}")
    for wrong in ("ops", "ops=", "=x", "ops=short"):
        with pytest.raises(ConfigError):
            run("verify", tmp_path / "signed", "--trusted-key", wrong)


def test_a_url_needs_keys_to_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_cli, "DEFAULT_TRUST", tmp_path / "trust.json")
    url = "http://127.0.0.1:9/bundles/plain"
    with pytest.raises(ConfigError, match="which keys to trust"):
        run("install", url, "--store", tmp_path / "store")
    (tmp_path / "trust.json").write_text("{")
    with pytest.raises(ConfigError, match=r"trust\.json"):  # the usual place counts without being named
        run("install", url, "--store", tmp_path / "store")
    with pytest.raises(ConfigError, match="together"):
        run("verify", tmp_path, "--trust", tmp_path / "trust.json", "--trusted-key", "a=b")


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    assert run("keygen", tmp_path / "ops.key") == 0
    before = (tmp_path / "ops.key").read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        run("keygen", tmp_path / "ops.key")
    (tmp_path / "ops.key.pub").unlink()
    with pytest.raises(ConfigError, match="can't be written"):
        run("keygen", tmp_path / "ops.key")
    assert (tmp_path / "ops.key").read_bytes() == before
    with pytest.raises(ConfigError, match="days"):
        run("keygen", tmp_path / "other.key", "--days", "0")
