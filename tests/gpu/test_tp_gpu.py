"""Ranks on GPUs: two on one GPU over gloo, and over NCCL where there are two GPUs, against one rank.

Runs under pytest, and without it: `PYTHONPATH=server:sdk_python:tests python3 tests/gpu/test_tp_gpu.py`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
except ImportError:  # a bare GPU machine
    pass

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 1024, "eos_token_id": 2,
    "initializer_range": 0.06, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = [[(7 * i + k) % 31000 + 5 for i in range(40 + 60 * k)] for k in range(4)]
# bf16 holds 8 bits, and partial sums of ranks are rounded before they are added.
LOGPROB_TOLERANCE = 0.15
NUM_TOKENS = 12


def _first_logprobs(folder: Path, **settings: Any) -> list[tuple[int, float]]:
    """The likeliest first token of each prompt with its logprob, and that longer answers come to an end."""
    engine = NativeEngine(
        EngineConfig(
            model=str(folder),
            load_format="random",
            dtype="bfloat16",
            num_kv_blocks=256,
            max_num_seqs=8,
            **settings,
        )
    )
    try:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, num_logprobs=0)
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, params)
        first: dict[str, tuple[int, float]] = {}
        num_tokens = 0
        while engine.has_unfinished():
            for output in engine.step():
                assert output.error is None and output.token_id is not None and output.logprob is not None
                first.setdefault(output.request_id, (output.token_id, output.logprob))
                num_tokens += 1
        assert num_tokens == NUM_TOKENS * len(PROMPTS)
        engine.check_integrity()
        return [first[str(index)] for index in range(len(PROMPTS))]
    finally:
        engine.close()


def _compare(device: str, **spread: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        whole = _first_logprobs(folder, device="cuda:0")
        began_s = time.monotonic()
        shared = _first_logprobs(folder, device=device, **spread)
        print(f"{spread} on {device}: {time.monotonic() - began_s:.1f} s, {whole} {shared}")
    for (_, one), (_, several) in zip(whole, shared, strict=True):
        assert abs(one - several) < LOGPROB_TOLERANCE, (whole, shared)


def test_two_ranks_on_one_gpu_over_gloo() -> None:
    _compare("cuda:0", tensor_parallel_size=2)


def test_attention_and_feed_forward_on_one_gpu_over_gloo() -> None:
    _compare("cuda:0", placement="attention_feed_forward")


def test_two_gpus_over_nccl() -> None:
    if torch.cuda.device_count() < 2:
        print("two GPUs over NCCL: not run, there is one GPU")
        return
    _compare("cuda", tensor_parallel_size=2)


if __name__ == "__main__":
    test_two_ranks_on_one_gpu_over_gloo()
    test_attention_and_feed_forward_on_one_gpu_over_gloo()
    test_two_gpus_over_nccl()
