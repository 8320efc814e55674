"""The quality gate: measures variants on a held-out task and takes the smallest that loses little enough.

Answers come from the device runtime itself, greedily, since that is what devices will run. Trains nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.device.calibrate import measure
from longshore.device.encoder import JobImage, PictureEncoder
from longshore.device.generate import GeneratedToken, Generator, Job
from longshore.device.sampling import SamplingSettings
from longshore.device.session import DecoderSession
from longshore.errors import ExportError
from longshore.wire import KvGeometry
from longshore_export.checkpoint import AnyCheckpoint
from longshore_export.graph import Rounding
from longshore_export.quantize_recipe import FP32, INT8, Recipe
from longshore_export.task import Example
from longshore_export.variant import build_variant
from longshore_export.vision.task import Picture
from longshore_export.vision.variant import build_encoder_variant

MAX_ANSWER_TOKENS = 256
SPEED_BUDGET_S = 0.4
PREFILL_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant and how its weights are rounded; `method` is "rtn" or "gptq"."""

    variant: str
    method: str
    rounding: Rounding
    recipe: Recipe | None = None  # of a variant that was made for this model

    @property
    def wanted(self) -> str | Recipe:
        """What the export takes."""
        return self.recipe or self.variant

    @property
    def label(self) -> str:
        return self.variant if self.variant == FP32.name else f"{self.variant} {self.method}"


@dataclass(frozen=True, slots=True)
class Row:
    """What one candidate was measured at; `points_lost` is in percent points against fp32."""

    candidate: Candidate
    size_bytes: int
    bits_per_weight: float
    exact_match: float
    points_lost: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """A picture encoder, before the chosen decoder; `points_lost` against fp32 of both."""

    name: str
    size_bytes: int
    exact_match: float
    points_lost: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The table and the row chosen from it, and the same of the picture encoder, of a model that sees."""

    rows: tuple[Row, ...]
    chosen: Row
    num_examples: int
    max_points_lost: float
    encoder_rows: tuple[EncoderRow, ...] = ()
    encoder: str = FP32.name

    def capabilities(self) -> Mapping[str, str | int | float | bool]:
        """What the manifest says of it."""
        return {
            "gate_max_points_lost": self.max_points_lost,
            "gate_points_lost": round(self._last.points_lost, 3),
            "gate_exact_match": round(self._last.exact_match, 5),
            "gate_num_examples": self.num_examples,
            "rounding": self.chosen.candidate.method,
            "bits_per_weight": round(self.chosen.bits_per_weight, 3),
        }

    @property
    def _last(self) -> Row | EncoderRow:
        """What was measured of all that was chosen."""
        return next((row for row in self.encoder_rows if row.name == self.encoder), self.chosen)

    def table(self) -> str:
        """As printed; the chosen rows have an arrow."""
        head = f"{'variant':<16}{'bytes':>12}{'bits/w':>8}{'exact':>8}{'lost':>7}"
        head += f"{'decode/s':>10}{'prefill/s':>11}"
        encoders = (
            f"encoder {row.name:<8}{row.size_bytes:>12}{'':>8}{row.exact_match:>8.1%}{row.points_lost:>7.1f}"
            + "  <-" * (row.name == self.encoder)
            for row in self.encoder_rows
        )
        return "\n".join([head, *(self._line(row) for row in self.rows), *encoders])

    def _line(self, row: Row) -> str:
        mark = "  <-" if row is self.chosen else ""
        return (
            f"{row.candidate.label:<16}{row.size_bytes:>12}{row.bits_per_weight:>8.2f}"
            f"{row.exact_match:>8.1%}{row.points_lost:>7.1f}{row.decode_tokens_per_s:>10.0f}"
            f"{row.prefill_tokens_per_s:>11.0f}{mark}"
        )


def pass_gate(
    checkpoint: AnyCheckpoint,
    tokenizer: Any,
    task: Sequence[Example],
    candidates: Sequence[Candidate],
    max_points_lost: float,
    work_dir: Path,
) -> Verdict:
    """Measure the candidates, fp32 first; the smallest within `max_points_lost` percent points is chosen.

    fp32 itself always passes. Raises ExportError where even fp32 gets nothing right, for then the task says
    nothing, and ParityError where a graph is wrong.
    """
    assert candidates[0].variant == FP32.name
    rows: list[Row] = []
    seen = _encoder(checkpoint, FP32.name, work_dir)
    for candidate in candidates:
        exact_match = rows[0].exact_match if rows else None
        rows.append(_measured(checkpoint, tokenizer, task, candidate, work_dir, exact_match, seen))
        if not rows[0].exact_match:
            raise ExportError("the model in fp32 gets no answer of the task right")
    passed = [row for row in rows if row.points_lost <= max_points_lost + 1e-9]
    chosen = min(passed, key=lambda row: row.size_bytes)
    if seen is None:
        return Verdict(tuple(rows), chosen, len(task), max_points_lost)
    encoders = [EncoderRow(FP32.name, seen[1], chosen.exact_match, chosen.points_lost)]
    small = _encoder(checkpoint, INT8.name, work_dir)
    assert small is not None
    row = _measured(checkpoint, tokenizer, task, chosen.candidate, work_dir, rows[0].exact_match, small)
    encoders.append(EncoderRow(INT8.name, small[1], row.exact_match, row.points_lost))
    fits = row.points_lost <= max_points_lost + 1e-9
    return Verdict(
        tuple(rows), chosen, len(task), max_points_lost, tuple(encoders), INT8.name if fits else FP32.name
    )


def _encoder(checkpoint: AnyCheckpoint, name: str, work_dir: Path) -> tuple[PictureEncoder, int] | None:
    """(the picture encoder, the bytes of its file), of a model that sees."""
    if checkpoint.vision is None:
        return None
    built = build_encoder_variant(checkpoint.vision, name, work_dir / f"gate.{name}.vision.onnx")
    encoder = PictureEncoder(built.file, checkpoint.vision.shape.geometry, num_threads=1)
    return encoder, built.file.stat().st_size


def _measured(
    checkpoint: AnyCheckpoint,
    tokenizer: Any,
    task: Sequence[Example],
    candidate: Candidate,
    work_dir: Path,
    reference: float | None,
    seen: tuple[PictureEncoder, int] | None,
) -> Row:
    file = work_dir / "gate.onnx"
    built = build_variant(checkpoint, candidate.wanted, file, candidate.rounding)
    size_bytes = built.size_bytes
    geometry = checkpoint.vision.shape.geometry if checkpoint.vision else None
    session = DecoderSession(file, kv_geometry(checkpoint), 1, built.prefill_file, geometry)
    prefill, decode = measure(session, SPEED_BUDGET_S)
    encoder = seen[0] if seen else None
    answers = greedy_answers(session, tokenizer, task, checkpoint.eos_token_ids, encoder)
    exact_match = sum(example.is_right(answer) for example, answer in zip(task, answers, strict=True)) / len(
        task
    )
    lost = 0.0 if reference is None else (reference - exact_match) * 100
    num_weights = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return Row(candidate, size_bytes, 8 * size_bytes / num_weights, exact_match, lost, decode, prefill)


def kv_geometry(checkpoint: AnyCheckpoint) -> KvGeometry:
    shape = checkpoint.shape
    return KvGeometry(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.max_tokens)


def greedy_answers(
    session: DecoderSession,
    tokenizer: Any,
    task: Sequence[Example],
    eos_token_ids: tuple[int, ...],
    encoder: PictureEncoder | None = None,
) -> Iterator[str]:
    """The device runtime's answers, one after another."""
    generator = Generator(session, PREFILL_CHUNK_TOKENS, encoder=encoder)
    for example in task:
        told: list[GeneratedToken] = []
        room = session.max_tokens - len(example.prompt)
        generator.run(
            Job(
                prompt=example.prompt,
                generated=(),
                max_tokens=min(MAX_ANSWER_TOKENS, room),
                stop_token_ids=eos_token_ids,
                sampling=SamplingSettings(temperature=0.0),
                images=tuple(map(_job_image, example.pictures)),
            ),
            told.append,
            lambda: False,
        )
        yield tokenizer.decode([token.sampled.token_id for token in told], skip_special_tokens=True)


def _job_image(picture: Picture) -> JobImage:
    bucket, digest = picture.bucket, hashlib.sha256(picture.data).hexdigest()
    return JobImage(picture.data, digest, bucket.width_px, bucket.height_px, bucket.num_tokens)
