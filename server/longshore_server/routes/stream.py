"""WebSocket `/v1/stream`: many generations over one socket, each with its own credit and its own end."""

from __future__ import annotations

from starlette.websockets import WebSocket

from longshore_server.auth import WEBSOCKET_PROTOCOL
from longshore_server.routes.deps import AppParts, KnownCaller, Service, protected_router
from longshore_server.routes.socket import SocketSession

router = protected_router()


@router.websocket("/v1/stream")
async def stream(websocket: WebSocket, caller: KnownCaller, service: Service, parts: AppParts) -> None:
    """Serve one socket until the client leaves."""
    offered = websocket.scope.get("subprotocols", ())
    await websocket.accept(WEBSOCKET_PROTOCOL if WEBSOCKET_PROTOCOL in offered else None)
    session = SocketSession(websocket, caller, service)
    parts.sockets.add(session)
    try:
        await session.serve()
    finally:
        parts.sockets.discard(session)
