"""The student's text side: chat table, tokens from text, text and bytes from tokens. Loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longshore.detokenize import IncrementalText
from longshore.device.template import render_chat
from longshore.errors import BundleDamagedError, ConfigError, UnsupportedParameterError
from longshore.wire import AnyRequest, ChatRequest, Manifest, TokenLogprob, TopLogprob

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's API says this of a token that can't come


class StudentText:
    """The tokenizer and chat table of one bundle; BundleDamagedError if the tokenizer can't be read."""

    def __init__(self, bundle_dir: Path, manifest: Manifest) -> None:
        self._template = manifest.chat_template
        self._tokenizer = _read_tokenizer(bundle_dir / manifest.tokenizer_file)
        self._added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        self._alphabet = _byte_alphabet() if _is_byte_level(self._tokenizer) else None

    def prompts(self, request: AnyRequest, answer_so_far: str = "") -> list[tuple[int, ...]]:
        """The token ids of each prompt, with `answer_so_far` after it."""
        if isinstance(request, ChatRequest):
            text = render_chat(self._template, request.messages) + answer_so_far
            return [self._encode(text, add_special_tokens=False)]
        return [self._prompt(prompt, answer_so_far) for prompt in request.prompts]

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

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token, which a decode can't give for part of a character."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            return b"".join(self._alphabet.get(char) or char.encode() for char in token)
        match = _BYTE_TOKEN.match(token)
        return bytes([int(match.group(1), 16)]) if match else token.replace("\u2581", " ").encode()

    def _described(self, token_id: int, logprob: float) -> tuple[str, float, tuple[int, ...]]:
        data = self.token_bytes(token_id)
        return data.decode("utf-8", "replace"), max(logprob, _LEAST_LOGPROB), tuple(data)

    def _prompt(self, prompt: str | tuple[int, ...], answer_so_far: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encode(prompt + answer_so_far, add_special_tokens=True)
        return prompt + (self._encode(answer_so_far, add_special_tokens=False) if answer_so_far else ())

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def check_text_only(request: AnyRequest) -> None:
    """UnsupportedParameterError naming the first image; this model reads text."""
    if not isinstance(request, ChatRequest):
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


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", [decoder]))


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-in of each byte: itself where printable, else from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
