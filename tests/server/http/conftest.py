"""One real core for all tests of its HTTP face: its own processes, a real socket, a tiny random model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess
from shop.chat import SPECIAL_TOKENS
from shop.models import save_model, shop_config

MODEL = "tiny"
MAX_IN_FLIGHT = 6


@dataclass(frozen=True)
class Core:
    """Where the core listens and how to talk to it."""

    url: str
    model_dir: Path
    edge_key: PrivateKey
    key: str = "key-of-acme"
    vip_key: str = "key-of-vips"
    small_key: str = "key-of-small"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def openai(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=30)


def _key_table(tenant: str, key: str, **more: Any) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in more.items()]
    digest = hashlib.sha256(key.encode()).hexdigest()
    return "\n".join(["[[keys]]", f'tenant = "{tenant}"', f'key_sha256 = "{digest}"', *lines, ""])


def settings(core: Core) -> str:
    return f"""\
model = {json.dumps(str(core.model_dir))}
served_model_name = "{MODEL}"
node = "core-test"
host = "127.0.0.1"
port = 0
dtype = "float32"
device = "cpu"
num_threads = 1
fuse_layers = false  # answers that last long enough to be broken into
max_num_seqs = 8
max_waiting = 8
max_in_flight_per_tenant = {MAX_IN_FLIGHT}
max_body_bytes = 200000
reader_timeout_s = 3.0

[aliases]
gpt-tiny = "{MODEL}"

{_key_table("acme", core.key)}
{_key_table("vips", core.vip_key, best_lane="vip")}
{_key_table("small", core.small_key, max_tokens=8)}
[[edges]]
issuer = "edge-1"
public_key = "{core.edge_key.public_key.text}"
"""


def make_model(folder: Path) -> Path:
    """A tiny model of random weights whose greedy answers vary: untied, and spread wider than usual."""
    import torch
    from transformers import LlamaForCausalLM

    config = shop_config("tiny")
    config.tie_word_embeddings = False
    config.initializer_range = 0.3
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0.0  # answers of plain text, which does not end early
    return save_model(model, folder)


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    folder = tmp_path_factory.mktemp("core")
    model_dir = make_model(folder / "model")
    config = folder / "core.toml"
    edge_key = PrivateKey.generate()
    config.write_text(settings(Core("", model_dir, edge_key)))
    environment = {"OMP_NUM_THREADS": "1"}
    with TierProcess(["serve", "--config", str(config)], environment=environment) as process:
        yield Core(process.url, model_dir, edge_key)


@pytest.fixture
async def http(core: Core) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=core.url, headers=core.headers, timeout=20) as client:
        yield client


@pytest.fixture
def client(core: Core) -> Iterator[openai.OpenAI]:
    with core.openai() as client:
        yield client


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat body; greedy and short unless the test says otherwise."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 4,
    }
    return {name: value for name, value in (body | fields).items() if value is not None}


def long_chat(**fields: Any) -> dict[str, Any]:
    """A chat whose answer takes seconds."""
    return chat(max_tokens=900, ignore_eos=True, **fields)


async def metric(http: httpx2.AsyncClient, name: str, **labels: str) -> float:
    """The value of one metric, 0 where it has none yet."""
    text = (await http.get("/metrics")).text
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.startswith(f"{name}{{") and all(
            f'{key}="{wanted}"' in head for key, wanted in labels.items()
        ):
            return float(value)
    return 0.0


async def eventually_idle(http: httpx2.AsyncClient, within_s: float = 3.0) -> float:
    """Seconds until the engine had nothing left to do; fails when it still has after `within_s`."""
    begin_s = time.monotonic()
    while await metric(http, "vllm:num_requests_running") > 0:
        assert time.monotonic() - begin_s < within_s, "the engine still works on an answer nobody waits for"
        await asyncio.sleep(0.02)
    return time.monotonic() - begin_s
