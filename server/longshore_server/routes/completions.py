"""`POST /v1/completions`."""

from __future__ import annotations

from starlette.requests import Request

from longshore.wire import decode_completion_request
from longshore_server.routes.answering import AnswerResponse
from longshore_server.routes.deps import KnownCaller, Service, protected_router
from longshore_server.routes.reading import read_json_object, request_id_of

router = protected_router()


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, caller: KnownCaller, service: Service) -> AnswerResponse:
    """Go on from one or more prompts, whole or streamed."""
    arrived_s = service.clock()
    body = await read_json_object(
        request, max_bytes=service.config.max_body_bytes, timeout_s=service.config.reader_timeout_s
    )
    completion = decode_completion_request(body)
    request_id = request_id_of(completion, request)
    return AnswerResponse(service, await service.plan(completion, caller, request_id, arrived_s))
