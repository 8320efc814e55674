"""The Shop tokenizer keeps any text, and its Jinja template and its prefix table say the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shop import COLOURS, KINDS, NAMES, make_question, make_sheet, messages, render
from shop.chat import PREFIX, SPECIAL_TOKENS
from shop.data import Curriculum, make_shard
from shop.models import MODELS
from shop.sheet import MAX_PRICE, MAX_STOCK
from shop.tokenizer import FOLDER, TOKENIZER_FILES


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@cache
def auto() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_words_of_the_task_are_single_tokens() -> None:
    words = [*NAMES, *COLOURS, *range(1, MAX_STOCK + 1), *(f"${n}" for n in range(1, MAX_PRICE + 1))]
    assert [word for word in words if len(tokenizer().encode(f" {word}").ids) != 1] == []
    assert [token for token in SPECIAL_TOKENS if len(tokenizer().encode(token).ids) != 1] == []


chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(list(PREFIX)), "content": st.text(max_size=30)}),
    min_size=1, max_size=5,
)  # fmt: skip


@given(chats, st.booleans())
def test_template_equals_prefix_table(chat: list[dict[str, str]], prompt: bool) -> None:
    table = json.loads((FOLDER / "chat_prefix_suffix.json").read_text(encoding="utf-8"))
    by_table = "".join(
        table["roles"][part["role"]]["prefix"] + part["content"] + table["roles"][part["role"]]["suffix"]
        for part in chat
    ) + (table["generation_prompt"] if prompt else "")
    by_template = auto().apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert by_table == by_template == render(chat, prompt)


def test_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="unknown role"):
        auto().apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_answers_have_the_promised_lengths() -> None:
    rng = Random(0)
    for num_items in range(2, 9):
        sheet = make_sheet(rng, num_items)
        for kind in KINDS:
            question = make_question(rng, sheet, kind)
            num_tokens = len(tokenizer().encode(question.answer).ids) + 1
            assert num_tokens >= 60 if kind == "list" and num_items >= 4 else 5 <= num_tokens <= 110
            prompt = auto().apply_chat_template(messages(sheet, question), return_dict=True)["input_ids"]
            assert len(prompt) + num_tokens <= auto().model_max_length


@pytest.mark.parametrize("which", ["shop-teacher", "shop-student"])
def test_committed_models_carry_this_tokenizer(which: str) -> None:
    for name in TOKENIZER_FILES:
        assert (MODELS / which / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_a_shard_is_full_and_repeatable(tmp_path: Path) -> None:
    shard = make_shard(3, 5, 200, FOLDER / "tokenizer.json", Curriculum().max_items(3))
    again = make_shard(3, 5, 200, FOLDER / "tokenizer.json", Curriculum().max_items(3))
    assert shard.shape == (5, 200) and (shard == again).all()
    assert {int(row[0]) for row in shard} == {tokenizer().token_to_id(PREFIX["system"])}
