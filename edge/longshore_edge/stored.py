"""The stored form of an answer: its bytes as sent, with slots for what each replay says anew.

A slot is a NUL byte and a letter; JSON never holds a bare NUL, so that no text can be taken for one.
"""

from __future__ import annotations

import secrets
from typing import Any

from longshore.errors import LongshoreError
from longshore.sse import SseDecoder, encode_data
from longshore.wire import AnyRequest, ChatRequest, dump_json, encode, load_json
from longshore.wire.render import AnswerCollector, ChunkReader
from longshore_edge import frames
from longshore_edge.call import Call

_ID = b"\x00i"
_REASON = b"\x00w"
_NODE = b"\x00n"
_HOPS = b"\x00h"


def store_whole(body: bytes) -> bytes | None:
    """The stored form of a whole answer; None if it carries no report."""
    answer = load_json(body, max_bytes=len(body))
    report = answer.get("longshore")
    if not isinstance(report, dict):
        return None
    return _template(answer, report, dump_json)


def store_stream(blocks: list[bytes], call: Call) -> tuple[bytes, str] | None:
    """The stored form of a finished stream, and the model's digest; None if it carries no report."""
    out: list[bytes] = []
    digest: str | None = None
    chunk_id = b'{"id":' + dump_json(call.id_prefix + call.request_id)
    for frame in frames.split(b"".join(blocks)):
        report = _report_chunk(frame)
        if report is not None:
            chunk, fields = report
            digest = str(fields.get("model_digest"))
            frame = _template(chunk, fields, encode_data)
        if not frame.startswith(b":"):
            out.append(frame.replace(chunk_id, b'{"id":"' + call.id_prefix.encode() + _ID + b'"', 1))
    return (b"".join(out), digest) if digest is not None else None


def replay(stored: bytes, call: Call, node: str, reason: str, hop: dict[str, Any]) -> bytes:
    """The bytes to send: a fresh id, reason and hop in the slots."""
    return (
        stored.replace(_ID, call.request_id.encode())
        .replace(_REASON, dump_json(reason)[1:-1])
        .replace(_NODE, dump_json(node)[1:-1])
        .replace(_HOPS, dump_json(hop))
    )


def whole_of_stream(stored: bytes, request: AnyRequest, num_choices: int) -> bytes | None:
    """The stored form of the whole answer that a stored stream amounts to; None if it can't be made."""
    try:
        return _collect(stored, request, num_choices)
    except (LongshoreError, KeyError, TypeError):
        return None


def _collect(stored: bytes, request: AnyRequest, num_choices: int) -> bytes | None:
    placeholder = "0" * 32
    filled = stored.replace(_ID, placeholder.encode())
    for slot in (_REASON, _NODE, _HOPS):
        filled = filled.replace(slot, b"")
    reader, collector = ChunkReader(num_choices), AnswerCollector(num_choices)
    first: dict[str, Any] | None = None
    for event in SseDecoder().feed(filled):
        if event.is_done:
            break
        chunk = load_json(event.data)
        first = first or chunk
        for answer_event in reader.read(chunk):
            collector.add(answer_event)
    reader.finish()
    assert first is not None
    make = collector.chat_completion if isinstance(request, ChatRequest) else collector.completion
    answer = make(request_id=placeholder, model=first["model"], created=first["created"])
    return store_whole(dump_json(encode(answer)))


def _report_chunk(frame: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if b'"report"' not in frame:
        return None
    chunk = load_json(frame.removeprefix(b"data: "))
    extension = chunk.get("longshore")
    report = extension.get("report") if isinstance(extension, dict) else None
    return (chunk, report) if isinstance(report, dict) else None


def _template(value: dict[str, Any], report: dict[str, Any], dump: Any) -> bytes:
    """`value` as bytes, with the id and what of its `report` is told anew replaced by slots."""
    mark = secrets.token_hex(16)
    prefix = str(value.get("id", "")).rpartition("-")[0]
    value["id"] = f"{prefix}-{mark}i"
    for name in ("attempts", "resumed"):
        report.pop(name, None)
    report |= {
        "request_id": mark + "i",
        "served_by": "edge",
        "node": mark + "n",
        "reason": mark + "w",
        "cached": True,
        "hops": [mark + "h"],
    }
    dumped: bytes = dump(value)
    dumped = dumped.replace(f'"{mark}h"'.encode(), _HOPS)
    for letter in (b"i", b"n", b"w"):
        dumped = dumped.replace(mark.encode() + letter, b"\x00" + letter)
    return dumped
