"""Bundles: any damage is refused, an install is whole or has not happened, old versions stay out."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundles import FILES, snapshot, write_plain
from longshore.bundle import (
    check_runtime,
    install,
    installed,
    list_installed,
    load_bundle,
    model_digest,
    rollback,
)
from longshore.bundle import store as store_module
from longshore.errors import (
    BundleDamagedError,
    BundleError,
    BundleIncompatibleError,
    BundleRollbackError,
)
from longshore.signing import PrivateKey

ANY_FILE = st.sampled_from(["manifest.json", *FILES])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_plain(folder)
    return folder


def make(folder: Path, version: int, **options: Any) -> Path:
    write_plain(folder, version=version, **options)
    return folder


def test_a_whole_bundle_loads(source: Path) -> None:
    assert load_bundle(source).name == "plain"


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(st.data())
def test_any_changed_byte_is_refused(source: Path, data: st.DataObject) -> None:
    path = source / data.draw(ANY_FILE)
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(bad))
    try:
        if path.name == "manifest.json":  # unsigned, a change may give another valid manifest; never a crash
            _loads_or_is_refused(source)
        else:
            with pytest.raises(BundleDamagedError):
                load_bundle(source)
    finally:
        path.write_bytes(good)


def _loads_or_is_refused(folder: Path) -> None:
    try:
        load_bundle(folder)
    except BundleError:
        return


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.data())
def test_any_truncation_is_refused(source: Path, data: st.DataObject) -> None:
    path = source / data.draw(ANY_FILE)
    good = path.read_bytes()
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    try:
        with pytest.raises(BundleDamagedError):
            load_bundle(source)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("path", ["manifest.json", *FILES])
def test_a_missing_file_is_refused(source: Path, path: str) -> None:
    (source / path).unlink()
    with pytest.raises(BundleDamagedError, match="missing"):
        load_bundle(source)


@pytest.mark.parametrize("path", ["more.txt", "extra/more.txt", "other/deep/more.txt", ".hidden"])
def test_a_file_beside_the_manifest_is_refused(source: Path, path: str) -> None:
    (source / path).parent.mkdir(parents=True, exist_ok=True)
    (source / path).write_bytes(b"x")
    with pytest.raises(BundleDamagedError, match="not in the manifest"):
        load_bundle(source)


@pytest.mark.parametrize("path", ["manifest.json", *FILES])
def test_a_link_is_refused_even_to_the_right_bytes(source: Path, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    (source / path).rename(outside)
    (source / path).symlink_to(outside)
    with pytest.raises(BundleDamagedError):
        load_bundle(source)


def test_a_linked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "extra").rename(tmp_path / "outside")
    (source / "extra").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleDamagedError):
        load_bundle(source)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(BundleDamagedError):
        load_bundle(source)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", ".hidden", "a//b", "a\x00b"]
)
def test_a_path_that_leaves_the_bundle_is_refused(source: Path, path: str) -> None:
    body = (source / "manifest.json").read_text()
    (source / "manifest.json").write_text(body.replace("extra/words.txt", path.replace("\\", "\\\\")))
    with pytest.raises(BundleDamagedError):
        load_bundle(source)


@pytest.mark.parametrize("name", ["..", "a/b", ".", "", "-x", "x" * 101])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError):
        install(make(tmp_path / "source", 1, name=name), tmp_path / "store")
    assert not (tmp_path / "store").exists()


# -- installing --------------------------------------------------------------------------------


def test_install_copies_and_makes_current(source: Path, tmp_path: Path) -> None:
    path = install(source, tmp_path / "store")
    found = installed(tmp_path / "store", "plain")
    assert found is not None and found.path == path and found.is_current
    assert snapshot(path) == snapshot(source)
    assert install(source, tmp_path / "store") == path, "again changes nothing"


def test_nothing_is_installed_in_an_empty_store(tmp_path: Path) -> None:
    assert installed(tmp_path, "plain") is None
    assert list_installed(tmp_path / "no-store") == []
    with pytest.raises(BundleError, match="no older version"):
        rollback(tmp_path, "plain")


def test_an_older_version_is_refused_and_the_newer_stays(tmp_path: Path) -> None:
    store = tmp_path / "store"
    path = install(make(tmp_path / "two", 2), store)
    with pytest.raises(BundleRollbackError):
        install(make(tmp_path / "one", 1), store)
    found = installed(store, "plain")
    assert found is not None and found.path == path and load_bundle(path).version == 2


def test_other_bytes_under_the_same_version_are_refused(source: Path, tmp_path: Path) -> None:
    path = install(source, tmp_path / "store")
    other = make(tmp_path / "other", 1, files=FILES | {"tokenizer.json": b"[]"})
    with pytest.raises(BundleRollbackError, match="another bundle"):
        install(other, tmp_path / "store")
    assert snapshot(path) == snapshot(source)


@pytest.mark.parametrize("path", list(FILES))
def test_a_damaged_source_leaves_the_old_version(tmp_path: Path, path: str) -> None:
    store = tmp_path / "store"
    good = install(make(tmp_path / "one", 1), store)
    two = make(tmp_path / "two", 2)
    (two / path).write_bytes(bytes([(two / path).read_bytes()[0] ^ 1]) + (two / path).read_bytes()[1:])
    with pytest.raises(BundleDamagedError):
        install(two, store)
    found = installed(store, "plain")
    assert found is not None and found.path == good and load_bundle(good).version == 1
    assert [entry.name for entry in (store / "plain").iterdir() if entry.is_dir()] == ["1"]


def test_a_damaged_copy_in_the_store_is_replaced(source: Path, tmp_path: Path) -> None:
    path = install(source, tmp_path / "store")
    (path / "model.onnx").write_bytes(b"broken")
    assert install(source, tmp_path / "store") == path
    assert snapshot(path) == snapshot(source)


def test_rollback_goes_back_and_forward_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for version in (1, 2, 3):
        install(make(tmp_path / str(version), version), store)
    assert [found.manifest.version for found in list_installed(store)] == [2, 3], "two versions are kept"
    assert rollback(store, "plain").name == "2"
    found = installed(store, "plain")
    assert found is not None and found.manifest.version == 2
    with pytest.raises(BundleError, match="no older version"):
        rollback(store, "plain")
    assert install(tmp_path / "3", store).name == "3"


def test_rollback_refuses_a_damaged_version(tmp_path: Path) -> None:
    store = tmp_path / "store"
    old = install(make(tmp_path / "one", 1), store)
    new = install(make(tmp_path / "two", 2), store)
    (old / "model.onnx").write_bytes(b"broken")
    with pytest.raises(BundleDamagedError):
        rollback(store, "plain")
    found = installed(store, "plain")
    assert found is not None and found.path == new


class _Killed(BaseException):
    """Stands for the process's end at one system call: nothing after it runs in the install."""


STEPS: tuple[tuple[Any, str], ...] = (
    (os, "replace"),
    (os, "fsync"),
    (Path, "mkdir"),
    (builtins, "open"),
    (os, "open"),
    (Path, "open"),
)


def _dies_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Let the `step`-th call that changes the disk, and each after it, raise; gives the number of calls."""
    calls = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise _Killed
            return real(*args, **kwargs)

        return call

    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    # A dead process cleans nothing up.
    monkeypatch.setattr(store_module.shutil, "rmtree", wrapped(store_module.shutil.rmtree))
    return lambda: calls


def test_a_kill_at_any_step_leaves_a_whole_current_version(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", 1), make(tmp_path / "two", 2)
    step = 0
    while True:
        store = tmp_path / f"store-{step}"
        install(one, store)
        with pytest.MonkeyPatch.context() as monkeypatch:
            _dies_at(monkeypatch, step)
            try:
                install(two, store)
                died = False
            except _Killed:
                died = True
        found = installed(store, "plain")
        assert found is not None
        assert load_bundle(found.path).version in (1, 2), f"killed at step {step}"
        assert install(two, store).name == "2", "the next install clears up and works"
        assert not list((store / "plain").glob(".incoming*"))
        if not died:
            break
        step += 1
    assert step > 20, "the install really was cut at many places"


def test_a_real_kill_leaves_a_whole_current_version(tmp_path: Path) -> None:
    big = FILES | {"model.onnx": os.urandom(24 * 1024 * 1024)}
    one, two = make(tmp_path / "one", 1), make(tmp_path / "two", 2, files=big)
    store = tmp_path / "store"
    install(one, store)
    code = "import sys; from longshore.bundle import install; print(flush=True); install(*sys.argv[1:])"
    for delay_s in (0.0, 0.01, 0.03):
        child = subprocess.Popen([sys.executable, "-c", code, str(two), str(store)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child, child.stdout:
            child.stdout.readline()
            time.sleep(delay_s)
            child.kill()
        found = installed(store, "plain")
        assert found is not None and load_bundle(found.path).version in (1, 2)
    install(two, store)
    assert {path.name for path in (store / "plain").iterdir()} == {"1", "2", "current", "highest", ".lock"}


# -- signatures, runtime, digest ---------------------------------------------------------------


def test_a_signed_bundle_needs_its_key(tmp_path: Path) -> None:
    key, other = PrivateKey.generate(), PrivateKey.generate()
    folder = make(tmp_path / "signed", 1, sign_with=("ops", key))
    assert load_bundle(folder, trusted_keys={"ops": key.public_key}).key_id == "ops"
    for keys in ({}, {"ops": other.public_key}, {"else": key.public_key}):
        with pytest.raises(BundleError):
            load_bundle(folder, trusted_keys=keys)
    path = install(folder, tmp_path / "store", trusted_keys={"ops": key.public_key})
    assert load_bundle(path, trusted_keys={"ops": key.public_key}).version == 1


@pytest.mark.parametrize("signature", [b"", b"!!", b"A" * 86, b"\xff" * 20, b"A" * 5000])
def test_a_wrong_signature_is_refused(tmp_path: Path, signature: bytes) -> None:
    key = PrivateKey.generate()
    folder = make(tmp_path / "signed", 1, sign_with=("ops", key))
    (folder / "manifest.sig").write_bytes(signature)
    with pytest.raises(BundleError, match="signature"):
        load_bundle(folder, trusted_keys={"ops": key.public_key})


def test_an_unsigned_or_expired_bundle_is_refused_where_keys_are_asked(source: Path, tmp_path: Path) -> None:
    key = PrivateKey.generate()
    with pytest.raises(BundleError, match="not signed"):
        load_bundle(source, trusted_keys={"ops": key.public_key})
    old = make(tmp_path / "old", 1, sign_with=("ops", key), expires_at=1)
    with pytest.raises(BundleError, match="expired"):
        load_bundle(old, trusted_keys={"ops": key.public_key})


@pytest.mark.parametrize(
    ("version", "fits"), [("1.23.9", False), ("1.24.0", True), ("1.100", True), ("2", True)]
)
def test_runtime_versions_compare_by_number(source: Path, version: str, fits: bool) -> None:
    manifest = load_bundle(source)
    if fits:
        check_runtime(manifest, version)
    else:
        with pytest.raises(BundleIncompatibleError):
            check_runtime(manifest, version)


def test_model_digest_names_weights_and_tokens(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no safetensors"):
        model_digest(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"one")
    with pytest.raises(BundleError, match=r"config\.json"):
        model_digest(tmp_path)
    for name in ("config.json", "tokenizer.json", "b.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    first = model_digest(tmp_path)
    assert len(first) == 64 and model_digest(tmp_path) == first
    (tmp_path / "README.md").write_text("words")
    assert model_digest(tmp_path) == first, "other files do not count"
    seen = {first}
    for name in ("config.json", "tokenizer.json", "a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"[]x")
        seen.add(model_digest(tmp_path))
    assert len(seen) == 5


def test_large_weights_are_sampled(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(300 * 1024 * 1024)  # sparse
    first = model_digest(tmp_path)
    for at in (0, 5, 300 * 1024 * 1024 - 1):
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        assert model_digest(tmp_path) != first
        first = model_digest(tmp_path)
