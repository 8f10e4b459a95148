"""`llmhub-meter demo`: everything in one process, and the model upstream that it brings along.

The upstream speaks OpenAI's wire format with no model behind it: the same request always gets the same
bytes, and the usage reported is what tiktoken counts.
"""

import asyncio
import base64
import hashlib
import math
import os
import re
import signal
import struct
import zlib
from bisect import bisect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .config import Config
from .errors import (
    AccountExists,
    ApiError,
    ConfigError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    NotFound,
)
from .meter import Meter
from .pricing.table import PriceTable
from .proxy import create_app
from .replies import error_json
from .serving import app_server, cut_answers, listen, listen_next, url_of
from .tokens import chat_text, count, count_in_thread, count_pieces

CHAT_MODEL = "demo-chat"
EMBEDDING_MODEL = "demo-embedding"
IMAGE_MODEL = "demo-image"
FREE_MODEL = "demo-free"

MODELS: Mapping[str, Mapping[str, object]] = {
    CHAT_MODEL: {
        "type": "chat",
        "input_per_1k": 14,
        "output_per_1k": 56,
        "max_output_tokens": 4096,
        "context_window": 128_000,
    },
    FREE_MODEL: {
        "type": "chat",
        "free": True,
        "max_output_tokens": 4096,
        "context_window": 128_000,
        "upstream_model": CHAT_MODEL,
    },
    EMBEDDING_MODEL: {"type": "embedding", "input_per_1k": "1.9"},
    IMAGE_MODEL: {
        "type": "image",
        "per_generation": 3700,
        "per_generation_by": {"1024x1024/hd": 7400},
    },
}
"""The demo's price table, in credits."""

ACCOUNT = "demo"
KEY_FILE = "demo.key"

_FINGERPRINT = "llmhub-meter-demo"
_CREATED = 1_767_225_600
"""A fixed date, 2026-01-01, so that equal requests get equal answers."""
_ECHO_CHARACTERS = 200
_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo that serves."""

    key: str
    base_url: str
    account: str
    data_dir: Path
    busy_port: int | None
    """The port that was asked for, where somebody else has it."""


async def run(data_dir: Path, *, host: str, port: int, announce: Callable[[Demo], None]) -> None:
    """Proxy, upstream and server of `data_dir` until SIGTERM or Ctrl-C; a second one does not wait.

    Started again, it goes on with the same account, key and balance. Raises ConfigError.
    """
    stop = asyncio.Event()
    with listen_next(host, port) as listener, listen("127.0.0.1", 0) as upstream_listener:
        upstream_url = url_of("127.0.0.1", upstream_listener.getsockname()[1])
        config = Config.model_validate(
            {
                "data_dir": data_dir,
                "upstreams": {"demo": {"base_url": f"{upstream_url}/v1", "auth": "none"}},
                "models": MODELS,
            }
        )
        meter = Meter.from_config(config, background=True, adopt_prices=True)
        try:
            await meter.start()
            await _publish(meter, config)
            key = await _key(meter, data_dir)
            async with (
                app_server(create_upstream(), upstream_listener) as upstream,
                app_server(create_app(config, meter), listener) as proxy,
            ):

                def end() -> None:
                    if stop.is_set():
                        cut_answers(proxy, upstream)
                    stop.set()

                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, end)
                actual = listener.getsockname()[1]
                busy = port if port not in (0, actual) else None
                announce(Demo(key, f"{url_of(host, actual)}/v1", ACCOUNT, data_dir, busy))
                await stop.wait()
        finally:
            await meter.aclose()


async def _publish(meter: Meter, config: Config) -> None:
    """Puts the demo's prices in force, but never in place of an operator's own."""
    if foreign := sorted(meter.prices.table.models.keys() - MODELS.keys()):
        raise ConfigError(
            [
                f"{config.data_dir} is in use with a price table of its own ({foreign[0]} ...); "
                "run the demo in another folder"
            ]
        )
    await meter.prices.publish(PriceTable.from_config(config.models, config.default_upstream), force=True)


async def _key(meter: Meter, data_dir: Path) -> str:
    """The demo account's key: the one of the last run, or a new one where that is lost."""
    with suppress(AccountExists):
        await meter.accounts.create(ACCOUNT)
    account = (await meter.accounts.get(ACCOUNT)).account.id
    path = data_dir / KEY_FILE
    with suppress(FileNotFoundError, InvalidApiKey):
        kept = path.read_text().strip()
        if (await meter.accounts.find(kept)).account == account:
            return kept
    key, _ = await meter.accounts.issue_key(account, name=ACCOUNT)
    # Replaced whole, so that a run which is killed here leaves no half a key.
    draft = data_dir / f".{KEY_FILE}.{os.getpid()}"
    with open(draft, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(f"{key}\n")
    draft.replace(path)
    return key


def welcome(demo: Demo) -> str:
    """What the demo is and how to use it, with lines to paste."""
    auth = f'-H "Authorization: Bearer {demo.key}"'
    post = f"{auth} -H 'Content-Type: application/json'"
    message = '"messages":[{"role":"user","content":"Hello"}]'
    moved = "" if demo.busy_port is None else f"port {demo.busy_port} is busy, using {_port(demo)}\n"
    return f"""{moved}llmhub-meter demo: an OpenAI-compatible API with prepaid credits, all on this machine.
No model is asked: a built-in upstream answers and reports its tokens.

  base URL   {demo.base_url}
  API key    {demo.key}
  account    {demo.account} (`llmhub-meter accounts show {demo.account}`)
  models     {", ".join(MODELS)}
  data       {demo.data_dir}

A chat; X-Credits-Used and X-Credits-Remaining are in its headers:
  curl -i {demo.base_url}/chat/completions {post} -d '{{"model":"{CHAT_MODEL}",{message}}}'

A stream; its last comment line has the credits:
  curl -N {demo.base_url}/chat/completions {post} -d '{{"model":"{CHAT_MODEL}","stream":true,{message}}}'

The balance:
  curl {demo.base_url}/credits {auth}

For OpenAI's clients:
  export OPENAI_BASE_URL={demo.base_url}
  export OPENAI_API_KEY={demo.key}

Ctrl-C stops it; the next run goes on with the same key and balance."""


def _port(demo: Demo) -> str:
    return demo.base_url.removesuffix("/v1").rpartition(":")[2]


def create_upstream(*, chunk_seconds: float = 0.02) -> Starlette:
    """The demo upstream as an app: chat completions, responses, embeddings, images and the list of models.

    `chunk_seconds` is the pause before each chunk of a stream.
    """

    async def chat(request: Request) -> Response:
        body = await request.body()
        return await _chat(_read(body, _ChatRequest), _answer_id("chatcmpl-", body), chunk_seconds)

    async def responses(request: Request) -> Response:
        body = await request.body()
        return await _respond(_read(body, _ResponsesRequest), _answer_id("resp_", body), chunk_seconds)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/embeddings", _embeddings, methods=["POST"]),
            Route("/v1/images/generations", _images, methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
        ],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse},
    )


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _ChatRequest(msgspec.Struct):
    model: str
    messages: Annotated[list[_Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None


class _ResponsesRequest(msgspec.Struct):
    model: str
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None


class _EmbeddingsRequest(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: Annotated[int, Meta(ge=1, le=3072)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class _ImagesRequest(msgspec.Struct):
    model: str
    prompt: Annotated[str, Meta(min_length=1)]
    n: Annotated[int, Meta(ge=1, le=10)] | None = None
    size: Literal["auto", "256x256", "512x512", "1024x1024", "1024x1536", "1536x1024"] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    response_format: Literal["b64_json"] | None = None


_Body = TypeVar("_Body", _ChatRequest, _ResponsesRequest, _EmbeddingsRequest, _ImagesRequest)


def _read(body: bytes, shape: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        field = re.search(r"`\$\.(\w+)|field `(\w+)`", str(error))
        raise InvalidRequest(str(error), param=field and (field[1] or field[2])) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body of your request is not valid JSON.") from None


def _require_model(named: str, served: str) -> None:
    if named != served:
        raise ModelNotFound(f"The demo serves `{served}` here, not `{named}`.", param="model")


def _answer_id(prefix: str, body: bytes) -> str:
    return prefix + hashlib.sha256(body).hexdigest()[:29]


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return Response(error_json(error), error.status, media_type="application/json")
    assert isinstance(error, HTTPException)
    unknown = NotFound(f"{error.detail}: {request.method} {request.url.path} is not part of the demo.")
    return Response(error_json(unknown), error.status_code, media_type="application/json")


async def _chat(request: _ChatRequest, answer_id: str, chunk_seconds: float) -> Response:
    _require_model(request.model, CHAT_MODEL)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
        )
    prompt = chat_text(
        [msgspec.to_builtins(message) for message in request.messages],
        request.tools,
        request.functions,
        response_format=request.response_format,
        model=CHAT_MODEL,
    )
    prompt_tokens = await count_pieces(prompt.pieces, prompt.overhead, CHAT_MODEL)
    answers = _answers(request)
    usage = _usage(prompt_tokens, sum(count(text, CHAT_MODEL) for text, _ in answers))
    if request.stream:
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        events = _chat_events(answer_id, answers, usage if wants_usage else None)
        return StreamingResponse(_paced(events, chunk_seconds), media_type="text/event-stream")
    choices: list[dict[str, object]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(answers)
    ]
    return _json({**_chat_head(answer_id, "chat.completion"), "choices": choices, "usage": usage})


def _answers(request: _ChatRequest) -> list[tuple[str, str]]:
    """Text and finish reason of each choice."""
    limit = request.max_completion_tokens or request.max_tokens
    choices = request.n or 1
    text = _answer_to(_text_of(request.messages[-1].content))
    texts = [text if choices == 1 else f"{text} (choice {index + 1})" for index in range(choices)]
    return [_cut(text, limit) for text in texts]


def _answer_to(asked: str) -> str:
    text = "This is a demo answer by llmhub-meter; no model was asked."
    if echo := asked[:_ECHO_CHARACTERS].strip():
        text += f' You wrote: "{echo}"'
    return text


def _text_of(content: object) -> str:
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return " ".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _cut(text: str, limit: int | None) -> tuple[str, str]:
    """The longest start of `text` within `limit` tokens, and why it ends there."""
    if limit is None or count(text, CHAT_MODEL) <= limit:
        return text, "stop"
    end = bisect(range(len(text)), limit, key=lambda end: count(text[:end], CHAT_MODEL)) - 1
    # A longer start may have fewer tokens, so the search can be off by a few characters.
    while count(text[:end], CHAT_MODEL) > limit:
        end -= 1
    return text[:end], "length"


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chat_head(answer_id: str, kind: str) -> dict[str, object]:
    return {
        "id": answer_id,
        "object": kind,
        "created": _CREATED,
        "model": CHAT_MODEL,
        "service_tier": "default",
        "system_fingerprint": _FINGERPRINT,
    }


def _chat_events(
    answer_id: str, answers: list[tuple[str, str]], usage: dict[str, object] | None
) -> Iterator[bytes]:
    """A stream as OpenAI sends it; asked for usage, each chunk has the field and a last one fills it."""
    head = _chat_head(answer_id, "chat.completion.chunk")
    no_usage = {} if usage is None else {"usage": None}

    def chunk(index: int, delta: dict[str, object], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event(msgspec.json.encode({**head, "choices": [choice], **no_usage}))

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    words = [_WORD.findall(text) for text, _ in answers]
    for position in range(max(map(len, words))):
        for index, spoken in enumerate(words):
            if position < len(spoken):
                yield chunk(index, {"content": spoken[position]})
    for index, (_, reason) in enumerate(answers):
        yield chunk(index, {}, reason)
    if usage is not None:
        yield _event(msgspec.json.encode({**head, "choices": [], "usage": usage}))
    yield _event(b"[DONE]")


async def _respond(request: _ResponsesRequest, answer_id: str, chunk_seconds: float) -> Response:
    _require_model(request.model, CHAT_MODEL)
    given = request.input
    prompt = chat_text(given, request.tools, system=request.instructions, model=CHAT_MODEL)
    prompt_tokens = await count_pieces(prompt.pieces, prompt.overhead, CHAT_MODEL)
    asked = given if isinstance(given, str) else _text_of(given[-1].get("content"))
    text, reason = _cut(_answer_to(asked), request.max_output_tokens)
    tokens = count(text, CHAT_MODEL)
    status = "completed" if reason == "stop" else "incomplete"
    item = {
        "id": answer_id.replace("resp_", "msg_"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    begun: dict[str, object] = {
        "id": answer_id,
        "object": "response",
        "created_at": _CREATED,
        "model": CHAT_MODEL,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": request.tools or [],
        "usage": None,
    }
    whole = {
        **begun,
        "status": status,
        "incomplete_details": None if reason == "stop" else {"reason": "max_output_tokens"},
        "output": [item],
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + tokens,
        },
    }
    if not request.stream:
        return _json(whole)
    events = _response_events(begun, item, text, whole)
    return StreamingResponse(_paced(events, chunk_seconds), media_type="text/event-stream")


def _response_events(
    begun: dict[str, object], item: dict[str, Any], text: str, whole: dict[str, object]
) -> Iterator[bytes]:
    """A response as OpenAI streams it: typed and numbered events, the usage in the last one."""
    part = item["content"][0]
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    events: list[tuple[str, dict[str, object]]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        (
            "response.output_item.added",
            {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}},
        ),
        ("response.content_part.added", {**place, "part": {**part, "text": ""}}),
        *(
            ("response.output_text.delta", {**place, "delta": word, "logprobs": []})
            for word in _WORD.findall(text)
        ),
        ("response.output_text.done", {**place, "text": text, "logprobs": []}),
        ("response.content_part.done", {**place, "part": part}),
        ("response.output_item.done", {"output_index": 0, "item": item}),
        (f"response.{whole['status']}", {"response": whole}),
    ]
    for number, (kind, fields) in enumerate(events):
        message = {"type": kind, "sequence_number": number, **fields}
        yield b"event: " + kind.encode() + b"\n" + _event(msgspec.json.encode(message))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _paced(events: Iterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    for event in events:
        await asyncio.sleep(seconds)
        yield event


async def _embeddings(request: Request) -> Response:
    asked = _read(await request.body(), _EmbeddingsRequest)
    _require_model(asked.model, EMBEDDING_MODEL)
    inputs = _inputs(asked.input)
    tokens = [
        len(each) if isinstance(each, list) else await count_in_thread(each, EMBEDDING_MODEL)
        for each in inputs
    ]
    data = []
    for index, each in enumerate(inputs):
        vector = _vector(msgspec.json.encode(each), asked.dimensions or 64)
        packed = struct.pack(f"<{len(vector)}f", *vector)
        base64_wanted = asked.encoding_format == "base64"
        embedding = base64.b64encode(packed).decode() if base64_wanted else vector
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
    return _json({"object": "list", "data": data, "model": EMBEDDING_MODEL, "usage": usage})


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One text, several texts, one list of token numbers, or several of these."""
    parts = [given] if isinstance(given, str) else given
    numbers = [part for part in parts if isinstance(part, int)]
    inputs: list[str | list[int]] = [part for part in parts if not isinstance(part, int)]
    if numbers and not inputs:
        return [numbers]
    if numbers or not inputs or not all(inputs):
        raise InvalidRequest("'input' must be text or token numbers, and none of it empty.", param="input")
    return inputs


def _vector(seed: bytes, dimensions: int) -> list[float]:
    """A unit vector that depends on the seed alone, in numbers that single precision holds exactly."""
    raw = struct.unpack(f"<{dimensions}h", hashlib.shake_256(seed).digest(2 * dimensions))
    length = math.sqrt(sum((2 * value + 1) ** 2 for value in raw))
    single = struct.pack(f"<{dimensions}f", *((2 * value + 1) / length for value in raw))
    return list(struct.unpack(f"<{dimensions}f", single))


async def _images(request: Request) -> Response:
    asked = _read(await request.body(), _ImagesRequest)
    _require_model(asked.model, IMAGE_MODEL)
    size = asked.size if asked.size and asked.size != "auto" else "1024x1024"
    width, height = map(int, size.split("x"))
    data = []
    for index in range(asked.n or 1):
        colour = hashlib.sha256(f"{asked.prompt} {index}".encode()).digest()[:3]
        data.append({"b64_json": base64.b64encode(_png(width, height, colour)).decode()})
    quality = asked.quality if asked.quality and asked.quality != "auto" else "standard"
    return _json(
        {"created": _CREATED, "data": data, "size": size, "quality": quality, "output_format": "png"}
    )


def _png(width: int, height: int, colour: bytes) -> bytes:
    """A PNG of one colour: one bit a pixel and a palette of one entry."""
    rows = bytes(height * (1 + (width + 7) // 8))
    return (
        b"\x89PNG\r\n\x1a\n"
        + _png_block(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0))
        + _png_block(b"PLTE", colour)
        + _png_block(b"IDAT", zlib.compress(rows, 9))
        + _png_block(b"IEND", b"")
    )


def _png_block(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


async def _models(request: Request) -> Response:
    models = [
        {"id": model, "object": "model", "created": _CREATED, "owned_by": "llmhub-meter"}
        for model in (CHAT_MODEL, EMBEDDING_MODEL, IMAGE_MODEL)
    ]
    return _json({"object": "list", "data": models})
