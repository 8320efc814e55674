"""Engine settings and sampling parameters: each wrong value is refused by name."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, InvalidRequestError
from longshore_server.native.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
        ("num_logprobs", -1),
        ("num_logprobs", 101),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"1": 0.0}),
        ("logit_bias", [1]),
        ("stop_token_ids", [1]),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", 1),
    ],
    ids=str,
)
def test_a_wrong_sampling_parameter_is_named(field, value) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("model", {"model": ""}),
        ("load_format", {"load_format": "pickle"}),
        ("dtype", {"dtype": "int8"}),
        ("block_size", {"block_size": 0}),
        ("max_num_seqs", {"max_num_seqs": 0}),
        ("max_num_batched_tokens", {"max_num_seqs": 64, "max_num_batched_tokens": 63}),
        ("num_kv_blocks", {"num_kv_blocks": 8, "kv_memory_bytes": 8}),
        ("kv_memory_bytes", {"kv_memory_bytes": 0}),
        ("batch_invariant", {"batch_invariant": True, "dtype": "bfloat16"}),
        ("batch_invariant", {"batch_invariant": True, "device": "cuda", "fuse_layers": False}),
    ],
    ids=str,
)
def test_a_wrong_engine_setting_is_named(field, settings) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m", **settings})
    assert caught.value.field == field


def test_light_parts_import_no_torch_and_the_engine_no_server() -> None:
    """HTTP workers use the types without paying for torch; the engine runs where no web framework is."""
    parts = ("config", "errors", "outputs", "sampling_params", "scheduler")
    light = "import sys; " + "; ".join(f"import longshore_server.native.{part}" for part in parts)
    light += "; print('torch' in sys.modules)"
    heavy = "import sys, longshore_server.native.engine as e"
    heavy += "; print(any(name in sys.modules for name in ('fastapi', 'msgspec', 'granian', 'pydantic')))"
    for code in (light, heavy):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == "False"
