"""Keys and assertions: who is let in as whom, and what a caller may ask."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from longshore.errors import AuthenticationError, PermissionDeniedError
from longshore.signing import PrivateKey, sign_assertion
from longshore.wire import Assertion, decode_chat_request
from longshore_server.auth import Authenticator, Caller
from longshore_server.config import EdgeSetting, KeySetting

NOW_S = 1_000_000.0
EDGE = PrivateKey.generate()


def _key(text: str, tenant: str, **more: Any) -> KeySetting:
    return KeySetting(tenant, hashlib.sha256(text.encode()).hexdigest(), **more)


AUTHENTICATOR = Authenticator(
    [_key("one", "acme"), _key("two", "vips", best_lane="vip", max_tokens=9)],
    [EdgeSetting("edge-1", EDGE.public_key.text)],
    unix_time_s=lambda: NOW_S,
)


def _connection(kind: str = "http", protocols: tuple[str, ...] = (), **headers: str) -> HTTPConnection:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return HTTPConnection({"type": kind, "headers": raw, "subprotocols": list(protocols)})


def test_a_key_is_its_tenant() -> None:
    assert AUTHENTICATOR.caller(_connection(authorization="Bearer one")) == Caller("acme")
    assert AUTHENTICATOR.caller(_connection(authorization="bearer  two ")) == Caller("vips", "vip", 9)


def test_no_settings_let_nobody_in() -> None:
    with pytest.raises(AuthenticationError):
        Authenticator([], []).caller(_connection(authorization="Bearer one"))


@given(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=600))
def test_any_other_header_is_refused(value: str) -> None:
    with pytest.raises(AuthenticationError):
        AUTHENTICATOR.caller(_connection(authorization=value))


def test_a_key_in_a_subprotocol_counts_on_websockets_only() -> None:
    protocols = ("longshore.v1", "bearer.one")
    assert AUTHENTICATOR.caller(_connection("websocket", protocols)) == Caller("acme")
    with pytest.raises(AuthenticationError):
        AUTHENTICATOR.caller(_connection("http", protocols))


def _assertion(key: PrivateKey = EDGE, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "issuer": "edge-1",
        "audience": "core",
        "tenant": "t9",
        "issued_at": int(NOW_S),
        "expires_at": int(NOW_S) + 30,
    }
    return sign_assertion(Assertion(**(fields | changes)), key)


def test_an_edge_vouches_for_its_client() -> None:
    token = _assertion(best_lane="vip", max_tokens=3)
    caller = AUTHENTICATOR.caller(_connection(longshore_assertion=token))
    assert caller == Caller("t9", "vip", 3, "edge-1")


@pytest.mark.parametrize(
    "token",
    [
        "",
        "nonsense",
        _assertion()[:-3],
        _assertion(PrivateKey.generate()),
        _assertion(issuer="edge-2"),
        _assertion(audience="edge"),
        _assertion(issued_at=int(NOW_S) - 90, expires_at=int(NOW_S) - 60),
        _assertion(expires_at=int(NOW_S) + 4000),
    ],
)
def test_a_bad_assertion_is_refused_even_beside_a_good_key(token: str) -> None:
    with pytest.raises(AuthenticationError):
        AUTHENTICATOR.caller(_connection(longshore_assertion=token, authorization="Bearer one"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"longshore": {"lane": "vip"}}, "longshore.lane"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"longshore": {"privacy": "device-only"}}, "longshore.privacy"),
        ({"max_tokens": 10}, "max_tokens"),
        ({"max_completion_tokens": 10}, "max_tokens"),
    ],
)
def test_what_a_caller_may_not_ask(fields: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    caller = Caller("t", "standard", 9)
    caller.check(decode_chat_request(body | {"max_tokens": 9, "longshore": {"lane": "batch"}}))
    with pytest.raises(PermissionDeniedError) as caught:
        caller.check(decode_chat_request(body | fields))
    assert caught.value.param == param
