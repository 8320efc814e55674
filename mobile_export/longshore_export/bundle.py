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
from longshore_export.checkpoint import AnyCheckpoint, Graph, open_checkpoint
from longshore_export.graph import MIN_ONNXRUNTIME, OPSET, Rounding, round_plainly
from longshore_export.quantize_recipe import Recipe
from longshore_export.variant import BuiltVariant, build_variant
from longshore_export.verify import Parity
from longshore_export.vision.shape import ENCODER_NAME
from longshore_export.vision.variant import BuiltEncoder, build_encoder_variant
from longshore_export.vision.verify import EncoderParity

MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, and how far its graph is from torch."""

    path: Path
    manifest: Manifest
    parity: Parity
    encoder_parity: EncoderParity | None = None


def export_student(
    model_dir: Path,
    out_dir: Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_tokens: int | None = None,
    signing_key: SigningKey | None = None,
    variant: str | Recipe = "fp32",
    graph: Graph | None = None,
    rounding: Rounding = round_plainly,
    encoder: str = "fp32",
    capabilities: Mapping[str, str | int | float | bool] | None = None,
) -> Exported:
    """Export a Hugging Face folder to a bundle; `name` is the folder's unless it is given.

    `variant` is one of `quantize_recipe.RECIPES` or a recipe; `graph` says how the graph is made, by default
    built where the builder knows the model and traced where not; `encoder`, of a model that sees, is "fp32"
    or "int8", and its graph stands beside the decoder's. `capabilities` go into the manifest beside its own.
    A bundle already at `out_dir` is replaced, anything else there is left alone and refused. Raises
    ExportError or a subclass, ParityError where graph and torch differ; nothing is written then.
    """
    _check_out(out_dir)
    checkpoint = open_checkpoint(model_dir, max_tokens, graph)
    chat_template = read_chat_template(model_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".export-") as work:
        folder = Path(work) / "bundle"
        folder.mkdir()
        built = build_variant(checkpoint, variant, folder / MODEL_NAME, rounding)
        seen = _encoder(checkpoint, encoder, folder)
        shutil.copyfile(model_dir / TOKENIZER_NAME, folder / TOKENIZER_NAME)
        manifest = Manifest(
            name=name or model_dir.resolve().name,
            version=version,
            model_digest=model_digest(model_dir),
            files=tuple(describe_file(folder, path.name) for path in sorted(folder.iterdir())),
            variants=(_variant(built, seen),),
            tokenizer_file=TOKENIZER_NAME,
            kv=_kv(checkpoint),
            chat_template=chat_template,
            eos_token_ids=checkpoint.eos_token_ids,
            min_onnxruntime=MIN_ONNXRUNTIME,
            opset=OPSET,
            vision_buckets=checkpoint.vision.shape.buckets if checkpoint.vision else (),
            vision=checkpoint.vision.shape.geometry if checkpoint.vision else None,
            capabilities={**_own_capabilities(checkpoint, seen), **(capabilities or {})},
        )
        manifest = write_manifest(folder, manifest, signing_key)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        folder.rename(out_dir)
    return Exported(out_dir, manifest, built.parity, seen.parity if seen else None)


def _encoder(checkpoint: AnyCheckpoint, name: str, folder: Path) -> BuiltEncoder | None:
    """The picture encoder beside the graph, of a model that sees."""
    if checkpoint.vision is None:
        return None
    return build_encoder_variant(checkpoint.vision, name, folder / ENCODER_NAME)


def _own_capabilities(checkpoint: AnyCheckpoint, seen: BuiltEncoder | None) -> dict[str, str | int | bool]:
    own: dict[str, str | int | bool] = {
        "images": seen is not None,
        "vocab_size": checkpoint.shape.vocab_size,
    }
    return {**own, "encoder": seen.name} if seen else own


def _variant(built: BuiltVariant, seen: BuiltEncoder | None) -> Variant:
    operators = {*built.required_operators, *(seen.required_operators if seen else ())}
    return Variant(
        name=built.name,
        file=built.file.name,
        precision=built.precision,
        graph=built.graph,
        required_operators=tuple(sorted(operators)),
        prefill_file=built.prefill_file.name if built.prefill_file else None,
    )


def _check_out(out_dir: Path) -> None:
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise ExportError(f"{out_dir} is in the way")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / MANIFEST_NAME).is_file():
        raise ExportError(f"{out_dir} holds something that is not a bundle")


def _kv(checkpoint: AnyCheckpoint) -> KvGeometry:
    shape = checkpoint.shape
    return KvGeometry(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.max_tokens)
