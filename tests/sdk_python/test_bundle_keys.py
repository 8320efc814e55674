"""Operators' keys: trust stores, rotation from old to new, revocation, key files that stay secret."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundles import write_plain
from longshore.bundle import (
    OperatorKey,
    SigningKey,
    TrustStore,
    install,
    load_bundle,
    load_trust,
    read_public_key,
    read_signing_key,
    save_trust,
    sign_rotation,
    write_public_key,
    write_signing_key,
)
from longshore.errors import BundleError, ConfigError, LongshoreError
from longshore.signing import PrivateKey, decode_base64url, encode_base64url

KEYS = {name: PrivateKey(encode_base64url(bytes([number]) * 32)) for number, name in enumerate("abcd", 1)}
NOW_S = 1000


def public(name: str, **times: int) -> OperatorKey:
    return OperatorKey(name, KEYS[name].public_key.text, **times)


def rotation(old: str, new: str, **times: int) -> str:
    return sign_rotation(old, KEYS[old], public(new, **times))


def said_twice(old: str, new: str) -> str:
    """Signed rightly, but other readers could take the other of the two names."""
    payload = decode_base64url(rotation(old, new).partition(".")[0])[:-1] + b',"old_key_id":"a"}'
    signature = KEYS[old].sign(b"longshore-key-rotation-1\n" + payload)
    return f"{encode_base64url(payload)}.{encode_base64url(signature)}"


def good(store: TrustStore, now_s: int = NOW_S) -> set[str]:
    found = set()
    for name in KEYS:
        try:
            store.key_for(name, now_s)
        except BundleError:
            continue
        found.add(name)
    return found


STORE = TrustStore((public("a"),))


def test_a_chain_leads_from_key_to_key() -> None:
    chain = [rotation("a", "b"), rotation("b", "c")]
    store = STORE.with_chain(chain, NOW_S)
    assert good(store) == {"a", "b", "c"}
    assert [key.introduced_by for key in store.keys] == [None, "a", "b"]
    assert store.with_chain(chain, NOW_S) == store, "again it teaches nothing"
    assert good(STORE.with_chain(reversed(chain), NOW_S)) == {"a", "b"}, "the order counts"


@pytest.mark.parametrize(
    "statement",
    [
        "",
        ".",
        "x" * 3000,
        rotation("b", "c"),  # by a key that is not known
        sign_rotation("a", KEYS["b"], public("c")),  # in another's name
        rotation("a", "c") + "A",
        rotation("a", "c").replace(".", "..", 1),
        encode_base64url(b"{}") + "." + rotation("a", "c").partition(".")[2],
        said_twice("a", "c"),
    ],
)
def test_what_does_not_verify_teaches_nothing(statement: str) -> None:
    assert STORE.with_chain([statement], NOW_S) == STORE


@given(st.data())
def test_no_flipped_character_teaches_anything(data: st.DataObject) -> None:
    text = rotation("a", "b")
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda char: char != text[at]))
    assert STORE.with_chain([text[:at] + other + text[at + 1 :]], NOW_S) == STORE


def test_a_known_id_is_never_given_another_key() -> None:
    store = TrustStore((public("a"), public("b")))
    stolen = sign_rotation("a", KEYS["a"], replace(public("c"), key_id="b"))
    assert store.with_chain([stolen], NOW_S) == store


def test_only_a_good_key_can_introduce_another() -> None:
    for bad in (
        TrustStore((public("a", expires_at=NOW_S),)),
        TrustStore((public("a", not_before=NOW_S + 1),)),
        STORE.without_key("a"),
    ):
        assert bad.with_chain([rotation("a", "b")], NOW_S) == bad
    assert good(STORE.without_key("b").with_chain([rotation("a", "b")], NOW_S)) == {"a"}


def test_a_new_key_keeps_its_own_times() -> None:
    store = STORE.with_chain([rotation("a", "b", not_before=900, expires_at=1100)], NOW_S)
    assert [good(store, now_s) for now_s in (899, 900, 1099, 1100)] == [{"a"}, {"a", "b"}, {"a", "b"}, {"a"}]


def test_a_learnt_key_outlives_the_one_that_introduced_it() -> None:
    store = TrustStore((public("a", expires_at=1100),)).with_chain([rotation("a", "b")], NOW_S)
    assert good(store, 2000) == {"b"}


def test_revoking_a_key_revokes_those_it_introduced() -> None:
    store = STORE.with_chain([rotation("a", "b"), rotation("b", "c")], NOW_S).with_key(public("d"))
    assert good(store.without_key("b")) == {"a", "d"}
    assert good(store.without_key("a")) == {"d"}
    assert store.without_key("a").without_key("a").revoked == ("a",)


def test_introductions_in_a_circle_end() -> None:
    circle = TrustStore((replace(public("a"), introduced_by="b"), replace(public("b"), introduced_by="a")))
    assert good(circle) == {"a", "b"} and good(circle.without_key("a")) == set()


def test_a_store_takes_a_key_once() -> None:
    for store in (STORE, TrustStore().without_key("a")):
        with pytest.raises(ConfigError, match="known already"):
            store.with_key(public("a"))
    with pytest.raises(ConfigError):
        STORE.without_key("not an id")


def test_a_bundle_brings_its_new_key(tmp_path: Path) -> None:
    chain = (rotation("a", "b"),)
    write_plain(tmp_path / "new", sign_with=("b", KEYS["b"]), key_chain=chain)
    path = install(tmp_path / "new", tmp_path / "store", trusted_keys=STORE)
    assert load_bundle(path, trusted_keys=STORE).key_id == "b"
    write_plain(tmp_path / "bare", sign_with=("b", KEYS["b"]))
    for folder, store in (("bare", STORE), ("new", STORE.without_key("a")), ("new", TrustStore())):
        with pytest.raises(BundleError):
            load_bundle(tmp_path / folder, trusted_keys=store)


# -- files ---------------------------------------------------------------------------------------


def test_a_store_survives_its_file(tmp_path: Path) -> None:
    store = STORE.with_chain([rotation("a", "b", expires_at=5000)], NOW_S).without_key("c")
    save_trust(tmp_path / "deep" / "trust.json", store)
    assert load_trust(tmp_path / "deep" / "trust.json") == store
    save_trust(tmp_path / "deep" / "trust.json", STORE)
    assert load_trust(tmp_path / "deep" / "trust.json") == STORE
    assert os.listdir(tmp_path / "deep") == ["trust.json"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        '{"format_version":2,"keys":[]}',
        '{"format_version":1,"keys":[],"more":1}',
        '{"format_version":1,"keys":[{"key_id":"a"}]}',
        '{"format_version":1,"keys":[{"key_id":"a","public_key":"short"}]}',
        '{"format_version":1,"keys":[{"key_id":"a b","public_key":"' + KEYS["a"].public_key.text + '"}]}',
        '{"format_version":1,"keys":[],"revoked":["../x"]}',
        "x" * 300_000,
    ],
)
def test_a_bad_trust_store_is_one_clear_line(tmp_path: Path, body: str) -> None:
    (tmp_path / "trust.json").write_text(body)
    with pytest.raises(ConfigError, match=r"trust\.json") as caught:
        load_trust(tmp_path / "trust.json")
    assert "\n" not in caught.value.message
    with pytest.raises(ConfigError, match="can't be read"):
        load_trust(tmp_path / "none.json")


def test_a_store_names_no_key_twice(tmp_path: Path) -> None:
    with pytest.raises(LongshoreError):
        TrustStore((public("a"), public("a")))


def test_key_files(tmp_path: Path) -> None:
    key = SigningKey("ops", KEYS["a"], 10, 20)
    write_signing_key(tmp_path / "key", key)
    write_public_key(tmp_path / "key.pub", key.public)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert read_signing_key(tmp_path / "key") == key == read_signing_key(tmp_path / "key", "ops")
    assert read_public_key(tmp_path / "key.pub") == OperatorKey("ops", KEYS["a"].public_key.text, 10, 20)
    assert KEYS["a"].text not in repr(key) and KEYS["a"].text not in (tmp_path / "key.pub").read_text()
    with pytest.raises(ConfigError, match="can't be written"):
        write_signing_key(tmp_path / "key", key)
    with pytest.raises(ConfigError, match="not other"):
        read_signing_key(tmp_path / "key", "other")


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    write_signing_key(tmp_path / "key", SigningKey("ops", KEYS["a"]))
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_signing_key(tmp_path / "key")


def test_a_bare_seed_needs_an_id(tmp_path: Path) -> None:
    (tmp_path / "seed").write_text(KEYS["a"].text + "\n")
    (tmp_path / "seed").chmod(0o600)
    assert read_signing_key(tmp_path / "seed", "ops").public == replace(public("a"), key_id="ops")
    for key_id in (None, "not an id"):
        with pytest.raises(ConfigError):
            read_signing_key(tmp_path / "seed", key_id)


@pytest.mark.parametrize("secret", ["short", KEYS["b"].text[:-1] + "!", 7, None])
def test_an_error_never_shows_the_key(tmp_path: Path, secret: object) -> None:
    (tmp_path / "key").write_text(json.dumps({"format_version": 1, "key_id": "a", "private_key": secret}))
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        read_signing_key(tmp_path / "key")
    assert type(secret) is not str or secret not in caught.value.message


def test_a_key_out_of_a_trust_store_is_no_key_file(tmp_path: Path) -> None:
    write_public_key(tmp_path / "key.pub", replace(public("a"), introduced_by="b"))
    with pytest.raises(ConfigError, match="operator's own file"):
        read_public_key(tmp_path / "key.pub")
