"""What a rehearsal does around its steps; the steps are tested where Triton is."""

from __future__ import annotations

import threading

import pytest
import torch

from longshore_server.native.gpu import rehearsal
from longshore_server.native.gpu.rehearsal import STEP_TOKENS, Rehearsal

CPU = torch.device("cpu")


def test_it_raises_what_a_step_raises() -> None:
    def make_runner(model, num_tokens):
        raise ValueError(f"no {model} of {num_tokens}")

    with Rehearsal(CPU, make_runner) as begun:
        assert not begun.has_begun
        begun.begin("model")
        assert begun.has_begun
        with pytest.raises(ValueError, match=f"no model of {STEP_TOKENS[0]}"):
            begun.finish()


def test_it_ends_when_loading_fails_meanwhile() -> None:
    ended = threading.Event()

    def make_runner(model, num_tokens):
        ended.wait(0.2)
        ended.set()
        raise ValueError

    with pytest.raises(OSError, match="no more weights"), Rehearsal(CPU, make_runner) as begun:
        begun.begin("model")
        raise OSError("no more weights")
    assert ended.is_set()
    assert not [each for each in threading.enumerate() if each.name.startswith("rehearsal")]


def test_it_waits_no_longer_than_its_deadline(monkeypatch) -> None:
    monkeypatch.setattr(rehearsal, "TIMEOUT_S", 0.05)
    goes_on = threading.Event()
    with Rehearsal(CPU, lambda model, num_tokens: goes_on.wait(30) and None) as begun:
        begun.begin("model")
        with pytest.raises(TimeoutError):
            begun.finish()
        goes_on.set()
