"""An edge loads for itself only what its trusted keys signed, and stops with one line for anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attacks.victim import KEY, Device
from longshore.bundle import OperatorKey, save_trust, sign_rotation
from longshore.errors import BundleError, ConfigError
from longshore.signing import PrivateKey
from longshore_edge.config import EdgeConfig, load_config
from longshore_edge.server import check_start
from longshore_edge.student import EdgeStudent

STRANGER = PrivateKey.generate()


@pytest.fixture
def config(device: Device, tmp_path: Path) -> EdgeConfig:
    """An edge whose student is the signed bundle in `device.offer`."""
    save_trust(tmp_path / "trust.json", device.trust)
    return EdgeConfig(student_bundle=str(device.offer), student_trust=str(tmp_path / "trust.json"))


def flip_a_byte(folder: Path) -> None:
    body = bytearray((folder / "model.onnx").read_bytes())
    body[99] ^= 1
    (folder / "model.onnx").write_bytes(bytes(body))


ATTACKS: dict[str, tuple[Callable[[Device], object], str]] = {
    "unsigned": (lambda it: it.write(it.offer, sign_with=None), "not signed by a trusted key"),
    "a stranger's key": (
        lambda it: it.write(it.offer, sign_with=("stranger", STRANGER)),
        "not signed by a trusted key",
    ),
    "a stranger under a known id": (
        lambda it: it.write(it.offer, sign_with=("ops", STRANGER)),
        "the signature does not fit",
    ),
    "expired": (lambda it: it.write(it.offer, expires_at=1_600_000_000), "has expired"),
    "another name in the manifest": (
        lambda it: (it.offer / "manifest.json").write_bytes(
            (it.offer / "manifest.json").read_bytes().replace(b'"plain"', b'"plane"')
        ),
        "the signature does not fit",
    ),
    "no signature file": (lambda it: (it.offer / "manifest.sig").unlink(), r"manifest\.sig"),
    "a flipped byte": (lambda it: flip_a_byte(it.offer), r"model\.onnx is damaged"),
    "a missing file": (lambda it: (it.offer / "tokenizer.json").unlink(), r"tokenizer\.json"),
    "a file too many": (
        lambda it: (it.offer / "more.py").write_text("x"),
        r"more\.py is not in the manifest",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_no_trusted_key_signed_stops_the_start(device: Device, config: EdgeConfig, attack: str) -> None:
    check_start(config)
    tamper, words = ATTACKS[attack]
    tamper(device)
    with pytest.raises(ConfigError, match=f"^student_bundle: .*{words}") as caught:
        check_start(config)
    assert "\n" not in caught.value.message


def test_a_bundle_exchanged_after_the_start_is_not_loaded(device: Device, config: EdgeConfig) -> None:
    student = EdgeStudent(config)
    device.write(device.offer, version=6, sign_with=("ops", STRANGER))
    with pytest.raises(BundleError, match="the signature does not fit"):
        student._student.start()


def test_a_revoked_key_and_one_that_a_good_key_introduced(
    device: Device, config: EdgeConfig, tmp_path: Path
) -> None:
    new = OperatorKey("next", STRANGER.public_key.text)
    device.write(device.offer, sign_with=("next", STRANGER), key_chain=(sign_rotation("ops", KEY, new),))
    check_start(config)
    save_trust(tmp_path / "trust.json", device.trust.without_key("ops"))
    with pytest.raises(ConfigError, match=r"student_bundle: .*not signed by a trusted key"):
        check_start(config)


def test_a_trust_store_that_is_not_there(config: EdgeConfig) -> None:
    with pytest.raises(ConfigError, match="the trust store /nowhere can't be read"):
        check_start(replace(config, student_trust="/nowhere"))


def test_unsigned_is_let_in_by_a_word_and_the_log_says_so(
    device: Device, config: EdgeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    check_start(config)
    assert capsys.readouterr().err == ""  # signed, and checked
    lax = replace(config, student_allow_unsigned=True)
    device.write(device.offer, sign_with=("ops", STRANGER))
    with pytest.raises(ConfigError, match="the signature does not fit"):
        check_start(lax)  # the word is for unsigned ones alone
    device.write(device.offer, sign_with=None)
    check_start(lax)
    assert "without a signature check, since it is unsigned" in capsys.readouterr().err
    check_start(replace(config, student_trust=None))
    told = capsys.readouterr().err
    assert "without a signature check, since there is no student_trust" in told and told.count("\n") == 1
    flip_a_byte(device.offer)
    with pytest.raises(ConfigError, match="is damaged"):
        check_start(replace(config, student_trust=None))


def test_the_command_ends_with_one_line(device: Device, config: EdgeConfig) -> None:
    device.write(device.offer, sign_with=("ops", STRANGER))
    settings = ["--student-bundle", str(config.student_bundle), "--student-trust", str(config.student_trust)]
    done = subprocess.run(
        [sys.executable, "-m", "longshore.cli", "edge", "--port", "0", *settings],
        env=os.environ | {"LONGSHORE_API_KEY": "k"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "the signature does not fit" in done.stderr and done.stderr.count("\n") == 1


def test_trust_without_a_student_is_refused() -> None:
    flags = {"student_trust": "trust.json", "cores": [{"name": "c", "url": "http://h:1", "api_key": "x"}]}
    with pytest.raises(ConfigError, match="student_trust needs a student_bundle"):
        load_config(environment={"LONGSHORE_API_KEY": "k"}, flags=flags)
