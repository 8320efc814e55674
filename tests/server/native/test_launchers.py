"""C code between Python and kernels: compiled as a module that can be imported, or one clear error."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.interpreted

SOURCE = """
#include <Python.h>
#include <math.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_launcher(void) {
  PyObject *made = PyModule_Create(&module);
  PyModule_AddObject(made, "root", PyFloat_FromDouble(sqrt(PyFloat_AsDouble(PyFloat_FromDouble(49.0)))));
  return made;
}
"""
needs_headers = pytest.mark.skipif(
    not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(), reason="needs Python's headers"
)


@pytest.fixture
def launchers() -> ModuleType:
    from longshore_server.native.gpu import launchers  # triton is not everywhere

    return launchers


def _write(folder: Path, text: str) -> str:
    path = folder / "launcher.c"
    path.write_text(text)
    return str(path)


@needs_headers
def test_what_is_built_can_be_imported(launchers, tmp_path) -> None:
    path = launchers.build("launcher", _write(tmp_path, SOURCE), str(tmp_path), [], [], ["m", "libm.so.6"])
    spec = importlib.util.spec_from_file_location("launcher", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.root == 7.0


def test_errors_are_raised(launchers, tmp_path, monkeypatch) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        launchers.build("launcher", _write(tmp_path, "no C"), str(tmp_path), [], [], [])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launchers, "COMPILERS", ())
    with pytest.raises(RuntimeError, match="no C compiler"):
        launchers.build("launcher", _write(tmp_path, SOURCE), str(tmp_path), [], [], [])


def test_another_way_to_build_stays(launchers, monkeypatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.build, "impl", None)
    launchers.compile_launchers_fast()
    assert knobs.build.impl is launchers.build
    own = lambda *_: ""  # noqa: E731
    monkeypatch.setattr(knobs.build, "impl", own)
    launchers.compile_launchers_fast()
    assert knobs.build.impl is own
