"""The folder in which the HTTP workers of one core keep their metrics, so that any can export the sum.

prometheus_client reads the folder's name from the environment when it is imported; nothing here imports it.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def prepare(folder: Path) -> dict[str, str]:
    """Make the folder of the metrics inside `folder`; what a worker needs in its environment to use it."""
    metrics = folder / "metrics"
    metrics.mkdir(mode=0o700, exist_ok=True)
    return {MULTIPROCESS_VARIABLE: str(metrics)}


def folder_of_workers() -> Path | None:
    """The folder that this worker shares with its siblings, if a supervisor made one."""
    folder = os.environ.get(MULTIPROCESS_VARIABLE)
    return Path(folder) if folder else None


def forget_dead_workers(metrics: Path) -> None:
    """Drop what workers that are gone said of their present; what they counted stays."""
    for file in metrics.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)
