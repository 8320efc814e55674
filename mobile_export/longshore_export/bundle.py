"""Writes a bundle folder: graph, tokenizer and manifest, checked before the folder appears under its name.

Owns what stands in the manifest; installing bundles is the SDK's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longshore.bundle import SigningKey, describe_file, model_digest, write_manifest
from longshore.errors import ExportError
from longshore.wire import (
    MANIFEST_NAME,
    KvGeometry,
    Manifest,
    Variant,
)
from longshore_export.chat_table import read_chat_template
from longshore_export.checkpoint import Checkpoint, load_checkpoint
from longshore_export.graph import MIN_ONNXRUNTIME, OPSET, Rounding, round_plainly
from longshore_export.variant import BuiltVariant, build_variant
from longshore_export.verify import Parity

MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, and how far its graph is from torch."""

    path: Path
    manifest: Manifest
    parity: Parity


def export_student(
    model_dir: Path,
    out_dir: Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_tokens: int | None = None,
    signing_key: SigningKey | None = None,
    variant: str = "fp32",
    rounding: Rounding = round_plainly,
    capabilities: Mapping[str, str | int | float | bool] | None = None,
) -> Exported:
    """Export a Hugging Face folder to a bundle; `name` is the folder's unless it is given.

    `variant` is one of `quantize_recipe.RECIPES`; `capabilities` go into the manifest beside its own.
    A bundle already at `out_dir` is replaced, anything else there is left alone and refused. Raises
    ExportError or a subclass, ParityError where graph and torch differ; nothing is written then.
    """
    _check_out(out_dir)
    checkpoint = load_checkpoint(model_dir, max_tokens)
    chat_template = read_chat_template(model_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".export-") as work:
        folder = Path(work) / "bundle"
        folder.mkdir()
        built = build_variant(checkpoint, variant, folder / MODEL_NAME, rounding)
        shutil.copyfile(model_dir / TOKENIZER_NAME, folder / TOKENIZER_NAME)
        manifest = Manifest(
            name=name or model_dir.resolve().name,
            version=version,
            model_digest=model_digest(model_dir),
            files=tuple(describe_file(folder, path.name) for path in sorted(folder.iterdir())),
            variants=(_variant(built),),
            tokenizer_file=TOKENIZER_NAME,
            kv=_kv(checkpoint),
            chat_template=chat_template,
            eos_token_ids=checkpoint.eos_token_ids,
            min_onnxruntime=MIN_ONNXRUNTIME,
            opset=OPSET,
            capabilities={"images": False, "vocab_size": checkpoint.shape.vocab_size, **(capabilities or {})},
        )
        manifest = write_manifest(folder, manifest, signing_key)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        folder.rename(out_dir)
    return Exported(out_dir, manifest, built.parity)


def _variant(built: BuiltVariant) -> Variant:
    return Variant(
        name=built.name,
        file=built.file.name,
        precision=built.precision,
        graph="built",
        required_operators=built.required_operators,
        prefill_file=built.prefill_file.name if built.prefill_file else None,
    )


def _check_out(out_dir: Path) -> None:
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise ExportError(f"{out_dir} is in the way")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / MANIFEST_NAME).is_file():
        raise ExportError(f"{out_dir} holds something that is not a bundle")


def _kv(checkpoint: Checkpoint) -> KvGeometry:
    shape = checkpoint.shape
    return KvGeometry(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.max_tokens)
