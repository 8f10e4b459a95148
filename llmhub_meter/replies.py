"""JSON answers over bare ASGI: one function turns an error into its reply."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from .errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = Iterable[tuple[bytes, bytes]]


def error_json(error: ApiError, *, anthropic: bool = False) -> bytes:
    """The error body in OpenAI's form, or inside Anthropic's envelope around the same fields."""
    envelope: dict[str, object] = {"type": "error"} if anthropic else {}
    envelope["error"] = error.body()
    return msgspec.json.encode(envelope)


async def send_error(
    send: Send, error: ApiError, *, headers: RawHeaders = (), anthropic: bool = False
) -> None:
    """Answer with the error's status, body and headers, and `headers` besides."""
    own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers().items()]
    await send_bytes(send, error.status, error_json(error, anthropic=anthropic), [*own, *headers])


async def send_bytes(send: Send, status: int, body: bytes, headers: RawHeaders = ()) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
