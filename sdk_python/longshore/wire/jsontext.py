"""Strict JSON in, compact JSON out: NaN, lone surrogates, deep nesting and bad UTF-8 end in a typed error."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from longshore.errors import BodyTooLargeError, InvalidRequestError, MalformedBodyError
from longshore.wire.limits import MAX_BODY_BYTES, MAX_JSON_DEPTH

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(body: bytes | str, *, max_bytes: int = MAX_BODY_BYTES) -> Any:
    """Parse one JSON value.

    Raises BodyTooLargeError over `max_bytes`, and MalformedBodyError for anything that RFC 8259
    does not allow, NaN and Infinity included; for numbers beyond a double, lone surrogates and
    nesting beyond MAX_JSON_DEPTH.
    """
    num_bytes = len(body) if isinstance(body, bytes) or body.isascii() else _num_bytes(body)
    if num_bytes > max_bytes:
        raise BodyTooLargeError(f"the body has {num_bytes} bytes; the limit is {max_bytes}")
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except MalformedBodyError:
        raise
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedBodyError(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nesting of thousands
        raise MalformedBodyError(
            "the body is not JSON that can be read: a number or its nesting is too long"
        ) from None
    if _too_deep(value, MAX_JSON_DEPTH):
        raise MalformedBodyError(f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    if _SURROGATE_ESCAPE.search(text):
        _num_bytes(_ENCODER.encode(value))
    return value


def load_json_object(body: bytes | str, *, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Parse a JSON object; anything else is a MalformedBodyError."""
    value = load_json(body, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise MalformedBodyError("the body must be a JSON object")
    return value


def refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    """A hook of json.loads: of a field that stands twice, other readers may take the other one."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidRequestError("a field stands twice")


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON; raises ValueError on NaN or a lone surrogate: bugs of the caller."""
    return _ENCODER.encode(value).encode()


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"the body is not JSON: {name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise MalformedBodyError("the body holds a number too large for a double")
    return value


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise MalformedBodyError("the body holds a lone surrogate, which is not Unicode text") from None


def _too_deep(value: Any, levels: int) -> bool:
    """True if containers are nested deeper than `levels`; iterative, so that depth can't overflow."""
    layer = [value] if type(value) in (dict, list) else []
    for _ in range(levels):
        if not layer:
            return False
        layer = [
            child
            for item in layer
            for child in (item.values() if type(item) is dict else item)
            if type(child) in (dict, list)
        ]
    return bool(layer)
