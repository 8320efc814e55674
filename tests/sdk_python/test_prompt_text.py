"""Foreign text in a prompt: encoded as it always was, unless it spells a control token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from longshore.prompt_text import LONG_TEXT_CHARS, PromptEncoder
from shop.tokenizer import FOLDER

TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
ENCODER = PromptEncoder(TOKENIZER)
SPECIAL = {i for i, token in TOKENIZER.get_added_tokens_decoder().items() if token.special}
SPELLINGS = [token.content for token in TOKENIZER.get_added_tokens_decoder().values()]
HOSTILE = st.lists(st.sampled_from(SPELLINGS) | st.text(max_size=6) | st.just("\U000f0000"), max_size=8)


@given(HOSTILE, HOSTILE)
def test_only_the_templates_control_tokens_are_control_tokens(first: list[str], second: list[str]) -> None:
    foreign = ENCODER.foreign()
    one, two = "".join(first), "".join(second)
    ids = ENCODER.encode_prompt(f"<|user|>{foreign.guard(one)}<|end|>{foreign.guard(two)}", foreign)
    controls = [token_id for token_id in ids if token_id in SPECIAL]
    assert [TOKENIZER.id_to_token(token_id) for token_id in controls] == ["<|user|>", "<|end|>"]
    assert TOKENIZER.decode(list(ids), skip_special_tokens=True) == one + two


@given(st.text(max_size=80).filter(lambda text: not any(word in text for word in SPELLINGS)))
def test_other_text_is_encoded_in_one_piece(written: str) -> None:
    foreign = ENCODER.foreign()
    prompt = f"<|user|>{foreign.guard(written)}<|end|>"
    assert prompt == f"<|user|>{written}<|end|>"
    assert ENCODER.encode_prompt(prompt, foreign) == ENCODER.encode(prompt)


def test_long_texts_are_encoded_alike() -> None:
    written = "the lamp costs $7. " * (LONG_TEXT_CHARS // 10)
    assert ENCODER.encode(written) == tuple(TOKENIZER.encode(written, add_special_tokens=False).ids)


def test_the_tokenizer_is_left_as_it_was() -> None:
    assert ENCODER.encode("<|end|>") == (TOKENIZER.token_to_id("<|end|>"),)


def test_a_tokenizer_without_control_tokens() -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = PromptEncoder(plain)
    foreign = encoder.foreign()
    assert encoder.encode_prompt(foreign.guard("a a"), foreign) == (0, 0)
