"""Who asks: turns a bearer key or an edge's assertion into a Caller; anything else is refused.

Nothing of a Caller ever comes from a body. Keeps no key in clear, only digests from the settings.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from longshore.errors import AuthenticationError, PermissionDeniedError
from longshore.signing import PublicKey, verify_assertion
from longshore.wire import ASSERTION_HEADER, LANES, AnyRequest, Lane
from longshore_server.config import CoreConfig, EdgeSetting, KeySetting

AUDIENCE = "core"
WEBSOCKET_PROTOCOL = "longshore.v1"
_BEARER_PROTOCOL = "bearer."
_MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is and what it permits. `issuer` is the edge that vouches for it, if one does."""

    tenant: str
    best_lane: Lane = "standard"
    max_tokens: int | None = None
    issuer: str | None = None

    def check(self, request: AnyRequest) -> None:
        """Raises PermissionDeniedError where the request asks for more than its sender may have."""
        if request.longshore.privacy == "device-only":
            raise PermissionDeniedError(
                "longshore.privacy: a device-only request must not leave the device",
                param="longshore.privacy",
            )
        if LANES.index(request.lane) < LANES.index(self.best_lane):
            param = "longshore.lane" if request.longshore.lane else "service_tier"
            raise PermissionDeniedError(
                f"{param}: the key permits the lane {self.best_lane!r} at best", param=param
            )
        limit = request.token_limit
        if self.max_tokens is not None and limit is not None and limit > self.max_tokens:
            raise PermissionDeniedError(
                f"max_tokens: the key permits {self.max_tokens} tokens at most, not {limit}",
                param="max_tokens",
            )


class Authenticator:
    """Checks keys and assertions against the settings; `unix_time_s` is the clock that assertions die by."""

    def __init__(
        self,
        keys: Sequence[KeySetting],
        edges: Sequence[EdgeSetting],
        *,
        unix_time_s: Callable[[], float] = time.time,
    ) -> None:
        self._keys = tuple((bytes.fromhex(key.key_sha256), key) for key in keys)
        self._edges = {edge.issuer: PublicKey(edge.public_key) for edge in edges}
        self._unix_time_s = unix_time_s

    @classmethod
    def of(cls, config: CoreConfig) -> Authenticator:
        """The authenticator of a core's settings."""
        return cls(config.keys, config.edges)

    def caller(self, connection: HTTPConnection) -> Caller:
        """The sender of a request or WebSocket handshake; raises AuthenticationError."""
        token = connection.headers.get(ASSERTION_HEADER)
        if token is not None:
            return self._vouched(token)
        key = _bearer_key(connection)
        if key is None:
            raise AuthenticationError("no API key: send it as `Authorization: Bearer KEY`")
        return self._holder(key)

    def _vouched(self, token: str) -> Caller:
        assertion = verify_assertion(token, self._edges, audience=AUDIENCE, now_s=self._unix_time_s())
        return Caller(assertion.tenant, assertion.best_lane, assertion.max_tokens, assertion.issuer)

    def _holder(self, key: str) -> Caller:
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        found: KeySetting | None = None
        for known, setting in self._keys:  # every one is compared, so that timing tells nothing
            if hmac.compare_digest(known, digest):
                found = setting
        if found is None:
            raise AuthenticationError("the API key is not known here")
        return Caller(found.tenant, found.best_lane, found.max_tokens)


def _bearer_key(connection: HTTPConnection) -> str | None:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and 0 < len(key.strip()) <= _MAX_KEY_CHARS:
        return key.strip()
    return _subprotocol_key(connection) if connection.scope["type"] == "websocket" else None


def _subprotocol_key(connection: HTTPConnection) -> str | None:
    """A browser can set no header on a WebSocket; it offers the key as a second subprotocol."""
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith(_BEARER_PROTOCOL) and len(protocol) <= _MAX_KEY_CHARS:
            return str(protocol.removeprefix(_BEARER_PROTOCOL))
    return None
