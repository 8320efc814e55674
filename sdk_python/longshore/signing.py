"""Ed25519 signatures (RFC 8032) of tier assertions and bundle manifests.

`cryptography` is imported on first use. Keys and signatures travel as unpadded base64url text.
Owns no key storage.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longshore.errors import AuthenticationError, ConfigError, LongshoreError
from longshore.wire import MAX_ASSERTION_AGE_S, Assertion, decode, dump_json, encode, load_json_object

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["PrivateKey", "PublicKey", "sign_assertion", "verify_assertion"]

_MAX_TOKEN_CHARS = 2048
_CLOCK_SKEW_S = 5


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The 32-byte public half as base64url text."""

    text: str

    def verifies(self, signature: bytes, payload: bytes) -> bool:
        """True if `signature` (64 bytes) is this key's over `payload`."""
        ed25519, invalid_signature = _ed25519()
        key = ed25519.Ed25519PublicKey.from_public_bytes(_key_bytes(self.text))
        try:
            key.verify(signature, payload)
        except invalid_signature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """The 32-byte seed as base64url text; its repr never shows it."""

    text: str

    def __repr__(self) -> str:
        return "PrivateKey(***)"

    @classmethod
    def generate(cls) -> PrivateKey:
        """A fresh key from the system's randomness."""
        ed25519, _ = _ed25519()
        return cls(encode_base64url(ed25519.Ed25519PrivateKey.generate().private_bytes_raw()))

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        return PublicKey(encode_base64url(self._key().public_key().public_bytes_raw()))

    def sign(self, payload: bytes) -> bytes:
        """The 64-byte signature of `payload`."""
        return self._key().sign(payload)

    def _key(self) -> Ed25519PrivateKey:
        ed25519, _ = _ed25519()
        key: Ed25519PrivateKey = ed25519.Ed25519PrivateKey.from_private_bytes(_key_bytes(self.text))
        return key


def sign_assertion(assertion: Assertion, key: PrivateKey) -> str:
    """The header value `payload.signature` of an assertion."""
    payload = dump_json(encode(assertion))
    return f"{encode_base64url(payload)}.{encode_base64url(key.sign(payload))}"


def verify_assertion(token: str, edges: Mapping[str, PublicKey], *, audience: str, now_s: float) -> Assertion:
    """The assertion in a header value, if a known edge signed it for `audience` and it is fresh.

    `edges` maps issuer names to their keys; `now_s` is Unix time. Raises AuthenticationError,
    without saying which check failed beyond what the sender may know.
    """
    try:
        payload, signature = _split(token)
        assertion = decode(Assertion, load_json_object(payload))
    except (LongshoreError, ValueError):
        raise AuthenticationError("the edge assertion can't be read") from None
    key = edges.get(assertion.issuer)
    if key is None or not key.verifies(signature, payload):
        raise AuthenticationError("the edge assertion is not signed by a known edge")
    if assertion.audience != audience:
        raise AuthenticationError("the edge assertion is meant for another tier")
    lifetime_s = assertion.expires_at - assertion.issued_at
    is_fresh = assertion.issued_at - _CLOCK_SKEW_S <= now_s < assertion.expires_at + _CLOCK_SKEW_S
    if not is_fresh or not 0 < lifetime_s <= MAX_ASSERTION_AGE_S:
        raise AuthenticationError("the edge assertion has expired")
    return assertion


def encode_base64url(data: bytes) -> str:
    """Unpadded base64url (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_base64url(text: str) -> bytes:
    """The bytes of unpadded base64url; raises ValueError on anything else."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_")
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None
    if encode_base64url(data) != text:  # the decoder passes over padding, foreign letters and loose bits
        raise ValueError("not canonical base64url")
    return data


def _split(token: str) -> tuple[bytes, bytes]:
    if len(token) > _MAX_TOKEN_CHARS:
        raise ValueError("too long")
    payload, dot, signature = token.partition(".")
    if not dot:
        raise ValueError("no signature")
    return decode_base64url(payload), decode_base64url(signature)


def _key_bytes(text: str) -> bytes:
    try:
        raw = decode_base64url(text)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ConfigError("an Ed25519 key must be 32 bytes in base64url")
    return raw


def _ed25519() -> tuple[Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError(
            "signatures need the package cryptography: install longshore[edge] or [server]"
        ) from None
    return ed25519, InvalidSignature
