"""A second bundle whose smaller model guesses ahead for the first: whether the two fit, and how it is loaded.

Runs nothing; what the guesses are worth is `longshore.device.speculate`'s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from longshore.bundle import Trust, load_bundle
from longshore.device.frames import Frame
from longshore.device.plan import VOCAB_SIZE
from longshore.errors import BundleIncompatibleError
from longshore.wire import Manifest, Variant


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft bundle that was checked, and the graph of it that runs."""

    folder: Path
    manifest: Manifest
    variant: Variant

    def load_frame(self) -> Frame:
        """As the model process takes it."""
        prefill = self.variant.prefill_file
        return {
            "model": str(self.folder / self.variant.file),
            "prefill_model": str(self.folder / prefill) if prefill else None,
            "kv": dataclasses.asdict(self.manifest.kv),
        }


def load_draft(bundle_dir: Path, main: Manifest, trusted_keys: Trust | None) -> Draft:
    """Check every file of the draft's bundle, and that its tokens are those of `main`.

    Raises BundleIncompatibleError where they are others, and what `load_bundle` raises.
    """
    manifest = load_bundle(bundle_dir, trusted_keys=trusted_keys)
    if _tokens(manifest) != _tokens(main):
        raise BundleIncompatibleError(f"the draft {manifest.name} has other tokens than {main.name}")
    variant = next((item for item in manifest.variants if item.graph == "built"), None)
    if variant is None or manifest.vision is not None:
        raise BundleIncompatibleError(f"the draft {manifest.name} has no graph that takes text alone")
    return Draft(bundle_dir.resolve(), manifest, variant)


def _tokens(manifest: Manifest) -> tuple[object, ...]:
    """The tokenizer's digest and how many tokens the model knows."""
    digests = {file.path: file.sha256 for file in manifest.files}
    return digests[manifest.tokenizer_file], manifest.capabilities.get(VOCAB_SIZE)
