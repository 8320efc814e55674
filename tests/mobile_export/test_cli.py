"""`longshore export student` as the command line runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from longshore.bundle import load_bundle
from longshore.errors import ConfigError, ExportError
from longshore.signing import PrivateKey
from longshore_export.cli import register
from tiny_models import config_of, write_model


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args(["export", "student", *map(str, words)])
    code: int = args.run(args)
    return code


def test_a_model_becomes_a_signed_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, key = write_model(tmp_path / "model", config_of("llama")), PrivateKey.generate()
    (tmp_path / "key").write_text(key.text + "\n")
    (tmp_path / "key").chmod(0o600)
    options = ["--name", "mine", "--version", "3", "--sign-key", str(tmp_path / "key"), "--key-id", "ops"]
    assert run("--model", model, "--out", tmp_path / "out", *options) == 0
    manifest = load_bundle(tmp_path / "out", trusted_keys={"ops": key.public_key})
    assert (manifest.name, manifest.version) == ("mine", 3)
    printed = capsys.readouterr().out
    assert "mine 3, fp32" in printed and "256 greedy tokens equal" in printed


def test_a_wrong_path_or_key_stops_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json"):
        run("--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="can't be read"):
        run("--model", tmp_path, "--out", tmp_path / "out", "--sign-key", tmp_path / "key", "--key-id", "a")
    (tmp_path / "key").write_text(PrivateKey.generate().text)
    with pytest.raises(ConfigError, match="read by others"):
        run("--model", tmp_path, "--out", tmp_path / "out", "--sign-key", tmp_path / "key", "--key-id", "a")
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError, match="key id"):
        run("--model", tmp_path, "--out", tmp_path / "out", "--sign-key", tmp_path / "key")
