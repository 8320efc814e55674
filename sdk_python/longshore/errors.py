"""The one error tree of all tiers, and its form on the wire (OpenAI's error body).

    LongshoreError
    |-- RequestError                    the request is at fault; the same request fails again
    |   |-- InvalidRequestError         400 invalid_request
    |   |   |-- MalformedBodyError      400 malformed_body
    |   |   |-- UnknownParameterError   400 unknown_parameter
    |   |   |-- UnsupportedParameterError 400 unsupported_parameter
    |   |   |-- OutOfRangeError         400 out_of_range
    |   |   |-- PromptTooLongError      400 context_length_exceeded
    |   |   |-- InvalidImageError       400 invalid_image
    |   |   `-- BadMessageError         400 bad_message        (WebSocket)
    |   |-- AuthenticationError         401 invalid_api_key
    |   |-- PermissionDeniedError       403 permission_denied
    |   |-- NotFoundError               404 not_found
    |   |   `-- UnknownModelError       404 model_not_found
    |   |-- MethodNotAllowedError       405 method_not_allowed
    |   |-- DuplicateRequestError       409 duplicate_request
    |   |-- ResumeUnavailableError      410 resume_unavailable
    |   `-- BodyTooLargeError           413 body_too_large
    |-- CancelledError                  499 cancelled
    |-- OverloadedError                 429 overloaded         retryable
    |   |-- RateLimitedError            429 rate_limit_exceeded
    |   `-- QueueFullError              429 queue_full
    |-- TierError                       a tier is at fault; another may do better
    |   |-- InternalError               500 internal_error
    |   |-- EngineFailedError           500 engine_failed      retryable
    |   |-- UpstreamError               502 upstream_failed    retryable
    |   |   `-- ProtocolError           502 protocol_error
    |   |-- AnswerInterruptedError      502 answer_interrupted retryable
    |   |-- UnavailableError            503 unavailable        retryable
    |   |   |-- ConnectionFailedError   503 connection_failed
    |   |   `-- NoTierAvailableError    503 no_tier_available
    |   `-- DeadlineExceededError       504 deadline_exceeded
    |-- DeviceError                     500 device_failed      on-device generation
    |-- BundleError                     500 bundle_invalid
    |   |-- BundleDamagedError          500 bundle_damaged
    |   |-- BundleRollbackError         500 bundle_rollback
    |   `-- BundleIncompatibleError     500 bundle_incompatible
    |-- ExportError                     500 export_failed          making a bundle from a model
    |   |-- UnsupportedModelError       500 unsupported_model
    |   `-- ParityError                 500 parity_failed
    `-- ConfigError                     500 bad_config         stops a start with one line

Each class has a stable `code`, an HTTP `status` and `retryable`; every tier raises the same
classes, and `from_body` builds them again from what came over the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

__all__ = [
    "AnswerInterruptedError",
    "AuthenticationError",
    "BadMessageError",
    "BodyTooLargeError",
    "BundleDamagedError",
    "BundleError",
    "BundleIncompatibleError",
    "BundleRollbackError",
    "CancelledError",
    "ConfigError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DeviceError",
    "DuplicateRequestError",
    "EngineFailedError",
    "ExportError",
    "InternalError",
    "InvalidImageError",
    "InvalidRequestError",
    "LongshoreError",
    "MalformedBodyError",
    "MethodNotAllowedError",
    "NoTierAvailableError",
    "NotFoundError",
    "OutOfRangeError",
    "OverloadedError",
    "ParityError",
    "PermissionDeniedError",
    "PromptTooLongError",
    "ProtocolError",
    "QueueFullError",
    "RateLimitedError",
    "RequestError",
    "ResumeUnavailableError",
    "TierError",
    "UnavailableError",
    "UnknownModelError",
    "UnknownParameterError",
    "UnsupportedModelError",
    "UnsupportedParameterError",
    "UpstreamError",
    "from_body",
]

_MAX_MESSAGE_CHARS = 2000


class LongshoreError(Exception):
    """Base of every error that Longshore raises on purpose.

    `param` names the field at fault, in the caller's own path syntax (`messages[2].content`).
    `retry_after_s` is how long the caller should wait before asking again, in seconds.
    `request_id` is set by the tier that answers, when the request got as far as having one.
    `tokens_delivered` says how many answer tokens had reached the caller before the failure.
    The SDK sets two more: `partial_text`, the answer so far, and `attempts`, the tiers that were
    considered (`longshore.wire.Attempt`).
    """

    code: ClassVar[str] = "longshore_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        tokens_delivered: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.tokens_delivered = tokens_delivered
        self.partial_text: str | None = None
        self.attempts: tuple[Any, ...] = ()

    def to_body(self) -> dict[str, Any]:
        """The error in OpenAI's shape: `{"error": {"message", "type", "param", "code", ...}}`."""
        error: dict[str, Any] = {
            "message": _text(self.message),
            "type": self.type,
            "param": _text(self.param),
            "code": self.code,
            "retry_after_s": self.retry_after_s,
            "request_id": _text(self.request_id),
            "tokens_delivered": self.tokens_delivered,
        }
        for name in ("retry_after_s", "request_id", "tokens_delivered"):
            if error[name] is None:
                del error[name]
        return {"error": error}


class RequestError(LongshoreError):
    """The request is at fault: no tier will answer it as it stands."""

    type = "invalid_request_error"
    status = 400
    code = "request_error"


class InvalidRequestError(RequestError):
    """A field has the wrong type, is missing, or contradicts another."""

    code = "invalid_request"


class MalformedBodyError(InvalidRequestError):
    """The body is not JSON: broken syntax, NaN or Infinity, bad UTF-8, nested too deep."""

    code = "malformed_body"


class UnknownParameterError(InvalidRequestError):
    """A field that the wire does not know."""

    code = "unknown_parameter"


class UnsupportedParameterError(InvalidRequestError):
    """A field that OpenAI's API knows and this tier does not carry out."""

    code = "unsupported_parameter"


class OutOfRangeError(InvalidRequestError):
    """A number, length or string outside the bounds of `longshore.wire`."""

    code = "out_of_range"


class PromptTooLongError(InvalidRequestError):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class InvalidImageError(InvalidRequestError):
    """A picture that can't be taken: no PNG, JPEG or WebP, broken, animated, or too large to be decoded."""

    code = "invalid_image"


class BadMessageError(InvalidRequestError):
    """A WebSocket message that is not in the table of message types."""

    code = "bad_message"


class AuthenticationError(RequestError):
    """No key, or one that is not known here."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDeniedError(RequestError):
    """The key is known and does not permit this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class NotFoundError(RequestError):
    """No such route or object."""

    status = 404
    code = "not_found"


class UnknownModelError(NotFoundError):
    """No model or alias of that name."""

    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """The route exists and has another method."""

    status = 405
    code = "method_not_allowed"


class DuplicateRequestError(RequestError):
    """A request of the same tenant with this id is in flight."""

    status = 409
    code = "duplicate_request"


class ResumeUnavailableError(RequestError):
    """The events that a client asks to resume from are no longer kept."""

    status = 410
    code = "resume_unavailable"


class BodyTooLargeError(RequestError):
    """The body is over the limit of bytes."""

    status = 413
    code = "body_too_large"


class CancelledError(LongshoreError):
    """The client left or cancelled."""

    status = 499
    code = "cancelled"
    type = "cancelled"


class OverloadedError(LongshoreError):
    """The tier is busy; the same request can succeed later or elsewhere."""

    status = 429
    code = "overloaded"
    retryable = True
    type = "rate_limit_error"


class RateLimitedError(OverloadedError):
    """The key's own limit is used up."""

    code = "rate_limit_exceeded"


class QueueFullError(OverloadedError):
    """The waiting queue is at its bound."""

    code = "queue_full"


class TierError(LongshoreError):
    """A tier is at fault; another one may answer."""

    code = "tier_failed"


class InternalError(TierError):
    """A bug of ours, told without its internals."""

    code = "internal_error"


class EngineFailedError(TierError):
    """The engine died or failed on this request."""

    code = "engine_failed"
    retryable = True


class UpstreamError(TierError):
    """The tier behind this one answered wrongly or not at all."""

    status = 502
    code = "upstream_failed"
    retryable = True


class ProtocolError(UpstreamError):
    """The peer broke the wire's rules."""

    code = "protocol_error"


class AnswerInterruptedError(TierError):
    """The answer stopped part-way; `tokens_delivered` says where."""

    status = 502
    code = "answer_interrupted"
    retryable = True


class UnavailableError(TierError):
    """The tier is not ready: starting, draining or down."""

    status = 503
    code = "unavailable"
    retryable = True


class ConnectionFailedError(UnavailableError):
    """No connection to the tier could be made, so nothing was sent."""

    code = "connection_failed"


class NoTierAvailableError(UnavailableError):
    """Every permitted tier was tried or ruled out."""

    code = "no_tier_available"


class DeadlineExceededError(TierError):
    """The request's own time ran out."""

    status = 504
    code = "deadline_exceeded"


class DeviceError(LongshoreError):
    """On-device generation failed."""

    code = "device_failed"


class BundleError(LongshoreError):
    """A model bundle can't be used."""

    code = "bundle_invalid"


class BundleDamagedError(BundleError):
    """A file is missing, truncated or not what the manifest says."""

    code = "bundle_damaged"


class BundleRollbackError(BundleError):
    """The bundle is older than the one installed."""

    code = "bundle_rollback"


class BundleIncompatibleError(BundleError):
    """The bundle needs a newer runtime or another operator set."""

    code = "bundle_incompatible"


class ExportError(LongshoreError):
    """A model can't be made into a bundle as asked."""

    code = "export_failed"


class UnsupportedModelError(ExportError):
    """The export does not know this architecture, or one of its settings."""

    code = "unsupported_model"


class ParityError(ExportError):
    """The exported graph and the model disagree, so no bundle was written."""

    code = "parity_failed"


class ConfigError(LongshoreError):
    """A setting, path or port that stops the start; the message is one line."""

    code = "bad_config"


def _tree(root: type[LongshoreError]) -> Iterator[type[LongshoreError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_BY_CODE: dict[str, type[LongshoreError]] = {cls.code: cls for cls in _tree(LongshoreError)}

_BY_STATUS: dict[int, type[LongshoreError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    405: MethodNotAllowedError,
    409: DuplicateRequestError,
    410: ResumeUnavailableError,
    413: BodyTooLargeError,
    422: InvalidRequestError,
    429: OverloadedError,
    499: CancelledError,
    502: UpstreamError,
    503: UnavailableError,
    504: DeadlineExceededError,
}


def from_body(status: int, body: object) -> LongshoreError:
    """Rebuild the error that a tier sent; never raises, whatever the body holds.

    An unknown code falls back to the class of the HTTP `status`, so that errors of other
    OpenAI-shaped servers arrive as ours too.
    """
    error = body.get("error") if isinstance(body, Mapping) else None
    fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    code = fields.get("code")
    cls = _BY_CODE.get(code) if isinstance(code, str) else None
    if cls is None:
        cls = _BY_STATUS.get(status, RequestError if 400 <= status < 500 else UpstreamError)
    return cls(
        _text(fields.get("message")) or f"the server answered {status}",
        param=_text(fields.get("param")),
        retry_after_s=_number(fields.get("retry_after_s")),
        request_id=_text(fields.get("request_id")),
        tokens_delivered=_whole(fields.get("tokens_delivered")),
    )


def _text(value: object) -> str | None:
    """Text cut to its bound; a lone surrogate, which no encoder takes, becomes a question mark."""
    if not isinstance(value, str):
        return None
    return value[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e9 else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None
