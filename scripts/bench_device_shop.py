"""Copy-heavy Shop answers: the device runtime guessing ahead, beside llama.cpp's plain decode.

    python scripts/bench_device_shop.py --peers PYTHON --work FOLDER [--kinds list] [--repeats 5]
        [--model examples/models/shop-teacher --draft examples/models/shop-student]

`--peers` is a Python that has llama-cpp-python and gguf. Whole greedy answers on one thread, prompt included,
nothing in the cache; all engines stay loaded and take turns question by question. The table says CPU time,
which answers are right, and how many are token for token those of the same engine without guessing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
EXAMPLES = SCRIPTS.parent / "examples"
STUDENT = EXAMPLES / "models" / "shop-student"
MAX_ANSWER_TOKENS = 256
FORMS = ("Q4_0", "Q8_0", "F16")
BASE = "llama.cpp Q4_0"


@dataclass
class Engine:
    """A worker process, its answers of the last round, and seconds of CPU of each round."""

    name: str
    process: subprocess.Popen[str]
    size_bytes: int
    plain: str | None = None  # the engine whose answers it must give
    answers: list[list[int]] = field(default_factory=list)
    rounds_s: list[float] = field(default_factory=list)

    def ask(self, prompt: Sequence[int], stop: Sequence[int]) -> float:
        job = {"prompt": list(prompt), "stop": list(stop), "max_tokens": MAX_ANSWER_TOKENS}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(job), file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        self.answers.append(told["tokens"])
        cpu_s: float = told["cpu_s"]
        return cpu_s


def start(name: str, python: str, kind: str, path: Path, options: dict[str, Any], size: int) -> Engine:
    words = [python, str(SCRIPTS / "bench_device_worker.py"), kind, str(path), json.dumps(options)]
    env = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    pipe = subprocess.PIPE
    return Engine(name, subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env), size)


@dataclass(frozen=True)
class Built:
    """A variant of a model, and what its session needs to know."""

    file: Path
    size_bytes: int
    options: dict[str, Any]


def build(model: Path, variant: str, work: Path) -> Built:
    from longshore_export.checkpoint import load_checkpoint
    from longshore_export.variant import build_variant

    checkpoint = load_checkpoint(model)
    shape = checkpoint.shape
    kv = {
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_tokens": shape.max_tokens,
    }
    built = build_variant(checkpoint, variant, work / f"{model.name}-{variant}.onnx")
    prefill = str(built.prefill_file) if built.prefill_file else None
    return Built(built.file, built.size_bytes, {"file": str(built.file), "kv": kv, "prefill": prefill})


def our_engines(args: argparse.Namespace) -> list[Engine]:
    """Each variant plain, guessing by lookup, and by a smaller model where there is one."""
    out = []
    for variant in args.variants:
        built = build(args.model, variant, args.work)
        draft = build(args.draft, variant, args.work) if args.draft else None
        for guess in ("", "lookup", "draft") if draft else ("", "lookup"):
            options = built.options | {"guess": guess, "draft": draft.options if draft else None}
            name = f"longshore {variant}" + f", {guess}" * bool(guess)
            engine = start(name, sys.executable, "longshore", built.file, options, built.size_bytes)
            engine.plain = f"longshore {variant}" if guess else None
            out.append(engine)
    return out


def peer_engines(peers: str, model: Path, work: Path) -> list[Engine]:
    config = json.loads((model / "config.json").read_text())
    options = {"vocab_size": config["vocab_size"], "max_tokens": config["max_position_embeddings"]}
    out = []
    for form in FORMS:
        file = work / f"{model.name}-{form}.gguf"
        if not file.exists():
            maker = SCRIPTS / "gguf_of_llama.py"
            subprocess.run([peers, str(maker), str(model), str(file), form.lower()], check=True)
        out.append(start(f"llama.cpp {form}", peers, "llama", file, options, file.stat().st_size))
    return out


def load_questions(model: Path, kinds: Sequence[str], num_per_kind: int, work: Path) -> tuple[list[Any], Any]:
    """Held-out examples of these kinds, and the tokenizer."""
    from tokenizers import Tokenizer

    from longshore_export.chat_table import read_chat_template
    from longshore_export.task import load_task

    sys.path.insert(0, str(EXAMPLES))
    from shop.question import KINDS
    from shop.task import task_lines

    lines = list(task_lines("heldout", num_per_kind, 0))
    wanted = [line for number, line in enumerate(lines) if KINDS[number // num_per_kind] in kinds]
    (work / "questions.jsonl").write_text("\n".join(wanted))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return load_task(work / "questions.jsonl", tokenizer, read_chat_template(model)), tokenizer


def measure(engines: Sequence[Engine], questions: Sequence[Any], stop: Sequence[int], repeats: int) -> None:
    for repeat in range(repeats + 1):  # the first round allocates
        for engine in engines:
            engine.answers.clear()
            engine.rounds_s.append(0.0)
        for number, question in enumerate(questions):
            turn = (repeat + number) % len(engines)
            for engine in (*engines[turn:], *engines[:turn]):
                engine.rounds_s[-1] += engine.ask(question.prompt, stop)
        if repeat == 0:
            for engine in engines:
                engine.rounds_s.clear()


def report(engines: Sequence[Engine], questions: Sequence[Any], tokenizer: Any) -> None:
    by_name = {engine.name: engine for engine in engines}
    base_s = statistics.median(by_name[BASE].rounds_s)
    print(
        f"{'engine':<30}{'MB':>6}{'ms/answer':>11}{'tokens/s':>10}{'x Q4_0':>8}{'right':>8}{'as plain':>10}"
    )
    for engine in engines:
        seconds = statistics.median(engine.rounds_s)
        num_tokens = sum(map(len, engine.answers))
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in engine.answers]
        num_right = sum(question.is_right(text) for question, text in zip(questions, texts, strict=True))
        alike = ""
        if engine.plain is not None:
            pairs = zip(engine.answers, by_name[engine.plain].answers, strict=True)
            alike = f"{sum(ours == theirs for ours, theirs in pairs)}/{len(questions)}"
        print(
            f"{engine.name:<30}{engine.size_bytes / 1e6:>6.2f}{seconds / len(questions) * 1e3:>11.2f}"
            f"{num_tokens / seconds:>10.0f}{base_s / seconds:>8.2f}"
            f"{f'{num_right}/{len(questions)}':>8}{alike:>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--model", type=Path, default=STUDENT)
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokens, which guesses too")
    parser.add_argument("--kinds", nargs="+", default=["list"])
    parser.add_argument("--num-per-kind", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=["int4-b64", "int4-b64-p8", "fp32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    questions, tokenizer = load_questions(args.model, args.kinds, args.num_per_kind, args.work)
    stop = [json.loads((args.model / "config.json").read_text())["eos_token_id"]]
    engines = our_engines(args) + peer_engines(args.peers, args.model, args.work)
    try:
        measure(engines, questions, stop, args.repeats)
        lengths = [len(question.prompt) for question in questions]
        print(
            f"{len(questions)} questions of {args.kinds}, prompts of {min(lengths)} to {max(lengths)} tokens"
        )
        report(engines, questions, tokenizer)
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


if __name__ == "__main__":
    main()
