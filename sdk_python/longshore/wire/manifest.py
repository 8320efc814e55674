"""The manifest of a model bundle: plain data with bounds.

Checking files and signatures is `longshore.bundle`'s.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len, MaxLen, Predicate

from longshore.errors import BundleDamagedError, InvalidRequestError, LongshoreError
from longshore.wire import limits
from longshore.wire.jsontext import load_json_object, refuse_twice
from longshore.wire.request import ModelDigest, TokenId
from longshore.wire.schema import decode

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
FORMAT_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*){0,3}\Z")
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}\Z")


def _is_sha256(value: str) -> bool:
    return _SHA256.match(value) is not None


def _is_safe_path(value: str) -> bool:
    is_path = _PATH.match(value) is not None and not any(part.endswith(".") for part in value.split("/"))
    return is_path and value.lower() not in (MANIFEST_NAME, SIGNATURE_NAME)


def _is_version(value: str) -> bool:
    return _VERSION.match(value) is not None


Sha256 = Annotated[str, Predicate(_is_sha256)]
BundlePath = Annotated[str, MaxLen(200), Predicate(_is_safe_path)]
RuntimeVersion = Annotated[str, Predicate(_is_version)]
Name = Annotated[str, Len(1, 100)]


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file: a relative path without `..`, dot files or symbolic links, its size and digest.

    `chunk_sha256` are the digests of consecutive pieces of `chunk_bytes`, so that a broken
    download goes on from the last good piece.
    """

    path: BundlePath
    size_bytes: Annotated[int, Interval(ge=0, le=limits.MAX_BUNDLE_FILE_BYTES)]
    sha256: Sha256
    chunk_bytes: Annotated[int, Interval(ge=4096, le=2**30)] | None = None
    chunk_sha256: Annotated[tuple[Sha256, ...], MaxLen(65536)] = ()

    def __post_init__(self) -> None:
        num_chunks = -(-self.size_bytes // self.chunk_bytes) if self.chunk_bytes is not None else 0
        if len(self.chunk_sha256) != num_chunks:
            raise InvalidRequestError(f"must hold {num_chunks} digests", param="chunk_sha256")


@dataclass(frozen=True, slots=True)
class RoleTemplate:
    """What stands before and after a message of one role, for clients without Jinja."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"prefix", "suffix"})
    prefix: Annotated[str, MaxLen(1000)]
    suffix: Annotated[str, MaxLen(1000)]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template twice: as Jinja source and as a prefix/suffix table per role."""

    jinja: Annotated[str, MaxLen(100_000)]
    roles: Annotated[dict[str, RoleTemplate], MaxLen(8)]
    start: Annotated[str, MaxLen(1000)] = ""
    generation_prompt: Annotated[str, MaxLen(1000)] = ""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The shape of the KV cache: [batch, num_kv_heads, tokens, head_dim] for each layer."""

    num_layers: Annotated[int, Interval(ge=1, le=1024)]
    num_kv_heads: Annotated[int, Interval(ge=1, le=1024)]
    head_dim: Annotated[int, Interval(ge=1, le=4096)]
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_PROMPT_TOKENS)]
    dtype: Literal["float32", "float16", "int8"] = "float32"


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of the model: its file, number format, size and what it needs of the runtime.

    `prefill_file` is a graph of the same inputs and outputs that reads prompts faster; its weights lie in
    `file`, and whoever does not use it loses nothing but time.
    """

    name: Name
    file: BundlePath
    precision: Literal["fp32", "int8", "int4"]
    graph: Literal["traced", "built"] = "traced"
    required_operators: Annotated[tuple[Name, ...], MaxLen(200)] = ()
    prefill_file: BundlePath | None = None


@dataclass(frozen=True, slots=True)
class VisionBucket:
    """An image size that the encoder takes, in pixels, and the tokens that it costs."""

    width_px: Annotated[int, Interval(ge=1, le=8192)]
    height_px: Annotated[int, Interval(ge=1, le=8192)]
    num_tokens: Annotated[int, Interval(ge=1, le=65536)]


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """How pictures enter a prompt: the encoder's graph, and the token that each row of its output stands for.

    A picture of width x height pixels is (width / unit_px) * (height / unit_px) tokens of `image_token_id`,
    and as many rows [num_tokens, hidden_size] from the encoder.
    """

    encoder_file: BundlePath
    image_token_id: TokenId
    unit_px: Annotated[int, Interval(ge=1, le=1024)]
    hidden_size: Annotated[int, Interval(ge=1, le=65536)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds and what it needs. `version` only ever grows for one `name`.

    `model_digest` names the weights, so that an answer begun on one tier is only continued
    token by token where the same weights are. `expires_at` is Unix time in seconds. `key_chain` holds the
    rotation statements that lead to the key that signed (`longshore.bundle.trust`).
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"format_version"})
    name: Name
    version: Annotated[int, Interval(ge=1, le=2**53)]
    model_digest: ModelDigest
    files: Annotated[tuple[BundleFile, ...], Len(1, limits.MAX_BUNDLE_FILES)]
    variants: Annotated[tuple[Variant, ...], Len(1, 16)]
    tokenizer_file: BundlePath
    kv: KvGeometry
    chat_template: ChatTemplate
    eos_token_ids: Annotated[tuple[TokenId, ...], Len(1, 16)]
    min_onnxruntime: RuntimeVersion
    opset: Annotated[int, Interval(ge=13, le=100)]
    vision_buckets: Annotated[tuple[VisionBucket, ...], MaxLen(64)] = ()
    vision: VisionGeometry | None = None
    capabilities: Annotated[dict[str, str | int | float | bool], MaxLen(64)] = field(default_factory=dict)
    key_id: Annotated[str, MaxLen(64)] | None = None
    expires_at: Annotated[int, Interval(ge=0, le=2**53)] | None = None
    key_chain: Annotated[tuple[Annotated[str, MaxLen(2048)], ...], MaxLen(8)] = ()
    format_version: Literal[1] = 1

    def __post_init__(self) -> None:
        paths = {file.path for file in self.files}
        folded = {path.lower() for path in paths}  # some file systems know no case
        if len(folded) != len(self.files):
            raise InvalidRequestError("names a path twice", param="files")
        if len({variant.name for variant in self.variants}) != len(self.variants):
            raise InvalidRequestError("names a variant twice", param="variants")
        graphs = [graph for item in self.variants for graph in (item.file, item.prefill_file) if graph]
        encoders = [self.vision.encoder_file] if self.vision is not None else []
        for needed in (self.tokenizer_file, *graphs, *encoders):
            if needed not in paths:
                raise InvalidRequestError(f"does not list {needed}", param="files")
        for path in folded:
            if any(str(parent) in folded for parent in PurePosixPath(path).parents):
                raise InvalidRequestError(f"{path} lies below another file", param="files")
        if self.vision is not None:
            _check_buckets(self.vision, self.vision_buckets)


def _check_buckets(vision: VisionGeometry, buckets: tuple[VisionBucket, ...]) -> None:
    """An encoder needs sizes to run at, each a whole number of its units and with the tokens that makes."""
    if not buckets:
        raise InvalidRequestError("must hold a size where there is an encoder", param="vision_buckets")
    if len({(bucket.width_px, bucket.height_px) for bucket in buckets}) != len(buckets):
        raise InvalidRequestError("names a size twice", param="vision_buckets")
    for bucket in buckets:
        columns, width_rest = divmod(bucket.width_px, vision.unit_px)
        rows, height_rest = divmod(bucket.height_px, vision.unit_px)
        if width_rest or height_rest or bucket.num_tokens != columns * rows:
            raise InvalidRequestError(
                f"{bucket.width_px} x {bucket.height_px} at {bucket.num_tokens} tokens is not what units of "
                f"{vision.unit_px} pixels make",
                param="vision_buckets",
            )


def load_manifest(body: bytes) -> Manifest:
    """Parse a manifest; raises BundleDamagedError with the field at fault."""
    try:
        value: dict[str, Any] = load_json_object(body, max_bytes=limits.MAX_MANIFEST_BYTES)
        json.loads(body, object_pairs_hook=refuse_twice)
        return decode(Manifest, value)
    except LongshoreError as error:
        raise BundleDamagedError(f"the manifest can't be used: {error.message}") from None
