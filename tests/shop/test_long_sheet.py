"""Look-ups in long contexts: right when dense, right with top pages, and lost by a window alone."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from shop.long_sheet import MODES, accuracy, engine_config, make_look_ups
from shop.models import MODELS


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_top_pages_keep_the_answers_that_a_window_loses(kv_cache_dtype) -> None:
    model = MODELS / "shop-teacher"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    look_ups = list(make_look_ups(10, num_items=8, num_turns=8, seed=3))
    dense, window, top_pages = (
        accuracy(engine_config(model, MODES[name], kv_cache_dtype=kv_cache_dtype), look_ups, tokenizer)[0]
        for name in ("dense", "sink + window, 160 tokens", "sink + window + top pages, 160 tokens")
    )
    assert dense >= 9 / 10 and top_pages >= 8 / 10
    assert window <= 7 / 10


def test_the_turns_before_do_not_tell_the_answer() -> None:
    for look_up in make_look_ups(40, num_items=8, num_turns=6):
        chat = look_up.prompt.split("<|end|>", 1)[1]
        earlier = chat.rsplit("<|user|>", 1)[0]
        stated = earlier.split("<|assistant|>")[1:]
        for name in (word for word in look_up.question.check if word.isalpha()):
            assert not any(f"The {name} " in turn for turn in stated)
