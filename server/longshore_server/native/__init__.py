"""The native engine: continuous batching over unmodified transformers models with a paged KV cache.

It deals in token ids only: text, chat templates, stop strings, sockets and HTTP live elsewhere. Importing
this package loads no torch; the names below load it when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longshore_server.native.config import EngineConfig
    from longshore_server.native.engine import NativeEngine
    from longshore_server.native.outputs import EngineStats, TokenOutput
    from longshore_server.native.sampling_params import SamplingParams

_MODULE_OF = {
    "EngineConfig": "config",
    "EngineStats": "outputs",
    "NativeEngine": "engine",
    "SamplingParams": "sampling_params",
    "TokenOutput": "outputs",
}

__all__ = ["EngineConfig", "EngineStats", "NativeEngine", "SamplingParams", "TokenOutput"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
