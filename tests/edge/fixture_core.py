"""A core that speaks the wire and misbehaves on request: it refuses, crashes, stalls, cuts, bursts and lies.

Run as a process of its own. The last message of a chat is a JSON object that says what to do with it;
`POST /_set` sets the same for all requests; `GET /_log` tells what arrived and how each request ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import time
from typing import Any

from aiohttp import web

from longshore.sse import DONE, encode_data
from longshore.wire import (
    FinishEvent,
    Hop,
    Report,
    TokenEvent,
    TokenMark,
    decode_any_request,
    encode,
    load_json_object,
    usage_of,
)
from longshore.wire.render import AnswerCollector, ChatRenderer, CompletionRenderer

DIGEST = "ab" * 16


class FixtureCore:
    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}

    async def answer(self, http: web.Request) -> web.StreamResponse:
        body = load_json_object(await http.read())
        record = {"headers": dict(http.headers), "body": body, "ended": "running", "sent": 0}
        self.log.append(record)
        request = decode_any_request(body)
        orders = dict(self.settings)
        if hasattr(request, "messages"):
            with contextlib.suppress(ValueError):
                orders |= json.loads(request.messages[-1].text)
        try:
            return await self.obey(http, request, orders, record)
        except asyncio.CancelledError:
            record["ended"] = "disconnected"
            raise

    async def obey(self, http: web.Request, request: Any, orders: dict[str, Any], record: Any) -> Any:
        await asyncio.sleep(orders.get("wait_s", 0))
        if "status" in orders:
            record["ended"] = "refused"
            error = {
                "message": f"{self.name} refuses",
                "code": orders.get("code"),
                "type": "x",
                "param": None,
            }
            headers = {"Retry-After": "7"} if orders["status"] in (429, 503) else {}
            return web.json_response({"error": error}, status=orders["status"], headers=headers)
        if orders.get("die_before"):
            os._exit(1)
        if orders.get("drop_before"):
            record["ended"] = "dropped"
            http.transport.abort()
            return web.Response()
        if request.stream:
            return await self.stream(http, request, orders, record)
        collector = AnswerCollector(request.n)
        for event in self.events(request, orders):
            collector.add(event)
        make = collector.chat_completion if hasattr(request, "messages") else collector.completion
        record["ended"] = "whole"
        if orders.get("garbage"):
            return web.Response(body=b"<html>not json", content_type="text/html")
        whole = make(request_id=request.longshore.request_id, model=request.model, created=1_700_000_000)
        return web.json_response(encode(whole))

    def events(self, request: Any, orders: dict[str, Any]) -> Any:
        num_tokens = orders.get("tokens", 4)
        for index in range(request.n):
            for offset in range(num_tokens):
                text = orders.get("text", f"w{offset} ")
                yield TokenEvent(TokenMark(0, offset, offset + 10, offset * 3, DIGEST), text, index)
            is_last = index == request.n - 1
            report = Report(
                request.longshore.request_id,
                "core",
                self.name,
                DIGEST,
                hops=(Hop("core", self.name, ttft_ms=1.0, total_ms=2.0),),
            )
            yield FinishEvent(
                "stop",
                index,
                "",
                usage_of(3, num_tokens * request.n) if is_last else None,
                report if is_last else None,
            )

    async def stream(self, http: web.Request, request: Any, orders: dict[str, Any], record: Any) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Secret-Of-Core": "1"})
        await response.prepare(http)
        make = ChatRenderer if hasattr(request, "messages") else CompletionRenderer
        usage = request.stream_options is not None and request.stream_options.include_usage
        renderer = make(
            request_id=request.longshore.request_id,
            model=request.model,
            created=1_700_000_000,
            num_choices=request.n,
            include_usage=usage,
        )
        if orders.get("keepalive_first"):
            await response.write(b": keepalive\n\n")
            await asyncio.sleep(0.05)
        for number, event in enumerate(self.events(request, orders)):
            if number == orders.get("cut_after"):
                record["ended"] = "cut"
                await asyncio.sleep(0.1)  # a reset takes along what the other side has not read yet
                http.transport.abort()
                return response
            if number == orders.get("end_after"):
                record["ended"] = "ended early"
                return response
            if number == orders.get("done_after"):
                await response.write(DONE)
                return response
            if number == orders.get("error_after"):
                body = {"error": {"message": "engine died", "code": "engine_failed", "type": "server_error"}}
                await response.write(encode_data(body, event="error"))
                return response
            if number == orders.get("stall_after"):
                await asyncio.sleep(3600)
            if number and "gap_s" in orders:
                await asyncio.sleep(orders["gap_s"])
            for chunk in renderer.chunks(event):
                await response.write(encode_data(chunk))
            record["sent"] = number + 1
        await response.write(DONE)
        record["ended"] = "whole"
        return response

    async def ready(self, _: web.Request) -> web.Response:
        status = self.settings.get("ready", 200)
        return web.json_response({"status": "ready" if status == 200 else "no"}, status=status)

    async def models(self, _: web.Request) -> web.Response:
        names = self.settings.get("models", ["shop"])
        cards = [
            {"id": name, "object": "model", "created": 0, "owned_by": "x", "model_digest": DIGEST}
            for name in names
        ]
        if "modalities" in self.settings:
            cards = [card | {"input_modalities": self.settings["modalities"]} for card in cards]
        return web.json_response({"object": "list", "data": cards})

    async def set(self, http: web.Request) -> web.Response:
        self.settings = await http.json()
        return web.Response()

    async def show(self, http: web.Request) -> web.Response:
        log = self.log
        if "clear" in http.query:
            self.log = []
        return web.json_response({"time": time.monotonic(), "log": log})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", default="{}")
    args = parser.parse_args()
    core = FixtureCore(args.name)
    core.settings = json.loads(args.set)
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post("/v1/chat/completions", core.answer)
    app.router.add_post("/v1/completions", core.answer)
    app.router.add_get("/readyz", core.ready)
    app.router.add_get("/v1/models", core.models)
    app.router.add_post("/_set", core.set)
    app.router.add_get("/_log", core.show)
    asyncio.run(serve(app, args.port))


async def serve(app: web.Application, port: int) -> None:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    print("ready", site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    main()
