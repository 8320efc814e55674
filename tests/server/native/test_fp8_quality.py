"""FP8 weights and a KV cache in FP8 on the trained Shop teacher lose at most half a point of exact match.

A question counts when the model, given the sheet and each true beginning of the answer, would go on with the
true token every time: greedy decoding's verdict in one forward pass. The rounding is the GPU's, in torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from longshore_server.native import EngineConfig
from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.kv_cache import KVScales, from_fp8, to_fp8
from longshore_server.native.attention.kv_scales import measure_scales, random_prompts
from longshore_server.native.model.load import load_model
from shop.chat import messages, render
from shop.evaluate import heldout_questions
from shop.models import MODELS

NUM_PER_KIND = 5
MOST_LOST = 0.005


class CausalContext:
    """Attention of one sequence over itself, so that a forward needs no pages."""

    def check_arguments(self, *_: Any) -> None:
        """Nothing to check."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        heads = (each.transpose(0, 1)[None] for each in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)


class RoundedContext(CausalContext):
    """The same over keys and values as an FP8 cache gives them back."""

    def __init__(self, scales: list[KVScales]) -> None:
        self._scales = scales

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        scales = self._scales[layer_index]
        key = from_fp8(to_fp8(key, scales.key), scales.key, key.dtype)
        value = from_fp8(to_fp8(value, scales.value), scales.value, value.dtype)
        return super().attend(layer_index, query, key, value, scale, window)


@torch.inference_mode()
def _is_exact(model: Any, context: CausalContext, prompt: list[int], answer: list[int]) -> bool:
    ids = torch.tensor([prompt + answer])
    positions = torch.arange(ids.shape[1])[None]
    output = model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=len(answer) + 1,
        **{CONTEXT_KEYWORD: context},
    )
    return bool(output.logits[0, :-1].argmax(-1).tolist() == answer)


@pytest.mark.timeout(300)
def test_fp8_weights_and_kv_lose_at_most_half_a_point() -> None:
    """The scales of the cache are those that an engine measures at its start, on random prompts."""
    folder = MODELS / "shop-teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    asked = [
        (tokens(render(messages(sheet, question))), tokens(question.answer))
        for sheet, question in heldout_questions(NUM_PER_KIND, seed=1)
    ]
    accuracies = []
    for settings in ({"dtype": "float32"}, {"dtype": "bfloat16", "quantization": "fp8"}):
        loaded = load_model(EngineConfig(model=str(folder), **settings))
        model, context = loaded.model, CausalContext()
        if "quantization" in settings:
            prompts = random_prompts(loaded.vocab_size, loaded.max_model_len, seed=0)
            context = RoundedContext(measure_scales(model, torch.device("cpu"), prompts))
        accuracies.append(sum(_is_exact(model, context, *each) for each in asked) / len(asked))
    exact, rounded = accuracies
    assert exact >= 0.95
    assert exact - rounded <= MOST_LOST
