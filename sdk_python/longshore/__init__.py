"""Longshore's SDK: one call that device, edge or core answers.

Names are loaded when they are first used, so that importing a leaf such as `longshore.errors` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longshore.client import (
        AsyncClient,
        Client,
    )
    from longshore.config import (
        HttpSettings,
        Mode,
        RoutingSettings,
    )
    from longshore.errors import (
        AnswerInterruptedError,
        AuthenticationError,
        BadMessageError,
        BodyTooLargeError,
        BundleDamagedError,
        BundleError,
        BundleIncompatibleError,
        BundleRollbackError,
        CancelledError,
        ConfigError,
        ConnectionFailedError,
        DeadlineExceededError,
        DeviceError,
        DuplicateRequestError,
        EngineFailedError,
        InternalError,
        InvalidImageError,
        InvalidRequestError,
        LongshoreError,
        MalformedBodyError,
        MethodNotAllowedError,
        NotFoundError,
        NoTierAvailableError,
        OutOfRangeError,
        OverloadedError,
        PermissionDeniedError,
        PromptTooLongError,
        ProtocolError,
        QueueFullError,
        RateLimitedError,
        RequestError,
        ResumeUnavailableError,
        TierError,
        UnavailableError,
        UnknownModelError,
        UnknownParameterError,
        UnsupportedParameterError,
        UpstreamError,
    )
    from longshore.policy import (
        TierView,
    )
    from longshore.streams import (
        AsyncChatStream,
        AsyncCompletionStream,
        ChatStream,
        CompletionStream,
    )
    from longshore.wire import (
        Attempt,
        ChatCompletion,
        ChatCompletionChunk,
        Completion,
        Hop,
        ImageUse,
        Message,
        ModelList,
        Report,
        Segment,
        Tier,
        Usage,
    )

__version__ = "0.1.0"

_HOMES = {
    "longshore.client": (
        "AsyncClient",
        "Client",
    ),
    "longshore.config": (
        "HttpSettings",
        "Mode",
        "RoutingSettings",
    ),
    "longshore.policy": ("TierView",),
    "longshore.streams": (
        "AsyncChatStream",
        "AsyncCompletionStream",
        "ChatStream",
        "CompletionStream",
    ),
    "longshore.wire": (
        "Attempt",
        "ChatCompletion",
        "ChatCompletionChunk",
        "Completion",
        "Hop",
        "ImageUse",
        "Message",
        "ModelList",
        "Report",
        "Segment",
        "Tier",
        "Usage",
    ),
}

__all__ = [
    "AnswerInterruptedError",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncCompletionStream",
    "Attempt",
    "AuthenticationError",
    "BadMessageError",
    "BodyTooLargeError",
    "BundleDamagedError",
    "BundleError",
    "BundleIncompatibleError",
    "BundleRollbackError",
    "CancelledError",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatStream",
    "Client",
    "Completion",
    "CompletionStream",
    "ConfigError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DeviceError",
    "DuplicateRequestError",
    "EngineFailedError",
    "Hop",
    "HttpSettings",
    "ImageUse",
    "InternalError",
    "InvalidImageError",
    "InvalidRequestError",
    "LongshoreError",
    "MalformedBodyError",
    "Message",
    "MethodNotAllowedError",
    "Mode",
    "ModelList",
    "NoTierAvailableError",
    "NotFoundError",
    "OutOfRangeError",
    "OverloadedError",
    "PermissionDeniedError",
    "PromptTooLongError",
    "ProtocolError",
    "QueueFullError",
    "RateLimitedError",
    "Report",
    "RequestError",
    "ResumeUnavailableError",
    "RoutingSettings",
    "Segment",
    "Tier",
    "TierError",
    "TierView",
    "UnavailableError",
    "UnknownModelError",
    "UnknownParameterError",
    "UnsupportedParameterError",
    "UpstreamError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'longshore' has no attribute {name!r}")
    homes = (module for module, names in _HOMES.items() if name in names)
    value = getattr(import_module(next(homes, "longshore.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
