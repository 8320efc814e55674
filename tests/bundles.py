"""Bundles for tests: a plain one of a few bytes, and a real one of a random model with Shop's tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from longshore.signing import PrivateKey, encode_base64url
from longshore.wire import (
    BundleFile,
    ChatTemplate,
    KvGeometry,
    Manifest,
    RoleTemplate,
    Variant,
    dump_json,
    encode,
)

FILES = {"model.onnx": b"not a graph " * 40, "tokenizer.json": b"{}", "extra/words.txt": b"one two\n"}


def write_plain(
    folder: Path,
    *,
    version: int = 1,
    name: str = "plain",
    files: dict[str, bytes] | None = None,
    sign_with: tuple[str, PrivateKey] | None = None,
    expires_at: int | None = None,
    chunk_bytes: int | None = None,
    key_chain: tuple[str, ...] = (),
    **fields: Any,
) -> Manifest:
    """A bundle whose files are whatever they are; nothing can run it."""
    files = FILES if files is None else files
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    manifest = Manifest(
        name=name,
        version=version,
        model_digest="0" * 32,
        files=tuple(_described(path, data, chunk_bytes) for path, data in files.items()),
        variants=(Variant("fp32", "model.onnx", "fp32", "built"),),
        tokenizer_file="tokenizer.json",
        kv=KvGeometry(1, 1, 8, 16),
        chat_template=ChatTemplate("", {"user": RoleTemplate("", "")}),
        eos_token_ids=(0,),
        min_onnxruntime=fields.pop("min_onnxruntime", "1.24"),
        opset=18,
        key_id=sign_with[0] if sign_with else None,
        expires_at=expires_at,
        key_chain=key_chain,
        **fields,
    )
    body = dump_json(encode(manifest))
    (folder / "manifest.json").write_bytes(body)
    if sign_with:
        (folder / "manifest.sig").write_text(encode_base64url(sign_with[1].sign(body)))
    return manifest


def _described(path: str, data: bytes, chunk_bytes: int | None) -> BundleFile:
    pieces = [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)] if chunk_bytes else []
    digests = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    return BundleFile(path, len(data), hashlib.sha256(data).hexdigest(), chunk_bytes, digests)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
