"""The official openai client works through the edge unchanged."""

from __future__ import annotations

import openai
import pytest

from edge.harness import KEY, CoreProcess, chat
from longshore.tier_process import TierProcess


@pytest.fixture
async def client(edge: TierProcess, core: CoreProcess):
    await core.set()
    async with openai.AsyncOpenAI(base_url=edge.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_chat_and_stream(client: openai.AsyncOpenAI) -> None:
    request = chat()
    answer = await client.chat.completions.create(model="shop", messages=request["messages"])
    assert answer.choices[0].message.content == "w0 w1 w2 w3 "
    parts = []
    async for chunk in await client.chat.completions.create(
        model="shop", messages=request["messages"], stream=True, stream_options={"include_usage": True}
    ):
        parts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(parts) == "w0 w1 w2 w3 "
    assert chunk.usage is not None and chunk.usage.completion_tokens == 4
    completion = await client.completions.create(model="shop", prompt="x")
    assert completion.choices[0].text == "w0 w1 w2 w3 "
    assert [model.id async for model in client.models.list()] == ["shop"]


async def test_errors(client: openai.AsyncOpenAI) -> None:
    messages = chat()["messages"]
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="nobody", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model="shop", messages=messages, temperature=3)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="no").chat.completions.create(model="shop", messages=messages)
    with pytest.raises(openai.RateLimitError):
        orders = chat(orders={"status": 429, "code": "rate_limit_exceeded"})["messages"]
        await client.chat.completions.create(model="shop", messages=orders)


async def test_a_cut_stream_is_an_error(client: openai.AsyncOpenAI) -> None:
    messages = chat(orders={"cut_after": 2})["messages"]
    with pytest.raises(openai.APIError):
        async for _ in await client.chat.completions.create(model="shop", messages=messages, stream=True):
            pass
