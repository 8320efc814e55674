"""What can go wrong in an export; one line each, told before any bundle is written."""

from __future__ import annotations

from typing import ClassVar

from longshore.errors import LongshoreError


class ExportError(LongshoreError):
    """The model can't be exported as asked."""

    code: ClassVar[str] = "export_failed"


class UnsupportedModelError(ExportError):
    """The builder does not know this architecture, or one of its settings."""

    code: ClassVar[str] = "unsupported_model"


class ParityError(ExportError):
    """The graph and torch disagree, so no bundle was written."""

    code: ClassVar[str] = "parity_failed"
