"""LangChain's ChatOpenAI against a real core."""

from __future__ import annotations

from langchain_openai import ChatOpenAI

from .conftest import MODEL, Core


def _model(core: Core) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{core.url}/v1",
        api_key=core.key,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=12,
        max_retries=0,
        timeout=20,
    )


def test_it_answers_and_streams_the_same(core: Core) -> None:
    model = _model(core)
    answer = model.invoke("How many red lamps are there?")
    assert isinstance(answer.content, str)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    chunks = list(model.stream("How many red lamps are there?"))
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content
    assert len(chunks) > 5


async def test_async_streaming(core: Core) -> None:
    chunks = [chunk async for chunk in _model(core).astream("How many red lamps are there?")]
    assert "".join(str(chunk.content) for chunk in chunks)
