"""The contract of every wire decoder: any input is accepted, or refused with a documented error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longshore import wire
from longshore.errors import (
    BadMessageError,
    BodyTooLargeError,
    BundleDamagedError,
    InvalidRequestError,
    LongshoreError,
    MalformedBodyError,
    OutOfRangeError,
    ProtocolError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from longshore.wire import dump_json, encode, limits, load_json
from wire_strategies import any_json, damaged, instances

pytestmark = pytest.mark.fuzz

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
DATACLASSES = sorted(
    (
        cls
        for name in wire.__all__
        if isinstance(cls := getattr(wire, name), type) and dataclasses.is_dataclass(cls)
    ),
    key=lambda cls: cls.__name__,
)
# GenerationRequest is abstract, GenerateMessage has a decoder of its own (below).
PLAIN = [cls for cls in DATACLASSES if cls not in (wire.GenerationRequest, wire.GenerateMessage)]


def chat(**fields: Any) -> wire.ChatRequest:
    return wire.decode_chat_request(CHAT | fields)


def refused(error: type[LongshoreError], param: str | None, **fields: Any) -> None:
    with pytest.raises(error) as caught:
        chat(**fields)
    assert type(caught.value) is error
    assert caught.value.param == param


# -- the names ---------------------------------------------------------------------------------


def test_all_names_everything_that_the_package_offers() -> None:
    modules = {
        "limits",
        "render",
        "schema",
        "jsontext",
        "request",
        "event",
        "answer",
        "stream",
        "manifest",
        "assertion",
    }
    public = {name for name in vars(wire) if not name.startswith("_")} - (modules - {"limits"})
    assert set(wire.__all__) == public
    assert wire.__all__ == sorted(
        wire.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )


# -- accepted, or refused with a documented error ----------------------------------------------


def load_manifest(value: Any) -> wire.Manifest:
    return wire.load_manifest(json.dumps(value).encode())


DECODERS: list[tuple[Callable[[Any], Any], type[LongshoreError]]] = [
    (wire.decode_chat_request, InvalidRequestError),
    (wire.decode_completion_request, InvalidRequestError),
    (wire.decode_any_request, InvalidRequestError),
    (wire.decode_client_message, InvalidRequestError),
    (wire.decode_server_message, ProtocolError),
    (wire.decode_chat_completion, InvalidRequestError),
    (wire.decode_chat_chunk, InvalidRequestError),
    (load_manifest, BundleDamagedError),
    (lambda value: wire.ChunkReader().read(value), ProtocolError),
    *((lambda value, cls=cls: wire.decode(cls, value), InvalidRequestError) for cls in PLAIN),
]


def check_accepted_or_refused(value: Any) -> None:
    for decoder, error in DECODERS:
        try:
            decoder(value)
        except error as refusal:
            body = load_json(dump_json(refusal.to_body()))  # it can be told on the wire
            assert body["error"]["code"] == refusal.code


@given(any_json())
@example({"type": ["generate"]})
@example({"choices": [{"index": 0, "delta": {}, "logprobs": {"tokens": ["a"]}}], "longshore": {}})
def test_any_json_value(value: Any) -> None:
    check_accepted_or_refused(value)


@given(st.one_of([damaged(instances(cls)) for cls in (*PLAIN, wire.GenerateMessage)]))
def test_damaged_messages(value: Any) -> None:
    check_accepted_or_refused(value)


@given(damaged(instances(wire.ChatRequest) | instances(wire.CompletionRequest)))
def test_damaged_requests_that_are_accepted_mean_what_they_say(value: Any) -> None:
    try:
        request = wire.decode_any_request(value)
    except InvalidRequestError:
        return
    assert wire.decode_any_request(load_json(dump_json(encode(request)))) == request
    given_names = {key for key, element in value.items() if element is not None}
    assert given_names <= {
        field.name for field in dataclasses.fields(request)
    }  # nothing accepted and ignored


@given(st.binary(max_size=200) | any_json().map(lambda value: json.dumps(value).encode()))
@example(b'{"a": NaN}')
@example(b"-Infinity")
@example(b"1e999")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"1" * 5000)
@example(b'"\\ud800"')
@example(b'{"\\udfff": 1}')
@example(b"\xef\xbb\xbf{}")
@example(b"\xff\xfe{\x00}\x00")
@example(b"")
def test_any_bytes_as_json(body: bytes) -> None:
    try:
        value = load_json(body)
    except MalformedBodyError:
        return
    assert value == json.loads(body)
    assert load_json(dump_json(value)) == value


@given(st.text(max_size=50))
def test_any_text_as_json(text: str) -> None:
    try:
        load_json(text)
    except MalformedBodyError as error:
        dump_json(error.to_body())


def test_lone_surrogates_in_a_text_frame_are_malformed() -> None:
    with pytest.raises(MalformedBodyError, match="surrogate"):
        load_json('{"a": "\ud800"}')


@pytest.mark.parametrize("escaped", [r'"\ud83d\ude00"', r'"\\ud800"', r'"\u00e9"'])
def test_escapes_that_are_whole_characters_are_read(escaped: str) -> None:
    assert load_json(escaped) == json.loads(escaped)


def test_size_is_counted_in_bytes_of_utf8() -> None:
    body = '"' + "é" * 10 + '"'
    assert load_json(body, max_bytes=22) == load_json(body.encode(), max_bytes=22)
    for form in (body, body.encode()):
        with pytest.raises(BodyTooLargeError, match="22 bytes"):
            load_json(form, max_bytes=21)


def test_the_deepest_nesting() -> None:
    def nested(levels: int) -> bytes:
        return b"[" * levels + b"]" * levels

    load_json(nested(limits.MAX_JSON_DEPTH))
    with pytest.raises(MalformedBodyError, match="deeper"):
        load_json(nested(limits.MAX_JSON_DEPTH + 1))


# -- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_encode_and_decode_give_the_same(cls: type) -> None:
    @given(instances(cls))
    def check(value: Any) -> None:
        assert wire.decode(cls, load_json(dump_json(encode(value)))) == value

    check()


@given(instances(wire.GenerateMessage))
def test_generate_messages_give_the_same(message: wire.GenerateMessage) -> None:
    assert wire.decode_client_message(load_json(dump_json(encode(message)))) == message


@given(instances(wire.ChatRequest))
def test_a_bare_chat_request_is_taken_as_generate(request: wire.ChatRequest) -> None:
    message = wire.decode_client_message(encode(request))
    assert isinstance(message, wire.GenerateMessage)
    assert message.request == request


def test_fields_at_their_default_are_not_sent() -> None:
    assert encode(chat()) == CHAT
    assert encode(chat(longshore={})) == CHAT
    assert encode(chat(temperature=1, n=1, stream=False, stop=None)) == CHAT


# -- bounds ------------------------------------------------------------------------------------


def message_of(parts: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": ""}] * parts}


def image_of(chars: int) -> list[dict[str, Any]]:
    url = "data:image/png;base64,".ljust(chars, "A")
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def mark_of(**fields: int) -> dict[str, Any]:
    mark = {"segment": 0, "offset": 0, "token_id": 0, "byte_offset": 0, "model_digest": "0" * 16} | fields
    return {"mark": mark}


def report_of(**fields: Any) -> Any:
    base = {"request_id": "r", "served_by": "core", "node": "n", "model_digest": "0" * 16}
    return wire.decode(wire.Report, base | fields)


def manifest_file(size_bytes: int) -> Any:
    return wire.decode(wire.BundleFile, {"path": "a", "sha256": "0" * 64, "size_bytes": size_bytes})


def images_of(count: int) -> list[dict[str, Any]]:
    """Over two messages, since the parts of one have a bound of their own."""
    [part] = image_of(30)[0]["content"]
    split = count // 2
    return [{"role": "user", "content": [part] * number} for number in (split, count - split)]


ATTEMPT = {"tier": "edge", "outcome": "failed", "reason": "x"}
HOP = {"tier": "edge", "node": "n"}
SEGMENT = {"number": 0, "tier": "core", "node": "n", "model_digest": "0" * 16, "offset": 0}


def files_of(count: int) -> None:
    file = {"sha256": "0" * 64, "size_bytes": 1}
    body = {
        "name": "m",
        "version": 1,
        "model_digest": "0" * 16,
        "tokenizer_file": "f0",
        "opset": 21,
        "files": [file | {"path": f"f{n}"} for n in range(count)],
        "variants": [{"name": "v", "file": "f0", "precision": "fp32"}],
        "kv": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "max_tokens": 1},
        "chat_template": {"jinja": "", "roles": {}},
        "eos_token_ids": [1],
        "min_onnxruntime": "1.24",
    }
    wire.decode(wire.Manifest, body)


# What uses each bound, as a function of the number that the bound is on.
AT_BOUND: dict[str, Callable[[int], Any]] = {
    "MAX_JSON_DEPTH": lambda n: load_json(b"[" * n + b"]" * n),
    "MAX_BODY_BYTES": lambda n: load_json(b'"' + b"a" * (n - 2) + b'"'),
    "MAX_MODEL_CHARS": lambda n: chat(model="m" * n),
    "MAX_MESSAGES": lambda n: chat(messages=CHAT["messages"] * n),
    "MAX_CONTENT_PARTS": lambda n: chat(messages=[message_of(n)]),
    "MAX_TEXT_CHARS": lambda n: wire.decode_completion_request({"model": "m", "prompt": "x" * n}),
    "MAX_IMAGE_URL_CHARS": lambda n: chat(messages=image_of(n)),
    "MAX_IMAGES": lambda n: chat(messages=images_of(n)),
    "MAX_PROMPTS": lambda n: wire.decode_completion_request({"model": "m", "prompt": ["p"] * n}),
    "MAX_PROMPT_TOKENS": lambda n: wire.decode_completion_request({"model": "m", "prompt": [1] * n}),
    "MAX_TOKEN_ID": lambda n: chat(logit_bias={str(n): 1}),
    "MAX_TOKENS": lambda n: chat(max_tokens=n),
    "MAX_CHOICES": lambda n: chat(n=n),
    "MAX_STOP_STRINGS": lambda n: chat(stop=["s"] * n),
    "MAX_STOP_CHARS": lambda n: chat(stop="s" * n),
    "MAX_LOGIT_BIAS": lambda n: chat(logit_bias={str(i): 1 for i in range(n)}),
    "MAX_TOP_LOGPROBS": lambda n: chat(logprobs=True, top_logprobs=n),
    "MAX_TOP_K": lambda n: chat(top_k=n),
    "MAX_METADATA": lambda n: chat(metadata={str(i): "" for i in range(n)}),
    "MAX_METADATA_CHARS": lambda n: chat(metadata={"a": "x" * n}),
    "MAX_DEADLINE_MS": lambda n: chat(longshore={"deadline_ms": n}),
    "MAX_CREDIT": lambda n: wire.decode_client_message({"type": "credit", "id": "a", "tokens": n}),
    "MAX_ATTEMPTS": lambda n: report_of(attempts=[ATTEMPT] * n),
    "MAX_HOPS": lambda n: report_of(hops=[HOP] * n),
    "MAX_SEGMENTS": lambda n: report_of(segments=[SEGMENT] * n),
    "MAX_MANIFEST_BYTES": lambda n: load_json(b" " * (n - 1) + b"1", max_bytes=limits.MAX_MANIFEST_BYTES),
    "MAX_BUNDLE_FILES": files_of,
    "MAX_BUNDLE_FILE_BYTES": manifest_file,
}
# Tested where they are enforced: the SSE decoder, and the servers' sockets.
ELSEWHERE = {"MAX_EVENT_BYTES", "MAX_WS_MESSAGE_BYTES", "MAX_GENERATIONS_PER_SOCKET"}


def test_every_bound_has_a_test() -> None:
    names = {name for name in vars(limits) if name.startswith("MAX_")}
    assert names == set(AT_BOUND) | ELSEWHERE


@pytest.mark.parametrize("name", AT_BOUND)
def test_the_bound_is_accepted_and_one_more_is_refused(name: str) -> None:
    bound = getattr(limits, name)
    AT_BOUND[name](bound)
    with pytest.raises((OutOfRangeError, BodyTooLargeError, MalformedBodyError)):
        AT_BOUND[name](bound + 1)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("max_tokens", 1, limits.MAX_TOKENS),
        ("max_completion_tokens", 1, limits.MAX_TOKENS),
        ("min_tokens", 0, limits.MAX_TOKENS),
        ("temperature", 0, 2),
        ("min_p", 0, 1),
        ("top_k", 0, limits.MAX_TOP_K),
        ("n", 1, limits.MAX_CHOICES),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("seed", -(2**63), 2**63 - 1),
    ],
)
def test_ranges_of_numbers(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(chat(**{name: value}), name) == value
    for value in (low - 1, high + 1, 10**30):
        refused(OutOfRangeError, name, **{name: value})
    if name in {"temperature", "min_p", "presence_penalty", "frequency_penalty"}:
        refused(OutOfRangeError, name, **{name: math.nextafter(high, math.inf)})
        refused(OutOfRangeError, name, **{name: math.nextafter(low, -math.inf)})
    for value in ("1", [], {}, True):
        refused(InvalidRequestError, name, **{name: value})


@pytest.mark.parametrize("name", ["top_p", "repetition_penalty"])
def test_ranges_that_leave_out_zero(name: str) -> None:
    refused(OutOfRangeError, name, **{name: 0})
    refused(OutOfRangeError, name, **{name: -0.0})
    assert getattr(chat(**{name: 5e-324}), name) == 5e-324


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    refused(OutOfRangeError, "temperature", temperature=value)
    refused(OutOfRangeError, "logit_bias.7", logit_bias={"7": value})


def test_a_fraction_is_no_whole_number() -> None:
    refused(InvalidRequestError, "max_tokens", max_tokens=1.5)
    refused(InvalidRequestError, "seed", seed=1.0)


@pytest.mark.parametrize(
    "key", ["-1", "01", "1.0", " 1", "x", "", "٣", str(limits.MAX_TOKEN_ID + 1), "9" * 5000]
)
def test_logit_bias_keys_are_token_ids(key: str) -> None:
    refused(OutOfRangeError, "logit_bias", logit_bias={key: 1})


def test_a_fault_is_named_by_its_path() -> None:
    turns = [
        CHAT["messages"][0],
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": 5}]},
    ]
    refused(InvalidRequestError, "messages[1].content[1].text", messages=turns)
    refused(InvalidRequestError, "messages[0].role", messages=[{"content": "x"}])
    refused(OutOfRangeError, "messages[0].role", messages=[{"role": "tool", "content": "x"}])
    refused(OutOfRangeError, "longshore.request_id", longshore={"request_id": "A" * 32})


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (["a", 5], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1], [2, "x"]], "prompt[1][1]"),
        ([1, -5], "prompt[1]"),
        ([[1]] * 17, "prompt"),
        ([], "prompt"),
        (5, "prompt"),
        (None, "prompt"),
    ],
)
def test_the_closest_form_of_a_prompt_says_what_is_wrong(prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode_completion_request({"model": "m", "prompt": prompt})
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_forms_of_a_prompt(prompt: Any) -> None:
    prompts = wire.decode_completion_request({"model": "m", "prompt": prompt}).prompts
    assert len(prompts) == (1 if prompt in ("a", [1, 2]) else 2)


# -- unknown, unsupported, null, neutral -------------------------------------------------------


@pytest.mark.parametrize("name", ["temprature", "", "Model", "top_P", "a" * 1000, "\ud800", "messages[0]"])
def test_unknown_parameters(name: str) -> None:
    with pytest.raises(UnknownParameterError) as caught:
        chat(**{name: 1})
    dump_json(caught.value.to_body())


@pytest.mark.parametrize("name", sorted(wire.GenerationRequest.UNSUPPORTED))
def test_parameters_of_openai_that_are_not_carried_out(name: str) -> None:
    refused(UnsupportedParameterError, name, **{name: 1})
    assert chat(**{name: None}) == chat()  # null is "not given"


def test_choices_that_are_not_carried_out() -> None:
    refused(OutOfRangeError, "store", store=True)
    refused(OutOfRangeError, "response_format.type", response_format={"type": "json_object"})
    refused(
        UnsupportedParameterError,
        "messages[0].tool_calls",
        messages=[CHAT["messages"][0] | {"tool_calls": []}],
    )
    refused(UnknownParameterError, "messages[0].weight", messages=[CHAT["messages"][0] | {"weight": 1}])


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(wire.ChatRequest)))
def test_null_is_not_given_where_a_field_is_optional(name: str) -> None:
    if name in CHAT:
        refused(InvalidRequestError, name, **{name: None})
    else:
        assert chat(**{name: None}) == chat()


def test_neutral_fields_are_accepted() -> None:
    assert chat(user="u", metadata={"a": "b"}, store=False).lane == "standard"


def test_lanes() -> None:
    assert chat(service_tier="priority").lane == "vip"
    assert chat(service_tier="flex").lane == "batch"
    assert chat(service_tier="flex", longshore={"lane": "vip"}).lane == "vip"


def test_rules_between_fields() -> None:
    going_on = {"continue_from": {"token_ids": [1]}}
    refused(InvalidRequestError, "stream_options", stream_options={"include_usage": True})
    refused(InvalidRequestError, "top_logprobs", top_logprobs=3)
    refused(InvalidRequestError, "max_completion_tokens", max_tokens=1, max_completion_tokens=1)
    refused(InvalidRequestError, "n", n=2, longshore=going_on)
    with pytest.raises(InvalidRequestError, match="one prompt"):
        wire.decode_completion_request(COMPLETION | {"prompt": ["a", "b"], "longshore": going_on})


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "file:///etc/passwd", "data:text/html,x", ""])
def test_images_are_never_fetched(url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    refused(
        InvalidRequestError,
        "messages[0].content[0].image_url.url",
        messages=[{"role": "user", "content": content}],
    )


def test_a_part_holds_the_field_of_its_type() -> None:
    for part in (
        {"type": "text"},
        {"type": "image_url", "text": "x"},
        {"type": "text", "text": "x", "image_url": None},
    ):
        content = [part]
        if part.get("text") and part["type"] == "text":
            assert chat(messages=[{"role": "user", "content": content}]).messages[0].text == "x"
        else:
            refused(
                InvalidRequestError, "messages[0].content[0]", messages=[{"role": "user", "content": content}]
            )


# -- WebSocket messages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [[], None, "x", 5, {}, {"type": "nope"}, {"type": 5}, {"type": None}, {"type": "token"}]
)
def test_messages_outside_the_table(body: Any) -> None:
    with pytest.raises(BadMessageError):
        wire.decode_client_message(body)


def test_a_message_names_its_field_at_fault() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode_client_message({"type": "resume", "id": "a", "request_id": "0" * 32})
    assert caught.value.param == "offset"
    with pytest.raises(UnknownParameterError):
        wire.decode_client_message({"type": "cancel", "id": "a", "why": "x"})


def test_a_newer_server_may_send_more_fields() -> None:
    message = wire.decode_server_message({"type": "pong", "nonce": "n", "later": {"a": 1}})
    assert message == wire.PongMessage("n")
    with pytest.raises(ProtocolError, match="nonce"):
        wire.decode_server_message({"type": "pong", "nonce": 5})


# -- manifests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../a",
        "/a",
        "a/../b",
        ".a",
        "a/.b",
        "a//b",
        "a\\b",
        "C:a",
        "a/",
        "",
        "a\n",
        "é",
        "Manifest.JSON",
        "manifest.sig",
        "a" * 201,
    ],
)
def test_paths_that_could_leave_the_bundle(path: str) -> None:
    with pytest.raises(OutOfRangeError):
        wire.decode(wire.BundleFile, {"path": path, "size_bytes": 1, "sha256": "0" * 64})


def changed_manifest(manifest: wire.Manifest, **fields: Any) -> bytes:
    return dump_json(encode(manifest) | fields)


@given(instances(wire.Manifest))
def test_rules_of_a_manifest(manifest: wire.Manifest) -> None:
    assert wire.load_manifest(changed_manifest(manifest)) == manifest
    files = [encode(file) for file in manifest.files]
    for bad_files in (
        [*files, files[0]],
        [*files, files[0] | {"path": "PART0.bin"}],
        [*files, files[0] | {"path": "Part0.bin/inner"}],
        [files[0] | {"path": "other"}],
        [files[0] | {"chunk_bytes": 4096, "size_bytes": 9000, "chunk_sha256": ["0" * 64]}],
    ):
        with pytest.raises(BundleDamagedError):
            wire.load_manifest(changed_manifest(manifest, files=bad_files))
    variant = encode(manifest.variants[0])
    for bad in (
        {"variants": [variant, variant]},
        {"variants": [variant | {"prefill_file": "nowhere.onnx"}]},
        {"version": 0},
        {"min_onnxruntime": "\N{ARABIC-INDIC DIGIT ONE}"},
        {"eos_token_ids": [-1]},
    ):
        with pytest.raises(BundleDamagedError):
            wire.load_manifest(changed_manifest(manifest, **bad))


@given(instances(wire.Manifest).filter(lambda manifest: manifest.vision is not None))
def test_rules_of_an_encoder(manifest: wire.Manifest) -> None:
    assert manifest.vision is not None
    vision, buckets = encode(manifest.vision), [encode(bucket) for bucket in manifest.vision_buckets]
    unit = manifest.vision.unit_px
    for bad in (
        {"vision": vision | {"encoder_file": "nowhere.onnx"}},
        {"vision": vision | {"encoder_file": "../part0.bin"}},
        {"vision": vision | {"image_token_id": -1}},
        {"vision": vision | {"unit_px": 0}},
        {"vision": vision | {"unit_px": 1025}},
        {"vision": vision | {"hidden_size": 65537}},
        {"vision": vision | {"more": 1}},
        {"vision": {name: vision[name] for name in vision if name != "hidden_size"}},
        {"vision_buckets": []},
        {"vision_buckets": [*buckets, buckets[0]]},
        {"vision_buckets": [*buckets, {"width_px": unit, "height_px": 2 * unit, "num_tokens": 3}]},
        {"vision_buckets": [*buckets, {"width_px": 4 * unit + 1, "height_px": unit, "num_tokens": 4}]},
    ):
        with pytest.raises(BundleDamagedError):
            wire.load_manifest(changed_manifest(manifest, **bad))
    without = {name: value for name, value in encode(manifest).items() if name != "vision"}
    assert wire.load_manifest(dump_json(without)).vision is None  # sizes alone are what older bundles have
