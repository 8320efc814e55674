"""The bytes of tokens, of both kinds of tokenizer that have a byte for everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from longshore.token_bytes import TokenBytes
from shop.tokenizer import FOLDER


@given(st.text(max_size=60))
def test_the_bytes_of_tokens_are_the_text(written: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(written, add_special_tokens=False).ids
    assert b"".join(token_bytes.bytes_of(token_id) for token_id in ids) == written.encode()


def test_byte_fallback_tokens() -> None:
    vocab = {"<unk>": 0, "\u2581the": 1, "<0xC3>": 2, "<0xA9>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes.bytes_of(index) for index in (1, 2, 3, 99)] == [b" the", b"\xc3", b"\xa9", b""]
    assert token_bytes.text_of(2) == "\N{REPLACEMENT CHARACTER}"
