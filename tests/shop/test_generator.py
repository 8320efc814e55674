"""Properties of the Shop generator: answers can be checked, wrong ones fail, the split never leaks."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shop import (
    COLOURS,
    KINDS,
    NAMES,
    Question,
    Sheet,
    chance_level,
    facts,
    make_question,
    make_sheet,
    split_rng,
)
from shop.sheet import MAX_ITEMS, MIN_ITEMS

seeds = st.integers(0, 2**32)
kinds = st.sampled_from(KINDS)


@st.composite
def asked(draw: st.DrawFn) -> tuple[Sheet, Question]:
    rng = Random(draw(seeds))
    sheet = make_sheet(rng, draw(st.integers(2, MAX_ITEMS)))
    return sheet, make_question(rng, sheet, draw(kinds))


@given(asked(), st.data())
def test_an_answer_with_another_fact_is_wrong(pair: tuple[Sheet, Question], data: st.DataObject) -> None:
    question = pair[1]
    place = data.draw(st.integers(0, len(question.check) - 1))
    fact = question.check[place]
    other = {"$": "$61", "0": "41"}.get("$" if fact[0] == "$" else "0" if fact.isdigit() else "")
    if other is None:
        pool = NAMES if fact in NAMES else COLOURS
        other = data.draw(st.sampled_from([word for word in pool if word != fact]))
    changed = [*question.check[:place], other, *question.check[place + 1 :]]
    assert not question.is_correct(" ".join(changed))
    assert not question.is_correct(" ".join(question.check[:place] + question.check[place + 1 :]))
    assert not question.is_correct(question.answer + " " + other)


@given(asked())
def test_answers_follow_from_the_sheet(pair: tuple[Sheet, Question]) -> None:
    sheet, question = pair
    items = {item.name: item for item in sheet.items}
    names = [word for word in question.check if word in NAMES]
    item = items[names[-1]]
    match question.kind:
        case "price":
            assert question.check == (item.name, f"${item.price}")
        case "colour":
            assert question.check == (item.name, item.colour)
        case "stock":
            assert question.check == (item.name, str(item.stock))
        case "cheaper":
            assert item.price == min(items[name].price for name in names)
        case "reverse":
            keys = [sheet_item for sheet_item in sheet.items if question.check[0] in (
                sheet_item.colour, f"${sheet_item.price}")]  # fmt: skip
            assert keys == [item], "a reverse look-up must have one answer"
        case "list":
            assert question.check == facts(sheet.text)
    assert set(names) <= set(items)


@given(seeds, st.integers(MIN_ITEMS, MAX_ITEMS))
def test_sheets_have_distinct_names_and_prices(seed: int, num_items: int) -> None:
    sheet = make_sheet(Random(seed), num_items)
    assert len({item.name for item in sheet.items}) == len({item.price for item in sheet.items}) == num_items


@given(seeds, st.integers(2, 8))
def test_splits_are_disjoint_by_content(seed: int, num_items: int) -> None:
    assert make_sheet(split_rng("train", seed), num_items, "train").split == "train"
    assert make_sheet(split_rng("heldout", seed), num_items, "heldout").split == "heldout"
    assert make_sheet(split_rng("train", seed), num_items) != make_sheet(
        split_rng("heldout", seed), num_items
    )


@given(asked())
def test_chance_is_a_probability_below_certainty(pair: tuple[Sheet, Question]) -> None:
    sheet, question = pair
    assert 0.0 < chance_level(question.kind, sheet) <= 1.0


def test_chance_level_matches_random_guesses() -> None:
    rng, guesses, hits, expected = Random(0), 20_000, 0, 0.0
    for _ in range(guesses):
        sheet = make_sheet(rng, 4)
        question = make_question(rng, sheet, "colour")
        expected += chance_level("colour", sheet)
        guess = rng.choice(sheet.items).colour
        hits += question.is_correct(f"The {question.check[0]} is {guess}.")
    assert hits / guesses == pytest.approx(expected / guesses, abs=0.02)


def test_the_same_seed_asks_the_same() -> None:
    one, two = (make_sheet(split_rng("heldout", 3), 5, "heldout") for _ in range(2))
    assert one == two and make_question(Random(1), one, "list") == make_question(Random(1), two, "list")


@pytest.mark.parametrize("num_items", [0, MAX_ITEMS + 1])
def test_bad_sizes_are_refused(num_items: int) -> None:
    with pytest.raises(ValueError, match="num_items"):
        make_sheet(Random(0), num_items)


def test_bad_kinds_are_refused() -> None:
    sheet = make_sheet(Random(0), 1)
    with pytest.raises(ValueError, match="unknown kind"):
        make_question(Random(0), sheet, "weight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two items"):
        make_question(Random(0), sheet, "cheaper")
