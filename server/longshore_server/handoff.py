"""What the supervisor hands each HTTP worker: the settings and where the engine's socket is.

The file lies in the supervisor's private folder, since settings hold key digests; only its path stands in
the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longshore.errors import ConfigError
from longshore_server.config import CoreConfig, from_json, to_json

HANDOFF_VARIABLE = "LONGSHORE_HANDOFF"


@dataclass(frozen=True, slots=True)
class Handoff:
    """One worker's settings; `socket_path` is the engine process's private socket."""

    config: CoreConfig
    socket_path: str


def write_handoff(handoff: Handoff, path: Path) -> None:
    """Writes the file, readable by this user alone."""
    text = json.dumps({"config": json.loads(to_json(handoff.config)), "socket_path": handoff.socket_path})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def read_handoff(environment: Mapping[str, str] | None = None) -> Handoff:
    """The settings of the worker that runs this; raises ConfigError where no supervisor left any."""
    path = (os.environ if environment is None else environment).get(HANDOFF_VARIABLE)
    if path is None:
        raise ConfigError(f"{HANDOFF_VARIABLE} is not set: HTTP workers are started by longshore serve")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return Handoff(from_json(json.dumps(values["config"])), str(values["socket_path"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"can't read what the supervisor left in {path}: {error}") from None
