"""Accuracy and time against resolution: `python -m shop.measure_pictures BUNDLE --out TABLE --picture SVG`.

Runs an exported bundle through the device runtime's own loop, on one thread, at every size of its manifest.
Times are CPU time, which other programs on the machine do not lengthen. Trains nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from longshore.bundle import load_bundle
from longshore.device.encoder import JobImage, PictureEncoder
from longshore.device.generate import GeneratedToken, Generator, Job
from longshore.device.sampling import SamplingSettings
from longshore.device.session import DecoderSession
from longshore.images import pixel_values
from longshore.wire import Manifest, VisionBucket
from shop.picture_questions import PICTURE_KINDS, PictureKind, PictureQuestion, ask, picture_prompt
from shop.pictures import draw_photo, make_photo
from shop.sheet import split_rng

MAX_ANSWER_TOKENS = 16
NUM_TIMED = 24
WIDTH, HEIGHT, MARGIN, GAP = 420, 300, 60, 90
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One size: right answers by kind, and the median CPU milliseconds of a photo new to the runtime.

    `first_token_ms` is decoding the file, scaling, encoding, reading the prompt and the first token.
    """

    width_px: int
    height_px: int
    num_tokens: int
    num_photos: int
    correct: dict[PictureKind, int]
    encode_ms: float
    first_token_ms: float

    @property
    def overall(self) -> float:
        return sum(self.correct.values()) / (self.num_photos * len(self.correct))


class Device:
    """A bundle's graphs in this process."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        assert manifest.vision is not None, "the bundle takes no pictures"
        variant = manifest.variants[0]
        prefill = bundle / variant.prefill_file if variant.prefill_file else None
        self.encoder = PictureEncoder(bundle / manifest.vision.encoder_file, manifest.vision, 1)
        session = DecoderSession(bundle / variant.file, manifest.kv, 1, prefill, manifest.vision)
        self._generator = Generator(session, 256, encoder=self.encoder)
        self._tokenizer = Tokenizer.from_file(str(bundle / manifest.tokenizer_file))
        self._eos = manifest.eos_token_ids

    def answer(self, image: JobImage, question: PictureQuestion) -> tuple[str, float]:
        """(the greedy answer, CPU milliseconds to its first token)."""
        prompt = self._tokenizer.encode(picture_prompt(question, image.num_tokens), add_special_tokens=False)
        told: list[GeneratedToken] = []
        first_ms = 0.0
        begin = time.process_time()

        def emit(token: GeneratedToken) -> None:
            nonlocal first_ms
            first_ms = first_ms or (time.process_time() - begin) * 1e3
            told.append(token)

        job = Job(
            prompt=tuple(prompt.ids), generated=(), max_tokens=MAX_ANSWER_TOKENS, stop_token_ids=self._eos,
            sampling=SamplingSettings(temperature=0.0), images=(image,),
        )  # fmt: skip
        self._generator.run(job, emit, lambda: False)
        ids = [token.sampled.token_id for token in told]
        return self._tokenizer.decode(ids, skip_special_tokens=True), first_ms


def heldout_files(num_photos: int, seed: int) -> Iterator[tuple[bytes, dict[PictureKind, PictureQuestion]]]:
    """PNG files of held-out photos, with a question of every kind."""
    rng = split_rng("heldout", seed)
    for _ in range(num_photos):
        photo, out = make_photo(rng, "heldout"), io.BytesIO()
        draw_photo(photo).save(out, "PNG")
        yield out.getvalue(), {kind: ask(rng, photo, kind) for kind in PICTURE_KINDS}


def measure_size(device: Device, bucket: VisionBucket, num_photos: int, seed: int) -> SizeRow:
    correct = dict.fromkeys(PICTURE_KINDS, 0)
    encode_ms, first_ms = [], []
    for number, (file, questions) in enumerate(heldout_files(num_photos, seed)):
        if number < NUM_TIMED:
            encode_ms.append(_encode_ms(device, file, bucket))
        digest = hashlib.sha256(file).hexdigest()
        image = JobImage(file, digest, bucket.width_px, bucket.height_px, bucket.num_tokens)
        for index, (kind, question) in enumerate(questions.items()):
            answer, taken_ms = device.answer(image, question)
            correct[kind] += question.is_correct(answer)
            if index == 0:  # later questions find the photo's rows and its part of the prompt still there
                first_ms.append(taken_ms)
    size = (bucket.width_px, bucket.height_px, bucket.num_tokens)
    return SizeRow(
        *size, num_photos, correct, round(statistics.median(encode_ms), 2),
        round(statistics.median(first_ms), 2),
    )  # fmt: skip


def _encode_ms(device: Device, file: bytes, bucket: VisionBucket) -> float:
    planes = pixel_values(file, bucket.width_px, bucket.height_px)
    begin = time.process_time()
    device.encoder.encode(planes)
    return (time.process_time() - begin) * 1e3


def table(rows: Sequence[SizeRow]) -> str:
    """In Markdown, as docs/vision.md has it."""
    head = "| size | tokens | price | colour | product | all | overall | encoder, ms | first token, ms |\n"
    lines = [
        f"| {row.width_px} x {row.height_px} | {row.num_tokens} | "
        + "".join(f"{row.correct[kind] / row.num_photos:.1%} | " for kind in PICTURE_KINDS)
        + f"{row.overall:.1%} | {row.encode_ms:.1f} | {row.first_token_ms:.1f} |"
        for row in rows
    ]
    return head + "|---" * 9 + "|\n" + "\n".join(lines)


# -- the picture -------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = "#333") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{fill}">{text}</text>'


def _curve(points: Sequence[Point], colour: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>', *dots]


def _panel(
    left: float,
    sizes: Sequence[int],
    curves: Sequence[tuple[str, str, Sequence[float]]],
    top: float,
    unit: str,
) -> list[str]:
    """Curves (label, colour, values) from 0 to `top` over the sizes, which stand where their pixels are."""
    bottom = MARGIN + HEIGHT
    x = {size: left + WIDTH * size / (max(sizes) * 1.05) for size in sizes}
    parts = [f'<rect x="{left}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    for quarter in range(5):
        y = bottom - HEIGHT * quarter / 4
        parts.append(_text(left - 6, y + 4, f"{top * quarter / 4:.0f}{unit}", "end"))
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + WIDTH}" y2="{y}" stroke="#eee"/>')
    parts += [_text(x[size], bottom + 16, str(size)) for size in sizes]
    parts.append(
        _text(left + WIDTH / 2, bottom + 36, "width and height of the picture as it is read, pixels")
    )
    for place, (label, colour, values) in enumerate(curves):
        points = [(x[size], bottom - HEIGHT * value / top) for size, value in zip(sizes, values, strict=True)]
        parts += _curve(points, colour)
        parts.append(_text(left + 140 * place, MARGIN - 14, label, "start", colour))
    return parts


def draw(rows: Sequence[SizeRow]) -> str:
    """Two panels over one axis: right answers, and CPU time."""
    width, height = 2 * WIDTH + 2 * MARGIN + GAP, HEIGHT + 2 * MARGIN
    sizes = [row.width_px for row in rows]
    right = [
        ("price read right", "#c02020", [100 * row.correct["price"] / row.num_photos for row in rows]),
        ("colour", "#1f77b4", [100 * row.correct["colour"] / row.num_photos for row in rows]),
        ("all questions", "#333333", [100 * row.overall for row in rows]),
    ]
    slowest = max(row.first_token_ms for row in rows)
    taken = [
        ("first token", "#d98200", [row.first_token_ms for row in rows]),
        ("of it the encoder", "#2a8a4a", [row.encode_ms for row in rows]),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="12" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>'
    )
    parts = _panel(MARGIN, sizes, right, 100, "%")
    parts += _panel(MARGIN + WIDTH + GAP, sizes, taken, 40 * -(-slowest // 40), " ms")
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="shop.measure_pictures", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the rows here, a JSON object a line")
    parser.add_argument("--picture", type=Path, help="write the curves here, as SVG")
    args = parser.parse_args(argv)
    manifest = load_bundle(args.bundle)
    device = Device(args.bundle, manifest)
    rows = []
    for bucket in manifest.vision_buckets:
        rows.append(measure_size(device, bucket, args.photos, args.seed))
        print(json.dumps(asdict(rows[-1])), flush=True)
    print(table(rows))
    if args.out:
        args.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    if args.picture:
        args.picture.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
