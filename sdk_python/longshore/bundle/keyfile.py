"""Key files of operators: private ones for their owner alone, public ones for trust stores. Prints no key."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from longshore.bundle.files import write_file
from longshore.bundle.trust import KeyId, KeyText, OperatorKey, UnixTime
from longshore.errors import ConfigError, LongshoreError
from longshore.signing import PrivateKey
from longshore.wire import decode, dump_json, encode, load_json_object

_MAX_KEY_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An operator's private key, the id under which devices know it, and its times."""

    key_id: str
    key: PrivateKey
    not_before: int | None = None
    expires_at: int | None = None

    @property
    def public(self) -> OperatorKey:
        """What a trust store takes."""
        return OperatorKey(self.key_id, self.key.public_key.text, self.not_before, self.expires_at)


@dataclass(frozen=True, slots=True)
class _KeyFile:
    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"format_version"})
    key_id: KeyId
    private_key: KeyText = field(repr=False)
    not_before: UnixTime | None = None
    expires_at: UnixTime | None = None
    format_version: Literal[1] = 1


def write_signing_key(path: Path, key: SigningKey) -> None:
    """A new file of mode 0600; an existing one is never replaced. Raises ConfigError."""
    body = dump_json(encode(_KeyFile(key.key_id, key.key.text, key.not_before, key.expires_at)))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(body + b"\n")
    except OSError as error:
        raise ConfigError(f"the key {path} can't be written: {error.strerror}") from None


def read_signing_key(path: Path, key_id: str | None = None) -> SigningKey:
    """The key in a file: JSON as `write_signing_key` wrote it, or the bare seed, which needs `key_id`.

    Raises ConfigError in one line that holds nothing of the file, also where others may read the file.
    """
    body = _read(path, is_private=True)
    if not body.lstrip().startswith(b"{"):
        if key_id is None:
            raise ConfigError(f"the key {path} has no id of its own: give a key id")
        key = SigningKey(key_id, PrivateKey(body.decode("ascii", "replace").strip()))
        return _checked(key)
    found: _KeyFile = _decode(_KeyFile, body, path)
    if key_id not in (None, found.key_id):
        raise ConfigError(f"the key {path} has the id {found.key_id}, not {key_id}")
    return SigningKey(found.key_id, PrivateKey(found.private_key), found.not_before, found.expires_at)


def write_public_key(path: Path, key: OperatorKey) -> None:
    """A new file with the public half; raises ConfigError."""
    try:
        write_file(path, dump_json(encode(key)) + b"\n")
    except OSError as error:
        raise ConfigError(f"the key {path} can't be written: {error.strerror}") from None


def read_public_key(path: Path) -> OperatorKey:
    """The public key in a file; raises ConfigError."""
    key: OperatorKey = _decode(OperatorKey, _read(path, is_private=False), path)
    if key.introduced_by is not None:
        raise ConfigError(f"the key {path} comes out of a trust store: take the operator's own file")
    return key


def _checked(key: SigningKey) -> SigningKey:
    """A key id or seed that can't be used shows here, before anything is signed."""
    try:
        decode(OperatorKey, encode(key.public))
    except LongshoreError as error:
        raise ConfigError(f"the key can't be used: {error.message}") from None
    return key


def _read(path: Path, *, is_private: bool) -> bytes:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            body = stream.read(_MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"the key {path} can't be read: {error.strerror}") from None
    if is_private and os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"the key {path} can be read by others: run `chmod 600` on it")
    return body


def _decode(cls: type[Any], body: bytes, path: Path) -> Any:
    try:
        return decode(cls, load_json_object(body, max_bytes=_MAX_KEY_FILE_BYTES))
    except LongshoreError as error:
        raise ConfigError(f"the key {path} can't be used: {error.message}") from None
