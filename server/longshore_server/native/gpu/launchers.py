"""The C code between Python and a kernel, compiled without optimization.

Triton compiles a launcher for each signature of a kernel. With the -O3 of its own that takes as long as the
kernel itself (0.26 of 0.5 s beside an H200), for code that hands a few arguments on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from triton import knobs

COMPILERS = ("gcc", "clang")


def compile_launchers_fast() -> None:
    """For this process, unless it has a way of its own; what is compiled already stays."""
    if knobs.build.impl is None:
        knobs.build.impl = build


def build(
    name: str,
    source: str,
    folder: str,
    library_dirs: Sequence[str],
    include_dirs: Sequence[str],
    libraries: Sequence[str],
) -> str:
    """Compiles the C file `source` into a module of Python's in `folder`; its path.

    Raises RuntimeError without a compiler, and CalledProcessError where that fails.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(
            "kernels cannot be launched: there is no C compiler (gcc, clang, or what CC names)"
        )
    path = Path(folder) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Debian's scheme names /usr/local, where no headers are.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = [*include_dirs, folder, sysconfig.get_paths(scheme)["include"]]
    subprocess.run(
        [
            *(compiler, source, "-O0", "-shared", "-fPIC", "-Wno-psabi", "-o", path),
            *(f"-l:{library}" if ".so" in library else f"-l{library}" for library in libraries),
            *(f"-L{each}" for each in library_dirs),
            *(f"-I{each}" for each in headers),
        ],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return str(path)
