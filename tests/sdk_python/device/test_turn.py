"""The line before the session: order, bound, deadline and cancellation."""

from __future__ import annotations

import threading
import time

import pytest

from longshore.device.turn import Turnstile
from longshore.errors import CancelledError, DeadlineExceededError, QueueFullError

NEVER = threading.Event()
WAIT_S = 10.0


def until(condition: object) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_callers_pass_in_the_order_of_their_coming() -> None:
    turnstile, passed, threads = Turnstile(5), [], []
    turnstile.enter("holder", NEVER, None)

    def go(name: int) -> None:
        turnstile.enter(name, NEVER, time.monotonic() + WAIT_S)
        passed.append(name)
        turnstile.leave(name)

    for name in range(5):
        threads.append(threading.Thread(target=go, args=(name,)))
        threads[-1].start()
        until(lambda count=name + 1: turnstile.num_waiting == count)
    with pytest.raises(QueueFullError):
        turnstile.enter("one too many", NEVER, None)
    turnstile.leave("not the holder")
    assert turnstile.is_taken and passed == []
    turnstile.leave("holder")
    for thread in threads:
        thread.join(WAIT_S)
    assert passed == [0, 1, 2, 3, 4]
    assert not turnstile.is_taken and turnstile.num_waiting == 0


def test_a_deadline_ends_the_wait() -> None:
    turnstile = Turnstile(1)
    turnstile.enter("holder", NEVER, None)
    with pytest.raises(DeadlineExceededError):
        turnstile.enter("late", NEVER, time.monotonic() + 0.02)
    assert turnstile.num_waiting == 0
    turnstile.leave("holder")
    turnstile.enter("next", NEVER, None)


def test_a_cancel_ends_the_wait_and_no_one_else_is_held_up() -> None:
    turnstile, cancelled, errors = Turnstile(2), threading.Event(), []
    turnstile.enter("holder", NEVER, None)

    def wait() -> None:
        try:
            turnstile.enter("cancelled", cancelled, None)
        except CancelledError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: turnstile.num_waiting == 1)
    cancelled.set()
    turnstile.nudge()
    thread.join(WAIT_S)
    assert len(errors) == 1 and turnstile.num_waiting == 0


def test_no_line_at_all_is_allowed() -> None:
    turnstile = Turnstile(0)
    turnstile.enter("holder", NEVER, None)
    with pytest.raises(QueueFullError):
        turnstile.enter("next", NEVER, None)
