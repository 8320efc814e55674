"""A worker whose engine is not there: it says so, and lives."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from longshore_server.app import create_app
from longshore_server.config import CoreConfig, KeySetting
from longshore_server.engines.native import NativeEngineClient
from shop.tokenizer import FOLDER

from .conftest import chat


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    digest = hashlib.sha256(b"key").hexdigest()
    config = CoreConfig(model=str(FOLDER), served_model_name="tiny", keys=(KeySetting("t", digest),))
    app = create_app(config, NativeEngineClient(str(tmp_path / "no-engine")))
    transport = httpx2.ASGITransport(app=app)
    headers = {"authorization": "Bearer key"}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://core", headers=headers) as client,
    ):
        yield client


async def test_it_is_alive_and_not_ready(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    response = await http.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "the engine is starting"}


async def test_requests_are_told_to_come_back(http: httpx2.AsyncClient) -> None:
    for response in (
        await http.post("/v1/chat/completions", json=chat()),
        await http.get("/v1/models"),
    ):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "unavailable"
    wrong = {"authorization": "Bearer wrong"}
    assert (await http.get("/v1/models", headers=wrong)).status_code == 401


async def test_a_scrape_works_and_says_that_the_engine_is_down(http: httpx2.AsyncClient) -> None:
    text = (await http.get("/metrics")).text
    assert 'longshore:engine_up{model_name="tiny"} 0.0' in text
    assert "vllm:num_requests_running" not in text
