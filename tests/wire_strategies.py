"""Hypothesis strategies for the wire: valid instances of any wire type, any JSON, and damaged messages.

Instances are made from the annotations themselves, so a new field is covered without a word here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import annotated_types as at
from hypothesis import strategies as st

from longshore import wire
from longshore.errors import InvalidRequestError

Strategy = st.SearchStrategy[Any]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_MAX_ITEMS = 3  # of a generated list; bounds have tests of their own
_BY_PREDICATE: dict[str, str] = {
    "_is_request_id": r"[0-9a-f]{32}",
    "_is_traceparent": r"00-[0-9a-f]{31}1-[0-9a-f]{15}1-[0-9a-f]{2}",
    "_is_digest": r"[0-9a-f]{16,64}",
    "_is_sha256": r"[0-9a-f]{64}",
    "_is_safe_path": r"[a-z]{1,8}(/[a-z]{1,8}){0,2}",
    "_is_version": r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}",
}

# -- valid instances ---------------------------------------------------------------------------


@cache
def instances(cls: type) -> Strategy:
    """Valid instances of a wire dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    optional, required = {}, {}
    for field in dataclasses.fields(cls):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        (optional if has_default else required)[field.name] = _of(hints[field.name])
    fields = st.fixed_dictionaries(required, optional=optional)
    return fields.map(_REPAIRS.get(cls, lambda kwargs: kwargs)).map(lambda kwargs: _construct(cls, kwargs))


def _construct(cls: type, kwargs: dict[str, Any]) -> Any:
    """The instance, without the fields that a rule between fields forbids."""
    while True:
        try:
            return cls(**kwargs)
        except InvalidRequestError as error:
            name = (error.param or "").partition(".")[0]
            if name not in kwargs:
                raise
            kwargs = {key: value for key, value in kwargs.items() if key != name}


def _of(tp: Any) -> Strategy:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Annotated:
        return _bounded(args[0], [part for item in args[1:] for part in _flat(item)])
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_of(arg) for arg in args])
    if origin is tuple:
        return st.lists(_of(args[0]), max_size=_MAX_ITEMS).map(tuple)
    if origin in (dict, Mapping):
        return st.dictionaries(TEXT, _of(args[1]), max_size=_MAX_ITEMS)
    if dataclasses.is_dataclass(tp):
        return instances(typing.cast(type, tp))
    return _SCALARS[tp]


_SCALARS: dict[Any, Strategy] = {
    str: TEXT,
    int: st.integers(-(2**63), 2**63),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
    Any: st.none() | st.booleans() | TEXT,
}


def _flat(item: Any) -> list[Any]:
    return list(item) if isinstance(item, at.GroupedMetadata) else [item]


def _bounded(tp: Any, bounds: list[Any]) -> Strategy:
    for bound in bounds:
        if isinstance(bound, at.Predicate):
            return st.from_regex(_BY_PREDICATE[bound.func.__name__], fullmatch=True)
    low = max((getattr(b, "ge", getattr(b, "gt", -math.inf)) for b in bounds), default=-math.inf)
    high = min((getattr(b, "le", getattr(b, "lt", math.inf)) for b in bounds), default=math.inf)
    if tp is int:
        return st.integers(low, high - any(isinstance(b, at.Lt) for b in bounds))
    if tp is float:
        return st.floats(low, high, exclude_min=any(isinstance(b, at.Gt) for b in bounds), allow_nan=False)
    size = min((b.max_length for b in bounds if isinstance(b, at.MaxLen)), default=_MAX_ITEMS)
    least = max((b.min_length for b in bounds if isinstance(b, at.MinLen)), default=0)
    if tp is str:
        characters = st.characters(exclude_categories=["Cs"])
        return st.text(characters, min_size=least, max_size=min(size, 12))
    args = typing.get_args(tp)
    if typing.get_origin(tp) is tuple:
        return st.lists(_of(args[0]), min_size=least, max_size=max(least, min(size, _MAX_ITEMS))).map(tuple)
    return st.dictionaries(TEXT, _of(args[1]), min_size=least, max_size=min(size, _MAX_ITEMS))


def _repair_part(kwargs: dict[str, Any]) -> dict[str, Any]:
    image = wire.ImageUrl("data:image/png;base64,iVBORw0KGgo=")
    if kwargs["type"] == "text":
        return {"type": "text", "text": kwargs.get("text") or "hello"}
    return {"type": "image_url", "image_url": kwargs.get("image_url") or image}


def _repair_request(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("logit_bias"):
        kwargs["logit_bias"] = {str(n): bias for n, bias in enumerate(kwargs["logit_bias"].values())}
    if kwargs.get("longshore") is not None and kwargs["longshore"].continue_from is not None:
        kwargs |= {"n": 1}
        if "prompt" in kwargs:
            kwargs["prompt"] = "go on"
    return kwargs


def _repair_file(kwargs: dict[str, Any]) -> dict[str, Any]:
    size_bytes = kwargs["size_bytes"] % 20_000
    chunk_bytes = kwargs.get("chunk_bytes")
    num_chunks = -(-size_bytes // chunk_bytes) if chunk_bytes is not None else 0
    return kwargs | {"size_bytes": size_bytes, "chunk_sha256": (kwargs["sha256"],) * num_chunks}


def _repair_manifest(kwargs: dict[str, Any]) -> dict[str, Any]:
    files = [dataclasses.replace(file, path=f"part{n}.bin") for n, file in enumerate(kwargs["files"])]
    variants = [
        dataclasses.replace(
            variant, name=f"v{n}", file="part0.bin", prefill_file=variant.prefill_file and "part0.bin"
        )
        for n, variant in enumerate(kwargs["variants"])
    ]
    kwargs |= {"files": tuple(files), "variants": tuple(variants), "tokenizer_file": "part0.bin"}
    if kwargs.get("vision") is None:
        return kwargs
    vision = dataclasses.replace(kwargs["vision"], encoder_file="part0.bin")
    sides = [(n * vision.unit_px, vision.unit_px) for n in range(1, 4)]
    buckets = tuple(wire.VisionBucket(width, height, width // height) for width, height in sides)
    return kwargs | {"vision": vision, "vision_buckets": buckets}


_REPAIRS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {
    wire.ImageUrl: lambda kwargs: kwargs | {"url": "data:image/png;base64," + kwargs["url"]},
    wire.ContentPart: _repair_part,
    wire.ChatRequest: _repair_request,
    wire.CompletionRequest: _repair_request,
    wire.BundleFile: _repair_file,
    wire.Manifest: _repair_manifest,
}

# -- anything ----------------------------------------------------------------------------------

_ODD_NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -0.0, 1e308, 5e-324, True, False])
_ODD_TEXT = st.sampled_from(["", "\0", "\u2028", "\ud800", "a\udfffb", "\ufeff", "\N{GRINNING FACE}" * 300])
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _ODD_NUMBERS | _ODD_TEXT
)
_NAMES = [
    *(field.name for cls in (wire.ChatRequest, wire.CompletionRequest) for field in dataclasses.fields(cls)),
    *(
        "type",
        "id",
        "request",
        "text",
        "url",
        "error",
        "mark",
        "tools",
        "choices",
        "delta",
        "content",
        "role",
    ),
]
KEYS = st.sampled_from(sorted(set(_NAMES))) | st.text(max_size=5) | _ODD_TEXT


def any_json(max_leaves: int = 12) -> Strategy:
    """Any value that Python's `json` could give, odd ones included."""
    return st.recursive(
        _LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=max_leaves,
    )


@st.composite
def damaged(draw: st.DrawFn, whole: Strategy) -> Any:
    """The JSON of a valid instance with one to three places replaced, removed or added to."""
    body = json.loads(json.dumps(wire.encode(draw(whole))))
    for _ in range(draw(st.integers(1, 3))):
        _damage(draw, body)
    return body


def _damage(draw: st.DrawFn, body: Any) -> None:
    while True:
        keys = list(body) if isinstance(body, dict) else list(range(len(body)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if not isinstance(body[key], dict | list) or draw(st.booleans()):
            break
        body = body[key]
    action = draw(st.sampled_from(["replace", "remove", "add"])) if keys else "add"
    if action == "replace":
        body[key] = draw(any_json(4))
    elif action == "remove":
        del body[key]
    elif isinstance(body, dict):
        body[draw(KEYS)] = draw(any_json(4))
    else:
        body.append(draw(any_json(4)))


@st.composite
def cuts(draw: st.DrawFn, data: Any) -> list[Any]:
    """`data` (bytes or a list) in pieces, some of them empty."""
    at_ = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *at_], [*at_, len(data)], strict=True)]
