"""KV blocks away and back: tiers against a model of themselves, faults, and answers that do not notice."""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longshore_server.native import SamplingParams
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError
from longshore_server.native.offload import file_memory
from longshore_server.native.offload.file_memory import FileMemory
from longshore_server.native.offload.kv_offload import KVOffload
from longshore_server.native.offload.memory import HostMemory, TierFault, pinned_slabs
from longshore_server.native.offload.spec import TierSpec, parse_kv_swap
from longshore_server.native.offload.speeds import Speeds
from longshore_server.native.offload.store import TieredStore
from longshore_server.native.offload.units import read_units, unit_bytes, write_units
from swap_traffic import FEW_BLOCKS, MAX_LEN, SwapTraffic

UNIT = 32
HOST, FILE = 3, 4


def _unit(number: int) -> torch.Tensor:
    return torch.full((UNIT,), number % 251, dtype=torch.uint8)


# --- the setting ---


@pytest.mark.parametrize(
    "entries",
    [
        "host:1GiB", ["host"], ["host:1GB"], ["host:0MiB"], ["host:-1MiB"], ["disk:/x:1GiB"], ["file::1GiB"],
        ["host:1MiB", "host:1MiB"], ["file:/x:1MiB", "host:1MiB"], ["file:/x:1MiB", "file:/x:2MiB"],
        ["host:99999999TiB"], ["file:/x\n:1MiB"], [3], ["host:1MiB"] * 9, ["host:" + "9" * 5000 + "GiB"],
    ],
)  # fmt: skip
def test_a_wrong_tier_is_named_in_one_line(entries) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", kv_swap=entries)
    assert caught.value.field == "kv_swap"
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 250


def test_tiers_are_read() -> None:
    assert parse_kv_swap(["host:32GiB", "file:/mnt/a:b/kv:256MiB"]) == (
        TierSpec(None, 32 << 30),
        TierSpec("/mnt/a:b/kv", 256 << 20),
    )


@pytest.mark.parametrize(
    "tier", ["host:1KiB", "host:4096TiB", "file:/no/such/folder/kv:1MiB", "file:{old}:1MiB"]
)
def test_a_tier_that_cannot_be_had_stops_the_start(tier, tmp_path, make_engine) -> None:
    old = tmp_path / "precious"
    old.write_text("keep me")
    with pytest.raises(ConfigError, match="kv_swap"):
        make_engine("llama", kv_swap=(tier.format(old=old),), block_size=64)
    assert old.read_text() == "keep me"


@given(st.integers(1, 1 << 44), st.integers(1, 1 << 24))
def test_pinned_memory_takes_what_was_asked_for_and_no_more(num_bytes, unit_bytes) -> None:
    slabs = pinned_slabs(num_bytes, unit_bytes)
    taken = sum(1 << (places * unit_bytes - 1).bit_length() for places in slabs)  # as torch rounds it up
    assert taken <= num_bytes and all(slabs)
    assert num_bytes < (sum(slabs) + len(slabs) + 2) * unit_bytes


def test_pinned_memory_in_pieces_has_a_place_for_each_unit(monkeypatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **kind: empty(*shape, **kind))
    memory = HostMemory(1000, 48, pinned=True)
    assert len(memory._slabs) > 2 and memory.num_places > 1000 // 48 - len(memory._slabs) - 2
    units = [torch.full((48,), place, dtype=torch.uint8) for place in range(memory.num_places)]
    for place, unit in enumerate(units):
        memory.write(place, unit)
    assert all(torch.equal(memory.read(place), unit) for place, unit in enumerate(units))


# --- the store ---


class StoreMachine(RuleBasedStateMachine):
    """Against a dict: what is here is what was put; what is gone went in the order of last use."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ.get("TMPDIR", "/tmp"))
        self.file = FileMemory(str(self.folder), FILE * UNIT, UNIT)
        self.store = TieredStore([HostMemory(HOST * UNIT, UNIT, pinned=False), self.file])
        self.content: dict[bytes, int] = {}
        self.pins: list[bytes] = []
        self.order: list[bytes] = []  # of use, oldest first
        self.count = 0

    @rule()
    def put(self) -> None:
        self.count += 1
        key = str(self.count).encode()
        before = len(self.store)
        is_stored = self.store.put(key, _unit(self.count))
        assert is_stored or len(set(self.pins)) >= HOST + FILE - 1 or before >= HOST
        if is_stored:
            self.content[key] = self.count
        for gone in [k for k in self.content if k not in self.store]:
            assert gone not in self.pins, "a pinned unit went"
            del self.content[gone]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def get(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.content)))
        unit = self.store.get(key)
        assert unit is not None and torch.equal(unit, _unit(self.content[key]))

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def discard(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.content)))
        if key not in self.pins:
            self.store.discard(key)
            del self.content[key]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def pin(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.content)))
        self.store.pin(key)
        self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        self.store.unpin(self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))))

    @invariant()
    def books_are_in_order(self) -> None:
        self.store.check_integrity()
        assert len(self.store) == len(self.content) <= HOST + FILE
        assert all(key in self.store for key in self.content)

    def teardown(self) -> None:
        self.store.close()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_the_oldest_go_down_and_at_last_out(tmp_path) -> None:
    file = FileMemory(str(tmp_path / "kv"), 2 * UNIT, UNIT)
    store = TieredStore([HostMemory(2 * UNIT, UNIT, pinned=False), file])
    for number in range(3):
        assert store.put(bytes([number]), _unit(number))
    assert store.counts() == [2, 1] and torch.equal(store.get(b"\x00"), _unit(0))
    store.touch(b"\x01")
    assert store.put(b"\x03", _unit(3)) and store.put(b"\x04", _unit(4))
    assert store.counts() == [2, 2] and store.num_dropped == 1
    assert b"\x00" not in store and b"\x01" in store
    file.flush()
    assert torch.equal(store.get(b"\x01"), _unit(1))
    assert not any(tmp_path.iterdir()), "the file has no name while it is in use"
    store.close()


# --- faults ---


def test_a_disk_that_is_full_at_the_start_leaves_the_tier_out(tmp_path, monkeypatch, caplog) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_memory.os, "posix_fallocate", full)
    store = TieredStore([FileMemory(str(tmp_path), 8 * UNIT, UNIT)])
    assert not store.put(b"a", _unit(1)) and store.num_dropped == 1
    assert "No space left on device" in caplog.text
    store.check_integrity()
    store.close()


def test_a_disk_that_fills_up_costs_units_and_one_warning(tmp_path, monkeypatch, caplog) -> None:
    memory = FileMemory(str(tmp_path), 8 * UNIT, UNIT)
    store = TieredStore([memory])
    store.put(b"good", _unit(1))
    memory.flush()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_memory.os, "pwrite", full)
        store.put(b"lost", _unit(2))
        memory.flush()
    assert not store.put(b"late", _unit(3))
    assert store.get(b"lost") is None and b"lost" not in store
    assert torch.equal(store.get(b"good"), _unit(1))
    assert caplog.text.count("takes no more blocks") == 1
    store.check_integrity()
    store.close()


def test_what_a_disk_garbles_is_not_given_back(tmp_path) -> None:
    memory = FileMemory(str(tmp_path), 8 * UNIT, UNIT)
    memory.write(3, _unit(7))
    memory.flush()
    os.pwrite(memory._shared.descriptor, b"\xff", 3 * UNIT + 5)
    with pytest.raises(TierFault, match="something else"):
        memory.read(3)
    with pytest.raises(TierFault, match="never written"):
        memory.read(4)
    memory.close()


def test_a_slow_disk_takes_no_more_than_its_queue(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_memory, "MAX_WRITES_QUEUED", 2)
    memory = FileMemory(str(tmp_path), 8 * UNIT, UNIT)
    store = TieredStore([memory])
    with memory._shared._lock:  # the writer cannot finish a unit meanwhile
        jobs = memory._shared.jobs
        jobs.put((0, bytes(UNIT), 0))
        for _ in range(6000):
            if jobs.empty():
                break
            time.sleep(0.01)
        for _ in range(2):
            jobs.put_nowait((0, bytes(UNIT), 0))
        assert not store.put(b"a", _unit(1)) and store.num_faults == 1
    store.check_integrity()
    store.close()


# --- units, speeds ---


def test_units_hold_a_block_of_all_layers_to_the_bit() -> None:
    geometries = [LayerGeometry(2, 8, 8), LayerGeometry(1, 16, 4), LayerGeometry(2, 8, 8)]
    cache = PagedKVCache(geometries, 6, 4, torch.bfloat16, torch.device("cpu"))
    for store in (*cache.keys, *cache.values):
        store.normal_()
    before = [(cache.keys[layer][1:3].clone(), cache.values[layer][1:3].clone()) for layer in range(3)]
    units = read_units(cache, [1, 2])
    assert units.shape == (2, unit_bytes(cache)) and units.dtype == torch.uint8
    cache.clear_blocks([1, 2])
    write_units(cache, [4, 0], units)
    for layer, (keys, values) in enumerate(before):
        assert torch.equal(cache.keys[layer][[4, 0]], keys) and torch.equal(
            cache.values[layer][[4, 0]], values
        )


def test_the_faster_way_is_chosen_once_both_are_known() -> None:
    speeds = Speeds()
    assert speeds.is_swap_faster(1, 1) and speeds.is_load_faster(1, 1)
    speeds.save_unit.note(10, 1.0)
    speeds.load_unit.note(10, 1.0)
    speeds.compute_token.note(100, 1.0)  # 10 ms a token; 100 ms a unit each way
    assert speeds.is_load_faster(1, 16) and not speeds.is_load_faster(2, 16)
    assert not speeds.is_swap_faster(1, 16) and speeds.is_swap_faster(1, 21)


# --- in the engine ---


def _prompts(count: int, low: int = 20, high: int = 70) -> list[list[int]]:
    chosen = random.Random(5)
    return [[chosen.randrange(3, 300) for _ in range(chosen.randrange(low, high))] for _ in range(count)]


def _always(engine, *, swap: bool) -> None:
    """Takes the choice from the clock, so that both ways are tested on any machine."""
    for name in ("is_swap_faster", "is_load_faster"):
        setattr(engine._offload.speeds, name, lambda *_: swap)


STARVED = {"num_kv_blocks": 40, "max_model_len": 120, "max_num_batched_tokens": 32}


@pytest.mark.parametrize(
    ("family", "tiers", "has_prefix_cache"),
    [
        ("llama", ("host:1MiB",), True),
        ("llama", ("file:{}:1MiB",), False),
        ("qwen3-mixed", ("host:16KiB", "file:{}:1MiB"), True),
    ],
    ids=["host", "file", "both"],
)
def test_answers_with_swaps_equal_the_undisturbed_ones(
    family, tiers, has_prefix_cache, make_engine, tmp_path
) -> None:
    prompts = _prompts(10)
    params = [
        SamplingParams(max_tokens=32, temperature=0.0 if index % 2 else 1.0, seed=index, ignore_eos=True)
        for index in range(10)
    ]
    calm = make_engine(family, enable_prefix_cache=False).generate(prompts, params)
    engine = make_engine(
        family,
        kv_swap=tuple(tier.format(tmp_path) for tier in tiers),
        enable_prefix_cache=has_prefix_cache,
        **STARVED,
    )
    _always(engine, swap=True)
    assert "swap" in engine.capabilities
    assert engine.generate(prompts, params) == calm
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.num_swaps_chosen > 0 and stats.num_blocks_swapped_in > 0
    assert stats.num_recomputes_chosen == 0
    assert has_prefix_cache or stats.num_blocks_in_swap == 0, "of use to nobody any more"
    engine.check_integrity()


def test_swapped_tokens_are_not_computed_again(make_engine, greedy) -> None:
    engine = make_engine("llama", kv_swap=("host:8MiB",), enable_prefix_cache=False)
    _always(engine, swap=True)
    engine.add_request("r", _prompts(1, 60, 61)[0], greedy(20, ignore_eos=True))
    for _ in range(5):
        engine.step()
    before = engine.stats().num_prefill_tokens
    assert engine.preempt("r") and not engine.preempt("r") and not engine.preempt("never")
    while engine.has_unfinished():
        engine.step()
    assert engine.stats().num_prefill_tokens == before
    assert engine.stats().num_blocks_swapped_in == 16  # 64 tokens in blocks of 4, the last one part full


def test_where_computing_is_faster_nothing_is_kept(make_engine, greedy) -> None:
    engine = make_engine("llama", kv_swap=("host:8MiB",), **STARVED, enable_prefix_cache=False)
    _always(engine, swap=False)
    prompts = _prompts(10)
    answers = make_engine("llama").generate(prompts, greedy(32, ignore_eos=True))
    assert engine.generate(prompts, greedy(32, ignore_eos=True)) == answers
    stats = engine.stats()
    assert stats.num_recomputes_chosen > 0 and stats.num_swaps_chosen == 0
    assert stats.num_blocks_swapped_out == stats.num_blocks_swapped_in == 0


def test_cold_prefixes_come_back_for_their_tenant_alone(make_engine, greedy) -> None:
    engine = make_engine("llama", kv_swap=("host:8MiB",), num_kv_blocks=40, max_model_len=120)
    _always(engine, swap=True)
    prompt, *others = _prompts(8, 60, 70)

    def ask(tenant: str) -> tuple[int, int]:
        engine.add_request("r", prompt, greedy(2, ignore_eos=True), tenant=tenant)
        outputs = [output for _ in range(4) if engine.has_unfinished() for output in engine.step()]
        return outputs[-1].num_cached_tokens, outputs[0].token_id

    cold, first = ask("a")
    engine.generate(others, greedy(2, ignore_eos=True))  # drives the prompt's blocks out
    assert cold == 0 and engine.stats().num_blocks_swapped_out > 0
    assert ask("b") == (0, first)
    engine.generate(others[::-1], greedy(2, ignore_eos=True))
    assert ask("a") == ((len(prompt) - 1) // 4 * 4, first)
    assert engine.stats().num_blocks_swapped_in > 0
    engine.check_integrity()


@pytest.mark.parametrize("fault", ["read", "garble", "copy out", "copy in"])
def test_faults_cost_work_and_never_an_answer(fault, make_engine, greedy, tmp_path, monkeypatch) -> None:
    prompts, params = _prompts(8), greedy(24, ignore_eos=True)
    calm = make_engine("llama").generate(prompts, params)
    engine = make_engine("llama", kv_swap=(f"file:{tmp_path}:1MiB",), **STARVED)
    _always(engine, swap=True)
    chosen = random.Random(fault)

    def fail(real, error):
        def call(*arguments):
            if chosen.random() < 0.5:
                raise error
            return real(*arguments)

        return call

    module = "longshore_server.native.offload.copies"
    if fault == "read":
        error = OSError(errno.EIO, "Input/output error")
        monkeypatch.setattr(file_memory.os, "pread", fail(os.pread, error))
        monkeypatch.setattr(file_memory._Shared, "accept", _accept_unqueued)
    elif fault == "garble":
        monkeypatch.setattr(file_memory._Shared, "accept", _accept_unqueued)
        monkeypatch.setattr(file_memory.zlib, "crc32", lambda _: chosen.random())
    elif fault == "copy out":
        monkeypatch.setattr(f"{module}.read_units", fail(read_units, RuntimeError("no memory")))
    else:
        monkeypatch.setattr(f"{module}.write_units", fail(write_units, RuntimeError("no memory")))
    assert engine.generate(prompts, params) == calm
    assert engine.stats().num_swap_faults > 0 and engine.stats().num_failed == 0
    engine.check_integrity()


def _accept_unqueued(shared, place: int, payload: bytes) -> None:
    """As `accept`, but what is on its way to the disk is read from the disk, too."""
    os.pwrite(shared.descriptor, payload, place * len(payload))
    with shared._lock:
        shared._checksums[place] = file_memory.zlib.crc32(payload)


def test_what_is_swapped_out_waits_until_it_is_swapped_in(make_engine, greedy) -> None:
    engine = make_engine("llama", kv_swap=("host:8MiB",))
    _always(engine, swap=True)
    prompts, params = _prompts(2), greedy(12, ignore_eos=True)
    calm = make_engine("llama").generate(prompts, params)
    for name, prompt in zip("ab", prompts, strict=True):
        engine.add_request(name, prompt, params)
    tokens: dict[str, list[int]] = {"a": [], "b": []}

    def run(count: int) -> None:
        for _ in range(count):
            for output in engine.step():
                tokens[output.request_id].append(output.token_id)

    run(3)
    assert engine.swap_out("a") and not engine.swap_out("a") and not engine.swap_in("b")
    held = len(tokens["a"])
    run(20)
    assert tokens["b"] == calm[1] and len(tokens["a"]) == held
    assert not engine.has_unfinished() and engine.stats().num_held == 1
    engine.check_integrity()
    assert engine.swap_in("a") and not engine.swap_in("a")
    run(20)
    assert tokens["a"] == calm[0]
    engine.add_request("c", prompts[0], params)
    assert engine.swap_out("c") and engine.abort("c")
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert engine.stats().num_held == 0 and engine.stats().kv_usage == 0.0


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_random_traffic_over_small_tiers_leaves_the_books_clean(
    has_prefix_cache, make_engine, tmp_path
) -> None:
    """Adds, aborts, preemptions and holds; every answer that ends by itself is the undisturbed one."""
    chosen = random.Random(has_prefix_cache)
    traffic = SwapTraffic(chosen)
    calm = make_engine("qwen2", max_model_len=MAX_LEN).generate(traffic.prompts, traffic.params)
    engine = make_engine(
        "qwen2",
        enable_prefix_cache=has_prefix_cache,
        kv_swap=("host:24KiB", f"file:{tmp_path}:32KiB"),
        **FEW_BLOCKS,
    )
    _always(engine, swap=True)
    traffic.run(engine, calm, num_steps=260, num_added=lambda: chosen.randrange(3))


def test_the_page_bounds_of_swapped_blocks_come_back(make_engine, greedy) -> None:
    settings_of = {"attention_sparsity": "sink=4 window=8 top_pages=3 dense_layers=none dense_below=0"}
    prompts, params = _prompts(8), greedy(24, ignore_eos=True)
    calm = make_engine("llama", **settings_of, enable_prefix_cache=False).generate(prompts, params)
    engine = make_engine("llama", **settings_of, **STARVED, kv_swap=("host:8MiB",), enable_prefix_cache=False)
    _always(engine, swap=True)
    assert engine.generate(prompts, params) == calm
    assert engine.stats().num_blocks_swapped_in > 0


def test_offload_refuses_to_plan_what_was_not_fetched() -> None:
    cache = PagedKVCache([LayerGeometry(1, 8, 8)], 4, 4, torch.float32, torch.device("cpu"))
    offload = KVOffload(cache, [HostMemory(4 * unit_bytes(cache), unit_bytes(cache), pinned=False)])
    with pytest.raises(KeyError):
        offload.load(b"unknown", 1)
    assert offload.fetch([b"unknown"]) == 0 and offload.execute() == []
