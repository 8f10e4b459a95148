"""A FastAPI app with a chat endpoint of its own, metered by MeterMiddleware.

uvicorn --factory main:create_app
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from llmhub_meter import Meter, MeterMiddleware

CONFIG = Path(__file__).parent / "llmhub-meter.toml"


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    model: str
    messages: list[Message]
    stream: bool = False


def create_app() -> FastAPI:
    meter = Meter.from_config(CONFIG, background=True)
    app = FastAPI()
    app.add_middleware(MeterMiddleware, meter=meter)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        # What the meter knows of this request: account, request_id, model.
        account = request.scope["llmhub_meter"].account
        words = f"Hello {account}, you wrote {len(body.messages)} message(s).".split()
        usage = _usage(body, words)
        if body.stream:
            return StreamingResponse(_events(body.model, words, usage), media_type="text/event-stream")
        message = {"role": "assistant", "content": " ".join(words)}
        return {
            "id": "chatcmpl-example",
            "object": "chat.completion",
            "created": 0,
            "model": body.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage,
        }

    @app.get("/")
    async def home() -> dict[str, str]:
        """Not metered: belongs to the app alone."""
        return {"hello": "world"}

    return app


def _usage(body: ChatRequest, words: list[str]) -> dict[str, int]:
    """What the meter charges. A real app passes on what its model reported."""
    prompt = sum(len(message.content.split()) for message in body.messages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(words),
        "total_tokens": prompt + len(words),
    }


def _events(model: str, words: list[str], usage: dict[str, int]) -> Iterator[str]:
    """OpenAI's stream. The last chunk reports the usage; the meter hides it where the client did not ask."""
    for word in words:
        choice = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
        yield _event(model, choices=[choice])
    yield _event(model, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield _event(model, choices=[], usage=usage)
    yield "data: [DONE]\n\n"


def _event(model: str, **fields: Any) -> str:
    head = {"id": "chatcmpl-example", "object": "chat.completion.chunk", "created": 0, "model": model}
    return f"data: {json.dumps({**head, **fields})}\n\n"
