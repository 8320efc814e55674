"""A model's text side: chat template, tokens from text, text from tokens. Loads no weights and no torch.

Whatever it renders is bounded in time; what a client wrote is data of the template, never a template.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from longshore.detokenize import IncrementalText
from longshore.errors import ConfigError, UnsupportedParameterError
from longshore.prompt_text import LONG_TEXT_CHARS, ForeignText, PromptEncoder
from longshore.token_bytes import TokenBytes
from longshore.wire import AnyRequest, ChatRequest, Message, TokenLogprob, TopLogprob
from longshore_server.chat_template import ChatTemplate

_NUM_THREADS = 2


class ModelText:
    """The tokenizer and template of one model folder.

    `load` raises ConfigError, in one line, when the tokenizer is missing or damaged. A model without a chat
    template serves completions only.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, *, max_threads: int = _NUM_THREADS
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)
        self._template = template
        self._bytes = TokenBytes(tokenizer)
        self._executor = ThreadPoolExecutor(max_threads, thread_name_prefix="tokenize")

    @classmethod
    def load(cls, folder: Path | str, *, template_timeout_s: float = 1.0) -> ModelText:
        """Read tokenizer.json and the chat template from a Hugging Face folder."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"no tokenizer: {path} does not exist")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(f"the tokenizer {path} can't be read: {str(error).splitlines()[0]}") from None
        return cls(tokenizer, ChatTemplate.load(Path(folder), timeout_s=template_timeout_s))

    def close(self) -> None:
        """Let go of the threads; a rendering under way ends by its own time limit."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    # -- text to tokens ------------------------------------------------------------------------

    async def prompts(self, request: AnyRequest, *, answer_so_far: str = "") -> tuple[tuple[int, ...], ...]:
        """The token ids of each prompt of a request, `answer_so_far` appended to the last.

        A picture is what the template writes for it, one token as a rule.

        Raises InvalidRequestError for a chat that the template refuses.
        """
        if _num_chars(request) <= LONG_TEXT_CHARS:
            return self._prompts(request, answer_so_far)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._prompts, request, answer_so_far)

    def _prompts(self, request: AnyRequest, answer_so_far: str) -> tuple[tuple[int, ...], ...]:
        foreign = self._encoder.foreign()
        so_far = foreign.guard(answer_so_far)
        if isinstance(request, ChatRequest):
            text = self.render_chat(request.messages, foreign) + so_far
            return (self._encoder.encode_prompt(text, foreign),)
        return tuple(self._prompt(prompt, so_far, foreign) for prompt in request.prompts)

    def _prompt(self, prompt: str | tuple[int, ...], so_far: str, foreign: ForeignText) -> tuple[int, ...]:
        if isinstance(prompt, str):  # a raw prompt may name control tokens: there is no other way to
            return self._encoder.encode_prompt(prompt + so_far, foreign, add_special_tokens=True)
        return prompt + (self._encoder.encode_prompt(so_far, foreign) if so_far else ())

    def render_chat(self, messages: Sequence[Message], foreign: ForeignText) -> str:
        """The prompt text of a conversation, ready for the assistant's turn, its messages guarded."""
        if self._template is None:
            raise UnsupportedParameterError(
                "messages: this model has no chat template; use /v1/completions", param="messages"
            )
        return self._template.render([_template_message(message, foreign) for message in messages])

    # -- tokens to text ------------------------------------------------------------------------

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids; special tokens have none, invalid UTF-8 reads as U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def incremental(self, stop_strings: Sequence[str] = ()) -> IncrementalText:
        """A detokenizer for one answer."""
        return IncrementalText(self.decode, stop_strings)

    def logprob(
        self, token_id: int, logprob: float, alternatives: Sequence[tuple[int, float]], num_alternatives: int
    ) -> TokenLogprob:
        """A token's log-probability with text and bytes, and those of its alternatives."""
        tops = (
            TopLogprob(*self._text_and_value(other_id, value), self._bytes.tuple_of(other_id))
            for other_id, value in alternatives[:num_alternatives]
        )
        text, value = self._text_and_value(token_id, logprob)
        return TokenLogprob(text, value, self._bytes.tuple_of(token_id), tuple(tops))

    def _text_and_value(self, token_id: int, logprob: float) -> tuple[str, float]:
        # JSON has no -inf; -9999.0 is what OpenAI's API says of a token that can't come
        return self._bytes.text_of(token_id), max(logprob, -9999.0)


def check_text_only(request: AnyRequest) -> None:
    """Raises UnsupportedParameterError naming the first image; this tier's models read text."""
    if not isinstance(request, ChatRequest):
        return
    for number, message in enumerate(request.messages):
        if isinstance(message.content, str):
            continue
        for index, part in enumerate(message.content):
            if part.type == "image_url":
                param = f"messages[{number}].content[{index}].image_url"
                raise UnsupportedParameterError(f"{param}: this model takes no images", param=param)


def _num_chars(request: AnyRequest) -> int:
    if isinstance(request, ChatRequest):
        return sum(len(message.text) for message in request.messages)
    return sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))


def _template_message(message: Message, foreign: ForeignText) -> dict[str, Any]:
    # "developer" is OpenAI's newer name of "system", and the only one that templates don't know
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _template_content(message, foreign)}


def _template_content(message: Message, foreign: ForeignText) -> str | list[dict[str, str]]:
    """Text, or parts where there are pictures, as templates of models that see take them."""
    if isinstance(message.content, str) or not message.images:
        return foreign.guard(message.text)
    return [
        {"type": "image"} if part.text is None else {"type": "text", "text": foreign.guard(part.text)}
        for part in message.content
    ]
