"""The compiled kernels: made by the machine's own C compiler at first use, kept in a cache folder, loaded.

Without a compiler, or where the result does not hold its promise, there is no library and torch serves. A
library in a folder that another user could write to is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from longshore_server.native.cpu import structs
from longshore_server.native.cpu.packing import PackedMatrix

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 60.0
FLAGS = (
    *("-std=gnu11", "-O2", "-shared", "-fPIC"),
    *(
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
    ),  # it rounds where the source says
)


@cache
def load_library() -> ctypes.CDLL | None:
    """The kernels for this processor; None, and a line in the log, where they cannot be had."""
    compiler = find_compiler()
    if compiler is None:
        logger.warning("no C compiler (%s): the CPU path runs on torch alone", ", ".join(COMPILERS))
        return None
    try:
        library = _open(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the CPU kernels cannot be had, torch serves: %s", _reason(error))
        return None
    if not is_row_invariant(library):
        logger.warning("the CPU kernels that %s makes are not row-invariant: torch serves", compiler)
        return None
    return library


def find_compiler() -> str | None:
    """The path of the first C compiler there is, CC's before others; None also where there is no POSIX."""
    if os.name != "posix":
        return None
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(compiler: str, target: Path, processor: str = "native") -> None:
    """Compiles to `target`, with OpenMP where the compiler has it; raises OSError or SubprocessError."""
    option = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
    start_s = time.perf_counter()
    command = [compiler, *FLAGS, f"{option}={processor}", "-fopenmp", str(SOURCE), "-o", str(target), "-lm"]
    try:
        _run(command)
    except subprocess.CalledProcessError:
        _run([word for word in command if word != "-fopenmp"])
    logger.info("compiled the CPU kernels with %s in %.1f s", compiler, time.perf_counter() - start_s)


@torch.inference_mode()
def is_row_invariant(library: ctypes.CDLL) -> bool:
    """Whether products are right, and a row's result has the same bits among any number of rows."""
    weight = torch.linspace(-2.0, 2.0, 100 * 200).sin().view(100, 200).bfloat16().float()
    rows = torch.linspace(-3.0, 3.0, 40 * 200).sin().view(40, 200)
    for weights in (weight, weight / 3.0):  # one for each way to store them
        matrix = PackedMatrix(library, weights)
        whole = matrix.multiply(rows)
        exact = rows.double() @ weights.double().t()
        if bool((whole - exact).abs().max() > 1e-5 * exact.abs().max()):
            return False
        if not all(torch.equal(matrix.multiply(rows[:count]), whole[:count]) for count in range(1, 40)):
            return False
    return True


def _open(compiler: str) -> ctypes.CDLL:
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="longshore-cpu-") as name:
            return _load(compiler, Path(name) / "kernels.so")
    return _load(compiler, folder / f"kernels-{_fingerprint(compiler)}.so")


def _load(compiler: str, target: Path) -> ctypes.CDLL:
    if not (target.is_file() and _is_ours(target)):
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as name:
            build(compiler, Path(name) / target.name)
            os.replace(Path(name) / target.name, target)
    library = ctypes.CDLL(str(target))
    structs.declare(library)
    return library


def cache_folder() -> Path | None:
    """Where libraries are kept between starts; None where there is no such place of this user alone."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "longshore" / "cpu"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if _is_ours(folder) and os.access(folder, os.W_OK) else None


def _is_ours(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _fingerprint(compiler: str) -> str:
    """Of all that decides the library: source, flags, compiler, processor."""
    status = os.stat(os.path.realpath(compiler))
    parts = [SOURCE.read_text(), *FLAGS, compiler, str(status.st_size), str(status.st_mtime_ns), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in names}))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return " ".join(str(said or error).split())[:300]
