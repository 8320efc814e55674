"""KV blocks that leave two ranks and come back: equal answers, and faults of the second rank's memories.

Ranks are processes over gloo, but where random traffic needs many steps.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rank_with_faults
import swap_traffic
from core_processes import tiny_model_folder
from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.errors import ConfigError, ModelLoadError, RanksLostError
from longshore_server.native.offload.memory import HostMemory
from longshore_server.native.offload.spec import parse_kv_swap
from longshore_server.native.offload.tiers import open_tiers
from longshore_server.native.ranks import group
from longshore_server.native.ranks import start as rank_start
from rank_threads import use_rank_threads
from swap_traffic import MAX_LEN, SwapTraffic

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
FEW_BLOCKS = {"num_kv_blocks": 40, "max_model_len": 120, "max_num_batched_tokens": 32}
TIERS = {"host": ("host:2MiB",), "file": ("file:{}:2MiB",), "both": ("host:24KiB", "file:{}:2MiB")}

MakeEngine = Callable[..., NativeEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeEngine]:
    """Engines over one model of random weights; each is closed at the end."""
    folder = tiny_model_folder(tmp_path / "tiny")
    made: list[NativeEngine] = []

    def make(**settings: Any) -> NativeEngine:
        values: dict[str, Any] = {"load_format": "random", "block_size": 4, "max_num_seqs": 8, "seed": 3}
        made.append(NativeEngine(EngineConfig(model=str(folder), **(values | settings))))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def _swapping(make: MakeEngine, tmp_path: Path, tiers: tuple[str, ...], **settings: Any) -> NativeEngine:
    """Two ranks with few blocks that keep whatever is preempted, however fast computing is."""
    kv_swap = tuple(tier.format(tmp_path / "kv") for tier in tiers)
    engine = make(kv_swap=kv_swap, **({"tensor_parallel_size": 2} | FEW_BLOCKS | settings))
    assert engine._offload is not None
    for name in ("is_swap_faster", "is_load_faster"):
        setattr(engine._offload.speeds, name, lambda *_: True)
    return engine


def _prompts(count: int) -> list[list[int]]:
    chosen = random.Random(5)
    return [[chosen.randrange(3, 1000) for _ in range(chosen.randrange(20, 70))] for _ in range(count)]


def _push_out(engine: NativeEngine, prompts: list[list[int]]) -> list[list[int]]:
    """Answers to all; each few prompts are more urgent than those before, which they push out."""
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    waiting = list(enumerate(prompts))
    num_steps = 0
    while waiting or engine.has_unfinished():
        for index, prompt in waiting[:2] if num_steps % 9 == 0 else ():
            engine.add_request(str(index), prompt, GREEDY, priority=-index)
            waiting.pop(0)
        for output in engine.step():
            assert output.error is None and output.token_id is not None
            answers[output.request_id].append(output.token_id)
        num_steps += 1
    engine.check_integrity()
    return list(answers.values())


# --- answers ---


@pytest.mark.slow
@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS.keys())
def test_answers_of_ranks_that_swap_are_those_of_one_that_does_not(
    tiers: tuple[str, ...], make: MakeEngine, tmp_path: Path
) -> None:
    prompts = _prompts(10)
    calm = make().generate(prompts, GREEDY)
    engine = _swapping(make, tmp_path, tiers)
    assert "swap" in engine.capabilities
    assert _push_out(engine, prompts) == calm
    assert engine.generate(prompts[1:], GREEDY) == calm[1:]  # leaves nothing of the first one on the devices
    first = engine.stats()
    assert first.preemptions and first.num_swaps_chosen and first.num_blocks_swapped_in
    engine.add_request("again", prompts[0], GREEDY)
    outputs = [output for _ in range(NUM_TOKENS) for output in engine.step()]
    assert [output.token_id for output in outputs] == calm[0]
    assert outputs[-1].num_cached_tokens == (len(prompts[0]) - 1) // 4 * 4
    stats = engine.stats()
    assert stats.num_blocks_swapped_in > first.num_blocks_swapped_in
    assert (stats.num_swap_faults, stats.num_failed, stats.kv_usage) == (0, 0, 0.0)
    engine.check_integrity()


@pytest.mark.slow
def test_where_one_rank_has_all_of_the_kv_it_alone_moves_blocks(make: MakeEngine, tmp_path: Path) -> None:
    prompts = _prompts(10)
    calm = make().generate(prompts, GREEDY)
    placement = {"placement": "attention_feed_forward", "tensor_parallel_size": 1}
    engine = _swapping(make, tmp_path, TIERS["both"], **placement)
    assert _push_out(engine, prompts) == calm
    stats = engine.stats()
    assert stats.preemptions and stats.num_blocks_swapped_in and not stats.num_swap_faults


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_random_traffic_over_small_tiers_leaves_the_books_clean(
    has_prefix_cache: bool, make: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adds, aborts, preemptions and holds; every answer that ends by itself is the undisturbed one."""
    use_rank_threads(monkeypatch)
    traffic = SwapTraffic(random.Random(has_prefix_cache))
    calm = make(max_model_len=MAX_LEN).generate(traffic.prompts, traffic.params)
    tiers = ("host:16KiB", "file:{}:24KiB")
    settings = swap_traffic.FEW_BLOCKS | {"enable_prefix_cache": has_prefix_cache}
    traffic.run(_swapping(make, tmp_path, tiers, **settings), calm, num_steps=200, num_added=lambda: 1)


def test_page_bounds_come_back_on_each_rank(
    make: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_rank_threads(monkeypatch)
    settings = {"attention_sparsity": "sink=4 window=8 top_pages=3 dense_layers=none dense_below=0"}
    prompts = _prompts(8)
    calm = make(**settings, tensor_parallel_size=2, enable_prefix_cache=False).generate(prompts, GREEDY)
    engine = _swapping(make, tmp_path, TIERS["both"], **settings, enable_prefix_cache=False)
    assert engine.generate(prompts, GREEDY) == calm
    assert engine.stats().num_blocks_swapped_in > 0
    engine.check_integrity()


# --- sizes and names ---


class _LastOfThree:
    rank, num_ranks = 2, 3

    def smallest(self, value: int) -> int:
        return min(value, 5)


def test_a_tier_is_shared_out_evenly_and_has_as_many_places_on_each_rank(tmp_path: Path) -> None:
    tiers = parse_kv_swap(["host:4KiB", f"file:{tmp_path}:9KiB"])
    links: Any = _LastOfThree()
    host, file = open_tiers(tiers, 300, pinned=False, links=links)
    assert (host.num_places, file.num_places) == (4096 // 3 // 300, 5)
    host, file = open_tiers(tiers, 300, pinned=False)
    assert (host.num_places, file.num_places) == (4096 // 300, 9 * 1024 // 300)
    file.close()


def test_ranks_together_may_not_ask_for_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    links: Any = _LastOfThree()
    monkeypatch.setattr("longshore_server.native.offload.memory.os.sysconf", lambda _: 1000)
    assert isinstance(
        open_tiers(parse_kv_swap(["host:976KiB"]), 300, pinned=False, links=links)[0], HostMemory
    )
    with pytest.raises(ConfigError, match="exceed this machine's 1000000"):
        open_tiers(parse_kv_swap(["host:977KiB"]), 300, pinned=False, links=links)


@pytest.mark.slow
def test_each_rank_has_a_file_of_its_own_and_takes_nobody_elses(make: MakeEngine, tmp_path: Path) -> None:
    old = tmp_path / "kv.rank1"
    old.write_text("keep me")
    with pytest.raises(
        ModelLoadError, match=r"rank 1: kv_swap: cannot make the file .*kv\.rank1: File exists"
    ):
        _swapping(make, tmp_path, TIERS["file"])
    assert old.read_text() == "keep me" and not (tmp_path / "kv").exists()


# --- faults of the second rank ---


def _start_with(fault: str) -> rank_start.StartRank:
    def start(peer: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, rank_with_faults.__file__, fault, str(peer.fileno())]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[peer.fileno()])

    return start


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full at the start", "full later", "slow", "read errors", "short reads"])
def test_what_the_second_rank_cannot_move_is_computed_again(
    fault: str, make: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _prompts(10)
    calm = make().generate(prompts, GREEDY)
    monkeypatch.setattr(rank_start, "start_process", _start_with(fault))
    engine = _swapping(make, tmp_path, TIERS["file"])
    assert _push_out(engine, prompts) == calm
    assert engine.generate(prompts, GREEDY) == calm
    stats = engine.stats()
    assert stats.num_swaps_chosen and not stats.num_failed
    if fault == "full at the start":
        assert stats.num_blocks_in_swap == stats.num_blocks_swapped_out == 0
    else:
        assert stats.num_swap_faults and stats.num_blocks_swapped_out
    engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "tiers", "reason"),
    [
        ("no copy out", "host", "rank 1: RuntimeError: on purpose"),
        ("no copy in", "host", "rank 1: RuntimeError: on purpose"),
        ("stuck reads", "file", "did not say within 1 s what it could read"),
    ],
)
def test_what_the_first_rank_cannot_know_of_ends_the_ranks(
    fault: str, tiers: str, reason: str, make: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token may come of it."""
    prompts = _prompts(10)
    calm = make().generate(prompts, GREEDY)
    monkeypatch.setattr(rank_start, "start_process", _start_with(fault))
    monkeypatch.setattr(group, "FETCH_TIMEOUT_S", 1.0)
    engine = _swapping(make, tmp_path, TIERS[tiers])
    answers: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, GREEDY)
    with pytest.raises(RanksLostError, match=reason):
        while engine.has_unfinished():
            for output in engine.step():
                assert output.token_id is not None
                answers[int(output.request_id)].append(output.token_id)
    assert answers == [whole[: len(part)] for whole, part in zip(calm, answers, strict=True)]
