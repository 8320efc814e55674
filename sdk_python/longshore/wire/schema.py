"""Turns plain JSON values into frozen dataclasses and back, by their annotations.

Owns types, bounds (annotated-types) and the naming of the field at fault; knows nothing of
any particular message. Decoders are compiled once per class, and a path such as
`messages[2].content` is only put together when something is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal, TypeVar, cast

import annotated_types as at

from longshore.errors import (
    InvalidRequestError,
    OutOfRangeError,
    UnknownParameterError,
    UnsupportedParameterError,
)

T = TypeVar("T")
Decoder = Callable[[Any], Any]
Check = Callable[[Any], str | None]


class _Fault(Exception):
    """A value that does not fit; containers prepend their part of the path as it passes."""

    def __init__(self, message: str, error: type[InvalidRequestError] = InvalidRequestError) -> None:
        super().__init__(message)
        self.message = message
        self.error = error
        self.path: list[str | int] = []

    def at(self, part: str | int) -> _Fault:
        self.path.insert(0, part)
        return self


def decode(cls: type[T], value: object, *, lenient: bool = False, at: str = "") -> T:
    """Build `cls` from a parsed JSON value.

    `lenient` skips unknown fields: for answers of other servers, never for requests.
    `at` is the path of `value` in the message that holds it. Raises InvalidRequestError or one
    of its subclasses, its `param` naming the field.
    """
    try:
        return cast(T, _decoder(cast(Any, cls), lenient)(value))
    except _Fault as fault:
        param = (at + _render(fault.path)).lstrip(".") or None
        message = f"{param}: {fault.message}" if param else fault.message
        raise fault.error(message, param=param) from None


def encode(value: Any) -> dict[str, Any]:
    """The JSON object of a dataclass; fields that have their default are left out."""
    return cast(dict[str, Any], _plain(value))


def _render(path: list[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


# -- decoding ---------------------------------------------------------------------------------


@cache
def _decoder(tp: Any, lenient: bool) -> Decoder:
    origin = typing.get_origin(tp)
    args = typing.get_args(tp)
    if origin is typing.Annotated:
        return _bounded(_decoder(args[0], lenient), args[1:])
    if origin is Literal:
        return _literal(args)
    if origin in (typing.Union, types.UnionType):
        return _union(args, lenient)
    if origin is tuple:
        return _sequence(_decoder(args[0], lenient))
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        return _mapping(_decoder(args[1], lenient))
    if dataclasses.is_dataclass(tp):
        return _dataclass(cast(type, tp), lenient)
    return _SCALARS[tp]


def _str(value: Any) -> str:
    if type(value) is not str:
        raise _Fault(f"must be a string, not {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Fault("holds a lone surrogate, which is not valid Unicode text") from None
    return value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise _Fault(f"must be a whole number, not {_kind(value)}")
    return value


def _float(value: Any) -> float:
    if type(value) is int:
        if abs(value) >= 2**63:
            raise _Fault("must be less than 2**63", OutOfRangeError)
        return float(value)
    if type(value) is not float:
        raise _Fault(f"must be a number, not {_kind(value)}")
    if value - value != 0:  # NaN and both infinities
        raise _Fault("must be a finite number", OutOfRangeError)
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise _Fault(f"must be true or false, not {_kind(value)}")
    return value


def _none(value: Any) -> None:
    if value is not None:
        raise _Fault(f"must be null, not {_kind(value)}")


def _any(value: Any) -> Any:
    return value


_SCALARS: dict[Any, Decoder] = {
    str: _str,
    int: _int,
    float: _float,
    bool: _bool,
    type(None): _none,
    None: _none,
    Any: _any,
    object: _any,
}

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")


def _literal(allowed: tuple[Any, ...]) -> Decoder:
    choices = ("one of " if len(allowed) > 1 else "") + ", ".join(json.dumps(item) for item in allowed)

    def decode_literal(value: Any) -> Any:
        for item in allowed:
            if type(item) is type(value) and item == value:
                return item
        raise _Fault(f"must be {choices}", OutOfRangeError)

    return decode_literal


_JSON_TYPE: dict[Any, type] = {str: str, int: int, float: float, bool: bool, type(None): type(None)}


def _json_type(tp: Any) -> type:
    """The Python type that `json` gives for a value of the annotation `tp`."""
    origin = typing.get_origin(tp)
    if origin is typing.Annotated:
        return _json_type(typing.get_args(tp)[0])
    if origin is Literal:
        return type(typing.get_args(tp)[0])
    if origin is tuple:
        return list
    return _JSON_TYPE.get(tp, dict)


def _union(args: tuple[Any, ...], lenient: bool) -> Decoder:
    """Pick the member by the value's JSON type; several of one type are tried in order.

    Where none of them fits, the one that came closest says why: a bound that was missed tells
    more than a wrong type, and a fault deep inside more than one at the door.
    """
    members: dict[type, list[Decoder]] = {}
    for arg in args:
        members.setdefault(_json_type(arg), []).append(_decoder(arg, lenient))
    if float in members:
        members.setdefault(int, []).extend(members[float])

    def decode_union(value: Any) -> Any:
        candidates = members.get(type(value))
        if candidates is None:
            raise _Fault(f"has the wrong type: {_kind(value)}")
        if len(candidates) == 1:
            return candidates[0](value)
        faults = []
        for candidate in candidates:
            try:
                return candidate(value)
            except _Fault as fault:
                faults.append(fault)
        raise max(faults, key=_closeness) from None

    return decode_union


def _closeness(fault: _Fault) -> tuple[bool, int, int]:
    first = fault.path[0] if fault.path else -1
    return fault.error is not InvalidRequestError, len(fault.path), first if isinstance(first, int) else 0


def _sequence(item: Decoder) -> Decoder:
    def decode_sequence(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _Fault(f"must be a list, not {_kind(value)}")
        out = []
        try:
            for element in value:
                out.append(item(element))
        except _Fault as fault:
            raise fault.at(len(out)) from None
        return tuple(out)

    return decode_sequence


def _mapping(item: Decoder) -> Decoder:
    def decode_mapping(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _Fault(f"must be an object, not {_kind(value)}")
        out = {}
        for key, element in value.items():
            try:
                out[_str(key)] = item(element)
            except _Fault as fault:
                raise fault.at(key.encode("utf-8", "replace").decode()) from None
        return out

    return decode_mapping


def _dataclass(cls: type, lenient: bool) -> Decoder:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    decoders = {field.name: _decoder(hints[field.name], lenient) for field in fields}
    required = tuple(field.name for field in fields if not _has_default(field))
    optional = frozenset(decoders) - frozenset(required)
    unsupported: frozenset[str] = getattr(cls, "UNSUPPORTED", frozenset())

    def decode_dataclass(value: Any) -> Any:
        if type(value) is not dict:
            raise _Fault(f"must be an object, not {_kind(value)}")
        kwargs = {}
        for key, element in value.items():
            decoder = decoders.get(key)
            if decoder is None:
                if lenient or (element is None and key in unsupported):
                    continue
                raise _unknown(key, unsupported)
            if element is None and key in optional:
                continue  # OpenAI's clients send null for "not given"
            try:
                kwargs[key] = decoder(element)
            except _Fault as fault:
                raise fault.at(key) from None
        for name in required:
            if name not in kwargs:
                raise _Fault("is required").at(name)
        return _construct(cls, kwargs)

    return decode_dataclass


def _construct(cls: type, kwargs: dict[str, Any]) -> Any:
    try:
        return cls(**kwargs)
    except InvalidRequestError as error:  # a rule between fields, from __post_init__
        fault = _Fault(error.message, type(error))
        raise (fault.at(error.param) if error.param else fault) from None


def _unknown(key: str, unsupported: frozenset[str]) -> _Fault:
    name = key[:100].encode("utf-8", "replace").decode()
    if key in unsupported:
        return _Fault("is not supported by this server", UnsupportedParameterError).at(name)
    return _Fault("is not a known parameter", UnknownParameterError).at(name)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


# -- bounds -----------------------------------------------------------------------------------


def _bounded(inner: Decoder, metadata: tuple[Any, ...]) -> Decoder:
    checks = [check for item in metadata for check in _checks(item)]

    def decode_bounded(value: Any) -> Any:
        out = inner(value)
        for check in checks:
            message = check(out)
            if message is not None:
                raise _Fault(message, OutOfRangeError)
        return out

    return decode_bounded


def _checks(bound: Any) -> list[Check]:
    if isinstance(bound, at.GroupedMetadata):
        return [check for item in bound for check in _checks(item)]
    if isinstance(bound, at.Predicate):
        return [_check(bound.func, "does not have the right form")]
    for kind, attribute, holds, words in _BOUNDS:
        if isinstance(bound, kind):
            limit = getattr(bound, attribute)
            return [_check(partial(_reversed, holds, limit), f"{words} {limit}")]
    return []


def _longer_or_equal(value: Any, limit: Any) -> bool:
    return bool(len(value) >= limit)


def _shorter_or_equal(value: Any, limit: Any) -> bool:
    return bool(len(value) <= limit)


_BOUNDS: tuple[tuple[type, str, Callable[[Any, Any], bool], str], ...] = (
    (at.Ge, "ge", operator.ge, "must be at least"),
    (at.Gt, "gt", operator.gt, "must be more than"),
    (at.Le, "le", operator.le, "must be at most"),
    (at.Lt, "lt", operator.lt, "must be less than"),
    (at.MinLen, "min_length", _longer_or_equal, "must not be shorter than"),
    (at.MaxLen, "max_length", _shorter_or_equal, "must not be longer than"),
)


def _reversed(holds: Callable[[Any, Any], bool], limit: Any, value: Any) -> bool:
    return holds(value, limit)


def _check(holds: Callable[[Any], bool], message: str) -> Check:
    return lambda value: None if holds(value) else message


# -- encoding ---------------------------------------------------------------------------------


@cache
def _encoder(cls: Any) -> tuple[tuple[str, Any], ...]:
    always: frozenset[str] = getattr(cls, "ALWAYS_SENT", frozenset())
    return tuple(
        (field.name, dataclasses.MISSING if field.name in always else _default(field))
        for field in dataclasses.fields(cls)
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    out = {}
    for name, default in _encoder(cast(Any, type(value))):
        item = getattr(value, name)
        if item is default or (item == default and type(item) is type(default)):
            continue
        out[name] = _plain(item)
    return out
