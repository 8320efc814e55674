"""The bounded buffer between an answer's maker and its sender."""

from __future__ import annotations

import asyncio

import pytest

from longshore_server.event_buffer import EventBuffer


async def test_a_slow_taker_holds_up_the_putter_and_loses_nothing() -> None:
    buffer: EventBuffer[int] = EventBuffer(4)

    async def put() -> None:
        for number in range(50):
            await buffer.put(number)
        buffer.close()

    putting = asyncio.create_task(put())
    taken: list[int] = []
    while not buffer.is_over:
        await asyncio.sleep(0.001)
        batch = await buffer.take(1.0)
        assert len(batch) <= 4
        taken += batch
    await putting
    assert taken == list(range(50))
    assert await buffer.take(0.0) == []


async def test_ready_events_are_taken_together_and_a_wait_ends() -> None:
    buffer: EventBuffer[int] = EventBuffer(8)
    assert await buffer.take(0.01) == []
    for number in range(3):
        await buffer.put(number)
    assert await buffer.take() == [0, 1, 2]
    waiting = asyncio.create_task(buffer.take(5.0))
    await asyncio.sleep(0)
    await buffer.put(7)
    assert await waiting == [7]


async def test_an_error_comes_after_what_was_before_it() -> None:
    buffer: EventBuffer[int] = EventBuffer(8)
    await buffer.put(1)
    buffer.close(KeyError("late"))
    buffer.close()  # the first close counts
    await buffer.put(2)
    assert await buffer.take() == [1]
    assert not buffer.is_over
    with pytest.raises(KeyError):
        await buffer.take()


async def test_discarding_frees_a_putter_that_waits() -> None:
    buffer: EventBuffer[int] = EventBuffer(1)
    await buffer.put(1)
    putting = asyncio.create_task(buffer.put(2))
    await asyncio.sleep(0)
    buffer.close(KeyError("gone"), discard=True)
    await asyncio.wait_for(putting, 1.0)
    with pytest.raises(KeyError):
        await buffer.take()
