"""The student's text side: chat table, tokens from text, text and bytes from tokens. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longshore.detokenize import IncrementalText
from longshore.device.template import render_chat
from longshore.errors import BundleDamagedError, ConfigError, UnsupportedParameterError
from longshore.prompt_text import ForeignText, PromptEncoder
from longshore.token_bytes import TokenBytes
from longshore.wire import AnyRequest, ChatRequest, Manifest, TokenLogprob, TopLogprob

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's API says this of a token that can't come


class StudentText:
    """The tokenizer and chat table of one bundle; BundleDamagedError if the tokenizer can't be read."""

    def __init__(self, bundle_dir: Path, manifest: Manifest) -> None:
        self._template = manifest.chat_template
        self._tokenizer = _read_tokenizer(bundle_dir / manifest.tokenizer_file)
        self._encoder = PromptEncoder(self._tokenizer)
        self._bytes = TokenBytes(self._tokenizer)
        self._image = self._image_text(manifest)

    def prompts(self, request: AnyRequest, answer_so_far: str = "") -> list[tuple[int, ...]]:
        """The token ids of each prompt, with `answer_so_far` after it; a picture is one image token."""
        foreign = self._encoder.foreign()
        so_far = foreign.guard(answer_so_far)
        if isinstance(request, ChatRequest):
            text = render_chat(self._template, request.messages, foreign, self._image) + so_far
            return [self._encoder.encode_prompt(text, foreign)]
        return [self._prompt(prompt, so_far, foreign) for prompt in request.prompts]

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids; special tokens have none, invalid UTF-8 reads as U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def incremental(self, stop_strings: Sequence[str]) -> IncrementalText:
        """A detokenizer for one answer."""
        return IncrementalText(self.decode, stop_strings)

    def logprob(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        """A token's log-probability with text and bytes, and those of its alternatives."""
        alternatives = tuple(TopLogprob(*self._described(other, value)) for other, value in top)
        return TokenLogprob(*self._described(token_id, logprob), alternatives)

    def _image_text(self, manifest: Manifest) -> str:
        """How the tokenizer spells the image token; "" for a model of text."""
        if manifest.vision is None:
            return ""
        spelling = self._tokenizer.id_to_token(manifest.vision.image_token_id)
        if spelling is None or self._encoder.encode(spelling) != (manifest.vision.image_token_id,):
            raise BundleDamagedError("the tokenizer has no image token of the manifest's number")
        return str(spelling)

    def _described(self, token_id: int, logprob: float) -> tuple[str, float, tuple[int, ...]]:
        value = max(logprob, _LEAST_LOGPROB)
        return self._bytes.text_of(token_id), value, self._bytes.tuple_of(token_id)

    def _prompt(self, prompt: str | tuple[int, ...], so_far: str, foreign: ForeignText) -> tuple[int, ...]:
        if isinstance(prompt, str):  # a raw prompt may name control tokens: there is no other way to
            return self._encoder.encode_prompt(prompt + so_far, foreign, add_special_tokens=True)
        return prompt + (self._encoder.encode_prompt(so_far, foreign) if so_far else ())


def check_text_only(request: AnyRequest, manifest: Manifest) -> None:
    """UnsupportedParameterError naming the first image, where the model reads nothing but text."""
    if not isinstance(request, ChatRequest) or manifest.vision is not None:
        return
    for number, message in enumerate(request.messages):
        if message.images:
            raise UnsupportedParameterError(
                f"messages[{number}].content: this model takes no images", param=f"messages[{number}].content"
            )


def _read_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("the device tier needs more packages: install longshore[device]") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise BundleDamagedError(f"the tokenizer can't be read: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
