"""`longshore chat`: a conversation in the terminal, streamed, that shows which tier answered and why."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from longshore.config import MODES
from longshore.errors import AnswerInterruptedError, ConfigError, LongshoreError
from longshore.images import data_url

if TYPE_CHECKING:
    from longshore.client import Client
    from longshore.streams import ChatStream

_HELP = (
    "/image PATH shows a picture with the next question, /reset forgets the conversation, "
    "/tiers shows what is measured, /quit or Ctrl-D ends"
)


def register(subparsers: Any) -> None:
    """Add the command; an address that is not given comes from LONGSHORE_EDGE_URL or LONGSHORE_CORE_URL."""
    parser = subparsers.add_parser("chat", help="talk to the tiers in the terminal")
    parser.add_argument("--edge-url", "--edge", action="append", metavar="URL", help="may be given again")
    parser.add_argument("--core-url", "--core", action="append", metavar="URL", help="may be given again")
    parser.add_argument("--device", metavar="FOLDER", help="an exported student")
    parser.add_argument("--model", help="default: the first that the tier lists")
    parser.add_argument("--mode", choices=MODES, default="auto")
    parser.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--deadline-s", type=float, default=60.0)
    parser.add_argument("--ttft-target-ms", type=int, default=300)
    parser.add_argument("--image", action="append", metavar="PATH", help="a picture for the first question")
    parser.add_argument("--once", metavar="QUESTION", help="ask this, print the answer, end")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Talk until the user ends it; with `--once`, the answer goes to stdout and the rest to stderr."""
    from longshore.client import Client

    with Client(
        edge_url=options.edge_url or _addresses("LONGSHORE_EDGE_URL"),
        core_url=options.core_url or _addresses("LONGSHORE_CORE_URL"),
        device=options.device,
        mode=options.mode,
        deadline_s=options.deadline_s,
        ttft_target_ms=options.ttft_target_ms,
    ) as client:
        conversation = Conversation(client, options, sys.stdout)
        if options.once is not None:
            conversation.ask(options.once)
            sys.stderr.write(conversation.footer + "\n")
            return 0
        return _converse(conversation)


def _addresses(variable: str) -> list[str] | None:
    value = os.environ.get(variable, "")
    return [part.strip() for part in value.split(",") if part.strip()] or None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _converse(conversation: Conversation) -> int:
    _say(f"Talking to {conversation.model}. {_HELP}.")
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            _say("")
            return 0
        if line in ("/quit", "/exit"):
            return 0
        _turn(conversation, line)


def _turn(conversation: Conversation, line: str) -> None:
    if not line:
        return
    if line == "/reset":
        conversation.reset()
    elif line == "/tiers":
        _say(conversation.tiers())
    elif line.startswith("/image "):
        _show(conversation, line.removeprefix("/image ").strip())
    elif line.startswith("/"):
        _say(_HELP)
    else:
        _answer(conversation, line)


def _show(conversation: Conversation, path: str) -> None:
    try:
        conversation.show(path)
    except LongshoreError as error:
        _say(f"  ({error.code}: {error.message})")


def _answer(conversation: Conversation, question: str) -> None:
    """One question; Ctrl-C ends the answer, an error is told, and the conversation goes on."""
    try:
        conversation.ask(question)
    except KeyboardInterrupt:
        _say("  (stopped)")
    except AnswerInterruptedError as error:
        _say(f"\n  ({error.code} after {error.tokens_delivered} tokens: {error.message})")
    except LongshoreError as error:
        _say(f"  ({error.code}: {error.message})")
    else:
        _say(f"  [{conversation.footer}]")


class Conversation:
    """The turns so far; asks through a client and writes answers as they come."""

    def __init__(self, client: Client, options: argparse.Namespace, out: TextIO) -> None:
        self._client = client
        self._options = options
        self._out = out
        self._messages: list[dict[str, Any]] = []
        self._pictures: list[dict[str, Any]] = []
        self.model: str = options.model or self._first_model()
        self.footer = ""
        self.reset()
        for path in options.image or ():
            self.show(path)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._pictures = []
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def show(self, path: str) -> None:
        """Have a picture stand before the next question. Raises InvalidImageError."""
        self._pictures.append({"type": "image", "image": data_url(path)})

    def ask(self, question: str) -> None:
        """Stream the answer; it becomes part of the conversation only when it is whole."""
        text = {"type": "text", "text": question}
        content = [*self._pictures, text] if self._pictures else question
        messages = [*self._messages, {"role": "user", "content": content}]
        begin_s = time.monotonic()
        with self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            stream=True,
            temperature=self._options.temperature,
            max_tokens=self._options.max_tokens,
        ) as stream:
            ttft_s = time.monotonic() - begin_s
            self._write(stream)
        self._messages = [*messages, {"role": "assistant", "content": stream.text}]
        self._pictures = []
        self.footer = _footer(stream, ttft_s, time.monotonic() - begin_s)

    def tiers(self) -> str:
        """What is measured of each tier, a line each."""
        return "\n".join(
            f"  {view.tier} {view.node}: "
            + (f"{view.ttft_ms:.0f} ms to the first token" if view.ttft_ms is not None else "not measured")
            + (f", {view.last_error}" if view.last_error else "")
            for view in self._client.measurements()
        )

    def _write(self, stream: ChatStream) -> None:
        for chunk in stream:
            for choice in chunk.choices:
                self._out.write(choice.delta.content or "")
            self._out.flush()
        self._out.write("\n")
        self._out.flush()

    def _first_model(self) -> str:
        cards = self._client.models.list().data
        if not cards:
            raise ConfigError("the tier lists no model; name one with --model")
        return cards[0].id


def _footer(stream: ChatStream, ttft_s: float, total_s: float) -> str:
    report, usage = stream.report, stream.usage
    num_tokens = usage.completion_tokens if usage is not None else 0
    writing_s = total_s - ttft_s
    speed = f", {(num_tokens - 1) / writing_s:.0f} tokens/s" if num_tokens > 1 and writing_s > 0 else ""
    who = "unknown" if report is None else report.served_by + (" (cache)" if report.cached else "")
    why = f"; {report.reason}" if report is not None and report.reason else ""
    uses = report.images if report is not None else ()
    seen = "".join(f"; picture read at {use.width_px} x {use.height_px} ({use.why})" for use in uses)
    return f"{who}, {ttft_s * 1000:.0f} ms to the first token{speed}{why}{seen}"
