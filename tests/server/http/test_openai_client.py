"""The official openai package against a real core."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx2
import openai
import pytest

from .conftest import MAX_IN_FLIGHT, MODEL, Core

MESSAGES: Any = [{"role": "user", "content": "What costs the red lamp?"}]


def _ask(client: openai.OpenAI, **fields: Any) -> Any:
    defaults = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**(defaults | fields))


def test_chat_answers_with_usage(client: openai.OpenAI) -> None:
    answer = _ask(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.longshore["served_by"] == "core"


def test_greedy_answer_is_that_of_transformers(client: openai.OpenAI, core: Core) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(core.model_dir)
    model = AutoModelForCausalLM.from_pretrained(core.model_dir, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = _ask(client, max_tokens=40)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_without_a_limit_the_answer_fills_the_context(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "lamp " * 850}]
    answer = _ask(client, messages=messages, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


def test_stream_gives_the_same_text_token_by_token(client: openai.OpenAI) -> None:
    whole = _ask(client, max_tokens=24).choices[0].message.content
    chunks = list(_ask(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == "length"
    offsets = [chunk.longshore["mark"]["offset"] for chunk in chunks[:-2]]
    assert offsets == list(range(24))


def test_tokens_arrive_one_by_one(client: openai.OpenAI) -> None:
    begin_s = time.monotonic()
    times_s = [time.monotonic() - begin_s for _ in _ask(client, max_tokens=200, stream=True)]
    assert times_s[0] < times_s[-1] / 2, "the first chunk came with the last: the stream is held back"


def test_stop_string_cuts_before_it(client: openai.OpenAI) -> None:
    whole = _ask(client, max_tokens=30).choices[0].message.content
    stop = whole[12:16]
    at = whole.index(stop)
    answer = _ask(client, max_tokens=30, stop=[stop])
    assert answer.choices[0].message.content == whole[:at]
    assert answer.choices[0].finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in _ask(client, max_tokens=30, stop=stop, stream=True)
    )
    assert streamed == whole[:at]


def test_n_gives_different_choices_that_a_seed_repeats(client: openai.OpenAI) -> None:
    first = _ask(client, n=3, temperature=1.0, seed=7, max_tokens=12)
    again = _ask(client, n=3, temperature=1.0, seed=7, max_tokens=12)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage.completion_tokens == 36
    alone = _ask(client, temperature=1.0, seed=7, max_tokens=12)
    assert alone.choices[0].message.content == texts[0]


def test_no_seed_means_another_answer_each_time(client: openai.OpenAI) -> None:
    texts = {_ask(client, temperature=1.0, max_tokens=12).choices[0].message.content for _ in range(4)}
    assert len(texts) > 1


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = _ask(client, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    text = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert text == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy takes the best
        assert entry.logprob <= 0


def test_completion_with_logprobs_and_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="gpt-tiny", prompt=["The lamp is", "One"], max_tokens=5, temperature=0, logprobs=2, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or ()) == len(logprobs.token_logprobs or ()) == 5
    assert (logprobs.text_offset or [])[0] == 0
    assert "".join(logprobs.tokens or ()) == answer.choices[2].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


def test_completion_takes_token_ids_and_streams(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=[20, 30, 40], max_tokens=6, temperature=0)
    chunks = client.completions.create(
        model=MODEL, prompt=[20, 30, 40], max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 3


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "gpt-tiny"]
    assert client.models.retrieve("gpt-tiny").id == "gpt-tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"temperature": 9}, openai.BadRequestError, "out_of_range", "temperature"),
        ({"extra_body": {"wat": 1}}, openai.BadRequestError, "unknown_parameter", "wat"),
        ({"tools": []}, openai.BadRequestError, "unsupported_parameter", "tools"),
        ({"model": "nothing"}, openai.NotFoundError, "model_not_found", "model"),
        ({"service_tier": "priority"}, openai.PermissionDeniedError, "permission_denied", "service_tier"),
        (
            {"extra_body": {"longshore": {"privacy": "device-only"}}},
            openai.PermissionDeniedError,
            "permission_denied",
            "longshore.privacy",
        ),
        (
            {"messages": [{"role": "user", "content": "long " * 2000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 300_000}]},
            openai.APIStatusError,
            "body_too_large",
            None,
        ),
        (
            {"max_tokens": 900, "extra_body": {"ignore_eos": True, "longshore": {"deadline_ms": 150}}},
            openai.InternalServerError,
            "deadline_exceeded",
            None,
        ),
    ],
)
def test_errors_of_each_status(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(error) as caught:
        _ask(client, **fields)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert _ask(client).choices[0].message.content, "the next request works"


def test_wrong_key(core: Core) -> None:
    with core.openai("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        _ask(client)
    assert caught.value.status_code == 401


def test_a_key_with_a_token_limit(core: Core) -> None:
    with core.openai(core.small_key) as client:
        assert _ask(client, max_tokens=None).usage.completion_tokens <= 8
        with pytest.raises(openai.PermissionDeniedError):
            _ask(client, max_tokens=9)


def test_over_the_keys_own_limit_is_429_with_retry_after(client: openai.OpenAI) -> None:
    streams = [
        _ask(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        for _ in range(MAX_IN_FLIGHT)
    ]
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            _ask(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
    finally:
        for stream in streams:
            stream.close()
    end_s = time.monotonic() + 5
    while True:
        try:
            assert _ask(client).choices[0].message.content
            return
        except openai.RateLimitError:
            assert time.monotonic() < end_s, "the places of clients that left are never given back"
            time.sleep(0.05)


def test_vips_pass_the_line(core: Core) -> None:
    """With every slot taken, a VIP that came last starts before the standard one that waits."""
    started: list[str] = []

    def ask(name: str, client: openai.OpenAI, **fields: Any) -> None:
        # read to its end, so that the next one starts well after this one was noticed
        stream = _ask(client, stream=True, max_tokens=150, n=4, extra_body={"ignore_eos": True}, **fields)
        for number, _ in enumerate(stream):
            if number == 0:
                started.append(name)

    with core.openai() as client, core.openai(core.vip_key) as vip_client:
        waiting = [
            threading.Thread(target=ask, args=("standard", client)),
            threading.Thread(target=ask, args=("vip", vip_client), kwargs={"service_tier": "priority"}),
        ]
        held = [  # they fill all slots, for as long as a context lasts
            _ask(client, stream=True, n=4, max_tokens=900, extra_body={"ignore_eos": True}) for _ in range(2)
        ]
        for number, thread in enumerate(waiting, 1):
            thread.start()
            _until(core, "longshore:admission_waiting", number)
        held[0].close()
        for thread in waiting:
            thread.join(30)
        held[1].close()
    assert started == ["vip", "standard"]


def _until(core: Core, name: str, value: int) -> None:
    end_s = time.monotonic() + 10
    wanted = f'{name}{{model_name="{MODEL}"}} {value}.0'
    while wanted not in httpx2.get(f"{core.url}/metrics", headers=core.headers).text:
        assert time.monotonic() < end_s, f"{name} does not become {value}"
        time.sleep(0.02)
