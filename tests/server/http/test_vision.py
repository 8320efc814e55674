"""A core whose model sees, over its real socket: OpenAI-shaped pictures, bad ones named, none mixed up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import openai
import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText
from websockets.asyncio.client import connect

from edge.harness import KEY as EDGE_KEY
from edge.harness import CoreProcess, edge_toml, start_edge
from longshore import Client
from longshore.images import pixel_values
from longshore.tier_process import TierProcess
from shop.models import MODELS
from shop.picture_questions import PICTURE_KINDS, ask, picture_messages
from shop.pictures import Photo, draw_photo, make_photo

MODEL = "shop-vision"
FOLDER = MODELS / MODEL
KEY = "key"
CHAT = "/v1/chat/completions"
QUESTION = "What is it?"
IMAGE = 1024


@dataclass(frozen=True)
class SeeingCore:
    """Where it listens, and its process."""

    url: str
    pid: int

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.pid).children(recursive=True)
        return next(each for each in children if "longshore_server.engine_process" in each.cmdline())


@pytest.fixture(scope="module")
def core() -> Iterator[SeeingCore]:
    flags = ["--model", str(FOLDER), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    environment = {"OMP_NUM_THREADS": "1", "LONGSHORE_API_KEY": KEY, "LONGSHORE_CORE_NUM_THREADS": "1"}
    with TierProcess(["serve", *flags], environment=environment) as process:
        yield SeeingCore(process.url, process.pid)


@pytest.fixture
async def http(core: SeeingCore) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(base_url=core.url, headers=headers, timeout=60) as client:
        yield client


def photo(seed: int) -> Photo:
    """One that the model was not trained on."""
    return make_photo(Random(seed), "heldout")


def file_of(seed: int, side_px: int | None = 128) -> bytes:
    """A photo as a PNG, at its own size where `side_px` is None."""
    image, out = draw_photo(photo(seed)), io.BytesIO()
    if side_px is not None:
        image = image.resize((side_px, side_px))
    image.save(out, "PNG")
    return out.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def body(*urls: str, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    content = [*map(part, urls), {"type": "text", "text": text}]
    values = {"model": MODEL, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return values | {"messages": [{"role": "user", "content": content}]} | fields


def expected(data: bytes, side_px: int, num_tokens: int = 12) -> str:
    """The answer of transformers' own generate."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    shown = "<image>" * (side_px // 16) ** 2
    ids = torch.tensor([tokenizer.encode(f"<|user|>{shown}{QUESTION}<|end|><|assistant|>").ids])
    with torch.inference_mode():
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(pixel_values(data, side_px, side_px))[None, None],
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return tokenizer.decode(answer[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def test_the_openai_client_shows_a_picture(core: SeeingCore) -> None:
    """A photo larger than the largest size, through the official client: whole, streamed, twice at once."""
    data = file_of(1, None)
    with openai.OpenAI(base_url=f"{core.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": [part(url_of(data)), {"type": "text", "text": QUESTION}]}
            ],
            "temperature": 0,
            "max_tokens": 12,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.chat.completions.create(**asked)
        pieces = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        both = client.chat.completions.create(**asked, n=2)
        (card,) = client.models.list().data
    text = whole.choices[0].message.content
    assert text == expected(data, 320)
    assert [streamed, *(choice.message.content for choice in both.choices)] == [text] * 3
    assert whole.usage is not None and whole.usage.prompt_tokens > 400
    assert whole.model_extra is not None
    assert whole.model_extra["longshore"]["images"] == [
        {"width_px": 320, "height_px": 320, "num_tokens": 400, "why": "full"}
    ]
    assert card.model_extra is not None and card.model_extra["input_modalities"] == ["text", "image"]


async def test_photos_that_it_never_saw_are_answered_rightly(http: httpx2.AsyncClient) -> None:
    rng = Random(7)
    questions = [ask(rng, photo(seed), PICTURE_KINDS[seed % len(PICTURE_KINDS)]) for seed in range(8)]
    asked = (
        body(url_of(file_of(seed, None)), text=question.text, ignore_eos=False, max_tokens=24)
        for seed, question in enumerate(questions)
    )
    answers = await asyncio.gather(*(_answer(http, **each) for each in asked))
    num_right = sum(question.is_correct(text) for question, (text, _) in zip(questions, answers, strict=True))
    assert num_right >= 7, [
        (question.answer, text) for question, (text, _) in zip(questions, answers, strict=True)
    ]


async def _answer(http: httpx2.AsyncClient, **fields: Any) -> tuple[str, int]:
    """The text, and how many of the prompt's tokens were known before."""
    response = await http.post(CHAT, json=fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return answer["choices"][0]["message"]["content"], cached


async def test_pictures_and_texts_at_once_do_not_mix(http: httpx2.AsyncClient) -> None:
    urls = [url_of(file_of(10 + seed, side_px)) for seed, side_px in enumerate((64, 96, 128, 128))]
    alone = [(await _answer(http, **body(url)))[0] for url in urls]
    assert len(set(alone)) > 1
    words = (await _answer(http, **body(text="hello")))[0]
    asked = [*(body(url) for url in urls), body(text="hello")] * 2
    together = await asyncio.gather(*(_answer(http, **each) for each in asked))
    assert [text for text, _ in together] == [*alone, words] * 2
    assert all(cached for _, cached in together[:4])  # each picture is known from before
    first, second = url_of(file_of(20)), url_of(file_of(21))
    both = await _answer(http, **body(first, second))
    assert await _answer(http, **body(second, first)) != both


async def test_little_detail_is_the_smallest_size(http: httpx2.AsyncClient) -> None:
    shown = [part(url_of(file_of(1)), detail=detail) for detail in ("low", "high")]
    response = await http.post(CHAT, json=body() | {"messages": [{"role": "user", "content": shown}]})
    uses = response.json()["longshore"]["images"]
    assert [(use["width_px"], use["why"]) for use in uses] == [(64, "asked"), (128, "full")]


async def test_a_picture_over_the_websocket(core: SeeingCore, http: httpx2.AsyncClient) -> None:
    asked = body(url_of(file_of(3)))
    text, _ = await _answer(http, **asked)
    headers = {"authorization": f"Bearer {KEY}"}
    async with connect(f"ws{core.url[4:]}/v1/stream", additional_headers=headers) as socket:
        await socket.send(json.dumps(asked | {"stream": True}))
        pieces = []
        async with asyncio.timeout(30):
            while (message := json.loads(await socket.recv()))["type"] != "finish":
                pieces.append(message["text"])
    assert "".join(pieces) + message.get("text", "") == text


async def test_more_pictures_than_fit_are_read_smaller(http: httpx2.AsyncClient) -> None:
    """Of 1024 tokens of context, 40 pictures of 64 tokens leave nothing; each still has 16."""
    response = await http.post(CHAT, json=body(*[url_of(file_of(4))] * 40))
    assert response.status_code == 200, response.text
    uses = response.json()["longshore"]["images"]
    assert {use["why"] for use in uses} >= {"context"}
    assert sum(use["num_tokens"] for use in uses) <= 1024 - 64


def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD = url_of(file_of(1, 64))
FIRST = "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        (body("https://example.org/cat.png"), "invalid_request", f"{FIRST}.url"),
        (body("file:///etc/passwd"), "invalid_request", f"{FIRST}.url"),
        (body("data:text/html;base64,AAAA"), "invalid_request", f"{FIRST}.url"),
        (body("data:image/png;base64,%%%%"), "invalid_image", FIRST),
        (body("data:image/png,plain"), "invalid_image", FIRST),
        (body("data:image/png;base64,"), "invalid_image", FIRST),
        (body(url_of(b"not a picture at all")), "invalid_image", FIRST),
        (body(url_of(b"<svg/>", "svg+xml")), "invalid_image", FIRST),
        (body(url_of(file_of(1)[:200])), "invalid_image", FIRST),
        (body(url_of(bomb())), "invalid_image", FIRST),
        (body(GOOD, url_of(b"x")), "invalid_image", "messages[0].content[1].image_url"),
        (body(GOOD) | {"messages": [{"role": "user", "content": [part(GOOD, detail="huge")]}]},
         "out_of_range", f"{FIRST}.detail"),
        (body() | {"messages": [{"role": "user", "content": [part(GOOD)] * 40}] * 2},
         "out_of_range", "messages"),
        (body(GOOD, text="word " * 2000), "context_length_exceeded", "messages"),
        (body(*[GOOD] * 60), None, None),  # of 16 tokens each: these fit
    ],
)  # fmt: skip
async def test_bad_pictures_are_refused_by_name(http: httpx2.AsyncClient, asked, code, param) -> None:
    response = await http.post(CHAT, json=asked)
    answer = response.json()
    if code is None:
        assert response.status_code == 200, answer
        return
    assert response.status_code == 400, answer
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert (await http.post(CHAT, json=body(GOOD))).status_code == 200


@pytest.mark.parametrize("prompt", ["a <image> b", [5, IMAGE, 6]])
async def test_a_raw_prompt_cannot_name_a_picture_that_is_not_there(http, prompt) -> None:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    response = await http.post("/v1/completions", json=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    response = await http.post("/v1/completions", json=asked | {"prompt": "hello"})
    assert response.status_code == 200


def test_the_whole_way_from_the_sdk_through_an_edge(core: SeeingCore, tmp_path: Path) -> None:
    """A PIL image in; the core's answer out, and the second time the edge's, from its cache."""
    question = ask(Random(1), photo(31), "product")
    image = {"type": "image", "image": draw_photo(photo(31))}
    behind = CoreProcess("core-1", int(core.url.rpartition(":")[2]), None)  # type: ignore[arg-type]
    with (
        start_edge(tmp_path, edge_toml([behind], core_extra=f'api_key = "{KEY}"')) as edge,
        Client(edge_url=edge.url, api_key=EDGE_KEY) as client,
    ):
        first, second = (
            client.chat.completions.create(
                model=MODEL, messages=picture_messages(question, image), temperature=0
            )
            for _ in range(2)
        )
    assert question.is_correct(first.choices[0].message.content or "")
    assert second.choices == first.choices
    for answer, tier in ((first, "core"), (second, "edge")):
        assert answer.longshore is not None
        assert (answer.longshore.served_by, answer.longshore.cached) == (tier, tier == "edge")
        assert [use.width_px for use in answer.longshore.images] == [320]


async def test_answers_to_a_picture_survive_the_engines_death(core: SeeingCore, http) -> None:
    """Several and long ones, since a compiled engine is through with a single one before it can be killed."""
    asked = body(url_of(file_of(6)), max_tokens=800, n=6)
    undisturbed = (await http.post(CHAT, json=asked)).json()["choices"]
    engine, texts = core.engine(), [""] * 6
    async with http.stream("POST", CHAT, json=asked | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not any(texts) and engine.is_running():
                engine.kill()
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
            report = (chunk.get("longshore") or {}).get("report")
    assert texts == [choice["message"]["content"] for choice in undisturbed]
    assert report["resumed"] is True
