"""A client that reads slowly costs bounded memory, holds the core back, and is given up in the end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil

from edge.harness import KEY, CoreProcess, ask, chat, edge_toml, eventually, session_to, start_edge

NUM_TOKENS = 40_000
TEXT = "x" * 1000  # 40 MB and more in all, far over every buffer on the way


def worker_rss_bytes(pid: int) -> int:
    return sum(child.memory_info().rss for child in psutil.Process(pid).children(recursive=True))


async def test_slow_reader(core: CoreProcess, tmp_path: Path) -> None:
    await core.set()
    await core.log(clear=True)
    with start_edge(tmp_path, edge_toml([core], "client_timeout_s = 2.0")) as edge:
        async with session_to(edge) as session:
            assert (await ask(session, chat()))[0] == 200
            before_bytes = worker_rss_bytes(edge.pid)
            host, port = edge.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            body = json.dumps(chat(stream=True, orders={"tokens": NUM_TOKENS, "text": TEXT})).encode()
            writer.write(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await reader.read(100)  # and then nothing more
            await asyncio.sleep(1.2)
            sent = (await core.log())[-1]["sent"]
            assert 0 < sent < NUM_TOKENS / 2, "the core was not held back"
            assert worker_rss_bytes(edge.pid) - before_bytes < 20 * 2**20

            async def is_given_up() -> bool:
                return (await core.log())[-1]["ended"] == "disconnected"

            await eventually(is_given_up, within_s=6.0)
            assert (await ask(session, chat()))[0] == 200
            writer.close()
