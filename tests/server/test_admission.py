"""Lanes, the bounded line, per-tenant limits; a clock that tests turn by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from longshore.errors import QueueFullError, RateLimitedError
from longshore.wire import LANES, Lane
from longshore_server.admission import Admission, priority_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _admission(
    running: int = 1, waiting: int = 8, tenant: int = 100, clock: Callable[[], float] | None = None
) -> Admission:
    return Admission(max_running=running, max_waiting=waiting, max_per_tenant=tenant, clock=clock or Clock())


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Visitor:
    """Someone who wants a slot, and holds it until told to go."""

    def __init__(
        self,
        admission: Admission,
        log: list[str],
        name: str,
        lane: Lane = "standard",
        slots: int = 1,
        tenant: str = "t",
    ) -> None:
        self.leave = asyncio.Event()
        self.name = name
        self.task = asyncio.create_task(self._visit(admission, log, lane, slots, tenant))

    async def _visit(self, admission: Admission, log: list[str], lane: Lane, slots: int, tenant: str) -> None:
        async with admission.slots(tenant=tenant, lane=lane, num_slots=slots):
            log.append(self.name)
            await self.leave.wait()


async def _end(*visitors: Visitor) -> None:
    for visitor in visitors:
        visitor.task.cancel()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)


def test_better_lanes_have_smaller_priorities() -> None:
    assert [priority_of(lane) for lane in LANES] == [0, 1, 2]


async def test_best_lane_first_then_first_come_first_served() -> None:
    admission, log = _admission(), []
    visitors = [Visitor(admission, log, "holder")]
    await _settle()
    wanted: list[tuple[str, Lane]] = [
        ("b1", "batch"),
        ("s1", "standard"),
        ("s2", "standard"),
        ("v1", "vip"),
        ("b2", "batch"),
        ("v2", "vip"),
    ]
    visitors += [Visitor(admission, log, name, lane) for name, lane in wanted]
    await _settle()
    assert admission.num_waiting == 6
    for _ in range(6):
        next(visitor for visitor in visitors if visitor.name == log[-1]).leave.set()
        await _settle()
    assert log == ["holder", "v1", "v2", "s1", "s2", "b1", "b2"]
    await _end(*visitors)
    assert (admission.num_running, admission.num_waiting, admission.num_in_flight) == (0, 0, 0)


async def test_a_full_line_refuses_and_says_when_to_come_back() -> None:
    clock = Clock()
    admission, log = _admission(running=1, waiting=1, clock=clock), []
    first = Visitor(admission, log, "first")
    await _settle()
    second = Visitor(admission, log, "second")
    await _settle()
    with pytest.raises(QueueFullError) as caught:
        async with admission.slots(tenant="t", lane="standard"):
            pass
    assert caught.value.retry_after_s is not None
    assert 1 <= caught.value.retry_after_s <= 60
    assert admission.num_in_flight == 2
    clock.now_s = 100.0
    first.leave.set()
    await _settle()
    assert log == ["first", "second"]
    assert admission.retry_after_s() > 1, "slots that are held for long mean a longer wait"
    await _end(first, second)


async def test_a_vip_takes_the_place_of_the_last_of_a_worse_lane() -> None:
    admission, log = _admission(running=1, waiting=2), []
    visitors = [Visitor(admission, log, "holder")]
    await _settle()
    visitors += [Visitor(admission, log, "b1", "batch"), Visitor(admission, log, "b2", "batch")]
    await _settle()
    visitors.append(Visitor(admission, log, "vip", "vip"))
    await _settle()
    assert isinstance(visitors[2].task.exception(), QueueFullError)
    visitors[0].leave.set()
    await _settle()
    assert log == ["holder", "vip"]
    await _end(*visitors)


async def test_a_tenant_has_its_own_limit() -> None:
    admission, log = _admission(running=4, tenant=2), []
    visitors = [Visitor(admission, log, "a", tenant="x"), Visitor(admission, log, "b", tenant="x")]
    await _settle()
    with pytest.raises(RateLimitedError):
        async with admission.slots(tenant="x", lane="vip"):
            pass
    async with admission.slots(tenant="y", lane="batch"):
        assert admission.num_in_flight == 3
    await _end(*visitors)
    async with admission.slots(tenant="x", lane="vip"):
        pass


async def test_many_slots_wait_for_room_and_are_not_starved() -> None:
    admission, log = _admission(running=4), []
    small = [Visitor(admission, log, f"small{index}") for index in range(3)]
    await _settle()
    big = Visitor(admission, log, "big", slots=4)
    await _settle()
    late = Visitor(admission, log, "late")
    await _settle()
    assert log == ["small0", "small1", "small2"], "who came after the big one must not pass it"
    for visitor in small:
        visitor.leave.set()
    await _settle()
    assert log[3:] == ["big"]
    big.leave.set()
    await _settle()
    assert log[4:] == ["late"]
    await _end(*small, big, late)


async def test_random_visits_keep_the_books() -> None:
    rng = random.Random(1)
    admission, log = _admission(running=5, waiting=6, tenant=7), []
    visitors: list[Visitor] = []
    everyone: list[Visitor] = []
    for step in range(600):
        if rng.random() < 0.6 or not visitors:
            lane = rng.choice(LANES)
            visitors.append(
                Visitor(admission, log, str(step), lane, rng.randint(1, 7), f"t{rng.randint(0, 2)}")
            )
            everyone.append(visitors[-1])
        else:
            visitor = visitors.pop(rng.randrange(len(visitors)))
            if rng.random() < 0.5:
                visitor.leave.set()
            else:
                visitor.task.cancel()
        if rng.random() < 0.5:
            await _settle()
            assert 0 <= admission.num_running <= 5
            assert admission.num_waiting <= 6
    await _end(*everyone)
    assert (admission.num_running, admission.num_waiting, admission.num_in_flight) == (0, 0, 0)
