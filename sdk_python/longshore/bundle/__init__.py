"""Model bundles: signed, checked file by file, downloaded, installed atomically, rolled back, never run.

The standard library alone; `cryptography` is imported when a signature is made or checked.
"""

from longshore.bundle.check import Trust, check_operators, check_runtime, load_bundle, read_manifest
from longshore.bundle.digest import model_digest
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
    "InstalledBundle",
    "OperatorKey",
    "Trust",
    "TrustStore",
    "TrustedKeys",
    "VerifyingKey",
    "check_operators",
    "check_runtime",
    "install",
    "installed",
    "list_installed",
    "load_bundle",
    "load_trust",
    "model_digest",
    "read_manifest",
    "rollback",
    "save_trust",
    "sign_rotation",
]
