"""Events to OpenAI shapes and back; the one place where both forms meet, for every tier.

Renderers make chunks from events, `AnswerCollector` makes whole answers, and `ChunkReader`
turns a stream of chunks into events again. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longshore.errors import AnswerInterruptedError, InvalidRequestError, ProtocolError
from longshore.wire.answer import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChunkExtension,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
)
from longshore.wire.event import (
    AnswerEvent,
    FinishEvent,
    Report,
    TokenEvent,
    TokenLogprob,
    TokenMark,
    TopLogprob,
    Usage,
)
from longshore.wire.schema import decode, encode


class _Renderer:
    """What both chunk renderers share: the frame of a chunk and the usage chunk at the end."""

    _object = ""
    _id_prefix = ""

    def __init__(
        self, *, request_id: str, model: str, created: int, num_choices: int = 1, include_usage: bool = False
    ) -> None:
        self._frame = {
            "id": self._id_prefix + request_id,
            "object": self._object,
            "created": created,
            "model": model,
        }
        self._num_open = num_choices
        self._include_usage = include_usage

    def chunks(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """The chunk objects of an event, in order; the usage chunk follows the last finish."""
        if isinstance(event, TokenEvent):
            choice = self._token_choice(event)
            return [self._frame | {"choices": [choice], "longshore": {"mark": encode_mark(event.mark)}}]
        chunk = self._frame | {"choices": [self._finish_choice(event)]}
        extension = encode(ChunkExtension(report=event.report, usage=event.usage))
        if extension:
            chunk["longshore"] = extension
        self._num_open -= 1
        if self._num_open > 0 or not self._include_usage:
            return [chunk]
        return [chunk, self._frame | {"choices": [], "usage": encode(event.usage or Usage())}]

    def _token_choice(self, event: TokenEvent) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} renders no tokens")

    def _finish_choice(self, event: FinishEvent) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} renders no finish")


class ChatRenderer(_Renderer):
    """Chunks of `/v1/chat/completions`; a choice's first one carries the role."""

    _object = "chat.completion.chunk"
    _id_prefix = "chatcmpl-"

    def __init__(
        self, *, request_id: str, model: str, created: int, num_choices: int = 1, include_usage: bool = False
    ) -> None:
        super().__init__(
            request_id=request_id,
            model=model,
            created=created,
            num_choices=num_choices,
            include_usage=include_usage,
        )
        self._begun: set[int] = set()

    def _token_choice(self, event: TokenEvent) -> dict[str, Any]:
        logprobs = {"content": [encode(event.logprob)]} if event.logprob is not None else None
        return {
            "index": event.index,
            "delta": self._delta(event.index, event.text),
            "finish_reason": None,
            "logprobs": logprobs,
        }

    def _finish_choice(self, event: FinishEvent) -> dict[str, Any]:
        delta = self._delta(event.index, event.text)
        if not event.text:
            delta.pop("content")
        return {
            "index": event.index,
            "delta": delta,
            "finish_reason": event.finish_reason,
            "logprobs": None,
        }

    def _delta(self, index: int, text: str) -> dict[str, Any]:
        if index in self._begun:
            return {"content": text}
        self._begun.add(index)
        return {"role": "assistant", "content": text}


class CompletionRenderer(_Renderer):
    """Chunks of `/v1/completions`."""

    _object = "text_completion"
    _id_prefix = "cmpl-"

    def __init__(
        self, *, request_id: str, model: str, created: int, num_choices: int = 1, include_usage: bool = False
    ) -> None:
        super().__init__(
            request_id=request_id,
            model=model,
            created=created,
            num_choices=num_choices,
            include_usage=include_usage,
        )
        self._num_chars: dict[int, int] = {}

    def _token_choice(self, event: TokenEvent) -> dict[str, Any]:
        begin = self._num_chars.get(event.index, 0)
        self._num_chars[event.index] = begin + len(event.text)
        logprobs = _completion_logprobs([event.logprob], begin) if event.logprob is not None else None
        return {
            "index": event.index,
            "text": event.text,
            "finish_reason": None,
            "logprobs": encode(logprobs) if logprobs is not None else None,
        }

    def _finish_choice(self, event: FinishEvent) -> dict[str, Any]:
        return {
            "index": event.index,
            "text": event.text,
            "finish_reason": event.finish_reason,
            "logprobs": None,
        }


def encode_mark(mark: TokenMark) -> dict[str, Any]:
    """A mark as JSON; written out because it stands in every token chunk."""
    return {
        "segment": mark.segment,
        "offset": mark.offset,
        "token_id": mark.token_id,
        "byte_offset": mark.byte_offset,
        "model_digest": mark.model_digest,
    }


# -- whole answers -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class AnswerCollector:
    """Gathers events into a whole answer of `num_choices` choices."""

    def __init__(self, num_choices: int = 1) -> None:
        self._choices = {index: _Choice() for index in range(num_choices)}
        self.usage: Usage | None = None
        self.report: Report | None = None

    def add(self, event: AnswerEvent) -> None:
        """Take the next event; raises ProtocolError if its choice was not asked for or is over."""
        choice = self._choices.get(event.index)
        if choice is None or choice.finish_reason is not None:
            raise ProtocolError(f"an event of choice {event.index} was not expected")
        choice.texts.append(event.text)
        if isinstance(event, TokenEvent):
            choice.token_ids.append(event.mark.token_id)
            if event.logprob is not None:
                choice.logprobs.append(event.logprob)
            return
        choice.finish_reason = event.finish_reason
        self.usage = event.usage or self.usage
        self.report = event.report or self.report

    def text(self, index: int = 0) -> str:
        """The text of a choice so far."""
        return self._choices[index].text

    def token_ids(self, index: int = 0) -> tuple[int, ...]:
        """The tokens of a choice so far."""
        return tuple(self._choices[index].token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(len(choice.token_ids) for choice in self._choices.values())

    @property
    def is_finished(self) -> bool:
        """True once every choice has its finish event."""
        return all(choice.finish_reason is not None for choice in self._choices.values())

    def chat_completion(self, *, request_id: str, model: str, created: int) -> ChatCompletion:
        """The whole chat answer; raises AnswerInterruptedError if a choice has no end."""
        choices = tuple(
            ChatChoice(
                index,
                AssistantMessage(choice.text),
                choice.finish_reason,
                ChatLogprobs(tuple(choice.logprobs)) if choice.logprobs else None,
            )
            for index, choice in self._finished()
        )
        return ChatCompletion("chatcmpl-" + request_id, created, model, choices, self.usage, self.report)

    def completion(self, *, request_id: str, model: str, created: int) -> Completion:
        """The whole completion; raises AnswerInterruptedError if a choice has no end."""
        choices = tuple(
            CompletionChoice(
                index,
                choice.text,
                choice.finish_reason,
                _completion_logprobs(choice.logprobs, 0) if choice.logprobs else None,
            )
            for index, choice in self._finished()
        )
        return Completion("cmpl-" + request_id, created, model, choices, self.usage, self.report)

    def _finished(self) -> list[tuple[int, _Choice]]:
        if not self.is_finished:
            raise AnswerInterruptedError(
                f"the answer stopped after {self.num_tokens} tokens", tokens_delivered=self.num_tokens
            )
        return sorted(self._choices.items())


def _completion_logprobs(entries: list[TokenLogprob], begin: int) -> CompletionLogprobs:
    offsets = []
    for entry in entries:
        offsets.append(begin)
        begin += len(entry.token)
    return CompletionLogprobs(
        tokens=tuple(entry.token for entry in entries),
        token_logprobs=tuple(entry.logprob for entry in entries),
        top_logprobs=tuple({top.token: top.logprob for top in entry.top_logprobs} for entry in entries),
        text_offset=tuple(offsets),
    )


# -- reading -----------------------------------------------------------------------------------


class ChunkReader:
    """Turns chunks of either API into events, and tells a true end from a stream that just stopped."""

    def __init__(self, num_choices: int = 1) -> None:
        self._open = set(range(num_choices))
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens read so far, over all choices."""
        return self._num_tokens

    @property
    def is_finished(self) -> bool:
        """True once every choice has ended."""
        return not self._open

    def read(self, chunk: Any) -> list[AnswerEvent]:
        """The events of one chunk; raises ProtocolError if it can't be read."""
        try:
            choices = chunk["choices"]
            extension = decode(ChunkExtension, chunk.get("longshore") or {}, lenient=True)
            return [event for choice in choices if (event := self._event(choice, extension)) is not None]
        except (InvalidRequestError, LookupError, TypeError, AttributeError) as error:
            raise ProtocolError(f"a chunk can't be read: {error}") from None

    def finish(self) -> None:
        """The stream ended; raises AnswerInterruptedError unless every choice had finished."""
        if self._open:
            raise AnswerInterruptedError(
                f"the stream stopped after {self._num_tokens} tokens without an end",
                tokens_delivered=self._num_tokens,
            )

    def _event(self, choice: Any, extension: ChunkExtension) -> AnswerEvent | None:
        index = choice["index"]
        text = choice.get("text") if "delta" not in choice else choice["delta"].get("content")
        if type(text) not in (str, type(None)):
            raise ProtocolError("a chunk's text is not a string")
        if type(index) is not int or index not in self._open:
            raise ProtocolError(f"a chunk of choice {index!r} was not expected")
        if choice.get("finish_reason") is not None:
            fields = {"finish_reason": choice["finish_reason"], "index": index, "text": text}
            end = decode(FinishEvent, fields, lenient=True)
            self._open.discard(index)
            return FinishEvent(end.finish_reason, index, end.text, extension.usage, extension.report)
        if extension.mark is None:
            if text:
                raise ProtocolError("a token chunk has no mark")
            return None
        self._num_tokens += 1
        return TokenEvent(extension.mark, text or "", index, _logprob(choice.get("logprobs")))


def _logprob(value: Any) -> TokenLogprob | None:
    """The one entry of a chunk's log-probabilities, from either API's shape."""
    if not value:
        return None
    if "content" in value:
        content = value["content"]
        return decode(TokenLogprob, content[0], lenient=True) if content else None
    lists = decode(CompletionLogprobs, value, lenient=True)
    if not lists.tokens or lists.token_logprobs[0] is None:
        return None
    tops = lists.top_logprobs[0] if lists.top_logprobs else None
    return TokenLogprob(
        lists.tokens[0],
        lists.token_logprobs[0],
        None,
        tuple(TopLogprob(token, logprob) for token, logprob in (tops or {}).items()),
    )
