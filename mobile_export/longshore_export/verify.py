"""Parity of a built graph with torch: logits over prompts and pieces, and greedy answers token by token.

Runs the graph through ONNX Runtime with bindings of its own, so that it checks the file and not the device
runtime's idea of it. Writes nothing.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longshore.errors import ParityError
from longshore_export.checkpoint import AnyCheckpoint, image_token_id
from longshore_export.shape import DecoderShape
from longshore_export.traced import TracedShape

MAX_LOGIT_DIFFERENCE = 1e-4
MAX_SHARE_OF_ROUNDING = 0.25
ROUNDED_PROMPT_LENGTHS = (1, 2, 3, 5, 8)
NUM_GREEDY_TOKENS = 64
PROMPT_LENGTHS = (1, 5, 33, 128)
MAX_WINDOW_PROMPT = 1024
SEED = 20

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared: the largest difference of a logit, and how many greedy tokens were equal."""

    max_logit_difference: float
    num_prompts: int
    num_greedy_tokens: int


def check_parity(model_file: Path, checkpoint: AnyCheckpoint) -> Parity:
    """Compare the graph in `model_file` with torch in fp32; raises ParityError where they differ too much."""
    shape, rng = checkpoint.shape, random.Random(SEED)
    runner = _Runner(model_file, shape, _hidden_size(checkpoint))
    longest = max(1, shape.max_tokens - NUM_GREEDY_TOKENS - 1)
    lengths = sorted({min(length, longest) for length in (*PROMPT_LENGTHS, *_past_the_window(shape))})
    worst = 0.0
    num_equal = 0
    for length in lengths:
        prompt = _prompt(rng, checkpoint, length)
        worst = max(worst, _logit_difference(runner, checkpoint.model, prompt))
        num_equal += _equal_greedy(runner, checkpoint.model, prompt, shape.max_tokens)
    if image_token_id(checkpoint) is not None:
        worst = max(worst, _seeing_difference(runner, checkpoint, rng))
    return Parity(worst, len(lengths), num_equal)


def _hidden_size(checkpoint: AnyCheckpoint) -> int | None:
    """Of a picture's features, of a model that sees."""
    return checkpoint.vision.shape.hidden_size if checkpoint.vision else None


def _prompt(rng: random.Random, checkpoint: AnyCheckpoint, length: int) -> list[int]:
    """Random tokens, but for the one that stands for a picture."""
    prompt: list[int] = []
    while len(prompt) < length:
        token = rng.randrange(checkpoint.shape.vocab_size)
        if token != image_token_id(checkpoint):
            prompt.append(token)
    return prompt


def _past_the_window(shape: DecoderShape | TracedShape) -> tuple[int, ...]:
    """A prompt that a sliding window doesn't hold, where that is soon computed."""
    window = shape.window if isinstance(shape, TracedShape) else None
    return (window + 8,) if window and window <= MAX_WINDOW_PROMPT else ()


def check_rounded_parity(model_file: Path, checkpoint: AnyCheckpoint, emulated: Any) -> Parity:
    """Compare a quantized graph with the torch model `emulated`, which rounds as the graph should.

    A sum in another order now and then moves an activation to the next step, and later layers make more of
    it: over a long prompt, nearly as much as rounding itself does. So prompts are short, and the mean
    difference is held against what rounding changes at all; ParityError where it is over a quarter of that.
    """
    shape, rng = checkpoint.shape, random.Random(SEED)
    runner = _Runner(model_file, shape, _hidden_size(checkpoint))
    lengths = sorted({min(length, shape.max_tokens) for length in ROUNDED_PROMPT_LENGTHS})
    worst, differences, roundings = 0.0, [], []
    for length in lengths:
        prompt = _prompt(rng, checkpoint, length)
        got = runner.run(prompt, 0, list(range(length)))
        expected, plain = (_logits(model, prompt) for model in (emulated, checkpoint.model))
        worst = max(worst, float(np.abs(got - expected).max()))
        differences.append(np.abs(got - expected).mean())
        roundings.append(np.abs(expected - plain).mean())
    share = float(np.mean(differences) / np.mean(roundings))
    if not share <= MAX_SHARE_OF_ROUNDING:
        raise ParityError(f"the quantized graph differs from its emulation by {share:.0%} of the rounding")
    return Parity(worst, len(lengths), 0)


@torch.no_grad()
def _logits(model: Any, prompt: list[int]) -> Floats:
    logits: Floats = model(torch.tensor([prompt])).logits[0].numpy()
    return logits


class _Runner:
    """The graph with fresh buffers."""

    def __init__(
        self, model_file: Path, shape: DecoderShape | TracedShape, image_hidden_size: int | None = None
    ) -> None:
        import onnxruntime

        sees = image_hidden_size is not None
        self._no_pictures = np.zeros((0, image_hidden_size or 0), np.float32) if sees else None
        self._ort = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(model_file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes share no base of their own
            raise ParityError(f"ONNX Runtime refuses the graph: {str(error).splitlines()[0]}") from None
        dims = (1, shape.num_kv_heads, shape.max_tokens, shape.head_dim)
        names = [f"{what}.{layer}" for layer in range(shape.num_layers) for what in ("key", "value")]
        self._cache = {name: self._wrap(np.zeros(dims, np.float32)) for name in names}

    def run(
        self, token_ids: list[int], num_past: int, rows: list[int], features: Floats | None = None
    ) -> Floats:
        """Logits [rows, vocab] of some of `token_ids`, which stand after `num_past` tokens.

        `features` [image tokens, hidden] are those of the pictures among them.
        """
        binding, total = self._session.io_binding(), num_past + len(token_ids)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array([token_ids], np.int64),
            "rows": np.array(rows, np.int64),
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array([total], np.int32),
        }
        shown = self._no_pictures if features is None else features
        if shown is not None:
            feeds["image_features"] = shown
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, cache in self._cache.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        # The cached buffers are outputs too; only the logits, bound last, are wanted.
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits

    def _wrap(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)


@torch.no_grad()
def _logit_difference(runner: _Runner, model: Any, prompt: list[int]) -> float:
    """The largest over all positions, computed at once, and in two pieces over the cache."""
    expected = model(torch.tensor([prompt])).logits[0].numpy()  # [tokens, vocab]
    rows = list(range(len(prompt)))
    worst = float(np.abs(runner.run(prompt, 0, rows) - expected).max())
    cut = len(prompt) // 2
    if cut:
        runner.run(prompt[:cut], 0, [cut - 1])
        rest = prompt[cut:]
        got = runner.run(rest, cut, list(range(len(rest))))
        worst = max(worst, float(np.abs(got - expected[cut:]).max()))
    if not worst <= MAX_LOGIT_DIFFERENCE and not worst <= _own_rounding(model, prompt, expected):
        raise ParityError(f"a logit differs from torch's by {worst:.2e}, over {MAX_LOGIT_DIFFERENCE:.0e}")
    return worst


@torch.no_grad()
def _own_rounding(model: Any, prompt: list[int], logits: Floats) -> float:
    """How far torch's own fp32 is from fp64: a text unlike all that was learnt can magnify rounding."""
    exact = copy.deepcopy(model).double()(torch.tensor([prompt])).logits[0].numpy()
    return float(np.abs(logits - exact).max())


@torch.no_grad()
def _seeing_difference(runner: _Runner, checkpoint: AnyCheckpoint, rng: random.Random) -> float:
    """The largest over a prompt with two pictures' worth of features, the second cut by two calls."""
    apart = image_token_id(checkpoint)
    assert apart is not None
    text = _prompt(rng, checkpoint, 6)
    prompt = [*text[:2], *[apart] * 3, *text[2:4], *[apart] * 4, *text[4:]]
    features = np.random.default_rng(SEED).standard_normal((7, _hidden_size(checkpoint) or 0), np.float32)
    embedded = checkpoint.model.get_input_embeddings()(torch.tensor(prompt))
    embedded[torch.tensor(prompt) == apart] = torch.from_numpy(features)
    expected = checkpoint.model(inputs_embeds=embedded[None]).logits[0].numpy()
    rows, cut = list(range(len(prompt))), 9
    whole = runner.run(prompt, 0, rows, features)
    first = runner.run(prompt[:cut], 0, rows[:cut], features[:5])
    second = runner.run(prompt[cut:], cut, rows[: len(prompt) - cut], features[5:])
    worst = max(float(np.abs(got - expected).max()) for got in (whole, np.concatenate([first, second])))
    if not worst <= MAX_LOGIT_DIFFERENCE:
        raise ParityError(f"with a picture, a logit differs from torch's by {worst:.2e}")
    return worst


@torch.no_grad()
def _equal_greedy(runner: _Runner, model: Any, prompt: list[int], max_tokens: int) -> int:
    """Tokens of a greedy answer, equal on both sides. A tie within the tolerance may go either way."""
    from transformers import DynamicCache

    cache = DynamicCache()
    step, past = prompt, 0
    num_tokens = min(NUM_GREEDY_TOKENS, max_tokens - len(prompt))
    for index in range(num_tokens):
        theirs = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1].numpy()
        ours = runner.run(step, past, [len(step) - 1])[0]
        past += len(step)
        expected, got = int(theirs.argmax()), int(ours.argmax())
        if expected != got and theirs[expected] - theirs[got] > MAX_LOGIT_DIFFERENCE:
            raise ParityError(f"greedy token {index} is {got}, and {expected} in torch")
        step = [expected]
    return num_tokens
