"""Renders a model's chat template in Jinja's sandbox, within a time limit and a size limit.

The template is the model folder's own; a client's messages are only its data. Behaves as transformers'
`apply_chat_template` does for text messages.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longshore.errors import ConfigError, InvalidRequestError

_MAX_OUTPUT_CHARS = 16 * 1024 * 1024
_MAX_REPEATED_CHARS = 1_000_000
_DATA_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError)
_FILENAME = "<template>"  # what Jinja names the code of a template made from a string


class _OutOfBudgetError(Exception):
    """The template ran too long or wrote too much."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses to blow up strings, lists and powers in a single operation."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplication and power of small values only."""
        if operator == "**" and (not _is_small(left) or not _is_small(right)):
            raise _OutOfBudgetError("** of large numbers")
        if operator == "*" and _repeated_size(left, right) > _MAX_REPEATED_CHARS:
            raise _OutOfBudgetError("* makes too long a value")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template. Rendering may run on any thread, one rendering per thread at a time."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, timeout_s: float = 1.0) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template can't be read: {_one_line(error)}") from None
        self._special_tokens = dict(special_tokens)
        self._timeout_s = timeout_s

    @classmethod
    def load(cls, folder: Path, *, timeout_s: float = 1.0) -> ChatTemplate | None:
        """The template of a Hugging Face folder, or None where it has none."""
        config = _read_json(folder / "tokenizer_config.json")
        source = _read_source(folder, config)
        return None if source is None else cls(source, _special_tokens(config), timeout_s=timeout_s)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt with the assistant's turn begun; InvalidRequestError where the template refuses it."""
        try:
            return _within(self._timeout_s, lambda: self._pieces(messages))
        except _OutOfBudgetError as error:
            raise InvalidRequestError(
                f"messages: the chat template takes too long on them: {error}", param="messages"
            ) from None
        except (jinja2.TemplateError, RecursionError, *_DATA_ERRORS) as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {_one_line(error)}", param="messages"
            ) from None

    def _pieces(self, messages: Sequence[Mapping[str, Any]]) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
        ):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > _MAX_OUTPUT_CHARS:
                raise _OutOfBudgetError(f"more than {_MAX_OUTPUT_CHARS} characters")
        return "".join(pieces)


def _within(timeout_s: float, render: Callable[[], str]) -> str:
    """Run `render`, stopped between two lines of the template's code once `timeout_s` is over.

    A trace function is the only thing that ends a loop in Python code from inside its own thread; it is
    installed for this call and follows the template's frames alone.
    """
    end_s = time.monotonic() + timeout_s

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != _FILENAME:
            return None
        if time.monotonic() > end_s:
            raise _OutOfBudgetError(f"over {timeout_s:g} s")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(previous)


def _read_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the chat template {path} can't be read: {_one_line(error)}") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {_one_line(error)}") from None
    return value if isinstance(value, dict) else {}


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 1_000


def _repeated_size(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            return len(value) * times
    return 0


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now(UTC).strftime(format)


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
