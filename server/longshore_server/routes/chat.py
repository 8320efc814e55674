"""`POST /v1/chat/completions`."""

from __future__ import annotations

from starlette.requests import Request

from longshore.wire import decode_chat_request
from longshore_server.routes.answering import AnswerResponse
from longshore_server.routes.deps import KnownCaller, Service, protected_router
from longshore_server.routes.reading import read_json_object, request_id_of

router = protected_router()


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, caller: KnownCaller, service: Service) -> AnswerResponse:
    """Answer a conversation, whole or streamed."""
    arrived_s = service.clock()
    body = await read_json_object(
        request, max_bytes=service.config.max_body_bytes, timeout_s=service.config.reader_timeout_s
    )
    chat = decode_chat_request(body)
    request_id = request_id_of(chat, request)
    return AnswerResponse(service, await service.plan(chat, caller, request_id, arrived_s))
