"""The engine process: loads the model, serves HTTP workers over a private socket, ends with its supervisor.

`python -m longshore_server.engine_process --socket PATH --config-json JSON`. Tells its supervisor on standard
output, one JSON object a line: `ready`, `beat` or `error`. It owns no client's socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import ConfigError, LongshoreError
from longshore_server.config import CoreConfig, from_json
from longshore_server.engine_loop import EngineBrokenError, EngineLoop
from longshore_server.engine_socket import EngineSocket
from longshore_server.engines.base import ModelInfo
from longshore_server.lifeline import Lifeline
from longshore_server.model_folder import check_model_folder, model_digest
from longshore_server.native.errors import NativeEngineError
from longshore_server.native.garbage import keep_for_good
from longshore_server.status_pipe import StatusPipe
from longshore_server.trial import TrialNote
from longshore_server.warm_up import warm_up

if TYPE_CHECKING:
    from longshore_server.native import EngineConfig

logger = logging.getLogger(__name__)

EXIT_CONFIG = 2
EXIT_BROKEN = 70
STOP_TIMEOUT_S = 3.0
TRIAL_NOTE_NAME = "trial"

EngineFactory = Callable[[CoreConfig], Any]


def native_engine(config: CoreConfig) -> Any:
    """The native engine with these settings; raises NativeEngineError when it can't start."""
    import torch

    from longshore_server.native import NativeEngine

    settings = native_settings(config)
    torch.set_num_threads(max(1, (config.num_threads or _spare_threads()) // settings.num_ranks))
    return NativeEngine(settings, on_ranks_lost=_die_without_ranks)


def native_settings(config: CoreConfig) -> EngineConfig:
    """What the native engine is told of the core's settings: every one that both have, under its own name."""
    import torch

    from longshore_server.native import EngineConfig

    names = {f.name for f in fields(EngineConfig)} & {f.name for f in fields(config)}
    values = {name: getattr(config, name) for name in names}
    if config.device == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return EngineConfig(**values, max_num_waiting=config.max_waiting)


def _spare_threads() -> int:
    """All cores but one, which the HTTP workers need: a step waits for its slowest thread."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores - 1)


def serve_engine(
    config: CoreConfig,
    socket_path: Path,
    factory: EngineFactory,
    status: StatusPipe,
    lifeline: Lifeline | None,
) -> int:
    """Runs the engine until it is asked to end; returns the exit code."""
    try:
        check_model_folder(config)
        engine = factory(config)
        info = _model_info(config, engine)
        warm_up(engine)
    except (NativeEngineError, LongshoreError) as error:
        status.tell(error=" ".join(str(error).split()))
        return EXIT_CONFIG
    note = TrialNote(socket_path.parent / TRIAL_NOTE_NAME)
    server = EngineSocket(
        socket_path,
        info,
        frozenset(engine.capabilities),
        incarnation=secrets.token_hex(8),
        blamed=note.blamed,
        step_timeout_s=config.engine_step_timeout_s,
        beat=lambda: status.tell(beat=1),
        stuck=_die_stuck,
    )
    max_streams = config.max_num_seqs + config.max_waiting
    loop = EngineLoop(engine, send=server.send, note=note, max_streams=max_streams)
    _stop_on_request(loop, lifeline)
    keep_for_good()
    server.start(loop)
    status.tell(ready=info.name)
    return _run(loop, server)


def _run(loop: EngineLoop, server: EngineSocket) -> int:
    try:
        loop.run()
    except EngineBrokenError as error:
        logger.critical("the engine is broken: %s", error)
        return EXIT_BROKEN
    server.close()
    return 0


def _model_info(config: CoreConfig, engine: Any) -> ModelInfo:
    return ModelInfo(
        name=config.model_name,
        digest=model_digest(config),
        max_model_len=engine.max_model_len,
        eos_token_ids=frozenset(engine.eos_token_ids),
        vocab_size=engine.vocab_size,
    )


def _stop_on_request(loop: EngineLoop, lifeline: Lifeline | None) -> None:
    """Stops at the end of the lifeline, or at a signal where there is none.

    Under a supervisor signals are ignored: Ctrl-C and service managers signal all processes at once, and the
    engine is needed until the workers have drained.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if lifeline else lambda *_: loop.stop())
    if lifeline is not None:
        lifeline.on_end = lambda: _stop_in_time(loop)


def _stop_in_time(loop: EngineLoop) -> None:
    loop.stop()
    threading.Event().wait(STOP_TIMEOUT_S)
    os._exit(1)  # the present step takes too long


def _die_stuck(age_s: float) -> None:
    logger.critical("one step has taken %.0f s; ending this engine", age_s)
    os._exit(EXIT_BROKEN)


def _die_without_ranks(reason: str) -> None:
    logger.critical("%s; ending this engine", reason)
    os._exit(EXIT_BROKEN)


def main(argv: list[str] | None = None, *, factory: EngineFactory = native_engine) -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="longshore_server.engine_process")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--parent", type=int, help="process id to live no longer than")
    arguments = parser.parse_args(argv)
    lifeline = None
    if arguments.parent is not None:
        lifeline = Lifeline(arguments.parent, sys.stdin.fileno())
    status = StatusPipe()
    try:
        config = from_json(arguments.config_json)
    except ConfigError as error:
        status.tell(error=error.message)
        return EXIT_CONFIG
    logging.basicConfig(level=config.log_level.upper(), format="longshore engine: %(levelname)s %(message)s")
    code = serve_engine(config, arguments.socket, factory, status, lifeline)
    os._exit(code)  # a broken engine may leave threads behind that never end


if __name__ == "__main__":
    main()
