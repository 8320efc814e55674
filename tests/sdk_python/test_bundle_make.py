"""Bundles made and signed by hand: what is made can be installed, and what does not fit is not made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bundles import FILES, snapshot, write_plain
from longshore.bundle import (
    CHUNK_BYTES,
    SigningKey,
    describe_file,
    load_bundle,
    make_bundle,
    sign_bundle,
)
from longshore.errors import BundleDamagedError, BundleError, ConfigError
from longshore.signing import PrivateKey

KEY = SigningKey("ops", PrivateKey.generate())
TRUST = {"ops": KEY.key.public_key}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_plain(tmp_path / "source")
    return tmp_path / "source"


def test_a_folder_becomes_a_signed_bundle(source: Path, tmp_path: Path) -> None:
    (source / "model.onnx").write_bytes(b"new graph")
    out = tmp_path / "out"
    made = make_bundle(source, out, changes={"version": 9, "expires_at": 2**40}, key=KEY)
    assert load_bundle(out, trusted_keys=TRUST) == made
    assert (made.version, made.key_id, made.expires_at) == (9, "ops", 2**40)
    assert set(snapshot(out)) == {*FILES, "manifest.json", "manifest.sig"}
    assert len((out / "manifest.sig").read_bytes()) == 86


def test_a_description_may_stand_elsewhere(source: Path, tmp_path: Path) -> None:
    (source / "manifest.json").rename(tmp_path / "description.json")
    made = make_bundle(source, tmp_path / "out", description=tmp_path / "description.json")
    assert made.key_id is None and {file.path for file in made.files} == set(FILES)


@pytest.mark.parametrize("changes", [{"name": "../x"}, {"version": 0}, {"odd": 1}])
def test_what_does_not_fit_is_not_made(source: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleDamagedError):
        make_bundle(source, tmp_path / "out", changes=changes, key=KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_links_odd_names_and_missing_folders_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "link").symlink_to(source / "tokenizer.json")
    with pytest.raises(BundleDamagedError, match="symbolic link"):
        make_bundle(source, tmp_path / "out")
    (source / "link").rename(source / ".hidden")
    with pytest.raises(BundleError):
        make_bundle(source, tmp_path / "out")
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            make_bundle(missing, tmp_path / "out")
    with pytest.raises(ConfigError, match="there already"):
        make_bundle(source, source)


def test_signing_anew_replaces_key_and_expiry(source: Path) -> None:
    sign_bundle(source, KEY, expires_at=2**40)
    other = SigningKey("next", PrivateKey.generate())
    signed = sign_bundle(source, other, key_chain=("x.y",))
    assert (signed.key_id, signed.expires_at, signed.key_chain) == ("next", 2**40, ("x.y",))
    with pytest.raises(BundleError):
        load_bundle(source, trusted_keys=TRUST)
    (source / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BundleDamagedError):
        sign_bundle(source, KEY)
    assert json.loads((source / "manifest.json").read_bytes())["key_id"] == "next"


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 4097, 12288])
def test_files_are_described_chunk_by_chunk(tmp_path: Path, size_bytes: int) -> None:
    data = bytes(number % 251 for number in range(size_bytes))
    (tmp_path / "file").write_bytes(data)
    file = describe_file(tmp_path, "file", 4096)
    pieces = [data[at : at + 4096] for at in range(0, size_bytes, 4096)]
    assert file.sha256 == hashlib.sha256(data).hexdigest() and file.size_bytes == size_bytes
    assert file.chunk_sha256 == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    assert describe_file(tmp_path, "file").chunk_bytes == CHUNK_BYTES
