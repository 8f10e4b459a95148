"""A Starlette app that knows its customers itself: `identify` says who pays, no API keys of the meter.

uvicorn --factory main:create_app
"""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from llmhub_meter import Account, Meter, MeterMiddleware

CONFIG = Path(__file__).parent / "llmhub-meter.toml"

CUSTOMERS = {
    "token-of-anna": Account("customer-17", name="Anna"),
    "token-of-ben": Account("customer-18", name="Ben"),
}
"""In a real app: your session, your database, your gateway's header."""


def identify(scope: Any) -> Account | None:
    """Who pays; None is answered with 401. An account that is new is opened with the signup grant."""
    for name, value in scope["headers"]:
        if name == b"x-app-token":
            return CUSTOMERS.get(value.decode("latin-1"))
    return None


async def chat(request: Request) -> JSONResponse:
    body = await request.json()
    message = {"role": "assistant", "content": "Hello."}
    return JSONResponse(
        {
            "id": "chatcmpl-example",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        }
    )


async def hello(request: Request) -> PlainTextResponse:
    """Not metered: belongs to the app alone."""
    return PlainTextResponse("hello")


def create_app() -> Starlette:
    meter = Meter.from_config(CONFIG, background=True)
    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/hello", hello)],
        middleware=[Middleware(MeterMiddleware, meter=meter, identify=identify)],
    )
