"""The chat form of Shop: OpenAI-shaped messages, and the one template that turns them into text.

The template is a fixed prefix and suffix per role, so that clients without Jinja can use the table. Standard
library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shop.question import Question
from shop.sheet import Sheet

PAD, END = "<|pad|>", "<|end|>"
ROLES: tuple[str, ...] = ("system", "user", "assistant")
PREFIX: dict[str, str] = {role: f"<|{role}|>" for role in ROLES}
SUFFIX: dict[str, str] = dict.fromkeys(ROLES, END)
SPECIAL_TOKENS: tuple[str, ...] = (
    PAD,
    END,
    *PREFIX.values(),
    "<|image|>",
    *(f"<|reserved_{i}|>" for i in range(24)),
)
IMAGE = "<image>"
"""Stands for a piece of a picture, in the picture model's tokenizer alone."""
INSTRUCTION = "You answer questions about this product sheet."

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def system_message(sheet: Sheet) -> dict[str, str]:
    return {"role": "system", "content": f"{INSTRUCTION}\n{sheet.text}"}


def messages(sheet: Sheet, question: Question) -> list[dict[str, str]]:
    """The sheet as the system message and the question as the user's, as OpenAI's chat API takes them."""
    return [system_message(sheet), {"role": "user", "content": question.text}]


def render(chat: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """The text that CHAT_TEMPLATE makes of `chat`, through the prefix and suffix table."""
    text = "".join(PREFIX[part["role"]] + part["content"] + SUFFIX[part["role"]] for part in chat)
    return text + PREFIX["assistant"] if add_generation_prompt else text


def prefix_suffix_table() -> dict[str, object]:
    """The template as plain data, as written to chat_prefix_suffix.json."""
    return {
        "roles": {role: {"prefix": PREFIX[role], "suffix": SUFFIX[role]} for role in ROLES},
        "generation_prompt": PREFIX["assistant"],
        "stop": [END],
    }
