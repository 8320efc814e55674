"""The command `bench core`: flags to rows and an engine, then a table. Importing it loads no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore_server.native.bench.engine_settings import ENGINE_FLAGS, draws_arrivals, engine_config
from longshore_server.native.bench.process_age import process_age_s
from longshore_server.native.bench.rows import DEFAULT_ROWS, Row, parse_row
from longshore_server.native.bench.rows import __doc__ as ROWS_HELP
from longshore_server.native.errors import ConfigError, NativeEngineError

if TYPE_CHECKING:
    from longshore_server.native.config import EngineConfig

BUILT_IN_MODELS = ("llama-8b", "llama-70b")
FIRST_PROMPT_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench core`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ROWS_HELP
    flag = parser.add_argument
    flag("--model", required=True, help="a model folder, or llama-8b or llama-70b with random weights")
    flag("--load-format", choices=("auto", "random"), default="auto", help="random for random weights")
    flag("--device", default="cpu", help="cpu, cuda, ...")
    flag("--threads", type=int, help="of torch on a CPU")
    flag("--rows", nargs="+", metavar="ROW", help="what to measure; see below")
    flag("--startup", action="store_true", help="stop when the time to the first token is known")
    flag("--rounds", type=int, default=3, help="figures are medians over so many rounds")
    flag("--max-p99-ttft-ms", type=float, default=350.0, help="the bound of poisson-search")
    flag("--poisson-s", type=float, default=20.0, help="how long arrivals last")
    flag("--poisson-requests", type=int, default=200, help="how many arrivals there are at least")
    flag("--clock", choices=("wall", "cpu"), default="wall", help="cpu counts this process alone")
    flag("--no-ceilings", action="store_true", help="do not measure what the device could do")
    flag("--json", type=Path, metavar="FILE", help="write the report there as well, after every row")
    flag("--set", action="append", default=[], metavar="NAME=VALUE", help="any other engine setting")
    for name, (kind, words) in ENGINE_FLAGS.items():
        flag("--" + name.replace("_", "-"), dest=name, type=kind, help=words)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m longshore_server.native.bench`; 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="longshore bench core", description="Speed of the engine by itself."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except NativeEngineError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 when a request failed. Raises NativeEngineError for what stops the start."""
    kind = arguments.device.partition(":")[0]
    rows = [parse_row(text) for text in arguments.rows or DEFAULT_ROWS.get(kind, DEFAULT_ROWS["cpu"])]
    if arguments.rounds < 1:
        raise ConfigError("rounds", "must be at least 1")
    if arguments.clock == "cpu" and draws_arrivals(rows):
        raise ConfigError("clock", "arrivals need the wall clock")
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as folder:
        return _measure(arguments, rows, Path(folder))


def _measure(arguments: argparse.Namespace, rows: list[Row], folder: Path) -> int:
    from longshore_server.native.bench.measure import Bench, Settings
    from longshore_server.native.bench.report import JsonFile, line_of, startup_line

    config, engine, startup = _start(arguments, rows, folder)
    _say(startup_line(startup))
    head = {"settings": dataclasses.asdict(config) | {"model": arguments.model}, "startup": startup}
    if arguments.startup:
        JsonFile(arguments.json, head).write() if arguments.json else None
        return 0
    cost, ceilings = _limits(arguments, config, head)
    settings = Settings(
        rounds=arguments.rounds,
        seed=config.seed,
        max_p99_ttft_s=arguments.max_p99_ttft_ms / 1e3,
        poisson_s=arguments.poisson_s,
        min_poisson_requests=arguments.poisson_requests,
    )
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    bench = Bench(engine, settings, ceilings, cost, clock)
    report = JsonFile(arguments.json, head) if arguments.json else None
    num_failures = 0
    for row in rows:
        for result in bench.measure(row):
            num_failures += len(result.failures)
            _say(line_of(result))
            if report is not None:
                report.add(result)
    return 1 if num_failures else 0


def _start(
    arguments: argparse.Namespace, rows: list[Row], folder: Path
) -> tuple[EngineConfig, Any, dict[str, float]]:
    """An engine, and the seconds since the start of the process to its milestones."""
    import torch

    from longshore_server.native.bench.drive import drive
    from longshore_server.native.bench.models import write_config
    from longshore_server.native.bench.prompts import first_token_request
    from longshore_server.native.bench.rows import FirstToken
    from longshore_server.native.engine import NativeEngine
    from longshore_server.native.garbage import keep_for_good

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    load_format = arguments.load_format
    if arguments.model in BUILT_IN_MODELS:
        load_format, model = "random", str(write_config(arguments.model, folder))
    else:
        model = arguments.model
    config = engine_config(argparse.Namespace(**vars(arguments) | {"model": model}), rows, load_format)
    startup = {"imports_s": process_age_s()}
    engine = NativeEngine(config)
    startup["engine_s"] = process_age_s()
    drive(engine, first_token_request(FirstToken(FIRST_PROMPT_TOKENS), engine.vocab_size, config.seed))
    startup["first_token_s"] = process_age_s()
    engine.settle()  # the ceilings' measurement waits for the whole device
    keep_for_good()  # as a server does
    return config, engine, startup


def _limits(arguments: argparse.Namespace, config: EngineConfig, head: dict[str, Any]) -> tuple[Any, Any]:
    """What the model costs and what the device can do; None where it is not known or not asked for."""
    from longshore_server.native.bench.ceilings import measure_ceilings
    from longshore_server.native.bench.models import dtype_of, model_cost

    if arguments.no_ceilings:
        return None, None
    dtype = dtype_of(config)
    quantization, kv_cache_dtype = arguments.quantization or "", arguments.kv_cache_dtype or ""
    cost = model_cost(config.model, dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    ceilings = measure_ceilings(config.device, dtype, quantization=quantization)
    if config.device == "cuda" and config.placement == "tensor_parallel":  # a GPU for each rank, all alike
        ceilings = ceilings.of_devices(config.tensor_parallel_size)
    head["ceilings"] = dataclasses.asdict(ceilings)
    _say(
        f"ceilings: copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, "
        f"{ceilings.gemm} GEMM {ceilings.gemm_flops_per_s / 1e12:.3f} TFLOP/s"
    )
    return cost, ceilings


def _say(line: str) -> None:
    print(line, flush=True)
