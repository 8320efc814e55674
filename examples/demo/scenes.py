"""The scenes of the demo: calm, rush, cache, a dying engine, a dying core, and no network at all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

import psutil

from demo import tiers
from demo.claims import Claims
from demo.questions import Case, case, cases
from demo.table import Row, Table
from longshore import AsyncClient
from longshore.errors import AnswerInterruptedError
from longshore.tier_process import TierProcess

NUM_CALM = 18
WAVES = (16, 24, 32, 48)  # questions at once
NUM_TOKENS_BEFORE_KILL = 6
LIST_ITEMS = 7
PATIENT = {"mode": "prefer-core", "ttft_target_ms": 30_000}
"""Ask for the core's own answer, however long its first token takes."""
ALL_TIERS = frozenset({"device", "edge", "core"})


async def ask(
    client: AsyncClient,
    asked: Case,
    on_text: Callable[[int], None] | None = None,
    *,
    model: str = tiers.MODEL_NAME,
    **options: object,
) -> Row:
    """Ask one question as a stream; `on_text` is called with the number of chunks of text so far."""
    started_s = time.monotonic()
    stream = await client.chat.completions.create(
        model=model, messages=asked.messages, temperature=0, stream=True, **options
    )
    first_s, num_chunks, texts = None, 0, []
    async with stream:
        async for chunk in stream:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if not text:
                continue
            first_s = first_s or time.monotonic()
            num_chunks += 1
            texts.append(text)
            if on_text is not None:
                on_text(num_chunks)
    ended_s = time.monotonic()
    assert stream.report is not None
    seconds = ended_s - (first_s or started_s)
    rate = (num_chunks - 1) / seconds if num_chunks > 1 and seconds > 0 else 0.0
    return Row(asked, "".join(texts), stream.report, ((first_s or ended_s) - started_s) * 1e3, rate)


class Scenes:
    """Runs the scenes against live tiers; every claim goes through `claims`."""

    def __init__(
        self, client: AsyncClient, core: TierProcess, edge: TierProcess, claims: Claims, rng: Random
    ) -> None:
        self._client = client
        self._core = core
        self._edge = edge
        self._claims = claims
        self._rng = rng
        self._cases: Iterator[Case] = cases(rng)
        self._table = Table()
        self.rows: list[Row] = []

    async def calm(self) -> None:
        """One question after another: nobody waits, so the best model answers."""
        print("\n1. One question at a time, auto routing")
        self._table.head()
        for _ in range(NUM_CALM):
            self._note(await ask(self._client, next(self._cases)))

    async def rush(self) -> None:
        """Many at once: predicted times grow, and the routing spreads over the tiers."""
        for size in WAVES:
            print(f"\n2. A rush: {size} questions at once, auto routing")
            self._table.head()
            pending = [asyncio.ensure_future(ask(self._client, next(self._cases))) for _ in range(size)]
            for done in asyncio.as_completed(pending):
                self._note(await done)
            if self._tiers().keys() >= ALL_TIERS:
                break
        self._claim_answers()

    async def cached(self) -> None:
        """The same question twice through the edge; the second comes from its cache."""
        print("\n3. The same question again (* = from the cache)")
        asked = next(self._cases)
        self._table.head()
        first = await ask(self._client, asked, **PATIENT)
        second = await ask(self._client, asked, **PATIENT)
        self._table.add(first)
        self._table.add(second)
        self._claims.check(
            second.report.cached and second.report.served_by == "edge", "the edge's cache answered"
        )
        self._claims.check(second.text == first.text, "with the same text")
        self._claims.check(
            second.ttft_ms < first.ttft_ms,
            "and faster",
            f"{second.ttft_ms:.0f} ms after {first.ttft_ms:.0f} ms",
        )

    async def dying_engine(self) -> None:
        """SIGKILL for the engine process in the middle of an answer: it is restarted and goes on."""
        print("\n4. The engine is killed in the middle of a long answer")
        asked = case(self._rng, "list", LIST_ITEMS)
        kill = self._at(NUM_TOKENS_BEFORE_KILL, self._kill_engine)
        row = await ask(self._client, asked, kill, **PATIENT)
        self._table.head()
        self._table.add(row)
        self._claims.check(row.report.served_by == "core", "the core answered", row.tier)
        self._claims.check(row.is_correct, "whole and right: no token lost, none twice")

    async def dying_core(self) -> None:
        """SIGKILL for the whole core: the answer is finished elsewhere, or ends in a typed error."""
        print("\n5. The whole core is killed in the middle of a long answer")
        await tiers.core_is_back(self._edge.url)
        asked = case(self._rng, "list", LIST_ITEMS)
        kill = self._at(NUM_TOKENS_BEFORE_KILL, self._core.kill)
        try:
            row = await ask(self._client, asked, kill, **PATIENT)
        except AnswerInterruptedError as error:
            print(
                f"  the stream ended with {error.code} after {error.tokens_delivered} tokens: {error.message}"
            )
            told = error.partial_text or ""
            self._claims.check(
                bool(error.tokens_delivered), "the cut answer ended in a typed error, not in a false end"
            )
            self._claims.check(
                bool(told) and asked.question.answer.startswith(told),
                "what had come is an exact prefix",
                told[-40:],
            )
        else:
            self._table.head()
            self._table.add(row)
            self._claims.check(len(row.report.segments) > 1, "another tier went on with the answer", row.why)
            self._claims.check(row.is_correct, "and it came whole")
        row = await ask(self._client, next(self._cases))
        self._table.head()
        self._table.add(row)
        self._claims.check(
            row.report.served_by != "core", "the next question is answered without the core", row.tier
        )

    async def offline(self) -> None:
        """Edge and core stopped: the device alone."""
        print("\n6. Edge and core are stopped: device only")
        self._edge.stop()
        self._table.head()
        rows = [
            await ask(self._client, next(self._cases), mode="device-only"),
            await ask(self._client, next(self._cases)),
        ]
        for row in rows:
            self._table.add(row)
        self._claims.check(
            all(row.report.served_by == "device" for row in rows),
            "the device answered, asked to and by itself",
        )

    def _note(self, row: Row) -> None:
        self.rows.append(row)
        self._table.add(row)

    def _tiers(self) -> Counter[str]:
        return Counter(row.report.served_by for row in self.rows)

    def _claim_answers(self) -> None:
        served, num_right = self._tiers(), sum(row.is_correct for row in self.rows)
        spread = ", ".join(f"{tier} {served[tier]}" for tier in sorted(ALL_TIERS))
        self._claims.check(len(self.rows) >= 30, "at least 30 questions were answered", str(len(self.rows)))
        self._claims.check(served.keys() >= ALL_TIERS, "each tier answered some of them", spread)
        self._claims.check(
            num_right >= 0.85 * len(self.rows),
            "at least 85% of the answers are right",
            f"{num_right}/{len(self.rows)}",
        )
        self._claims.check(all(row.why for row in self.rows), "each answer says why its tier was chosen")

    @staticmethod
    def _at(num_chunks: int, act: Callable[[], None]) -> Callable[[int], None]:
        return lambda seen: act() if seen == num_chunks else None

    def _kill_engine(self) -> None:
        for process in psutil.Process(self._core.pid).children(recursive=True):
            if "longshore_server.engine_process" in " ".join(process.cmdline()):
                process.kill()
                return
        raise RuntimeError("the core has no engine process")
