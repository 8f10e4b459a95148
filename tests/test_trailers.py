"""The final figures of a stream as HTTP trailers, where the server offers these."""

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from test_middleware import BODY, by_header, new_meter, routes

from llmhub_meter import MeterMiddleware
from llmhub_meter.meter import running


async def messages_of(redis_url: str, body: dict[str, Any], extensions: dict[str, Any]) -> list[Any]:
    """What the middleware sends to a server with these extensions."""
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"x-user", b"alice")],
        "query_string": b"",
        "extensions": extensions,
    }
    request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if request:
            return request.pop()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async with running(new_meter(redis_url)) as meter:
        app = MeterMiddleware(Starlette(routes=routes()), meter=meter, identify=by_header)
        await app(scope, receive, send)
    return sent


async def test_a_stream_ends_with_trailers(redis_url: str) -> None:
    sent = await messages_of(redis_url, {**BODY, "stream": True}, {"http.response.trailers": {}})
    assert sent[0]["trailers"] is True
    assert (b"trailer", b"x-credits-used, x-credits-remaining") in sent[0]["headers"]
    assert sent[-2]["more_body"] is False
    assert sent[-1] == {
        "type": "http.response.trailers",
        "headers": [(b"x-credits-used", b"175"), (b"x-credits-remaining", b"825")],
        "more_trailers": False,
    }


@pytest.mark.parametrize(
    ("body", "extensions"),
    [({**BODY, "stream": True}, {}), (BODY, {"http.response.trailers": {}})],
    ids=["a server without", "a JSON answer"],
)
async def test_no_trailers(redis_url: str, body: dict[str, Any], extensions: dict[str, Any]) -> None:
    sent = await messages_of(redis_url, body, extensions)
    assert not sent[0].get("trailers")
    assert {message["type"] for message in sent} == {"http.response.start", "http.response.body"}
