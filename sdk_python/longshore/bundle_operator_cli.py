"""`longshore bundle keygen|rotate|trust|make|sign`: the operator's side. Prints no private key."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

_DAY_S = 86_400
_MAX_DAYS = 36_500


def register_operator(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the operator's actions to the `bundle` command."""
    keygen = actions.add_parser("keygen", help="make an operator's key: FILE, mode 0600, and FILE.pub")
    keygen.add_argument("file", type=Path)
    keygen.add_argument("--key-id", help="by default from the key itself")
    keygen.add_argument("--days", type=int, default=730, help="how long it counts (default: %(default)s)")
    keygen.set_defaults(run=_keygen)
    rotate = actions.add_parser("rotate", help="let the old key vouch for a new one")
    rotate.add_argument("--old", type=Path, required=True, metavar="KEY", help="the old private key")
    rotate.add_argument("--new", type=Path, required=True, metavar="PUB", help="the new public key")
    rotate.add_argument("--chain", type=Path, required=True, help="file that gets the statement as a line")
    rotate.set_defaults(run=_rotate)
    trust = actions.add_parser("trust", help="change or show a trust store").add_subparsers(
        dest="trust_action", required=True
    )
    for name, words, run in (
        ("add", "add an operator's public key", _trust_add),
        ("revoke", "let a key, and those it introduced, count no more", _trust_revoke),
        ("list", "show the keys", _trust_list),
    ):
        action = trust.add_parser(name, help=words)
        action.add_argument("store", type=Path, metavar="TRUST")
        action.set_defaults(run=run)
        if name == "add":
            action.add_argument("key", type=Path, metavar="PUB")
        elif name == "revoke":
            action.add_argument("key_id")
    make = actions.add_parser("make", help="make a bundle of a folder's files")
    make.add_argument("source", type=Path)
    make.add_argument("out", type=Path)
    make.add_argument("--manifest", type=Path, help="its description; SOURCE/manifest.json by default")
    make.add_argument("--name", help="in place of the description's")
    make.add_argument("--version", type=int, help="in place of the description's")
    make.set_defaults(run=_make)
    sign = actions.add_parser("sign", help="sign a bundle folder")
    sign.add_argument("bundle", type=Path)
    sign.set_defaults(run=_sign)
    for action in (make, sign):
        action.add_argument("--key", type=Path, required=action is sign, help="the private key to sign with")
        action.add_argument("--chain", type=Path, help="file with rotation statements to put in")
        action.add_argument("--days", type=int, help="how long the bundle may be installed and loaded")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _expiry(days: int | None) -> int | None:
    from longshore.errors import ConfigError

    if days is None:
        return None
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(f"--days must be 1 to {_MAX_DAYS}")
    return int(time.time()) + days * _DAY_S


def _keygen(args: argparse.Namespace) -> int:
    import hashlib

    from longshore.bundle import SigningKey, write_public_key, write_signing_key
    from longshore.errors import ConfigError
    from longshore.signing import PrivateKey

    public_file = args.file.with_name(args.file.name + ".pub")
    if public_file.exists():
        raise ConfigError(f"the key {public_file} is there already")
    secret = PrivateKey.generate()
    fingerprint = hashlib.sha256(secret.public_key.text.encode()).hexdigest()[:16]
    key = SigningKey(args.key_id or f"key-{fingerprint}", secret, int(time.time()), _expiry(args.days))
    write_signing_key(args.file, key)
    write_public_key(public_file, key.public)
    _say(f"{key.key_id}: keep {args.file} secret, give {public_file} to the devices")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    from longshore.bundle import read_public_key, read_signing_key, sign_rotation
    from longshore.errors import ConfigError

    old, new = read_signing_key(args.old), read_public_key(args.new)
    if new.key_id == old.key_id or new.public_key == old.key.public_key.text:
        raise ConfigError("the new key has the old one's id or is the same key")
    statements = [*_chain(args.chain, is_new=True), sign_rotation(old.key_id, old.key, new)]
    _check_chain(statements)
    try:
        args.chain.write_text("".join(f"{line}\n" for line in statements), "ascii")
    except OSError as error:
        raise ConfigError(f"{args.chain} can't be written: {error.strerror}") from None
    _say(f"{args.chain}: {old.key_id} vouches for {new.key_id}")
    return 0


def _chain(path: Path | None, *, is_new: bool = False) -> tuple[str, ...]:
    from longshore.errors import ConfigError

    if path is None or (is_new and not path.exists()):
        return ()
    try:
        return tuple(path.read_text("ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def _check_chain(statements: list[str]) -> None:
    from longshore.errors import ConfigError

    if len(statements) > 8:
        raise ConfigError("a chain holds 8 statements at most: begin a new one from a key that devices have")


def _trust_add(args: argparse.Namespace) -> int:
    from longshore.bundle import TrustStore, load_trust, read_public_key, save_trust

    store = load_trust(args.store) if args.store.exists() else TrustStore()
    key = read_public_key(args.key)
    save_trust(args.store, store.with_key(key))
    _say(f"{args.store} trusts {key.key_id}{_until(key.expires_at)}")
    return 0


def _trust_revoke(args: argparse.Namespace) -> int:
    from longshore.bundle import load_trust, save_trust

    save_trust(args.store, load_trust(args.store).without_key(args.key_id))
    _say(f"{args.store} trusts {args.key_id} no more")
    return 0


def _trust_list(args: argparse.Namespace) -> int:
    from longshore.bundle import load_trust
    from longshore.errors import BundleError

    store = load_trust(args.store)
    for key in store.keys:
        try:
            store.key_for(key.key_id, time.time())
            state = "good" + _until(key.expires_at)
        except BundleError as error:
            state = error.message.rpartition("which ")[2]
        _say(f"{key.key_id}  {key.public_key}  {state}")
    return 0


def _until(expires_at: int | None) -> str:
    if expires_at is None:
        return ""
    return time.strftime(" until %Y-%m-%d %H:%M UTC", time.gmtime(min(expires_at, 253_402_300_799)))


def _make(args: argparse.Namespace) -> int:
    from longshore.bundle import make_bundle, read_signing_key

    changes: dict[str, Any] = {"name": args.name, "version": args.version, "expires_at": _expiry(args.days)}
    manifest = make_bundle(
        args.source,
        args.out,
        description=args.manifest,
        changes={name: value for name, value in changes.items() if value is not None},
        key=read_signing_key(args.key) if args.key is not None else None,
        key_chain=_chain(args.chain),
    )
    signed = f", signed by {manifest.key_id}" if manifest.key_id is not None else ", not signed"
    _say(f"{args.out}: {manifest.name} {manifest.version}, {len(manifest.files)} files{signed}")
    return 0


def _sign(args: argparse.Namespace) -> int:
    from longshore.bundle import read_signing_key, sign_bundle

    key = read_signing_key(args.key)
    manifest = sign_bundle(args.bundle, key, key_chain=_chain(args.chain), expires_at=_expiry(args.days))
    _say(f"{args.bundle}: {manifest.name} {manifest.version}, signed by {manifest.key_id}")
    return 0
