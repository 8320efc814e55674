"""Tiny model folders and real engine processes for the tests of the core; every wait has a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longshore_server.config import CoreConfig, to_json
from longshore_server.ipc import FrameDecoder, decode_engine_message, to_frame

TESTS = Path(__file__).parent
TOKENIZER = TESTS.parent / "examples" / "shop" / "tokenizer"
VOCAB_SIZE = 1024
START_TIMEOUT_S = 90.0
WAIT_S = 30.0

_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # wide enough for greedy answers to vary
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}


def tiny_model_folder(folder: Path, **changes: Any) -> Path:
    """A Llama of two layers without weights: for `load_format` random."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_TINY_LLAMA | changes))
    for path in TOKENIZER.glob("*.json"):
        shutil.copy(path, folder / path.name)
    return folder


def engine_config(model: Path, **changes: Any) -> CoreConfig:
    """Settings of a small, exactly reproducible engine."""
    values: dict[str, Any] = {
        "model": str(model),
        "load_format": "random",
        "batch_invariant": True,
        "fuse_layers": False,  # answers that last long enough to be broken into
        "num_threads": 1,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return CoreConfig(**(values | changes))


class EngineProcess:
    """An engine process, its status lines, and its private folder; may be started again after it died."""

    def __init__(self, config: CoreConfig, *, module: str = "longshore_server.engine_process") -> None:
        self.config = config
        self.module = module
        self.folder = Path(tempfile.mkdtemp(prefix="ls-"))
        self.socket_path = self.folder / "engine"
        self.process: subprocess.Popen[bytes] | None = None
        self.num_starts = 0
        self._ready = threading.Event()
        self._reader: threading.Thread | None = None
        self.error = ""

    def start(self) -> None:
        self._close_pipes()
        self._ready.clear()
        self.num_starts += 1
        command = [sys.executable, "-m", self.module, "--socket", str(self.socket_path)]
        command += ["--config-json", to_json(self.config).decode(), "--parent", str(os.getpid())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        assert self._ready.wait(START_TIMEOUT_S), "the engine did not come up"
        assert not self.error, self.error

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait(WAIT_S)
        self._close_pipes()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close_pipes(self) -> None:
        if self._reader is not None:
            self._reader.join(WAIT_S)
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            status = json.loads(line)
            if "ready" in status or "error" in status:
                self.error = status.get("error", "")
                self._ready.set()


@contextlib.contextmanager
def engine_process(config: CoreConfig, **options: Any) -> Iterator[EngineProcess]:
    """A started and ready engine process, gone afterwards."""
    engine = EngineProcess(config, **options)
    try:
        engine.start()
        engine.wait_ready()
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def kept_running(engine: EngineProcess) -> Iterator[None]:
    """Starts the engine again whenever it ends, as a supervisor does."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.is_set():
            engine.wait(timeout_s=600)
            if not is_over.is_set():
                engine.start()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        engine.kill()
        keeper.join(WAIT_S)


class RawPeer:
    """A worker of the engine by hand: frames out, messages in."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(path))
        self._decoder = FrameDecoder()
        self._messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.socket.sendall(to_frame(message))

    def send_bytes(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, *kinds: type, timeout_s: float = WAIT_S) -> Any:
        """The next message of one of `kinds`, or None when the connection has ended."""
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            while self._messages:
                message = self._messages.pop(0)
                if not kinds or isinstance(message, kinds):
                    return message
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._messages += [decode_engine_message(frame) for frame in self._decoder.feed(data)]
        raise AssertionError(f"none of {kinds} within {timeout_s} s")

    def close(self) -> None:
        self.socket.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = WAIT_S) -> None:
    """Waits until `condition` holds; fails when it does not in time."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it did not happen in time"
        time.sleep(0.01)


def request_id() -> str:
    return secrets.token_hex(16)
