"""Model bundles: signed, checked file by file, downloaded, installed atomically, rolled back, never run.

The standard library alone; `cryptography` is imported when a signature is made or checked.
"""

from longshore.bundle.check import Trust, check_runtime, load_bundle, read_manifest
from longshore.bundle.digest import model_digest
from longshore.bundle.download import Download, DownloadLimits, install_from_edge
from longshore.bundle.keyfile import (
    SigningKey,
    read_public_key,
    read_signing_key,
    write_public_key,
    write_signing_key,
)
from longshore.bundle.make import CHUNK_BYTES, describe_file, make_bundle, sign_bundle, write_manifest
from longshore.bundle.store import InstalledBundle, install, installed, list_installed, rollback
from longshore.bundle.trust import (
    OperatorKey,
    TrustedKeys,
    TrustStore,
    VerifyingKey,
    load_trust,
    save_trust,
    sign_rotation,
)

__all__ = [
    "CHUNK_BYTES",
    "Download",
    "DownloadLimits",
    "InstalledBundle",
    "OperatorKey",
    "SigningKey",
    "Trust",
    "TrustStore",
    "TrustedKeys",
    "VerifyingKey",
    "check_runtime",
    "describe_file",
    "install",
    "install_from_edge",
    "installed",
    "list_installed",
    "load_bundle",
    "load_trust",
    "make_bundle",
    "model_digest",
    "read_manifest",
    "read_public_key",
    "read_signing_key",
    "rollback",
    "save_trust",
    "sign_bundle",
    "sign_rotation",
    "write_manifest",
    "write_public_key",
    "write_signing_key",
]
