"""Which operators the installed ONNX Runtime has, asked of it in the model process. Loads no model."""

from __future__ import annotations

from collections.abc import Collection

from longshore.errors import BundleIncompatibleError


def known_operators() -> frozenset[str] | None:
    """Names as `domain:name`, the standard domain left out; None where this runtime can't tell."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return None
    schemas = get_all_operator_schema()
    return frozenset(f"{schema.domain}:{schema.name}" if schema.domain else schema.name for schema in schemas)


def refuse_unknown(required: Collection[str]) -> None:
    """BundleIncompatibleError names those that the runtime does not have."""
    known = known_operators() if required else None
    missing = sorted(set(required) - known) if known is not None else []
    if missing:
        raise BundleIncompatibleError(f"this onnxruntime does not know {', '.join(missing[:5])}")
