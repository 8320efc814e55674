"""The error tree: its drawing, its codes, and the way there and back over the wire."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore import errors
from longshore.errors import LongshoreError, from_body
from longshore.wire import dump_json, load_json
from wire_strategies import any_json


def tree(
    root: type[LongshoreError] = LongshoreError, depth: int = 0
) -> Iterator[tuple[int, type[LongshoreError]]]:
    yield depth, root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:  # other tests make classes of their own
            yield from tree(child, depth + 1)


CLASSES = [cls for _, cls in tree()]
# A line of the drawing: branches, a name, and where the class has them, status, code and "retryable".
_LINE = re.compile(
    r"^(?P<branches>[ |`-]*)(?P<name>[A-Z]\w+Error)(?: +(?P<status>\d{3}) (?P<code>\w+))?(?P<rest>.*)$"
)


def drawing() -> list[re.Match[str]]:
    lines = inspect.getdoc(errors).splitlines()  # type: ignore[union-attr]
    return [
        match for line in lines if line.startswith((" ", "LongshoreError")) and (match := _LINE.match(line))
    ]


def test_the_drawing_has_every_class_at_its_place() -> None:
    drawn = [((len(match["branches"]) - 4) // 4, match["name"]) for match in drawing()]
    assert drawn == [(depth, cls.__name__) for depth, cls in tree()]


def test_the_drawing_tells_status_code_and_retryable() -> None:
    for match in drawing():
        cls = getattr(errors, match["name"])
        if match["code"]:
            assert (cls.status, cls.code) == (int(match["status"]), match["code"])
        if "retryable" in match["rest"]:
            assert cls.retryable
        elif not any(base.retryable for base in cls.__mro__[1:-3] if hasattr(base, "retryable")):
            assert not cls.retryable, cls


def test_codes_are_unique_and_names_are_public() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)
    assert set(errors.__all__) == {cls.__name__ for cls in CLASSES} | {"from_body"}
    assert all(cls.__doc__ for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_there_and_back(cls: type[LongshoreError]) -> None:
    error = cls("it broke", param="a[0].b", retry_after_s=1.5, request_id="0" * 32, tokens_delivered=7)
    back = from_body(cls.status, load_json(dump_json(error.to_body())))
    assert type(back) is cls
    assert vars(back) == vars(error)
    assert str(back) == "it broke"
    plain = from_body(cls.status, cls("x").to_body())
    assert vars(plain) == vars(cls("x"))


@given(st.integers(-5, 999), any_json())
def test_from_body_takes_anything(status: int, body: Any) -> None:
    for form in (body, {"error": body}, {"error": {"message": body, "code": body, "retry_after_s": body}}):
        error = from_body(status, form)
        assert isinstance(error, LongshoreError)
        load_json(dump_json(error.to_body()))


@pytest.mark.parametrize("value", [2**64, -1, 1.5, True, "7", None, [7], float("nan")])
def test_odd_counts_are_left_out(value: Any) -> None:
    error = from_body(502, {"error": {"message": value, "tokens_delivered": value, "code": value}})
    assert error.tokens_delivered is None


@pytest.mark.parametrize(
    ("status", "retryable"), [(400, False), (418, False), (429, True), (500, True), (503, True)]
)
def test_errors_of_other_servers_are_told_by_their_status(status: int, retryable: bool) -> None:
    error = from_body(status, {"error": {"message": "no", "type": "x", "param": None, "code": "their_own"}})
    assert error.message == "no"
    assert error.retryable is retryable
    assert from_body(status, "<html>").message == f"the server answered {status}"


def test_messages_are_bounded_and_can_be_encoded() -> None:
    error = LongshoreError("\ud800" + "x" * 10_000, param="\udfff")
    inner = load_json(dump_json(error.to_body()))["error"]
    assert len(inner["message"]) == 2000
    assert inner["message"].startswith("?x")
    assert inner["param"] == "?"
