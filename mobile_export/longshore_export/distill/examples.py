"""Training text from a JSONL file to padded batches. A batch is a function of (seed, step, rank) alone.

A line is {"text": ...}, {"prompt": ..., "answer": ...} or {"messages": [...]} whose last one is the
assistant's; the loss is on every answer, or on the whole text where there is no prompt.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longshore.errors import ConfigError

MAX_KEPT_TOKENS = 1 << 24  # 64 MiB: later passes over data of this size encode nothing again
_MARK = re.compile("\x02(\\d+)\x03")  # control characters that no template writes itself
Turns = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, of which those in the ranges `learnt` (start, end) are answers and the others given."""

    token_ids: Sequence[int]
    learnt: tuple[tuple[int, int], ...]

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens come before the last answer."""
        return self.learnt[-1][0]


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
        self._kept: dict[int, Example] = {}
        self._num_kept_tokens = 0

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Example:
        if (kept := self._kept.get(index)) is not None:
            return kept
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            example = self._encode(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{self._path}, line {index + 1}: {_one_line(error)}") from None
        if self._num_kept_tokens < MAX_KEPT_TOKENS:
            self._kept[index] = example
            self._num_kept_tokens += len(example.token_ids)
        return example

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
        end_id = self._tokenizer.eos_token_id
        ids: array[int] = array("i")
        learnt: list[tuple[int, int]] = []
        for given, answer in self._turns(line):
            given_ids = self._tokenizer.encode(given, add_special_tokens=False) if given else []
            if learnt and given_ids[:1] == [end_id]:  # what ends an answer is part of it
                learnt[-1] = (learnt[-1][0], len(ids) + 1)
            ids.extend(given_ids)
            start = len(ids)
            ids.extend(self._tokenizer.encode(answer, add_special_tokens=False))
            learnt.append((start, len(ids)))
        ids.append(end_id)
        learnt[-1] = (learnt[-1][0], len(ids))
        del ids[self._max_tokens :]
        # the first token of all follows nothing, so it is never learnt
        kept = tuple(
            (start, min(end, len(ids))) for start, end in learnt if max(start, 1) < min(end, len(ids))
        )
        if not kept:
            raise ValueError(f"no answer within {self._max_tokens} tokens")
        return Example(ids, kept)

    def _turns(self, line: dict[str, Any]) -> Turns:
        """Pairs of what is given and what is answered, in order."""
        if "text" in line:
            return [("", str(line["text"]))]
        if "messages" not in line:
            return [(str(line["prompt"]), str(line["answer"]))]
        *before, last = line["messages"]
        if last["role"] != "assistant":
            raise ValueError("the last message must be the assistant's")
        answers = [
            message["content"]
            for message in before
            if message["role"] == "assistant" and isinstance(message["content"], str)
        ]
        given = self._given(before)
        if len(given) != len(answers) + 1:  # the template drops or repeats earlier answers
            return [(self._rendered(before), str(last["content"]))]
        return list(zip(given, [*answers, str(last["content"])], strict=True))

    def _given(self, before: list[dict[str, Any]]) -> list[str]:
        """The rendered chat, cut where the answers of earlier turns stand."""
        marked, number = [], 0
        for message in before:
            if message["role"] == "assistant" and isinstance(message["content"], str):
                message, number = {**message, "content": f"\x02{number}\x03"}, number + 1
            marked.append(message)
        pieces = _MARK.split(self._rendered(marked))
        if pieces[1::2] != [str(index) for index in range(number)]:
            return []
        return pieces[::2]

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


class Ahead:
    """Batches of one process, each made in a thread while the step before it is trained; `close` ends it."""

    def __init__(self, examples: Examples, rank: int, num_ranks: int, num_rows: int, seed: int) -> None:
        self._examples, self._of = examples, (rank, num_ranks, num_rows, seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """That of `step`; raises what making it raised."""
        wanted = self._next[1] if self._next and self._next[0] == step else self._make(step)
        batch = wanted.result()
        self._next = (step + 1, self._make(step + 1))
        return batch

    def close(self) -> None:
        """Wait for the batch that nobody will ask for."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._examples.batch, step, *self._of)


def _collate(examples: list[Example]) -> Batch:
    width = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.token_ids)
        ids[row, : len(tokens)] = tokens
        for start, end in example.learnt:
            learnt_from = max(start - 1, 0)
            labels[row, learnt_from : end - 1] = tokens[learnt_from + 1 : end]
    prompts = [list(example.token_ids[: max(1, example.num_prompt_tokens)]) for example in examples]
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
