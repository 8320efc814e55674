"""Bundles from a real edge process: downloaded, updated, and gone on with after the edge was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import FILES, snapshot, write_plain
from edge.harness import KEY, KEY_SHA256
from longshore.bundle import DownloadLimits, OperatorKey, TrustStore, install_from_edge, save_trust
from longshore.errors import AuthenticationError, LongshoreError
from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess

OPERATOR = PrivateKey.generate()
TRUST = TrustStore((OperatorKey("ops", OPERATOR.public_key.text),))
CHUNK_BYTES = 64 * 1024
NUM_CHUNKS = 256
MODEL = os.urandom(CHUNK_BYTES * NUM_CHUNKS)
LIMITS = DownloadLimits(time_limit_s=60, num_failures=1)


def offer(folder: Path, version: int, model: bytes = MODEL) -> Path:
    folder.mkdir(exist_ok=True)
    files = FILES | {"model.onnx": model}
    write_plain(folder, version=version, files=files, chunk_bytes=CHUNK_BYTES, sign_with=("ops", OPERATOR))
    return folder


class Edge:
    """An edge that serves one folder; its cores never answer, and it is asked for none of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: TierProcess | None = None

    @property
    def url(self) -> str:
        assert self._process is not None
        return f"{self._process.url}/bundles/plain"

    def start(self) -> None:
        config = self.folder / "edge.toml"
        config.write_text(
            'node = "edge-1"\nport = 0\n[[cores]]\nname = "none"\nurl = "http://127.0.0.1:9"\napi_key = "x"\n'
            f'[[keys]]\ntenant = "acme"\nkey_sha256 = "{KEY_SHA256}"\n'
            f'[[bundles]]\npath = "{self.folder}/offer"\n'
        )
        self._process = TierProcess(["edge", "--config", str(config)], start_timeout_s=60)
        self._process.start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    offer(tmp_path / "offer", 1)
    edge = Edge(tmp_path)
    edge.start()
    yield edge
    edge.kill()


def test_an_edge_killed_mid_download_and_back_again(edge: Edge, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def kill_midway(num_done_bytes: int, num_bytes: int) -> None:
        if num_done_bytes > num_bytes // 4:
            edge.kill()

    with pytest.raises(LongshoreError) as caught:
        install_from_edge(
            edge.url, store, trusted_keys=TRUST, api_key=KEY, limits=LIMITS, progress=kill_midway
        )
    assert caught.value.retryable and not (store / "plain" / "current").exists()
    edge.start()
    done = install_from_edge(edge.url, store, trusted_keys=TRUST, api_key=KEY, limits=LIMITS)
    assert snapshot(done.path) == snapshot(tmp_path / "offer")
    assert done.num_kept_bytes > len(MODEL) // 4, "what had come was not fetched again"
    assert done.num_fetched_bytes + done.num_kept_bytes == sum(map(len, FILES.values())) - 480 + len(MODEL)

    # The next version, of which one chunk is new, from the same edge after its restart.
    edge.kill()
    offer(
        tmp_path / "offer", 2, MODEL[: 7 * CHUNK_BYTES] + os.urandom(CHUNK_BYTES) + MODEL[8 * CHUNK_BYTES :]
    )
    edge.start()
    done = install_from_edge(edge.url, store, trusted_keys=TRUST, api_key=KEY, limits=LIMITS)
    assert done.num_fetched_bytes == CHUNK_BYTES and done.path.name == "2"
    assert snapshot(done.path) == snapshot(tmp_path / "offer")


def test_the_command_downloads_and_a_wrong_key_does_not(edge: Edge, tmp_path: Path) -> None:
    store, trust = tmp_path / "store", tmp_path / "trust.json"
    save_trust(trust, TRUST)
    with pytest.raises(AuthenticationError):
        install_from_edge(edge.url, store, trusted_keys=TRUST, api_key="wrong", limits=LIMITS)
    command = [sys.executable, "-m", "longshore.cli", "bundle", "install", edge.url]
    command += ["--store", str(store), "--trust", str(trust)]
    for expected in (f"downloaded {len(MODEL) + 10}", "downloaded 0"):
        ran = subprocess.run(
            command,
            env=os.environ | {"LONGSHORE_API_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0 and expected in ran.stdout, ran.stdout + ran.stderr
    assert snapshot(store / "plain" / "1") == snapshot(tmp_path / "offer")
