"""Every failure as an answer in OpenAI's shape: ours, the framework's and bugs alike."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from longshore.errors import (
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    LongshoreError,
    MethodNotAllowedError,
    NotFoundError,
)
from longshore.wire import dump_json
from longshore_server.routes.reading import REQUEST_ID_HEADER, known_request_id
from longshore_server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


def error_response(error: LongshoreError, request_id: str | None = None) -> Response:
    """The response of an error, with Retry-After where it says when to come back."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    elif error.status in (429, 503):
        headers["retry-after"] = "1"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    request_id = error.request_id or request_id
    if request_id is not None:
        headers[REQUEST_ID_HEADER] = request_id
    return Response(dump_json(error.to_body()), error.status, headers, "application/json")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Make `app` answer every failure in our shape, and count it."""

    async def on_error(connection: Any, caught: Exception) -> Response | None:
        error = as_longshore_error(connection, caught)
        metrics.error(error)
        response = error_response(error, known_request_id(connection))
        if isinstance(connection, WebSocket):  # refused before it was accepted
            await connection.send_denial_response(response)
            return None
        if isinstance(caught, HTTPException) and caught.headers:
            response.headers.update(caught.headers)  # Allow, of a 405
        return response

    for kind in (LongshoreError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, on_error)  # type: ignore[arg-type]  # takes both kinds of connection


def as_longshore_error(connection: HTTPConnection, error: Exception) -> LongshoreError:
    """Our error for whatever was raised; a bug is logged and told without its insides."""
    if isinstance(error, LongshoreError):
        return error
    if isinstance(error, HTTPException):
        return _of_status(error, connection)
    if isinstance(error, RequestValidationError):
        return InvalidRequestError("the request can't be read")
    logger.error("unhandled error at %s", connection.url.path, exc_info=error)
    return InternalError("the request failed inside the server")


def _of_status(error: HTTPException, connection: HTTPConnection) -> LongshoreError:
    path = connection.url.path[:200]
    if error.status_code == 404:
        return NotFoundError(f"no route {path}")
    if error.status_code == 405:
        method = connection.method if isinstance(connection, Request) else "this method"
        return MethodNotAllowedError(f"{path} does not take {method}")
    if error.status_code == 413:
        return BodyTooLargeError("the body is too large")
    if 400 <= error.status_code < 500:
        return InvalidRequestError(str(error.detail))
    return InternalError("the request failed inside the server")
