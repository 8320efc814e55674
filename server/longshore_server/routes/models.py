"""`GET /v1/models` and `GET /v1/models/{id}`: the served model and its aliases."""

from __future__ import annotations

from starlette.responses import Response

from longshore.errors import UnknownModelError
from longshore.wire import ModelCard, ModelList, dump_json, encode
from longshore_server.generation import AnswerService
from longshore_server.routes.deps import Service, protected_router

router = protected_router()


@router.get("/v1/models", response_model=None)
async def list_models(service: Service) -> Response:
    """Every name that a request may give."""
    return _json(encode(ModelList(tuple(_cards(service)))))


@router.get("/v1/models/{model_id:path}", response_model=None)
async def get_model(model_id: str, service: Service) -> Response:
    """One model by its name or alias."""
    for card in _cards(service):
        if card.id == model_id:
            return _json(encode(card))
    raise UnknownModelError(f"model: no model {model_id[:200]!r} here", param="model")


def _cards(service: AnswerService) -> list[ModelCard]:
    name, info = service.config.model_name, service.engine.info
    return [
        ModelCard(
            id=served,
            root=None if served == name else name,
            max_model_len=info.max_model_len,
            model_digest=info.digest,
            input_modalities=("text", "image") if service.takes_images else ("text",),
        )
        for served in (name, *sorted(service.config.aliases))
    ]


def _json(value: object) -> Response:
    return Response(dump_json(value), media_type="application/json")
