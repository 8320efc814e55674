"""The held-out task that variants are judged by: a JSONL file of prompts and expected answers.

    {"messages": [{"role": "user", "content": "..."}], "expected": "..."}
    {"prompt": "...", "expected": "...", "pattern": "[0-9]+"}

A message's content may hold pictures, as OpenAI's `image_url` parts with data: URLs. An answer is right where
its text equals `expected`, blanks at its ends aside; with a `pattern`, where what the pattern finds in both,
in lower case, is the same in order. Runs no model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.errors import ExportError, LongshoreError
from longshore.prompt_text import PromptEncoder
from longshore.wire import ChatTemplate
from longshore_export.vision.shape import VisionShape
from longshore_export.vision.task import Picture, Sight

MAX_EXAMPLES = 100_000


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt in token ids, and the check of an answer to it."""

    prompt: tuple[int, ...]
    expected: str
    pattern: re.Pattern[str] | None
    pictures: tuple[Picture, ...] = ()

    def is_right(self, answer: str) -> bool:
        return self._facts(answer) == self._facts(self.expected)

    def _facts(self, text: str) -> list[str]:
        return self.pattern.findall(text.lower()) if self.pattern else [text.strip()]


def load_task(
    path: Path, tokenizer: Any, template: ChatTemplate, vision: VisionShape | None = None
) -> list[Example]:
    """Every example of a file; ExportError naming the line at fault."""
    try:
        lines = path.read_text("utf-8").splitlines()[:MAX_EXAMPLES]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"the task {path} can't be read: {error}") from None
    encoder, examples = PromptEncoder(tokenizer), []
    for number, line in enumerate(lines, 1):
        try:
            sight = Sight(vision, tokenizer)
            examples.append(_example(json.loads(line), encoder, template, sight))
        except (LongshoreError, ValueError, KeyError, TypeError, re.error) as error:
            raise ExportError(f"{path.name}, line {number}: {type(error).__name__}: {error}") from None
    if not examples:
        raise ExportError(f"the task {path} holds no examples")
    return examples


def _example(entry: dict[str, Any], encoder: PromptEncoder, template: ChatTemplate, sight: Sight) -> Example:
    foreign = encoder.foreign()
    if "messages" in entry:
        parts = [template.start]
        for message in entry["messages"]:
            affixes = template.roles[message["role"]]
            parts += [affixes.prefix, sight.text(message["content"], foreign.guard), affixes.suffix]
        prompt = encoder.encode_prompt("".join(parts) + template.generation_prompt, foreign)
    else:
        prompt = encoder.encode_prompt(str(entry["prompt"]), foreign, add_special_tokens=True)
    pattern = entry.get("pattern")
    known = re.compile(pattern) if pattern else None
    return Example(prompt, str(entry["expected"]), known, tuple(sight.pictures))
