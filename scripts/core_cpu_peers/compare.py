"""Longshore's engine, transformers' continuous batching and llama.cpp on one CPU, in interleaved rounds.

    .venv/bin/python scripts/core_cpu_peers/compare.py --llama-python VENV/bin/python

VENV needs llama-cpp-python, gguf and numpy. Each engine is a process with the same number of threads; a round
gives each of them the same random prompts, one engine at a time, and the order turns. Figures are medians of
tokens a second, of the wall clock and of CPU time, which other load on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "examples" / "models" / "shop-teacher"


class Peer:
    """One engine's process."""

    def __init__(self, label: str, name: str, python: str, model: str, num_threads: int) -> None:
        self.label = label
        self.rounds: dict[int, list[dict[str, Any]]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        command = [python, str(HERE / "worker.py"), name, model, str(num_threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, prompts: list[list[int]], num_answer: int) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "num_answer": num_answer}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        lengths = {len(each) for each in answer["answers"]}
        assert lengths == {num_answer}, f"{self.label}: answers of {lengths} tokens, not {num_answer}"
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(peers: list[Peer], options: argparse.Namespace) -> None:
    draw = random.Random(options.seed)
    for num_streams in options.streams:
        for peer in peers:  # warm
            peer.run(prompts_of(draw, num_streams, options), min(8, options.answer_tokens))
        for index in range(options.rounds):
            prompts = prompts_of(draw, num_streams, options)
            turned = peers[index % len(peers) :] + peers[: index % len(peers)]
            for peer in turned:
                peer.rounds.setdefault(num_streams, []).append(peer.run(prompts, options.answer_tokens))
        for peer in peers:
            print(line_of(peer, peers[0], num_streams, options), flush=True)


def prompts_of(draw: random.Random, num_streams: int, options: argparse.Namespace) -> list[list[int]]:
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    return [draw.choices(range(vocab_size), k=options.prompt_tokens) for _ in range(num_streams)]


def line_of(peer: Peer, ours: Peer, num_streams: int, options: argparse.Namespace) -> str:
    num_tokens = num_streams * options.answer_tokens

    def rate(which: Peer, clock: str) -> float:
        return median(num_tokens / each[clock] for each in which.rounds[num_streams])

    same = [
        a["answers"] == b["answers"]
        for a, b in zip(peer.rounds[num_streams], ours.rounds[num_streams], strict=True)
    ]
    wall, cpu = rate(peer, "wall_s"), rate(peer, "cpu_s")
    return (
        f"{num_streams:3} streams  {peer.label:22} {wall:8.0f} tok/s ({rate(ours, 'wall_s') / wall:5.2f})"
        f"  {cpu:8.0f} tok per CPU second ({rate(ours, 'cpu_s') / cpu:5.2f})"
        f"  {sum(same)} of {len(same)} rounds with our tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--llama-weights", nargs="+", default=["f32", "q8_0"], choices=("f32", "f16", "q8_0"))
    parser.add_argument("--skip", nargs="+", default=[], choices=("torch", "transformers", "llama.cpp"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    peers = [Peer("longshore f32", "longshore", sys.executable, str(MODEL), options.threads)]
    try:
        if "torch" not in options.skip:
            peers.append(
                Peer("longshore, torch alone", "longshore-torch", sys.executable, str(MODEL), options.threads)
            )
        if "transformers" not in options.skip:
            peers.append(
                Peer("transformers f32", "transformers", sys.executable, str(MODEL), options.threads)
            )
        with tempfile.TemporaryDirectory(prefix="longshore-gguf-") as folder:
            if options.llama_python and "llama.cpp" not in options.skip:
                peers += [llama(kind, Path(folder), options) for kind in options.llama_weights]
            print("in brackets: ours divided by theirs", flush=True)
            compare(peers, options)
    finally:
        for peer in peers:
            peer.close()


def llama(kind: str, folder: Path, options: argparse.Namespace) -> Peer:
    target = folder / f"{kind}.gguf"
    command = [options.llama_python, str(HERE.parent / "gguf_of_llama.py"), str(MODEL), str(target), kind]
    subprocess.run(command, check=True)
    return Peer(f"llama.cpp {kind}", "llama.cpp", options.llama_python, str(target), options.threads)


if __name__ == "__main__":
    main()
