"""A device with a whole signed bundle and a trust store, which no attack may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bundles import write_plain
from longshore.bundle import OperatorKey, TrustStore, install, installed, load_bundle
from longshore.errors import BundleError, LongshoreError
from longshore.signing import PrivateKey

KEY = PrivateKey.generate()
FILES = {"model.onnx": bytes(range(256)) * 64, "tokenizer.json": b"{}", "extra/words.txt": b"one two\n"}


@dataclass
class Device:
    """A store with version 5 of the bundle `plain`, and version 6 in `offer`, both signed by `ops`."""

    folder: Path
    trust: TrustStore = field(default_factory=lambda: TrustStore((OperatorKey("ops", KEY.public_key.text),)))

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def offer(self) -> Path:
        return self.folder / "offer"

    def write(self, where: Path, **fields: Any) -> Path:
        options: dict[str, Any] = {"files": FILES, "chunk_bytes": 4096, "sign_with": ("ops", KEY)}
        write_plain(where, **options | fields)
        return where

    def refuses(self, attack: Callable[[], object], error: type[LongshoreError] = BundleError) -> str:
        """The error's message; what was current is current still, whole and signed."""
        with pytest.raises(error) as caught:
            attack()
        found = installed(self.store, "plain")
        assert found is not None and found.manifest.version == 5
        assert load_bundle(found.path, trusted_keys=self.trust).version == 5
        assert not list((self.store / "plain").glob(".incoming*"))
        assert "\n" not in caught.value.message
        return caught.value.message

    def install_offer(self) -> Path:
        return install(self.offer, self.store, trusted_keys=self.trust, onnxruntime_version="1.24.1")
