"""The decoder by annotations, on classes of its own: types, bounds, unions, defaults, paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Gt, Len, Lt, Predicate

from longshore.errors import (
    InvalidRequestError,
    OutOfRangeError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from longshore.wire import decode, encode


@dataclass(frozen=True)
class Inner:
    """A nested object."""

    size: Annotated[int, Gt(0), Lt(10)]
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    """One field of each kind."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"kind"})
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"later"})
    one: Inner
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    kind: Literal["a", "b", 3] = "a"
    number: float = 0.5
    either: int | str | tuple[str, ...] | None = None
    short: Annotated[str, Len(2, 3)] = "ab"
    even: Annotated[int, Predicate(lambda n: n % 2 == 0)] = 0
    free: Any = None

    def __post_init__(self) -> None:
        if self.short == self.kind * 2:
            raise InvalidRequestError("must not repeat kind", param="short")
        if self.number == 13:
            raise OutOfRangeError("brings bad luck")


ONE = {"one": {"size": 1}}


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ([], InvalidRequestError, None),
        ({}, InvalidRequestError, "one"),
        ({"one": None}, InvalidRequestError, "one"),
        ({"one": {}}, InvalidRequestError, "one.size"),
        ({"one": {"size": 0}}, OutOfRangeError, "one.size"),
        ({"one": {"size": 10}}, OutOfRangeError, "one.size"),
        ({"one": {"size": True}}, InvalidRequestError, "one.size"),
        ({"one": {"size": 1, "note": 5}}, InvalidRequestError, "one.note"),
        ({"one": {"size": 1, "extra": 5}}, UnknownParameterError, "one.extra"),
        (ONE | {"many": [{"size": 1}, {"size": 11}]}, OutOfRangeError, "many[1].size"),
        (ONE | {"many": {}}, InvalidRequestError, "many"),
        (ONE | {"by_name": {"x": {"size": "1"}}}, InvalidRequestError, "by_name.x.size"),
        (ONE | {"by_name": {"\ud800": {"size": 1}}}, InvalidRequestError, "by_name.?"),
        (ONE | {"by_name": []}, InvalidRequestError, "by_name"),
        (ONE | {"kind": "c"}, OutOfRangeError, "kind"),
        (ONE | {"kind": 3.0}, OutOfRangeError, "kind"),
        (ONE | {"number": "1"}, InvalidRequestError, "number"),
        (ONE | {"number": 2**63}, OutOfRangeError, "number"),
        (ONE | {"number": 13}, OutOfRangeError, None),
        (ONE | {"either": 1.5}, InvalidRequestError, "either"),
        (ONE | {"either": ["a", 1]}, InvalidRequestError, "either[1]"),
        (ONE | {"short": "a"}, OutOfRangeError, "short"),
        (ONE | {"short": "abcd"}, OutOfRangeError, "short"),
        (ONE | {"short": "a\ud800"}, InvalidRequestError, "short"),
        (ONE | {"short": "aa"}, InvalidRequestError, "short"),
        (ONE | {"even": 3}, OutOfRangeError, "even"),
        (ONE | {"later": 1}, UnsupportedParameterError, "later"),
    ],
)
def test_faults(body: Any, error: type[InvalidRequestError], param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(Outer, body)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert "\n" not in caught.value.message


def test_what_is_accepted() -> None:
    body = ONE | {
        "many": [{"size": 2}],
        "by_name": {"x": {"size": 3}},
        "number": 2,
        "either": ["a"],
        "later": None,
    }
    outer = decode(Outer, body)
    assert outer == Outer(Inner(1), (Inner(2),), {"x": Inner(3)}, number=2.0, either=("a",))
    assert type(outer.number) is float
    assert decode(Outer, ONE | {"kind": 3}).kind == 3


def test_the_path_begins_where_the_caller_says() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(Inner, {"size": "x"}, at="items[3]")
    assert caught.value.param == "items[3].size"


def test_lenient_decoding_skips_what_it_does_not_know_and_nothing_else() -> None:
    assert decode(Outer, {"one": {"size": 1, "new": 1}, "later": 1, "new": {}}, lenient=True) == Outer(
        Inner(1)
    )
    with pytest.raises(OutOfRangeError):
        decode(Outer, {"one": {"size": 0}}, lenient=True)


def test_encoding_leaves_out_defaults_by_value_and_type() -> None:
    assert encode(Outer(Inner(1))) == ONE | {"kind": "a"}
    assert encode(Outer(Inner(1), even=False)) == ONE | {"kind": "a", "even": False}
    assert encode(Outer(Inner(1, None), by_name={"x": Inner(2)}))["by_name"] == {"x": {"size": 2}}


def test_a_single_choice_is_told_in_json() -> None:
    @dataclass(frozen=True)
    class Off:
        on: Literal[False] = False

    Off.__annotations__ = {"on": Literal[False]}
    with pytest.raises(OutOfRangeError, match="must be false"):
        decode(Off, {"on": True})
