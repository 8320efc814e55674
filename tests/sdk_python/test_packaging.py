"""The built wheel in a fresh environment: light, complete, and importing nothing heavy."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_DEPENDENCIES_BYTES = 8 * 1024 * 1024
HEAVY = {
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "fastapi",
    "starlette",
    "pydantic",
    "numpy",
    "granian",
}
# What comes with every environment, and Longshore itself: not its dependencies.
NOT_DEPENDENCIES = (
    "pip",
    "setuptools",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence.pth",
    "longshore",
)
LEAVES = [
    "errors.py",
    "sse.py",
    "detokenize.py",
    *(f"wire/{p.name}" for p in (ROOT / "sdk_python/longshore/wire").glob("*.py")),
]


def run(*command: str | Path, timeout_s: float = 100) -> str:
    """Standard output of a command; its whole output is shown where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """The wheel, and an environment that holds nothing but it and its dependencies."""

    wheel: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))

    def evaluate(self, code: str) -> object:
        """What the code prints as JSON, run where no source tree is in reach."""
        return json.loads(run(self.python, "-I", "-c", code))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("packaging")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    result = Installed(wheel, folder / "env")
    constraints = ROOT / "constraints.txt"
    run(result.python, "-m", "pip", "install", "-qq", "--no-compile", "-c", constraints, wheel)
    return result


def test_importing_longshore_brings_in_nothing_heavy(installed: Installed) -> None:
    modules = installed.evaluate("import json, sys, longshore; print(json.dumps(sorted(sys.modules)))")
    assert isinstance(modules, list)
    assert HEAVY.isdisjoint({name.partition(".")[0] for name in modules})
    versions = installed.evaluate(
        "import json, longshore; from importlib.metadata import version;"
        "print(json.dumps([longshore.__version__, version('longshore')]))"
    )
    assert isinstance(versions, list)
    assert versions[0] == versions[1]


def test_installed_dependencies_stay_small(installed: Installed) -> None:
    sizes = {
        path.name: sum(
            file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
        )
        for path in installed.site_packages.iterdir()
        if not path.name.startswith(NOT_DEPENDENCIES) and path.name != "__pycache__"
    }
    assert not HEAVY & set(sizes)
    assert "httpx2" in sizes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    assert sum(sizes.values()) < MAX_DEPENDENCIES_BYTES, largest


def test_the_wheel_holds_the_four_packages_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "longshore",
        "longshore_edge",
        "longshore_export",
        "longshore_server",
    }
    assert "longshore/py.typed" in names
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".onnx", ".pem", ".key"))]
    sources = {
        path.relative_to(ROOT / "sdk_python").as_posix() for path in (ROOT / "sdk_python").rglob("*.py")
    }
    assert sources <= set(names)


def test_the_command_helps_without_the_extras(installed: Installed) -> None:
    text = run(installed.folder / "bin" / "longshore", "--help")
    assert "longshore" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_the_standard_library_and_annotated_types_alone(leaf: str) -> None:
    allowed = sys.stdlib_module_names | {"annotated_types"}
    for node in ast.walk(ast.parse((ROOT / "sdk_python/longshore" / leaf).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            is_leaf = name.startswith(("longshore.errors", "longshore.wire"))
            assert is_leaf or name.partition(".")[0] in allowed, f"{leaf} imports {name}"


@pytest.mark.parametrize(
    "module", ["longshore.device", "longshore_edge", "longshore_server", "longshore_export"]
)
def test_heavy_runtimes_are_imported_late(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(run(sys.executable, "-c", code))
    assert {"torch", "transformers", "onnxruntime", "onnx"}.isdisjoint(modules)
