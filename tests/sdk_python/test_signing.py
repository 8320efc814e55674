"""Assertions of an edge: only a known edge's fresh word for this tier is believed, whatever is sent."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longshore.errors import AuthenticationError, ConfigError
from longshore.signing import (
    PrivateKey,
    PublicKey,
    decode_base64url,
    encode_base64url,
    sign_assertion,
    verify_assertion,
)
from longshore.wire import MAX_ASSERTION_AGE_S, Assertion, dump_json, encode
from wire_strategies import instances

pytestmark = pytest.mark.fuzz

NOW_S = 1_800_000_000
KEY = PrivateKey(encode_base64url(bytes(range(32))))
EDGES = {"edge-1": KEY.public_key, "edge-2": PrivateKey.generate().public_key}
ASSERTION = Assertion("edge-1", "core", "acme", issued_at=NOW_S, expires_at=NOW_S + 30, max_tokens=100)
TOKEN = sign_assertion(ASSERTION, KEY)


def verify(token: str, *, audience: str = "core", now_s: float = NOW_S) -> Assertion:
    return verify_assertion(token, EDGES, audience=audience, now_s=now_s)


def test_a_fresh_assertion_is_believed() -> None:
    assert verify(TOKEN) == ASSERTION


@given(instances(Assertion))
def test_every_assertion_there_and_back(assertion: Assertion) -> None:
    fresh = dataclasses.replace(assertion, issued_at=NOW_S, expires_at=NOW_S + 1)
    edges = {fresh.issuer: KEY.public_key}
    token = sign_assertion(fresh, KEY)
    assert verify_assertion(token, edges, audience=fresh.audience, now_s=NOW_S) == fresh


def test_rfc_8032_test_1() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    key = PrivateKey(encode_base64url(seed))
    assert key.public_key == PublicKey(encode_base64url(public))
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a")
    assert key.public_key.verifies(key.sign(b""), b"")


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from("ABab01-_.=+/ \0é"))
def test_no_changed_letter_is_believed(at: int, letter: str) -> None:
    changed = TOKEN[:at] + letter + TOKEN[at + 1 :]
    if changed != TOKEN:
        with pytest.raises(AuthenticationError):
            verify(changed)


@given(
    st.text()
    | st.binary().map(encode_base64url)
    | st.binary().map(lambda raw: encode_base64url(raw) + ".AAAA")
)
@example("")
@example(".")
@example("x" * 5000)
@example(TOKEN + "=")
@example(TOKEN + ".AAAA")
@example(" " + TOKEN)
@example(encode_base64url(b"[" * 1000) + ".AAAA")
def test_any_text_is_refused_as_not_authentic(token: str) -> None:
    with pytest.raises(AuthenticationError):
        verify(token)


@pytest.mark.parametrize("lifetime_s", [1, 30, MAX_ASSERTION_AGE_S])
def test_it_lives_from_its_issue_to_its_end(lifetime_s: int) -> None:
    token = sign_assertion(dataclasses.replace(ASSERTION, expires_at=NOW_S + lifetime_s), KEY)
    for now_s in (NOW_S - 5, NOW_S, NOW_S + lifetime_s, NOW_S + lifetime_s + 4.9):
        verify(token, now_s=now_s)
    for now_s in (NOW_S - 5.1, NOW_S + lifetime_s + 5):
        with pytest.raises(AuthenticationError, match="expired"):
            verify(token, now_s=now_s)


@pytest.mark.parametrize("lifetime_s", [-1, 0, MAX_ASSERTION_AGE_S + 1, 10**9])
def test_lifetimes_that_no_edge_should_give(lifetime_s: int) -> None:
    token = sign_assertion(dataclasses.replace(ASSERTION, expires_at=NOW_S + lifetime_s), KEY)
    with pytest.raises(AuthenticationError):
        verify(token)


def test_other_audience_issuer_and_key() -> None:
    with pytest.raises(AuthenticationError, match="another tier"):
        verify(TOKEN, audience="edge")
    for issuer in ("edge-2", "edge-3"):
        with pytest.raises(AuthenticationError, match="known edge"):
            verify(sign_assertion(dataclasses.replace(ASSERTION, issuer=issuer), KEY))


def test_a_signed_payload_that_is_no_assertion() -> None:
    for body in ({}, encode(ASSERTION) | {"admin": True}, encode(ASSERTION) | {"tenant": ""}, [1]):
        payload = dump_json(body)
        with pytest.raises(AuthenticationError, match="can't be read"):
            verify(f"{encode_base64url(payload)}.{encode_base64url(KEY.sign(payload))}")


@given(st.binary(max_size=80))
def test_base64url_there_and_back(data: bytes) -> None:
    assert decode_base64url(encode_base64url(data)) == data


@pytest.mark.parametrize("text", ["A", "AA==", "AA=", "AB", "A+8_", "A/8_", "AA A", "AA\n", "é", "-_-_\0"])
def test_base64url_has_one_spelling(text: str) -> None:
    with pytest.raises(ValueError):
        decode_base64url(text)


@pytest.mark.parametrize("text", ["", "AAAA", "é", "x" * 43, encode_base64url(bytes(33))])
def test_a_bad_key_is_a_bad_setting(text: str) -> None:
    with pytest.raises(ConfigError):
        PrivateKey(text).sign(b"")
    with pytest.raises(ConfigError):
        PublicKey(text).verifies(bytes(64), b"")


@given(st.binary(max_size=100))
def test_any_signature_is_true_or_false(signature: bytes) -> None:
    assert KEY.public_key.verifies(signature, b"payload") is (signature == KEY.sign(b"payload"))


def test_a_private_key_is_never_shown() -> None:
    assert KEY.text not in repr(KEY) + str(KEY) + f"{KEY!r:>50}"
