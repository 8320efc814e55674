"""Bundle folders that were tampered with: each is refused with a typed error, and the old version stays."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks.victim import FILES, KEY, Device
from longshore.bundle import TrustStore, install, load_bundle, rollback
from longshore.errors import BundleDamagedError, BundleError, BundleIncompatibleError, BundleRollbackError
from longshore.signing import PrivateKey, encode_base64url

ALL_FILES = ["manifest.json", "manifest.sig", *FILES]
BAD_PATHS = ["../up", "a/../../up", "/etc/hosts", "C:\\x", "\\\\host\\x", "a\\b", ".hidden", "a//b", "a/"]
BAD_PATHS += ["", "a\x00", "a/b/c/d/e", "manifest.sig", "MANIFEST.json", "dot./x", "x.", "a" * 201]
BAD_PATHS += ["ä", "a b", "a:b", "~x"]
on_one_device = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def signed_anew(folder: Path, change: Callable[[dict[str, Any]], Any], key: PrivateKey = KEY) -> None:
    """Change the manifest and sign it with the operator's own key: the signature is not what refuses it."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    change(fields)
    put_signed(folder, json.dumps(fields).encode(), key)


def put_signed(folder: Path, body: bytes, key: PrivateKey = KEY) -> None:
    (folder / "manifest.json").write_bytes(body)
    (folder / "manifest.sig").write_text(encode_base64url(key.sign(body)))


def test_what_is_not_tampered_with_is_taken(device: Device) -> None:
    assert device.install_offer().name == "6"


@on_one_device
@given(st.data())
def test_any_flipped_byte(device: Device, data: st.DataObject) -> None:
    path = device.offer / data.draw(st.sampled_from(ALL_FILES))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
    try:
        device.refuses(device.install_offer)
    finally:
        path.write_bytes(good)


def test_every_character_of_the_signature(device: Device) -> None:
    path = device.offer / "manifest.sig"
    good = path.read_bytes()
    bits = [8 * at + at % 8 for at in range(len(good))]
    for bit in [*bits, *range(8 * len(good) - 8, 8 * len(good))]:  # the last one has bits to spare
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(BundleError):
            load_bundle(device.offer, trusted_keys=device.trust)


@on_one_device
@given(st.data())
def test_any_truncation_or_addition(device: Device, data: st.DataObject) -> None:
    path = device.offer / data.draw(st.sampled_from(ALL_FILES))
    good = path.read_bytes()
    cut = good[: data.draw(st.integers(0, len(good) - 1))]
    path.write_bytes(data.draw(st.sampled_from([cut, good + b" ", good + b"\n\n", b"\n" + good])))
    try:
        device.refuses(device.install_offer)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("one", "other"), [("model.onnx", "tokenizer.json"), ("manifest.sig", "tokenizer.json")]
)
def test_files_that_changed_places(device: Device, one: str, other: str) -> None:
    (device.offer / one).rename(device.folder / "aside")
    (device.offer / other).rename(device.offer / one)
    (device.folder / "aside").rename(device.offer / other)
    device.refuses(device.install_offer)


def test_a_file_of_another_signed_version(device: Device) -> None:
    device.write(device.folder / "seven", version=7, files=FILES | {"model.onnx": b"x" * 16384})
    shutil.copy(device.folder / "seven" / "model.onnx", device.offer)
    device.refuses(device.install_offer, BundleDamagedError)


# -- old versions --------------------------------------------------------------------------------


def test_an_older_signed_version(device: Device) -> None:
    old = device.write(device.folder / "old", version=4)
    device.refuses(lambda: install(old, device.store, trusted_keys=device.trust), BundleRollbackError)


def test_another_bundle_of_the_same_version(device: Device) -> None:
    other = device.write(device.folder / "other", version=5, files=FILES | {"tokenizer.json": b"[]"})
    device.refuses(lambda: install(other, device.store, trusted_keys=device.trust), BundleRollbackError)


def test_an_old_version_after_the_operator_went_back(device: Device) -> None:
    device.install_offer()
    assert rollback(device.store, "plain", trusted_keys=device.trust).name == "5"
    other_six = device.write(device.folder / "other", version=6, files=FILES | {"tokenizer.json": b"[]"})
    device.refuses(lambda: install(other_six, device.store, trusted_keys=device.trust), BundleRollbackError)
    shutil.rmtree(device.store / "plain" / "6")
    device.refuses(lambda: install(other_six, device.store, trusted_keys=device.trust), BundleRollbackError)
    assert device.install_offer().name == "6", "the version of the mark itself may come back"


@pytest.mark.parametrize("mark", ["", "6", "0 " + "0" * 64 + "\n", "5 x\n", "\xff"])
def test_a_damaged_high_water_mark(device: Device, mark: str) -> None:
    (device.store / "plain" / "highest").write_text(mark, "latin-1")
    device.refuses(device.install_offer, BundleDamagedError)


# -- paths and links, all rightly signed ---------------------------------------------------------


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_lead_elsewhere(device: Device, path: str) -> None:
    signed_anew(device.offer, lambda fields: fields["files"][2].update(path=path))
    device.refuses(device.install_offer, BundleDamagedError)


@pytest.mark.parametrize("path", ["model.onnx", "Model.ONNX", "model.onnx/x", "EXTRA/words.txt", "extra"])
def test_names_that_collide(device: Device, path: str) -> None:
    signed_anew(device.offer, lambda fields: fields["files"].append(fields["files"][1] | {"path": path}))
    device.refuses(device.install_offer, BundleDamagedError)


def test_a_field_that_stands_twice(device: Device) -> None:
    body = (device.offer / "manifest.json").read_bytes()
    put_signed(device.offer, body.replace(b'"version":6', b'"version":1,"version":6'))
    assert "twice" in device.refuses(device.install_offer, BundleDamagedError)


@pytest.mark.parametrize("name", ["..", "../plain", "plain/5", "", ".", "plain."])
def test_names_that_are_no_folder(device: Device, name: str) -> None:
    signed_anew(device.offer, lambda fields: fields.update(name=name))
    device.refuses(device.install_offer, BundleDamagedError)


@pytest.mark.parametrize("path", ALL_FILES)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_the_right_bytes(device: Device, path: str, link: Callable[[Path, Path], None]) -> None:
    (device.offer / path).rename(device.folder / "outside")
    link(device.folder / "outside", device.offer / path)
    device.refuses(device.install_offer, BundleDamagedError)


def test_a_linked_folder(device: Device) -> None:
    (device.offer / "extra").rename(device.folder / "outside")
    (device.offer / "extra").symlink_to(device.folder / "outside")
    device.refuses(device.install_offer, BundleDamagedError)


# -- keys ----------------------------------------------------------------------------------------


def test_nobodys_key(device: Device) -> None:
    device.write(device.offer, version=6, sign_with=("ops", PrivateKey.generate()))
    assert "does not fit" in device.refuses(device.install_offer)
    device.write(device.offer, version=6, sign_with=("other", KEY))
    assert "trusted key" in device.refuses(device.install_offer)


def test_no_signature(device: Device) -> None:
    (device.offer / "manifest.sig").unlink()
    assert "missing" in device.refuses(device.install_offer)
    device.write(device.offer, version=6, sign_with=None)
    assert "not signed" in device.refuses(device.install_offer)


def test_the_signature_of_other_bytes(device: Device) -> None:
    device.write(device.folder / "seven", version=7)
    shutil.copy(device.folder / "seven" / "manifest.sig", device.offer)
    device.refuses(device.install_offer)


def test_a_key_outside_its_time(device: Device) -> None:
    now_s, good = int(time.time()), device.trust
    for times, words in (({"expires_at": now_s}, "expired"), ({"not_before": now_s + 900}, "not count yet")):
        trust = TrustStore((_with(good, **times),))
        attack = lambda trust=trust: install(device.offer, device.store, trusted_keys=trust)  # noqa: E731
        assert words in device.refuses(attack)


def _with(store: TrustStore, **times: int) -> Any:
    from dataclasses import replace

    return replace(store.keys[0], **times)


def test_a_revoked_key(device: Device) -> None:
    trust = device.trust.without_key("ops")
    attack = lambda: install(device.offer, device.store, trusted_keys=trust)  # noqa: E731
    assert "revoked" in device.refuses(attack)


def test_an_expired_bundle(device: Device) -> None:
    device.write(device.offer, version=6, expires_at=int(time.time()) - 1)
    assert "expired" in device.refuses(device.install_offer)


def test_a_runtime_that_is_too_old(device: Device) -> None:
    device.write(device.offer, version=6, min_onnxruntime="1.25")
    device.refuses(device.install_offer, BundleIncompatibleError)
