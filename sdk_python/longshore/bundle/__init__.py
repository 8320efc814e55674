"""Model bundles: checked file by file, installed atomically, rolled back, never run.

Standard library alone.
"""

from longshore.bundle.check import TrustedKeys, VerifyingKey, check_runtime, load_bundle, read_manifest
from longshore.bundle.digest import model_digest
from longshore.bundle.store import InstalledBundle, install, installed, list_installed, rollback

__all__ = [
    "InstalledBundle",
    "TrustedKeys",
    "VerifyingKey",
    "check_runtime",
    "install",
    "installed",
    "list_installed",
    "load_bundle",
    "model_digest",
    "read_manifest",
    "rollback",
]
