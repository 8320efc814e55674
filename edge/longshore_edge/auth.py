"""Who asks: client keys, compared by digest, and the signed assertions that the edge makes to the cores.

Nothing of it is ever taken from a body.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from longshore.errors import AuthenticationError, PermissionDeniedError
from longshore.signing import PrivateKey, sign_assertion
from longshore.wire import LANES, MAX_ASSERTION_AGE_S, AnyRequest, Assertion, Lane
from longshore_edge.config import KeySettings

AUDIENCE = "core"
_REUSE_S = MAX_ASSERTION_AGE_S // 2


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request as its key says; limits of None are none of the edge's."""

    tenant: str
    best_lane: Lane = "standard"
    max_tokens: int | None = None
    max_concurrency: int | None = None
    requests_per_minute: int | None = None


class Keyring:
    """The keys that the edge knows, by their digest."""

    def __init__(self, keys: tuple[KeySettings, ...]) -> None:
        self._clients = {key.key_sha256: (key.key_sha256, _client(key)) for key in keys}

    def client_of(self, authorization: str | None) -> Client:
        """The client behind an `Authorization` header; raises AuthenticationError."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("give a key as `Authorization: Bearer KEY`")
        return self.client_of_key(key.strip())

    def client_of_key(self, key: str) -> Client:
        """The client behind a bare key; raises AuthenticationError."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        known = self._clients.get(digest)  # a look-up by digest tells nothing of the keys by its timing
        if known is None or not hmac.compare_digest(known[0], digest):
            raise AuthenticationError("the key is not known here")
        return known[1]


def _client(key: KeySettings) -> Client:
    return Client(key.tenant, key.best_lane, key.max_tokens, key.max_concurrency, key.requests_per_minute)


def asks_for_a_lane(request: AnyRequest) -> bool:
    """False where the request leaves the lane to the key."""
    return request.longshore.lane is not None or request.service_tier not in (None, "auto")


def check_permitted(request: AnyRequest, client: Client) -> None:
    """Raise PermissionDeniedError for what the client's key, or the request's privacy, does not permit."""
    if request.longshore.privacy == "device-only":
        raise PermissionDeniedError(
            "a device-only request must not leave the device", param="longshore.privacy"
        )
    if asks_for_a_lane(request) and LANES.index(request.lane) < LANES.index(client.best_lane):
        raise PermissionDeniedError(
            f"the key permits the lane {client.best_lane}, not {request.lane}", param="longshore.lane"
        )
    limit = request.token_limit
    if client.max_tokens is not None and limit is not None and limit > client.max_tokens:
        raise PermissionDeniedError(f"the key permits {client.max_tokens} tokens", param="max_tokens")


class AssertionMaker:
    """Makes assertions to the cores and reuses each for half of its life. `clock` is Unix time in seconds."""

    def __init__(self, issuer: str, key: PrivateKey, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._key = key
        self._clock = clock
        self._made: dict[Client, tuple[float, str]] = {}

    def assertion_for(self, client: Client) -> str:
        """The header value for a request of `client`; the map holds one per key of the settings."""
        now_s = self._clock()
        made = self._made.get(client)
        if made is not None and made[0] <= now_s < made[0] + _REUSE_S:
            return made[1]
        token = self._sign(client, int(now_s))
        self._made[client] = (now_s, token)
        return token

    def _sign(self, client: Client, now_s: int) -> str:
        assertion = Assertion(
            issuer=self._issuer,
            audience=AUDIENCE,
            tenant=client.tenant,
            issued_at=now_s,
            expires_at=now_s + MAX_ASSERTION_AGE_S,
            best_lane=client.best_lane,
            max_tokens=client.max_tokens,
        )
        return sign_assertion(assertion, self._key)
