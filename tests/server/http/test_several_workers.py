"""Two HTTP workers on one port: metrics are sums, and a tenant's limit holds over both."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack

import httpx2
import pytest

from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess

from .conftest import MAX_IN_FLIGHT, Core, chat, long_chat, metric, settings

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.slow  # starts a core of its own


@pytest.fixture(scope="module")
def two_workers(core: Core, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    config = tmp_path_factory.mktemp("two") / "core.toml"
    edge_key = PrivateKey.generate()
    text = settings(Core("", core.model_dir, edge_key))
    text = text.replace(
        "max_waiting = 8", "max_waiting = 64"
    )  # so that the tenant's limit is what is met first
    config.write_text("workers = 2\n" + text)
    with TierProcess(["serve", "--config", str(config)], environment={"OMP_NUM_THREADS": "1"}) as process:
        yield Core(process.url, core.model_dir, edge_key)


async def test_metrics_are_the_sum_over_workers(two_workers: Core) -> None:
    for _ in range(12):  # a connection each, so that both workers get some
        async with httpx2.AsyncClient(base_url=two_workers.url, headers=two_workers.headers) as http:
            assert (await http.post(CHAT, json=chat(max_tokens=2))).status_code == 200
    for _ in range(6):
        async with httpx2.AsyncClient(base_url=two_workers.url, headers=two_workers.headers) as http:
            assert await metric(http, "vllm:e2e_request_latency_seconds_count") == 12
            assert await metric(http, "vllm:generation_tokens_total") == 24
            text = (await http.get("/metrics")).text
    names = re.findall(r"^(\S+) ", text, re.M)
    series = [name for name in names if not name.startswith("#")]
    assert len(series) == len(set(series)), "a series is exported twice"


async def test_a_tenants_limit_holds_over_both_workers(two_workers: Core) -> None:
    statuses = []
    async with AsyncExitStack() as stack:
        for _ in range(2 * MAX_IN_FLIGHT):
            http = await stack.enter_async_context(
                httpx2.AsyncClient(base_url=two_workers.url, headers=two_workers.headers, timeout=30)
            )
            response = await stack.enter_async_context(http.stream("POST", CHAT, json=long_chat(stream=True)))
            statuses.append(response.status_code)
            await asyncio.sleep(0)
    assert statuses.count(200) == MAX_IN_FLIGHT
    assert statuses.count(429) == MAX_IN_FLIGHT
