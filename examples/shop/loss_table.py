"""What each distillation loss is worth on Shop (`python -m shop.loss_table`): one table, one picture.

Trains every variant with the command `longshore export distill` itself, from the same first weights, on the
same data, for as many steps, several at once on one GPU; scores each on held-out questions. Results are
written after each run, so that those of a table cut off by its time limit stand.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shop.chat import system_message
from shop.data import LARGEST_SHEET, SMALLEST_SHEET, TOKENS_PER_TURN, questions
from shop.question import KINDS
from shop.sheet import make_sheet, split_rng

TOKENS_PER_ITEM = 20
SIZES = range(SMALLEST_SHEET, LARGEST_SHEET + 1)
NUM_DATA_PARTS = 16
HELDOUT_SEED = 7
PROBED = ("hard", "hard + soft + hidden")
RATES = (1e-3, 3e-3)
ON_POLICY = {"on_policy_from": 0.7, "on_policy_share": 0.25, "on_policy_tokens": 24}


@dataclass(frozen=True, slots=True)
class Variant:
    """Weights of the losses, where the student starts, and which of the two students it is."""

    name: str
    hard: float = 0.5
    soft: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    on_policy: bool = False
    shape: str = "student"
    start: str = "weights"

    def settings(self) -> dict[str, float]:
        """What --set gets."""
        weights = {f"{name}_weight": getattr(self, name) for name in ("hard", "soft", "hidden", "attention")}
        return weights | (ON_POLICY if self.on_policy else {})


WIDE = "wide"  # the teacher's widths and half of its layers, as layer-drop needs
VARIANTS: tuple[Variant, ...] = (
    Variant("hard", hard=1.0),
    Variant("hard + soft", soft=0.5),
    Variant("hard + hidden", hidden=2.0),
    Variant("hard + soft + hidden", soft=0.5, hidden=2.0),
    Variant("hard + soft + attention", soft=0.5, attention=1.0),
    Variant("all four", soft=0.5, hidden=2.0, attention=1.0),
    Variant("all four, then on-policy", soft=0.5, hidden=2.0, attention=1.0, on_policy=True),
    Variant("wide: hard + soft", soft=0.5, shape=WIDE),
    Variant("wide: hard + soft, layer-drop", soft=0.5, shape=WIDE, start="layer-drop"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command and the scoring after it; everything that a worker needs."""

    variant: Variant
    seed: int
    rate: float
    teacher: Path
    work: Path
    num_steps: int
    rows: int
    max_tokens: int
    per_kind: int
    device: str

    @property
    def folder(self) -> Path:
        name = self.variant.name.replace(" ", "-").replace(",", "").replace(":", "")
        return self.work / f"{name}-{self.seed}-{self.rate:g}"

    def arguments(self) -> list[str]:
        """The command's, after `longshore`."""
        settings = {
            "num_steps": self.num_steps,
            "num_rows": self.rows,
            "max_tokens": self.max_tokens,
            "learning_rate": self.rate,
            "seed": self.seed,
            "checkpoint_every": self.num_steps,
            **self.variant.settings(),
        }
        student = self.work / "starts" / f"{self.variant.shape}-{self.seed}"
        paths = {
            "--teacher": self.teacher, "--student": student, "--data": self.work / "train.jsonl",
            "--out": self.folder,
        }  # fmt: skip
        flags = [word for flag, path in paths.items() for word in (flag, str(path))]
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value:g}")]
        cpu = ["--cpu"] if self.device == "cpu" else []
        return ["export", "distill", *flags, "--start", self.variant.start, *sets, *cpu]


# -- data and first weights --------------------------------------------------------------------------


def chat_line(rng: Any, max_tokens: int, size_power: float) -> str:
    """A chat of several turns about one training sheet, about `max_tokens` long, as the command takes it.

    A sheet of n items is as likely as n to the power of -`size_power`.
    """
    sheet = make_sheet(rng, rng.choices(SIZES, [size**-size_power for size in SIZES])[0], "train")
    num_turns = max(1, (max_tokens - TOKENS_PER_ITEM * len(sheet.items)) // TOKENS_PER_TURN)
    chat = [system_message(sheet)]
    for question in questions(rng, sheet, num_turns):
        chat += [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.answer},
        ]
    return json.dumps({"messages": chat}) + "\n"


def _part(part: int, num_lines: int, max_tokens: int, size_power: float) -> str:
    rng = split_rng("train", 500_000 + part)
    return "".join(chat_line(rng, max_tokens, size_power) for _ in range(num_lines))


def write_data(path: Path, num_lines: int, max_tokens: int, size_power: float, num_processes: int) -> None:
    """The same lines whatever `num_processes`; returns when the file is whole."""
    num_each = -(-num_lines // NUM_DATA_PARTS)
    make = functools.partial(_part, num_lines=num_each, max_tokens=max_tokens, size_power=size_power)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        path.write_text("".join(pool.map(make, range(NUM_DATA_PARTS))), encoding="utf-8")


def write_starts(folder: Path, teacher: Path, seeds: Sequence[int]) -> None:
    """First weights of both students, with the look-back heads that the Shop models start with."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from shop.models import build_model, look_back, save_model

    for seed in seeds:
        save_model(build_model("student", seed), folder / f"student-{seed}")
        config = AutoConfig.from_pretrained(teacher)
        config.num_hidden_layers //= 2
        torch.manual_seed(seed)
        wide = LlamaForCausalLM(config).float()
        look_back(wide)
        save_model(wide, folder / f"{WIDE}-{seed}")


# -- one run, in a worker ----------------------------------------------------------------------------


def do(job: Job) -> dict[str, Any]:
    """Run the command and score its student; never raises, so that one failed run costs one row."""
    job.work.mkdir(parents=True, exist_ok=True)
    with Path(f"{job.folder}.log").open("w", encoding="utf-8") as log, _all_output_to(log):
        try:
            started = time.monotonic()
            _command(job.arguments())
            seconds = time.monotonic() - started
            return {**_named(job), "train_s": round(seconds, 1), **_scores(job), "curve": _curve(job)}
        except Exception as error:  # whatever it was, the table says so
            return {**_named(job), "error": f"{type(error).__name__}: {error}"[:300]}


@contextlib.contextmanager
def _all_output_to(log: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _command(arguments: Sequence[str]) -> None:
    """What the `longshore` command runs for these arguments, without needing its other tiers' packages."""
    from longshore_export.cli import register

    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    options = parser.parse_args(arguments)
    if options.run(options) != 0:
        raise RuntimeError("the command failed")


def _named(job: Job) -> dict[str, Any]:
    return {"variant": job.variant.name, "seed": job.seed, "learning_rate": job.rate}


def _scores(job: Job) -> dict[str, Any]:
    from shop.evaluate import evaluate_folder

    report: dict[str, Any] = evaluate_folder(
        job.folder / "model", job.per_kind, seed=HELDOUT_SEED, device=job.device
    )
    return {
        "exact": report["overall"],
        "kinds": {kind: score["accuracy"] for kind, score in report["kinds"].items()},
    }


def _curve(job: Job) -> list[dict[str, Any]]:
    lines = (job.folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def score_teacher(job: Job) -> dict[str, Any]:
    """The teacher's row."""
    from shop.evaluate import evaluate_folder

    report = evaluate_folder(job.teacher, job.per_kind, seed=HELDOUT_SEED, device=job.device)
    return {"variant": "teacher", "exact": report["overall"]}


# -- what comes out ----------------------------------------------------------------------------------


class Results:
    """All rows so far, on disk after each: results.json, curves.jsonl, table.md and curves.svg."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.about = folder, about
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], probe: bool = False) -> None:
        """Keep a row; those of a probe choose the learning rate and are in no table."""
        curve = row.pop("curve", None)
        self.rows.append(row | ({"probe": True} if probe else {}))
        if curve is not None:
            with (self._folder / "curves.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**_key(row), "probe": probe, "curve": curve}) + "\n")
            row["hard_loss"] = self.rows[-1]["hard_loss"] = _last_hard_loss(curve)
        print(json.dumps(row), flush=True)
        whole = {"about": self.about, "rows": self.rows}
        (self._folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (self._folder / "table.md").write_text(table(self.rows), encoding="utf-8")

    def draw(self) -> None:
        """The picture, of what there is."""
        if (self._folder / "curves.jsonl").exists():
            draw(self._folder / "curves.jsonl", self.rows, self._folder / "curves.svg")


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("variant", "seed", "learning_rate")}


def _last_hard_loss(curve: Sequence[dict[str, Any]]) -> float | None:
    values = [point["loss"]["hard"] for point in curve if "hard" in point["loss"]][-10:]
    return round(statistics.fmean(values), 5) if values else None


def _of(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    chosen = [row for row in rows if row["variant"] == name and "exact" in row and not row.get("probe")]
    return sorted(chosen, key=lambda row: row.get("seed", 0))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line per variant: exact answers per seed and their mean, by kind, and seconds."""
    lines = [
        f"| student | exact, each seed | mean | {' | '.join(KINDS)} | seconds |",
        "|---" * (len(KINDS) + 4) + "|",
    ]
    for teacher in _of(rows, "teacher"):
        lines.append(f"| teacher | {teacher['exact']:.1%} | {teacher['exact']:.1%} |" + " |" * 7)
    for variant in VARIANTS:
        if ours := _of(rows, variant.name):
            mean = functools.partial(_mean, ours)
            kinds = " | ".join(f"{mean(lambda row, k=kind: row['kinds'][k]):.0%}" for kind in KINDS)
            each = ", ".join(f"{row['exact']:.1%}" for row in ours)
            exact, seconds = mean(lambda row: row["exact"]), mean(lambda row: row["train_s"])
            lines.append(f"| {variant.name} | {each} | {exact:.1%} | {kinds} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, Any]], value: Any) -> float:
    return statistics.fmean(value(row) for row in rows)


def draw(curves: Path, rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Cross-entropy on answers against steps (mean over seeds), and exact answers, one dot a seed."""
    from matplotlib.figure import Figure

    runs = [json.loads(line) for line in curves.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, variant in enumerate(VARIANTS):
        ours = [run["curve"] for run in runs if run["variant"] == variant.name and not run["probe"]]
        if not ours:
            continue
        colour = f"C{place}"
        steps = [point["step"] for point in ours[0] if "hard" in point["loss"]]
        values = [
            statistics.fmean(point["loss"]["hard"] for point in same)
            for same in zip(*([p for p in curve if "hard" in p["loss"]] for curve in ours), strict=True)
        ]
        left.plot(steps, values, color=colour, linewidth=1, label=variant.name)
        scores = [row["exact"] for row in _of(rows, variant.name)]
        right.scatter(scores, [-place] * len(scores), color=colour, s=24)
    left.set(xlabel="training step", ylabel="cross-entropy of the answers", yscale="log")
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="exact held-out answers", xlim=(0, 1.03))
    right.set_yticks([-place for place in range(len(VARIANTS))], [each.name for each in VARIANTS], fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(picture)


# -- the whole ---------------------------------------------------------------------------------------


def choose_rate(rows: Sequence[dict[str, Any]]) -> float:
    """The learning rate with the most exact answers over the probed variants; ties go to the smaller loss."""

    def quality(rate: float) -> tuple[float, float]:
        ours = [row for row in rows if row.get("probe") and row["learning_rate"] == rate and "exact" in row]
        return sum(row["exact"] for row in ours), -sum(row["hard_loss"] for row in ours)

    return max(RATES, key=quality)


def run(args: argparse.Namespace) -> bool:
    """Everything, until done (True) or out of time (False)."""
    stop_at = time.monotonic() + args.seconds
    results = Results(args.out, _about(args))
    seeds, probe_seed = range(args.seeds), args.seeds
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    write_data(work / "train.jsonl", args.lines, args.max_tokens, args.size_power, args.processes)
    write_starts(work / "starts", args.teacher, [*seeds, probe_seed])
    base = Job(
        VARIANTS[0], 0, args.rate or RATES[0], args.teacher, work, args.num_steps, args.rows, args.max_tokens,
        args.per_kind, args.device,
    )  # fmt: skip
    pool = get_context("spawn").Pool(args.processes)
    try:
        teacher = pool.apply_async(score_teacher, (base,))
        if not args.rate:
            probes = [
                replace(base, variant=variant, seed=probe_seed, rate=rate)
                for variant in VARIANTS
                if variant.name in PROBED
                for rate in RATES
            ]
            for row in _done(pool, probes, stop_at):
                results.add(row, probe=True)
            base = replace(base, rate=choose_rate(results.rows))
        results.about["learning_rate"] = base.rate
        results.add(teacher.get(max(0.0, stop_at - time.monotonic())))
        longest_first = sorted(VARIANTS, key=lambda variant: not variant.on_policy)
        jobs = [replace(base, variant=variant, seed=seed) for seed in seeds for variant in longest_first]
        for row in _done(pool, jobs, stop_at):
            results.add(row)
    except PoolTimeout:
        print("out of time: what is finished stands", flush=True)
        return False
    finally:
        pool.terminate()
        results.draw()
    return True


def _done(pool: Any, jobs: Sequence[Job], stop_at: float) -> Iterator[dict[str, Any]]:
    """Finished rows as they come; multiprocessing.TimeoutError when the time is over."""
    finished = pool.imap_unordered(do, jobs)
    for _ in jobs:
        yield finished.next(max(0.0, stop_at - time.monotonic()))


def _about(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cards = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join(["python3", "-m", "shop.loss_table", *sys.argv[1:]]),
        "machine": f"{cards}, {os.cpu_count()} CPUs, {platform.machine()}",
        "torch": torch.__version__,
        "num_steps": args.num_steps,
        "rows": args.rows,
        "max_tokens": args.max_tokens,
        "variants": [asdict(variant) for variant in VARIANTS],
        "on_policy": ON_POLICY,
    }


def main(argv: list[str] | None = None) -> int:
    """0 when every run finished."""
    from shop.models import MODELS

    parser = argparse.ArgumentParser(prog="shop.loss_table", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for table, picture and numbers")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and models")
    parser.add_argument("--teacher", type=Path, default=MODELS / "shop-teacher")
    parser.add_argument("--seconds", type=float, default=420.0, help="stop after this long (default: 420)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--lines", type=int, default=16_384, help="chats in the training data")
    parser.add_argument(
        "--size-power", type=float, default=0.0, help="above 0, small sheets come more often (default: 0)"
    )
    parser.add_argument("--per-kind", type=int, default=84, help="held-out questions of each kind")
    parser.add_argument("--processes", type=int, default=9, help="runs side by side (default: 9)")
    parser.add_argument("--rate", type=float, help="learning rate; without it, a probe chooses one")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.device == "cuda":  # how accelerate is told; the student's own weights stay fp32
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
    return 0 if run(args) else 1


if __name__ == "__main__":
    raise SystemExit(main())
