"""Training text from a JSONL file to padded batches. A batch is a function of (seed, step, rank) alone.

A line is {"text": ...}, {"prompt": ..., "answer": ...} or {"messages": [...]} whose last one is the
assistant's; the loss is on the answer, or on the whole text where there is no prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longshore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, of which the first `num_prompt_tokens` are given and the others learnt."""

    token_ids: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """`input_ids` [rows, tokens], padded on the right; `labels` hold the next token, or -100."""

    input_ids: Tensor
    labels: Tensor
    prompts: list[list[int]]


class Examples:
    """A JSONL file, read line by line as batches ask for it; raises ConfigError naming a wrong line."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if not path.is_file():
            raise ConfigError(f"no training data: {path} does not exist")
        self._path, self._tokenizer, self._max_tokens = path, tokenizer, max_tokens
        self._offsets = _line_offsets(path)
        if not len(self._offsets):
            raise ConfigError(f"the training data {path} is empty")
        self._order_of: tuple[tuple[int, int], np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Example:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return self._encode(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{self._path}, line {index + 1}: {_one_line(error)}") from None

    def batch(self, step: int, rank: int, num_ranks: int, num_rows: int, seed: int) -> Batch:
        """The rows of one rank in one step; every line comes once per pass, in a new order each pass."""
        first = (step * num_ranks + rank) * num_rows
        return _collate([self[self._place(first + row, seed)] for row in range(num_rows)])

    def _place(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, len(self))
        if self._order_of is None or self._order_of[0] != (seed, epoch):
            self._order_of = ((seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self)))
        return int(self._order_of[1][place])

    def _encode(self, line: dict[str, Any]) -> Example:
        prompt, answer = self._parts(line)
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
        answer_ids = self._tokenizer.encode(answer, add_special_tokens=False)
        ids = [*prompt_ids, *answer_ids, self._tokenizer.eos_token_id][: self._max_tokens]
        if len(ids) <= max(1, len(prompt_ids)):
            raise ValueError(f"no answer within {self._max_tokens} tokens")
        return Example(ids, len(prompt_ids))

    def _parts(self, line: dict[str, Any]) -> tuple[str, str]:
        if "text" in line:
            return "", str(line["text"])
        if "messages" not in line:
            return str(line["prompt"]), str(line["answer"])
        *before, last = line["messages"]
        if last["role"] != "assistant":
            raise ValueError("the last message must be the assistant's")
        prompt = self._tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        return str(prompt), str(last["content"])


def _collate(examples: list[Example]) -> Batch:
    width = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.token_ids)
        ids[row, : len(tokens)] = tokens
        learnt_from = max(example.num_prompt_tokens - 1, 0)
        labels[row, learnt_from : len(tokens) - 1] = tokens[learnt_from + 1 :]
    prompts = [example.token_ids[: max(1, example.num_prompt_tokens)] for example in examples]
    return Batch(ids, labels, prompts)


def _line_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    offsets, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(offset)
            offset += len(line)
    return np.array(offsets, dtype=np.int64)


def _one_line(error: Exception) -> str:
    words = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return (words or type(error).__name__).splitlines()[0][:200]
