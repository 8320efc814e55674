"""NativeEngineClient against real engine processes: what a death, a hang or a slow reader does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from core_processes import (
    EngineProcess,
    engine_config,
    engine_process,
    kept_running,
    request_id,
    tiny_model_folder,
)
from longshore.errors import (
    DeadlineExceededError,
    EngineFailedError,
    InvalidRequestError,
    PromptTooLongError,
    UnavailableError,
)
from longshore_server.engines.base import Engine, EngineToken, GenerateJob, SamplingSpec
from longshore_server.engines.native import NativeEngineClient
from poison_engine import POISON

PROMPT = tuple(range(10, 26))
GREEDY = SamplingSpec(max_tokens=400, temperature=0, ignore_eos=True)
SEEDED = SamplingSpec(
    max_tokens=400,
    temperature=1.0,
    top_p=0.95,
    seed=7,
    ignore_eos=True,
    frequency_penalty=0.3,
    num_logprobs=2,
)


def job(params: SamplingSpec = GREEDY, **fields: Any) -> GenerateJob:
    values = {"request_id": request_id(), "prompt_token_ids": PROMPT, "params": params}
    return GenerateJob(**(values | fields))


async def collect(client: NativeEngineClient, job: GenerateJob) -> list[EngineToken]:
    return [token async for token in client.generate(job)]


@asynccontextmanager
async def connected(engine: EngineProcess, **options: Any) -> AsyncIterator[NativeEngineClient]:
    client = NativeEngineClient(str(engine.socket_path), **options)
    await asyncio.wait_for(client.start(), 30)
    try:
        yield client
    finally:
        await client.close()


async def until(condition: Any, timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def running(client: NativeEngineClient) -> int:
    stats = await client.stats()
    return stats.num_running + stats.num_waiting


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("client") / "tiny")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineProcess]:
    with engine_process(engine_config(model)) as process:
        yield process


# -- a healthy engine --------------------------------------------------------------------------


async def test_it_is_an_engine_and_tells_of_its_model(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        assert isinstance(client, Engine)
        assert (client.info.name, client.info.vocab_size, client.info.max_model_len) == ("tiny", 1024, 1024)
        assert client.info.eos_token_ids == {1}
        assert "resume" in client.capabilities
        assert client.is_ready()
    assert not client.is_ready()


async def test_answers_at_once_do_not_mix_and_are_reproducible(engine: EngineProcess) -> None:
    jobs = [job(SamplingSpec(max_tokens=40, seed=seed, ignore_eos=True)) for seed in range(12)]
    async with connected(engine) as client:
        answers = await asyncio.gather(*(collect(client, each) for each in jobs))
        again = [await collect(client, each) for each in jobs[:3]]
    assert [[token.token_id for token in answer] for answer in again] == [
        [token.token_id for token in answer] for answer in answers[:3]
    ]
    for answer in answers:
        assert [token.offset for token in answer] == list(range(40))
        assert [token.finish_reason for token in answer] == [None] * 39 + ["length"]
    assert len({tuple(token.token_id for token in answer) for answer in answers}) == 12


async def test_continuing_an_answer_gives_its_rest(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        whole = [token.token_id for token in await collect(client, job(SEEDED))]
        rest = await collect(client, job(SEEDED, continue_from=tuple(whole[:150])))
    assert [token.offset for token in rest] == list(range(150, 400))
    assert [token.token_id for token in rest] == whole[150:]


async def test_closing_the_iterator_aborts_in_the_engine(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        async with aclosing(client.generate(job(SamplingSpec(max_tokens=1000, ignore_eos=True)))) as tokens:
            await anext(tokens)
            steps = (await client.stats()).num_steps
        async with asyncio.timeout(10):
            while await running(client):
                await asyncio.sleep(0.01)
        assert (await client.stats()).num_steps - steps < 100


async def test_cancelling_the_reader_aborts_in_the_engine(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        reader = asyncio.create_task(collect(client, job(SamplingSpec(max_tokens=1000, ignore_eos=True))))
        async with asyncio.timeout(10):
            while not await running(client):
                await asyncio.sleep(0.01)
        reader.cancel()
        async with asyncio.timeout(10):
            while await running(client):
                await asyncio.sleep(0.01)


async def test_errors_of_the_engine_come_as_their_own_class(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        with pytest.raises(InvalidRequestError) as raised:
            await collect(client, job(SamplingSpec(top_p=0.0)))
        assert raised.value.param == "top_p"
        with pytest.raises(PromptTooLongError):
            await collect(client, job(prompt_token_ids=(5,) * 3000))
        with pytest.raises(DeadlineExceededError):
            await collect(client, job(deadline_s=time.monotonic() + 0.05))
        assert len(await collect(client, job())) == 400


async def test_a_slow_reader_leaves_the_engine_and_loses_nothing(engine: EngineProcess) -> None:
    async with connected(engine, max_unread_tokens=16) as client:
        whole = await collect(client, job(SEEDED))
        slow: list[EngineToken] = []
        async for token in client.generate(job(SEEDED)):
            if len(slow) in (0, 100, 200):
                async with asyncio.timeout(10):
                    while await running(client):  # it is taken out while nobody reads
                        await asyncio.sleep(0.01)
            slow.append(token)
    assert [(token.offset, token.token_id) for token in slow] == [
        (token.offset, token.token_id) for token in whole
    ]


async def test_stopping_a_worker_ends_its_requests_with_an_error(engine: EngineProcess) -> None:
    async with connected(engine) as client:
        reader = asyncio.create_task(collect(client, job(SamplingSpec(max_tokens=1000, ignore_eos=True))))
        async with asyncio.timeout(10):
            while not await running(client):
                await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(reader, 5)


async def test_an_engine_that_never_comes_is_a_typed_error(tmp_path: Path) -> None:
    client = NativeEngineClient(str(tmp_path / "none"), start_timeout_s=0.3)
    with pytest.raises(UnavailableError):
        await client.start()
    with pytest.raises(UnavailableError):
        _ = client.info
    with pytest.raises(UnavailableError):
        await collect(client, job())
    with pytest.raises(UnavailableError):
        await client.stats()


# -- an engine that dies -----------------------------------------------------------------------


@pytest.mark.slow
async def test_an_answer_goes_on_byte_for_byte_after_kill_9(model: Path) -> None:
    with engine_process(engine_config(model)) as engine, kept_running(engine):
        async with connected(engine) as client:
            whole = [await collect(client, job(params)) for params in (GREEDY, SEEDED)]
            halves: list[list[EngineToken]] = [[], []]

            async def read(index: int, params: SamplingSpec) -> None:
                async for token in client.generate(job(params)):
                    halves[index].append(token)

            readers = [asyncio.create_task(read(i, params)) for i, params in enumerate((GREEDY, SEEDED))]
            await until(lambda: min(map(len, halves)) >= 50)
            engine.kill()
            killed_s = time.monotonic()
            await until(lambda: not client.is_ready(), 5)
            assert time.monotonic() - killed_s < 1.0
            with pytest.raises(UnavailableError) as raised:
                await collect(client, job())
            assert raised.value.retryable
            assert max(map(len, halves)) < 400
            await asyncio.wait_for(asyncio.gather(*readers), 60)
            stats = await client.stats()
    for half, answer in zip(halves, whole, strict=True):
        assert [(token.token_id, token.offset, token.finish_reason) for token in half] == [
            (token.token_id, token.offset, token.finish_reason) for token in answer
        ]
    for half, answer in zip(halves[1], whole[1], strict=True):
        assert half.logprob == pytest.approx(answer.logprob, abs=1e-6)
    assert (stats.num_restarts, stats.num_replays) == (1, 2)


@pytest.mark.slow
async def test_a_request_that_kills_the_engine_again_ends_and_takes_nobody_along(model: Path) -> None:
    config = engine_config(model)
    with engine_process(config, module="poison_engine") as engine, kept_running(engine):
        async with connected(engine) as client:
            bystanders = [
                asyncio.create_task(
                    collect(client, job(SamplingSpec(max_tokens=800, seed=n, ignore_eos=True)))
                )
                for n in range(3)
            ]
            async with asyncio.timeout(30):
                while await running(client) < 3:
                    await asyncio.sleep(0.01)
            with pytest.raises(EngineFailedError, match="died 2 times") as raised:
                await asyncio.wait_for(collect(client, job(prompt_token_ids=(*PROMPT, POISON))), 60)
            assert raised.value.tokens_delivered == 0
            answers = await asyncio.wait_for(asyncio.gather(*bystanders), 60)
            assert [len(answer) for answer in answers] == [800, 800, 800]
            undisturbed = await collect(client, job(SamplingSpec(max_tokens=800, seed=0, ignore_eos=True)))
            assert [token.token_id for token in undisturbed] == [token.token_id for token in answers[0]]
            assert (await client.stats()).num_restarts == 2
    assert engine.num_starts == 3


@pytest.mark.slow
async def test_without_replays_a_death_ends_the_request(model: Path) -> None:
    with engine_process(engine_config(model)) as engine, kept_running(engine):
        async with connected(engine, max_replays=0) as client:
            tokens = client.generate(job(SamplingSpec(max_tokens=1000, ignore_eos=True)))
            await anext(tokens)
            engine.kill()
            with pytest.raises(EngineFailedError) as raised:
                async with asyncio.timeout(60):
                    async for _ in tokens:
                        pass
            assert (raised.value.tokens_delivered or 0) >= 1


@pytest.mark.slow
async def test_waiting_for_an_engine_that_stays_away_has_an_end(model: Path) -> None:
    long = SamplingSpec(max_tokens=1000, ignore_eos=True)
    with engine_process(engine_config(model)) as engine:
        async with connected(engine, replay_wait_s=1.0) as client:
            patient = client.generate(job(long))
            hurried = client.generate(job(long, deadline_s=time.monotonic() + 1.0))
            for tokens in (patient, hurried):
                await anext(tokens)
            engine.kill()
            for tokens, error in (
                (hurried, (DeadlineExceededError, EngineFailedError)),
                (patient, EngineFailedError),
            ):
                with pytest.raises(error):
                    async with asyncio.timeout(5):
                        async for _ in tokens:
                            pass


@pytest.mark.slow
async def test_a_frozen_engine_is_noticed_within_a_second_and_loses_nothing_when_it_thaws(
    model: Path,
) -> None:
    with engine_process(engine_config(model)) as engine:
        async with connected(engine, silence_s=30.0) as client:
            whole = await collect(client, job())
            tokens = client.generate(job())
            read = [await anext(tokens)]
            os.kill(engine.pid, signal.SIGSTOP)
            frozen_s = time.monotonic()
            await until(lambda: not client.is_ready(), 5)
            assert time.monotonic() - frozen_s < 1.5  # a second after its last sign of life
            os.kill(engine.pid, signal.SIGCONT)
            read += [token async for token in tokens]
            await until(client.is_ready, 5)
            assert (await client.stats()).num_replays == 0
    assert [token.token_id for token in read] == [token.token_id for token in whole]
