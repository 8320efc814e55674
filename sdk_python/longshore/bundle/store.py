"""A store of bundles: installed atomically, rolled back, at most two versions of each name.

`STORE/NAME/VERSION/` is a version, `STORE/NAME/current` names the one in use, and `STORE/NAME/highest` is the
high-water mark below which nothing is installed. Whatever happens in the middle, `current` names a whole
version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longshore.bundle.check import (
    SAFE_NAME,
    Trust,
    check_runtime,
    copy_checked,
    load_bundle,
    read_manifest,
    read_manifest_bytes,
    read_signature,
    refuse_extra_entries,
)
from longshore.bundle.files import (
    INCOMING_PREFIX,
    flush,
    flush_folder,
    locked,
    open_plain,
    replace_file,
    write_file,
)
from longshore.errors import BundleDamagedError, BundleError, BundleRollbackError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, Manifest

NUM_KEPT_VERSIONS = 2
_CURRENT_NAME = "current"
_HIGHEST_NAME = "highest"
_LOCK_NAME = ".lock"
_VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,15}\Z")
_HIGHEST = re.compile(r"([1-9][0-9]{0,15}) ([0-9a-f]{64})\n\Z")


@dataclass(frozen=True, slots=True)
class InstalledBundle:
    """One version in a store; `path` is its folder."""

    path: Path
    manifest: Manifest
    is_current: bool


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest that was checked, the bytes that were signed, and the signature, empty if there is none."""

    manifest: Manifest
    body: bytes
    signature: bytes


def install(
    source_dir: Path | str,
    store_dir: Path | str,
    *,
    trusted_keys: Trust | None = None,
    onnxruntime_version: str | None = None,
) -> Path:
    """Copy a bundle into a store, checking each byte on the way, and make it current; gives its folder.

    The bytes that were checked are the ones installed. Installing the current version again changes nothing,
    unless its copy is damaged, which is then replaced. `onnxruntime_version` is the one that will run it, if
    that is known. Raises BundleIncompatibleError where that is too old, BundleRollbackError for a version
    below the highest that was ever installed or another bundle of that version, BundleDamagedError as
    load_bundle does, BundleError if the store can't be written; in every case what was current stays.
    """
    source = Path(source_dir)
    body, manifest = read_manifest_bytes(source, trusted_keys)
    if onnxruntime_version is not None:
        check_runtime(manifest, onnxruntime_version)
    refuse_extra_entries(source, manifest)
    signed = SignedManifest(manifest, body, read_signature(source))
    with writing(Path(store_dir), manifest.name) as home:
        settled = settled_folder(home, signed)
        if settled is not None:
            return settled
        with incoming_folder(home) as incoming:
            _copy_files(source, incoming, manifest)
            return commit(home, incoming, signed)


def installed(store_dir: Path | str, name: str) -> InstalledBundle | None:
    """The current version of a bundle, or None; its files are not checked (see load_bundle)."""
    home = _home(Path(store_dir), name)
    version = _current_version(home)
    if version is None:
        return None
    path = home / str(version)
    return InstalledBundle(path, read_manifest(path), is_current=True)


def list_installed(store_dir: Path | str) -> list[InstalledBundle]:
    """Every version in a store, by name and version; folders that hold no readable bundle are left out."""
    store = Path(store_dir)
    found: list[InstalledBundle] = []
    for home in sorted(store.iterdir()) if store.is_dir() else []:
        if not home.is_dir() or home.is_symlink() or not SAFE_NAME.match(home.name):
            continue
        current = _current_version(home)
        for version in _versions(home):
            with contextlib.suppress(BundleError):
                path = home / str(version)
                found.append(InstalledBundle(path, read_manifest(path), version == current))
    return found


def rollback(store_dir: Path | str, name: str, *, trusted_keys: Trust | None = None) -> Path:
    """Make the newest version below the current one current again; gives its folder.

    The operator's own act: the high-water mark stays, so that nobody else can offer an old version. The
    version is checked first, and a damaged one is not taken. Raises BundleError where there is none.
    """
    with writing(Path(store_dir), name) as home:
        current = _current_version(home)
        older = [version for version in _versions(home) if current is None or version < current]
        if not older:
            raise BundleError(f"there is no older version of {name} to go back to")
        target = home / str(older[-1])
        load_bundle(target, trusted_keys=trusted_keys)
        _point_to(home, older[-1])
        return target


# -- one install, in steps ----------------------------------------------------------------------


def settled_folder(home: Path, signed: SignedManifest) -> Path | None:
    """The folder where exactly this bundle is current and whole; None if it has yet to be installed.

    Raises BundleRollbackError for what is not newer than the high-water mark.
    """
    manifest = signed.manifest
    current = _current_version(home)
    if current == manifest.version and _is_whole(home / str(current), signed):
        return home / str(current)
    highest, digest = _high_water(home)
    if manifest.version < highest:
        raise BundleRollbackError(
            f"{manifest.name} {manifest.version} is older than version {highest}, which was installed before"
        )
    if manifest.version == highest and hashlib.sha256(signed.body).hexdigest() != digest:
        raise BundleRollbackError(f"another bundle of {manifest.name} {manifest.version} is installed")
    return None


@contextlib.contextmanager
def incoming_folder(home: Path) -> Iterator[Path]:
    """An empty folder to put a bundle together in; what is left of it at the end goes."""
    folder = home / f"{INCOMING_PREFIX}{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(home: Path, incoming: Path, signed: SignedManifest) -> Path:
    """Make the checked files in `incoming` the current version; gives its folder."""
    version, previous = signed.manifest.version, _current_version(home)
    if signed.signature:
        write_file(incoming / SIGNATURE_NAME, signed.signature)
    write_file(incoming / MANIFEST_NAME, signed.body)
    for folder, _, _ in os.walk(incoming):
        flush_folder(Path(folder))
    target = home / str(version)
    _replace_folder(incoming, target)
    digest = hashlib.sha256(signed.body).hexdigest()
    replace_file(home / _HIGHEST_NAME, f"{version} {digest}\n".encode())
    _point_to(home, version)
    _drop_oldest(home, keep={version, previous})
    return target


@contextlib.contextmanager
def writing(store: Path, name: str) -> Iterator[Path]:
    """The folder of `name`, for one writer at a time; leftovers of a broken install are cleared first."""
    home = _home(store, name)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / _LOCK_NAME):
            for leftover in home.glob(f"{INCOMING_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
            yield home
    except OSError as error:
        raise BundleError(f"the store {store} can't be written: {error.strerror or error}") from None


def _is_whole(folder: Path, signed: SignedManifest) -> bool:
    """False for other or damaged bytes, in which case the high-water mark decides."""
    try:
        body, _ = read_manifest_bytes(folder, None)
        load_bundle(folder)
        return body == signed.body and read_signature(folder) == signed.signature
    except BundleDamagedError:
        return False


def _high_water(home: Path) -> tuple[int, str]:
    """The highest version ever installed and its manifest's digest; (0, "") in a new store.

    A store from before the mark was kept has its newest folder in its place.
    """
    try:
        match = _HIGHEST.match((home / _HIGHEST_NAME).read_text("ascii"))
    except FileNotFoundError:
        newest = max(_versions(home), default=0)
        return newest, _manifest_digest(home / str(newest))
    except UnicodeDecodeError:
        match = None
    if match is None:
        raise BundleDamagedError(f"{home / _HIGHEST_NAME} is damaged: it must name a version and a digest")
    return int(match.group(1)), match.group(2)


def _manifest_digest(folder: Path) -> str:
    try:
        return hashlib.sha256(read_manifest_bytes(folder, None)[0]).hexdigest()
    except BundleDamagedError:
        return ""


def _home(store: Path, name: str) -> Path:
    if not SAFE_NAME.match(name):
        raise BundleError(f"{name[:40]!r} can't name a bundle")
    return store / name


def _current_version(home: Path) -> int | None:
    try:
        text = (home / _CURRENT_NAME).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not _VERSION_FOLDER.match(text) or not (home / text / MANIFEST_NAME).is_file():
        return None
    return int(text)


def _versions(home: Path) -> list[int]:
    if not home.is_dir():
        return []
    return sorted(
        int(path.name) for path in home.iterdir() if _VERSION_FOLDER.match(path.name) and path.is_dir()
    )


def _copy_files(source: Path, target: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_plain(source, file.path) as reader, path.open("xb") as writer:
            copy_checked(reader, file, writer)
            flush(writer)


def _replace_folder(incoming: Path, target: Path) -> None:
    """Rename into place; a damaged folder of the same version is moved out of the way first."""
    if target.exists():
        doomed = target.with_name(f"{INCOMING_PREFIX}{secrets.token_hex(8)}")
        os.replace(target, doomed)
        os.replace(incoming, target)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        os.replace(incoming, target)
    flush_folder(target.parent)


def _point_to(home: Path, version: int) -> None:
    """Switch `current`; a reader sees the old version or the new one."""
    replace_file(home / _CURRENT_NAME, f"{version}\n".encode())


def _drop_oldest(home: Path, keep: set[int | None]) -> None:
    """Keep the current version and the one before it; what an interrupted install left goes too."""
    versions = _versions(home)
    spare = NUM_KEPT_VERSIONS - sum(version in keep for version in versions)
    others = [version for version in reversed(versions) if version not in keep]
    for version in others[max(spare, 0) :]:
        shutil.rmtree(home / str(version), ignore_errors=True)
