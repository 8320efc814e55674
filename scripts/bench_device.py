"""The device runtime beside its peers on a random 32 M Llama: one thread, prompt 256, decode 128.

    python scripts/bench_device.py --peers PYTHON --work FOLDER [--genai-model FOLDER] [--repeats 9] [--torch]

`--peers` is a Python that has llama-cpp-python, gguf and, for its rows, onnxruntime-genai. All engines stay
loaded and take turns, in another order each round, so that a disturbance hits them alike. Rates are medians
of tokens per second of CPU time, ratios medians of the ratios within a round. Models that FOLDER has are not
made again. A genai model is made first, by `python -m onnxruntime_genai.models.builder -p int4 -e cpu`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB, MAX_TOKENS, NUM_PROMPT, NUM_DECODE = 8192, 512, 256, 128
KV = {"num_layers": 8, "num_kv_heads": 2, "head_dim": 64, "max_tokens": MAX_TOKENS}
SCRIPTS = Path(__file__).parent
GENAI = "onnxruntime-genai int4"
OURS = ("int4-b64", "int4-b128-p8", "int4-b256-p8", "int8")


@dataclass
class Engine:
    """A worker process and what it has measured, [prefill, decode] tokens per second of CPU."""

    name: str
    process: subprocess.Popen[str]
    size_bytes: int
    rates: list[tuple[float, float]]
    prompt_walls_s: list[float]

    def run(self, prompt: list[int]) -> None:
        job = json.dumps({"prompt": prompt, "num_decode": NUM_DECODE})
        assert self.process.stdin and self.process.stdout
        print(job, file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        self.prompt_walls_s.append(told["prefill"]["wall_s"])
        self.rates.append((len(prompt) / told["prefill"]["cpu_s"], NUM_DECODE / told["decode"]["cpu_s"]))


def make_model(folder: Path) -> None:
    """The 32 M Llama of the benchmark, drawn from a fixed seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shop = SCRIPTS.parent / "examples/shop/tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shop / name).read_bytes())


def start(name: str, python: str, kind: str, path: Path, options: dict[str, Any], size: int) -> Engine:
    words = [python, str(SCRIPTS / "bench_device_worker.py"), kind, str(path), json.dumps(options)]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    return Engine(name, process, size, [], [])


def our_engines(model: Path, work: Path) -> list[Engine]:
    out = []
    for name in OURS:
        file, prefill = work / f"{name}.onnx", work / f"{name}.prefill.onnx"
        if not file.exists():
            build(model, name, file)
        options = {"kv": KV, "prefill": str(prefill) if prefill.exists() else None}
        size = sum(path.stat().st_size for path in (file, prefill) if path.exists())
        out.append(start(f"longshore {name}", sys.executable, "longshore", file, options, size))
    return out


def build(model: Path, name: str, file: Path) -> None:
    from longshore_export.checkpoint import load_checkpoint
    from longshore_export.variant import build_variant

    build_variant(load_checkpoint(model), name, file)


def peer_engines(peers: str, model: Path, work: Path, args: argparse.Namespace) -> list[Engine]:
    out = []
    options = {"vocab_size": VOCAB, "max_tokens": MAX_TOKENS}
    for form in ("Q4_0", "Q8_0"):
        file = work / f"{form}.gguf"
        if not file.exists():
            maker = SCRIPTS / "gguf_of_llama.py"
            subprocess.run([peers, str(maker), str(model), str(file), form.lower()], check=True)
        out.append(start(f"llama.cpp {form}", peers, "llama", file, options, file.stat().st_size))
    if args.genai_model:
        size = sum(path.stat().st_size for path in args.genai_model.glob("model.onnx*"))
        out.append(start(GENAI, peers, "genai", args.genai_model, options, size))
    if args.torch:
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        out.append(start("torch eager fp32", sys.executable, "torch", model, options, size))
    return out


def ratio(engine: Engine, other: Engine | None, side: int) -> str:
    """How many times as fast as another engine in the same round; side 0 is prefill, 1 decode."""
    if other is None:
        return "-"
    pairs = zip(engine.rates, other.rates, strict=True)
    return f"{statistics.median(ours[side] / theirs[side] for ours, theirs in pairs):.2f}"


def report(engines: list[Engine]) -> None:
    by_name = {engine.name: engine for engine in engines}
    llama, genai = by_name["llama.cpp Q4_0"], by_name.get(GENAI)
    print(f"{'':<33}{'prefill':>16}{'decode':>27}{'first token, ms':>19}")
    print(
        f"{'engine':<26}{'MB':>7}{'/s':>8}{'x Q4_0':>8}{'/s':>9}{'x Q4_0':>9}{'x genai':>9}"
        f"{'CPU':>10}{'best wall':>11}"
    )
    for engine in engines:
        prefill, decode = (statistics.median(side) for side in zip(*engine.rates, strict=True))
        print(
            f"{engine.name:<26}{engine.size_bytes / 1e6:>7.1f}{prefill:>8.0f}{ratio(engine, llama, 0):>8}"
            f"{decode:>9.0f}{ratio(engine, llama, 1):>9}{ratio(engine, genai, 1):>9}"
            f"{NUM_PROMPT / prefill * 1e3:>10.0f}{min(engine.prompt_walls_s) * 1e3:>11.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--genai-model", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--torch", action="store_true", help="torch's eager model as well, which takes long")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    model = args.work / "llama32m"
    args.work.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        model.mkdir()
        make_model(model)
    engines = our_engines(model, args.work) + peer_engines(args.peers, model, args.work, args)
    prompt = [(7 * number + 3) % VOCAB for number in range(NUM_PROMPT)]
    try:
        for repeat in range(args.repeats + 1):
            turn = repeat % len(engines)
            for engine in (*engines[turn:], *engines[:turn]):
                engine.run(prompt)
                if repeat == 0:  # the first run allocates
                    engine.rates.clear()
        report(engines)
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


if __name__ == "__main__":
    main()
