"""Which keys may sign bundles: a store of public keys with their times, revocations and rotation.

Decides by what is in the file and the time it is given; never fetches a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

from annotated_types import Interval, MaxLen, Predicate

from longshore.bundle.files import replace_file
from longshore.errors import BundleError, ConfigError, InvalidRequestError, LongshoreError
from longshore.signing import PrivateKey, PublicKey, decode_base64url, encode_base64url
from longshore.wire import decode, dump_json, encode, load_json_object
from longshore.wire.jsontext import refuse_twice

MAX_KEYS = 64
MAX_TRUST_BYTES = 256 * 1024
MAX_STATEMENT_CHARS = 2048
_ROTATION_PREFIX = b"longshore-key-rotation-1\n"
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}\Z")


def _is_key_id(value: str) -> bool:
    return _KEY_ID.match(value) is not None


def _is_key(value: str) -> bool:
    try:
        return len(decode_base64url(value)) == 32
    except ValueError:
        return False


KeyId = Annotated[str, Predicate(_is_key_id)]
KeyText = Annotated[str, MaxLen(43), Predicate(_is_key)]
UnixTime = Annotated[int, Interval(ge=0, le=2**53)]


class VerifyingKey(Protocol):
    """What a trusted key can do; `longshore.signing.PublicKey` is one."""

    def verifies(self, signature: bytes, payload: bytes) -> bool: ...


TrustedKeys = Mapping[str, VerifyingKey]


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """A public key that counts from `not_before` until just before `expires_at`, in Unix time."""

    key_id: KeyId
    public_key: KeyText
    not_before: UnixTime | None = None
    expires_at: UnixTime | None = None
    introduced_by: KeyId | None = None


@dataclass(frozen=True, slots=True)
class _Statement:
    """`new_key` counts too, says the key `old_key_id`."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"format_version"})
    old_key_id: KeyId
    new_key: OperatorKey
    format_version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class TrustStore:
    """The keys that a device believes. `revoked` ids count no more, nor do keys that those introduced."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"format_version", "keys"})
    keys: Annotated[tuple[OperatorKey, ...], MaxLen(MAX_KEYS)] = ()
    revoked: Annotated[tuple[KeyId, ...], MaxLen(256)] = ()
    format_version: Literal[1] = 1

    def __post_init__(self) -> None:
        if len({key.key_id for key in self.keys}) != len(self.keys):
            raise InvalidRequestError("names a key twice", param="keys")

    def key_for(self, key_id: str | None, now_s: float) -> PublicKey:
        """The good key of that id; BundleError says why there is none."""
        key = self._find(key_id or "")
        if key is None:
            raise BundleError("is not signed by a trusted key")
        self._refuse_revoked(key)
        if key.not_before is not None and now_s < key.not_before:
            raise BundleError(f"is signed by the key {key.key_id}, which does not count yet")
        if key.expires_at is not None and now_s >= key.expires_at:
            raise BundleError(f"is signed by the key {key.key_id}, which has expired")
        return PublicKey(key.public_key)

    def with_chain(self, statements: Iterable[str], now_s: float) -> TrustStore:
        """The store with the keys that rotation statements teach; what does not verify teaches nothing."""
        store = self
        for text in statements:
            new = store._learn(text, now_s)
            if new is not None and len(store.keys) < MAX_KEYS:
                store = replace(store, keys=(*store.keys, new))
        return store

    def with_key(self, key: OperatorKey) -> TrustStore:
        """The store with one more key, whose id is new; raises ConfigError."""
        if self._find(key.key_id) is not None or key.key_id in self.revoked:
            raise ConfigError(f"the key id {key.key_id} is known already; give the new key another one")
        if len(self.keys) >= MAX_KEYS:
            raise ConfigError(f"a trust store holds {MAX_KEYS} keys at most")
        return replace(self, keys=(*self.keys, key))

    def without_key(self, key_id: str) -> TrustStore:
        """The store with `key_id` revoked for good, whether it was known or not; raises ConfigError."""
        if not _is_key_id(key_id):
            raise ConfigError(f"{key_id[:70]!r} is no key id")
        return self if key_id in self.revoked else replace(self, revoked=(*self.revoked, key_id))

    def _find(self, key_id: str) -> OperatorKey | None:
        return next((key for key in self.keys if key.key_id == key_id), None)

    def _refuse_revoked(self, key: OperatorKey) -> None:
        """Neither the key nor any in the line of keys that introduced it may be revoked."""
        line, introducer = [key.key_id], key.introduced_by
        while introducer is not None and introducer not in line:
            line.append(introducer)
            found = self._find(introducer)
            introducer = found.introduced_by if found is not None else None
        if not set(line).isdisjoint(self.revoked):
            raise BundleError(f"is signed by the key {key.key_id}, which is revoked")

    def _learn(self, text: str, now_s: float) -> OperatorKey | None:
        try:
            payload, signature = _split(text)
            fields = load_json_object(payload, max_bytes=MAX_STATEMENT_CHARS)
            json.loads(payload, object_pairs_hook=refuse_twice)
            statement = decode(_Statement, fields)
            old_key = self.key_for(statement.old_key_id, now_s)
        except (LongshoreError, ValueError):
            return None
        new = statement.new_key
        if not old_key.verifies(signature, _ROTATION_PREFIX + payload):
            return None
        is_known = self._find(new.key_id) is not None or new.key_id in self.revoked
        return None if is_known else replace(new, introduced_by=statement.old_key_id)


def sign_rotation(old_key_id: str, old_key: PrivateKey, new_key: OperatorKey) -> str:
    """The statement by which the old key vouches for the new one."""
    payload = dump_json(encode(_Statement(old_key_id, replace(new_key, introduced_by=None))))
    signature = old_key.sign(_ROTATION_PREFIX + payload)
    return f"{encode_base64url(payload)}.{encode_base64url(signature)}"


def load_trust(path: Path) -> TrustStore:
    """The trust store in a file; ConfigError in one line if it can't be used."""
    try:
        with path.open("rb") as stream:
            body = stream.read(MAX_TRUST_BYTES + 1)
        return decode(TrustStore, load_json_object(body, max_bytes=MAX_TRUST_BYTES))
    except OSError as error:
        raise ConfigError(f"the trust store {path} can't be read: {error.strerror}") from None
    except LongshoreError as error:
        raise ConfigError(f"the trust store {path} can't be used: {error.message}") from None


def save_trust(path: Path, store: TrustStore) -> None:
    """Replace the file in one step; raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, dump_json(encode(store)) + b"\n")
    except OSError as error:
        raise ConfigError(f"the trust store {path} can't be written: {error.strerror}") from None


def _split(text: str) -> tuple[bytes, bytes]:
    payload, _, signature = text.partition(".")
    if len(text) > MAX_STATEMENT_CHARS:
        raise ValueError("too long")
    return decode_base64url(payload), decode_base64url(signature)
