"""The chat table: read or derived, and always the same prompt as the template's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longshore.errors import ExportError
from longshore_export.chat_table import read_chat_template, render_table
from shop.chat import CHAT_TEMPLATE, prefix_suffix_table

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<s>Be kind.</s>{% endif %}" + CHATML
NUMBERED = "{% for message in messages %}[{{ loop.index }}]{{ message.content }}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Rules"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Price?"},
]


def write(folder: Path, template: str | None, table: object = None, **tokens: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **tokens}))
    if table is not None:
        (folder / "chat_prefix_suffix.json").write_text(json.dumps(table))
    return folder


def test_shops_table_is_taken_and_agrees(tmp_path: Path) -> None:
    template = read_chat_template(write(tmp_path, CHAT_TEMPLATE, prefix_suffix_table()))
    assert render_table(template, CHAT, True) == (
        "<|system|>Rules<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Price?<|end|><|assistant|>"
    )


def test_shops_table_can_be_derived(tmp_path: Path) -> None:
    derived = read_chat_template(write(tmp_path, CHAT_TEMPLATE))
    assert derived == read_chat_template(write(tmp_path, CHAT_TEMPLATE, prefix_suffix_table()))


def test_a_start_token_is_found(tmp_path: Path) -> None:
    template = read_chat_template(write(tmp_path, LLAMA3, bos_token={"content": "<|begin|>"}))
    assert template.start == "<|begin|>"
    assert render_table(template, CHAT[1:2], True) == (
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_is_found_and_a_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    template = read_chat_template(write(tmp_path, "{{ raise_exception('not me') }}"))
    assert template.roles["user"].prefix == "<|im_start|>user\n"
    assert template.generation_prompt == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "source", [DEFAULT_SYSTEM, NUMBERED, "{{ messages[0].content[:1] }}", "{% if %}", None]
)
def test_what_no_table_can_say_is_refused(tmp_path: Path, source: str | None) -> None:
    with pytest.raises(ExportError):
        read_chat_template(write(tmp_path, source))


@pytest.mark.parametrize("table", [{"roles": {}}, {"roles": 3}, {"roles": {"user": {}}}, []])
def test_a_table_that_disagrees_is_refused(tmp_path: Path, table: object) -> None:
    with pytest.raises(ExportError):
        read_chat_template(write(tmp_path, CHAT_TEMPLATE, table))
