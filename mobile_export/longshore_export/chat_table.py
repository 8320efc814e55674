"""The chat template of a bundle: Jinja source, and the prefix and suffix table for clients without Jinja.

The table is read from chat_prefix_suffix.json or derived by rendering; either way it is checked against the
template, so that a bundle never holds a table that says something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from longshore.errors import ExportError
from longshore.wire import ChatTemplate, RoleTemplate
from longshore_export.checkpoint import read_json

TABLE_NAME = "chat_prefix_suffix.json"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

Chat = Sequence[Mapping[str, str]]
Render = Callable[[Chat, bool], str]


def read_chat_template(folder: Path) -> ChatTemplate:
    """Template and table of a model folder; ExportError where there is none, or they disagree."""
    source, special_tokens = _source(folder)
    render = _renderer(source, special_tokens)
    table = read_json(folder / TABLE_NAME)
    template = _from_file(source, table) if table else _derived(source, render)
    _check(template, render)
    return template


def render_table(template: ChatTemplate, chat: Chat, add_generation_prompt: bool) -> str:
    """What a client without Jinja makes of a conversation."""
    text = template.start
    for message in chat:
        role = template.roles[message["role"]]
        text += role.prefix + message["content"] + role.suffix
    return text + template.generation_prompt if add_generation_prompt else text


def _source(folder: Path) -> tuple[str, dict[str, str]]:
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise ExportError("the model folder has no chat template")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()
    }
    return source, {name: text for name, text in texts.items() if isinstance(text, str)}


def _renderer(source: str, special_tokens: Mapping[str, str]) -> Render:
    """Renders as transformers does, in Jinja's sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ExportError("chat templates need the package jinja2: install longshore[export]") from None

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ExportError(f"the chat template can't be read: {error}") from None

    def render(chat: Chat, add_generation_prompt: bool) -> str:
        values: dict[str, Any] = {"messages": chat, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(**special_tokens, **values)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ExportError(f"the chat template refuses a plain conversation: {error}") from None

    return render


def _from_file(source: str, table: Mapping[str, Any]) -> ChatTemplate:
    try:
        roles = {
            name: RoleTemplate(str(role["prefix"]), str(role["suffix"]))
            for name, role in table["roles"].items()
        }
        return ChatTemplate(
            source, roles, str(table.get("start", "")), str(table.get("generation_prompt", ""))
        )
    except (KeyError, TypeError, AttributeError):
        raise ExportError(f"{TABLE_NAME} does not have the form of a table") from None


def _derived(source: str, render: Render) -> ChatTemplate:
    """Find what stands around each role's text by rendering marked conversations and cutting at the marks."""
    u, a, s = "\x01U\x01", "\x01A\x01", "\x01S\x01"
    user, answer, system = _message(USER, u), _message(ASSISTANT, a), _message(SYSTEM, s)
    before_user, after_user = _cut(render([user], False), u)
    _, rest = _cut(render([user, answer], False), u)
    between, after_answer = _cut(rest, a)
    _, rest = _cut(render([user, answer, user], False), a)
    turn, _ = _cut(rest, u)
    before_system, rest = _cut(render([system, user], False), s)
    system_end, _ = _cut(rest, u)
    user_prefix = _without(turn, after_answer, front=True)
    start = _without(before_user, user_prefix, front=False)
    roles = {
        SYSTEM: RoleTemplate(
            _without(before_system, start, front=True), _without(system_end, user_prefix, front=False)
        ),
        USER: RoleTemplate(user_prefix, after_user),
        ASSISTANT: RoleTemplate(_without(between, after_user, front=True), after_answer),
    }
    generation_prompt = _without(render([user], True), render([user], False), front=True)
    return ChatTemplate(source, roles, start, generation_prompt)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise _no_table()
    return before, after


def _without(text: str, part: str, *, front: bool) -> str:
    if not (text.startswith(part) if front else text.endswith(part)):
        raise _no_table()
    return text[len(part) :] if front else text[: len(text) - len(part)]


def _no_table() -> ExportError:
    return ExportError(
        f"the chat template is not a prefix and suffix per role; write {TABLE_NAME} into the model folder"
    )


def _check(template: ChatTemplate, render: Render) -> None:
    """Table and template must agree on conversations of several turns, odd spaces and characters included."""
    if not {SYSTEM, USER, ASSISTANT} <= template.roles.keys():
        raise ExportError(f"the chat table must hold the roles {SYSTEM}, {USER} and {ASSISTANT}")
    texts = ("Hello", " two\nlines ", "ünïcode 茶 \U0001f375 {{ braces }}", "")
    for system in (True, False):
        for num_turns in (1, 2, 3):
            chat = [_message(SYSTEM, texts[1].strip())] if system else []
            for turn in range(num_turns):
                chat.append(_message(USER, texts[turn % 4].strip()))
                if turn + 1 < num_turns:
                    chat.append(_message(ASSISTANT, texts[(turn + 2) % 4].strip()))
            if render_table(template, chat, True) != render(chat, True):
                raise ExportError("the chat table and the chat template give different prompts")
