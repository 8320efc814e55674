"""`longshore bundle verify|install|list|rollback`; imports the bundle code only when one of them runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longshore.bundle_operator_cli import register_operator

if TYPE_CHECKING:
    from longshore.bundle import Trust, TrustStore

DEFAULT_STORE = Path.home() / ".local" / "share" / "longshore" / "bundles"
DEFAULT_TRUST = Path.home() / ".config" / "longshore" / "trust.json"
_API_KEY_VARIABLE = "LONGSHORE_API_KEY"
_MIB = 1024 * 1024


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bundle` command."""
    parser = subparsers.add_parser("bundle", help="make, sign, check, install and roll back model bundles")
    actions = parser.add_subparsers(dest="action", required=True)
    verify = actions.add_parser("verify", help="check the signature and every file of a bundle folder")
    verify.add_argument("bundle", type=Path)
    verify.set_defaults(run=_verify)
    install = actions.add_parser("install", help="install a bundle and make it current")
    install.add_argument("bundle", help="a bundle folder, or a URL like https://edge.example/bundles/NAME")
    install.add_argument(
        "--allow-unsigned",
        action="store_true",
        help="take an unsigned bundle from a URL, if no key is given",
    )
    install.add_argument("--time-limit", type=float, default=1800, metavar="S", help="default: %(default)s")
    install.set_defaults(run=_install)
    listing = actions.add_parser("list", help="list the installed bundles")
    listing.set_defaults(run=_list)
    rollback = actions.add_parser("rollback", help="go back to the version before")
    rollback.add_argument("name")
    rollback.set_defaults(run=_rollback)
    for action in (install, listing, rollback):
        action.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    for action in (verify, install, rollback):
        _add_trust(action)
    register_operator(actions)


def _add_trust(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--trust", type=Path, metavar="FILE", help=f"the trust store; {DEFAULT_TRUST} if that is there"
    )
    action.add_argument(
        "--trusted-key",
        action="append",
        default=[],
        metavar="ID=KEY",
        help="a key id and its Ed25519 public key, in place of a trust store; may be repeated",
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _trust(args: argparse.Namespace) -> Trust | None:
    """The keys of the options; None where no trust is configured."""
    from longshore.bundle import load_trust
    from longshore.errors import ConfigError
    from longshore.signing import PublicKey

    if args.trust is not None and args.trusted_key:
        raise ConfigError("--trust and --trusted-key can't be given together")
    keys = {}
    for text in args.trusted_key:
        key_id, equals, key = text.partition("=")
        if not (key_id and equals and key):
            raise ConfigError("--trusted-key takes ID=KEY")
        keys[key_id] = PublicKey(key)
    path = _trust_path(args)
    return keys or (load_trust(path) if path is not None else None)


def _trust_path(args: argparse.Namespace) -> Path | None:
    if args.trust is None and not args.trusted_key and not DEFAULT_TRUST.exists():
        return None
    path: Path = args.trust or DEFAULT_TRUST
    return path if not args.trusted_key else None


def _verify(args: argparse.Namespace) -> int:
    from longshore.bundle import load_bundle

    trust = _trust(args)
    manifest = load_bundle(args.bundle, trusted_keys=trust)
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    signed = f", signed by {manifest.key_id}" if trust is not None else ""
    _say(
        f"{manifest.name} {manifest.version}: {len(manifest.files)} files, {size_mb:.1f} MB, "
        f"all as listed{signed}"
    )
    return 0


def _install(args: argparse.Namespace) -> int:
    from longshore.bundle import TrustStore, install, read_manifest

    trust = _trust(args)
    if "://" in args.bundle:
        path = _install_url(args, trust)
    else:
        path = install(
            args.bundle, args.store, trusted_keys=trust, onnxruntime_version=_onnxruntime_version()
        )
    _say(f"installed {path}")
    if isinstance(trust, TrustStore):
        _learn(args, trust, read_manifest(path).key_chain)
    return 0


def _install_url(args: argparse.Namespace, trust: Trust | None) -> Path:
    from longshore.bundle import DownloadLimits, install_from_edge
    from longshore.errors import ConfigError

    if trust is None and not args.allow_unsigned:
        raise ConfigError("nothing says which keys to trust: give --trust, or --allow-unsigned")
    if not 1 <= args.time_limit <= 7 * 86400:
        raise ConfigError("--time-limit must be 1 to 604800 seconds")
    done = install_from_edge(
        args.bundle,
        args.store,
        trusted_keys=trust,
        onnxruntime_version=_onnxruntime_version(),
        api_key=os.environ.get(_API_KEY_VARIABLE),
        limits=DownloadLimits(time_limit_s=args.time_limit),
        progress=_show if sys.stderr.isatty() else None,
    )
    _say(f"downloaded {done.num_fetched_bytes} bytes, {done.num_kept_bytes} were here already")
    return done.path


def _onnxruntime_version() -> str | None:
    """The one that is installed here, not imported; None on a machine that only keeps bundles."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return None


def _show(num_done_bytes: int, num_bytes: int) -> None:
    end = "\n" if num_done_bytes == num_bytes else ""
    sys.stderr.write(f"\r{num_done_bytes / _MIB:.1f} of {num_bytes / _MIB:.1f} MiB{end}")


def _learn(args: argparse.Namespace, trust: TrustStore, key_chain: tuple[str, ...]) -> None:
    """Keep the keys that a bundle's rotation statements brought, before the old key expires."""
    import time

    from longshore.bundle import save_trust

    learnt = trust.with_chain(key_chain, time.time())
    path = _trust_path(args)
    if learnt == trust or path is None:
        return
    save_trust(path, learnt)
    for key in learnt.keys[len(trust.keys) :]:
        _say(f"{path} trusts {key.key_id} from now on, which {key.introduced_by} introduced")


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

    _say(f"current again: {rollback(args.store, args.name, trusted_keys=_trust(args))}")
    return 0
