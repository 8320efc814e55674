"""The exact bytes of each token, which a decode can't give for part of a UTF-8 character. Pure look-ups.

A leaf that the core's workers and the device share; the tokenizer (of the `tokenizers` library) is passed in.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

__all__ = ["TokenBytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_CACHE_TOKENS = 65_536


class TokenBytes:
    """Bytes of tokens, for byte-level BPE (GPT-2's alphabet) and for SentencePiece with byte fallback."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
        self._alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self.tuple_of = lru_cache(_CACHE_TOKENS)(self._tuple_of)

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; empty for an id that has no token (padding of the vocabulary)."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            return b"".join(self._alphabet.get(char) or char.encode() for char in token)
        match = _BYTE_TOKEN.match(token)
        return bytes([int(match.group(1), 16)]) if match else token.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        """The token's text, U+FFFD for what is not whole UTF-8."""
        return bytes(self.tuple_of(token_id)).decode("utf-8", "replace")

    def _tuple_of(self, token_id: int) -> tuple[int, ...]:
        return tuple(self.bytes_of(token_id))


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-in of each byte: itself where printable, else from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
