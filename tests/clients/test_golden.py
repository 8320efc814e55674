"""The golden vectors are what Python gives today, and JavaScript reproduces every one of them."""

from __future__ import annotations

import base64
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from clients.conftest import STUDENT
from clients.runtimes import ROOT, run_node
from longshore.wire import Manifest

ANDROID = ROOT / "examples" / "android"
GOLDEN = ANDROID / "golden"


@cache
def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return value


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", ANDROID / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vectors_are_fresh(bundle: tuple[Path, Manifest]) -> None:
    fresh = maker().golden(bundle[0])
    assert sorted(fresh) == sorted(path.stem for path in GOLDEN.glob("*.json"))
    for name, value in fresh.items():
        stale = json.loads(json.dumps(value)) != load(name)
        assert not stale, (
            f"{name}.json is stale: run examples/android/make_golden.py and look at the difference"
        )


def test_the_vectors_refuse_and_accept() -> None:
    verdicts = {case.get("error", "accepted") for case in load("bundles")["cases"]}
    assert verdicts == {"accepted", "bundle_invalid", "bundle_damaged"}
    assert {"key" in case for case in load("rotations")["cases"]} == {True, False}
    assert {case["is_valid"] for case in load("signatures")["cases"]} == {True, False}


def test_javascript_reproduces_them() -> None:
    bundles = [case for case in load("bundles")["cases"] if "files" not in case]
    template = json.loads(base64.b64decode(load("template")["manifest"]))["chat_template"]
    found = run_node(
        "node_tokens.mjs",
        {
            "what": "vectors",
            "tokenizer": str(STUDENT / "tokenizer.json"),
            "texts": [case["text"] for case in load("tokenizer")["cases"]],
            "template": template,
            "chats": [case["messages"] for case in load("template")["cases"]],
            "trusted": load("bundles")["trusted"],
            "bundles": [{key: case[key] for key in ("manifest", "signature")} for case in bundles],
            "runtimes": load("runtimes")["cases"],
            "rotations": load("rotations")["cases"],
        },
    )
    assert found["tokenizer"] == load("tokenizer")["cases"]
    assert found["template"] == [case["ids"] for case in load("template")["cases"]]
    verdicts = dict(zip((case["name"] for case in bundles), found["bundles"], strict=True))
    expected = {case["name"]: case.get("error", case.get("version")) for case in bundles}
    assert {
        name: (verdicts[name], expected[name]) for name in verdicts if verdicts[name] != expected[name]
    } == {}
    assert found["runtimes"] == [case["error"] for case in load("runtimes")["cases"]]
    for case, rotation in zip(load("rotations")["cases"], found["rotations"], strict=True):
        verdict = case.get("key", case.get("error"))
        wanted = {"known": case["known"], "key": verdict, "keptKey": verdict}
        assert rotation == wanted, case["name"]
