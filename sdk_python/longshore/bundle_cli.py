"""`longshore bundle verify|install|list|rollback`; imports the bundle code only when one of them runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshore.signing import PublicKey

DEFAULT_STORE = Path.home() / ".local" / "share" / "longshore" / "bundles"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bundle` command."""
    parser = subparsers.add_parser("bundle", help="check, install, list and roll back model bundles")
    actions = parser.add_subparsers(dest="action", required=True)
    verify = actions.add_parser("verify", help="check every file of a bundle folder")
    verify.add_argument("bundle", type=Path)
    verify.set_defaults(run=_verify)
    install = actions.add_parser("install", help="install a bundle folder and make it current")
    install.add_argument("bundle", type=Path)
    install.set_defaults(run=_install)
    listing = actions.add_parser("list", help="list the installed bundles")
    listing.set_defaults(run=_list)
    rollback = actions.add_parser("rollback", help="go back to the version before")
    rollback.add_argument("name")
    rollback.set_defaults(run=_rollback)
    for action in (install, listing, rollback):
        action.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    for action in (verify, install):
        action.add_argument(
            "--trusted-key",
            action="append",
            default=[],
            metavar="ID=KEY",
            help="a key id and its Ed25519 public key; the bundle must be signed by one of those given",
        )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _keys(args: argparse.Namespace) -> dict[str, PublicKey] | None:
    from longshore.errors import ConfigError
    from longshore.signing import PublicKey

    keys = {}
    for text in args.trusted_key:
        key_id, equals, key = text.partition("=")
        if not (key_id and equals and key):
            raise ConfigError("--trusted-key takes ID=KEY")
        keys[key_id] = PublicKey(key)
    return keys or None


def _verify(args: argparse.Namespace) -> int:
    from longshore.bundle import load_bundle

    manifest = load_bundle(args.bundle, trusted_keys=_keys(args))
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    _say(f"{manifest.name} {manifest.version}: {len(manifest.files)} files, {size_mb:.1f} MB, all as listed")
    return 0


def _install(args: argparse.Namespace) -> int:
    from longshore.bundle import install

    _say(f"installed {install(args.bundle, args.store, trusted_keys=_keys(args))}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from longshore.bundle import list_installed

    found = list_installed(args.store)
    for bundle in found:
        mark = "*" if bundle.is_current else " "
        variants = ", ".join(variant.name for variant in bundle.manifest.variants)
        _say(f"{mark} {bundle.manifest.name} {bundle.manifest.version}  {variants}  {bundle.path}")
    if not found:
        _say(f"no bundle in {args.store}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from longshore.bundle import rollback

    _say(f"current again: {rollback(args.store, args.name)}")
    return 0
