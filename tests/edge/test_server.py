"""Settings, start and stop: precedence, one clear line for what is wrong, draining, a killed worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.harness import (
    CoreProcess,
    ask,
    chat,
    edge_toml,
    eventually,
    session_to,
    start_edge,
    stream,
    text_of,
)
from longshore.errors import ConfigError
from longshore.wire import decode
from longshore_edge.config import EdgeConfig, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "edge.toml"
KEY = {"LONGSHORE_API_KEY": "k"}
CORE = {"cores": [{"name": "c", "url": "http://127.0.0.1:1", "api_key": "x"}]}


def run_edge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LONGSHORE_")}
    return subprocess.run(
        [sys.executable, "-m", "longshore.cli", "edge", *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(edge_toml([], "num_candidates = 2\nmax_tries = 5\nworkers = 3"))
    environment = KEY | {
        "LONGSHORE_EDGE_MAX_TRIES": "6",
        "LONGSHORE_EDGE_WORKERS": "4",
        "LONGSHORE_EDGE_NODE": "n",
        "LONGSHORE_EDGE_OPEN_METRICS": "false",
        "LONGSHORE_EDGE_CACHE_TTL_S": "7.5",
        "LONGSHORE_EDGE_TRUSTED_PROXIES": '["10.0.0.0/8"]',
    }
    config = load_config(path, environment=environment, flags=CORE | {"workers": 5, "host": None})
    assert (config.num_candidates, config.max_tries, config.workers, config.node) == (2, 6, 5, "n")
    assert (config.open_metrics, config.cache_ttl_s, config.trusted_proxies) == (False, 7.5, ("10.0.0.0/8",))
    assert [key.tenant for key in config.keys] == ["acme", "default"]


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"prot": 1}, KEY, "prot: is not a known parameter"),
        ({"port": 70000}, KEY, "port: must be at most 65535"),
        ({"policy": "random"}, KEY, "policy: must be one of"),
        ({}, {}, "no client could ask"),
        ({"cores": []}, KEY, "nothing to answer"),
        ({"cores": [{"name": "c", "url": "http://x"}]}, KEY, "core c needs an api_key"),
        ({"cores": [{"name": "c", "url": "ftp://x", "api_key": "k"}]}, KEY, r"cores\[0\]\.url"),
        ({"cores": CORE["cores"] * 2}, KEY, "c stands twice"),
        ({"trusted_proxies": ["10.0.0.0/99"]}, KEY, "trusted_proxies"),
        ({"signing_key": "short"}, KEY, "32 bytes"),
        ({"signing_key_file": "/nowhere/key"}, KEY, "signing_key_file: /nowhere/key can't be read"),
        ({"keys": 5}, KEY, "keys must be a list"),
        ({}, KEY | {"LONGSHORE_EDGE_PROT": "1"}, "LONGSHORE_EDGE_PROT is not a setting"),
        ({}, KEY | {"LONGSHORE_EDGE_PORT": "many"}, "LONGSHORE_EDGE_PORT='many'"),
    ],
)
def test_wrong_settings_are_named(flags: Any, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(environment=environment, flags=CORE | flags)
    assert "\n" not in caught.value.message


@given(
    st.dictionaries(
        st.sampled_from(sorted(EdgeConfig.__dataclass_fields__)), st.none() | st.integers() | st.text()
    )
)
def test_any_settings_are_taken_or_refused_with_a_config_error(flags: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        load_config(environment=KEY, flags=flags)


def test_the_example_is_a_valid_configuration() -> None:
    values = tomllib.loads(EXAMPLE.read_text())
    assert decode(EdgeConfig, values).cores


def test_print_config_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(edge_toml([]))
    done = run_edge(
        "--config", str(tmp_path / "edge.toml"), "--core", "a=http://h:1", "--core", "http://h:2",
        "--port", "1", "--print-config", LONGSHORE_API_KEY="my-secret",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [(core["name"], core["url"]) for core in shown["cores"]] == [
        ("a", "http://h:1"),
        ("core-2", "http://h:2"),
    ]
    assert shown["signing_key"] == "***" and "my-secret" not in done.stdout
    assert all(key["key_sha256"] == "***" for key in shown["keys"])


def test_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            "port = [": "is not TOML",
            edge_toml([], "prot = 1"): "prot: is not a known parameter",
            edge_toml([], 'geo_db = "/nowhere.mmdb"', '[[cores]]\nname="c"\nurl="http://x"'): "/nowhere.mmdb",
            edge_toml([], 'student_bundle = "/nowhere"'): "student_bundle: there is no bundle at /nowhere",
            edge_toml(
                [], "", '[[cores]]\nname="c"\nurl="http://x"\n[[bundles]]\npath="/nowhere"'
            ): "bundles: /nowhere",
            edge_toml([], "", '[[cores]]\nname="c"\nurl="http://x"').replace(
                "port = 0", f"port = {port}"
            ): str(port),
        }
        for text, words in cases.items():
            path.write_text(text)
            done = run_edge("--config", str(path))
            assert done.returncode == 2, (words, done)
            assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert run_edge("--config", str(tmp_path / "none.toml")).returncode == 2


async def test_sigterm_lets_running_answers_end(core: CoreProcess, tmp_path: Path) -> None:
    await core.set()
    with start_edge(tmp_path, edge_toml([core])) as edge:
        async with session_to(edge) as session:
            running = asyncio.create_task(stream(session, chat(orders={"tokens": 20, "gap_s": 0.05})))
            await asyncio.sleep(0.3)
            os.kill(edge.pid, signal.SIGTERM)
            events = await running
        assert events[-1].is_done
        assert text_of(events) == "".join(f"w{offset} " for offset in range(20))
        await asyncio.to_thread(psutil.Process(edge.pid).wait, 5)
        assert edge._process is not None and edge._process.poll() == 0


async def test_sigterm_does_not_wait_for_ever(core: CoreProcess, tmp_path: Path) -> None:
    await core.set()
    with start_edge(tmp_path, edge_toml([core], "drain_s = 1")) as edge:
        async with session_to(edge) as session:
            running = asyncio.create_task(stream(session, chat(orders={"stall_after": 1})))
            await asyncio.sleep(0.3)
            os.kill(edge.pid, signal.SIGTERM)
            await asyncio.to_thread(psutil.Process(edge.pid).wait, 5)
            assert edge._process is not None and edge._process.poll() == 0
            with pytest.raises(Exception):  # noqa: B017  cut off, and so no end of the answer
                await running


async def test_a_killed_worker_is_replaced(core: CoreProcess, tmp_path: Path) -> None:
    await core.set()
    with start_edge(tmp_path, edge_toml([core])) as edge:
        (worker,) = [
            child
            for child in psutil.Process(edge.pid).children()
            if "resource_tracker" not in " ".join(child.cmdline())
        ]
        worker.kill()

        async def answers() -> bool:
            try:
                async with session_to(edge) as session:
                    return (await ask(session, chat()))[0] == 200
            except OSError:
                return False

        await eventually(answers, within_s=10)
