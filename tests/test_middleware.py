"""The middleware inside somebody's own ASGI app."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import httpx
import pytest
from hub import chat_answer, usage
from servers import connect, serve_app
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from llmhub_meter import Account, Meter, MeterMiddleware
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.config import CreditsConfig
from llmhub_meter.errors import ConfigError
from llmhub_meter.scripts import Scripts
from llmhub_meter.scripts import connect as connect_async

PRICES: dict[str, Any] = {
    "m": {"type": "chat", "input_per_1k": 1000, "output_per_1k": 1000, "max_output_tokens": 100}
}
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


async def answer(request: Request) -> Response:
    body = await request.json()
    if body.get("stream"):

        async def events() -> AsyncIterator[bytes]:
            yield b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
            yield b'data: {"choices":[],"usage":{"prompt_tokens":25,"completion_tokens":150}}\n\n'
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")
    return JSONResponse(chat_answer(usage=usage(25, 150)))


async def fail(request: Request) -> Response:
    raise RuntimeError("a defect of the app")


async def plain(request: Request) -> Response:
    return PlainTextResponse("mine", headers={"x-credits-used": "of the app"})


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


def routes(endpoint: Any = answer) -> list[Any]:
    return [
        Route("/v1/chat/completions", endpoint, methods=["POST"]),
        Route("/v1/other", plain, methods=["GET", "POST"]),
        WebSocketRoute("/socket", echo),
    ]


def by_header(scope: Any) -> Account | None:
    for name, value in scope["headers"]:
        if name == b"x-user":
            return Account(value.decode())
    return None


def new_meter(url: str, **options: Any) -> Meter:
    return Meter(
        redis=url, prices=PRICES, credits=CreditsConfig.model_validate({"signup_grant": 1000}), **options
    )


@contextmanager
def served(app: Any, redis_url: str) -> Iterator[httpx.Client]:
    """The app on a real port; afterwards nothing may be held and the ledger must add up."""
    with serve_app(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client

    async def check() -> None:
        scripts = Scripts(connect_async(redis_url))
        try:
            async for holder in Accounts(scripts, signup_grant=0).all():
                assert holder.figures.held == 0
            report = await audit(scripts)
            assert report.differences == 0, report.findings
        finally:
            await scripts.aclose()

    asyncio.run(check())


@pytest.mark.parametrize("inner", [True, False], ids=["add_middleware", "wrapped"])
def test_json_and_stream(redis_url: str, inner: bool) -> None:
    meter = new_meter(redis_url)
    if inner:
        app: Any = Starlette(
            routes=routes(), middleware=[Middleware(MeterMiddleware, meter=meter, identify=by_header)]
        )
    else:
        app = MeterMiddleware(Starlette(routes=routes()), meter=meter, identify=by_header)
    with served(app, redis_url) as client:
        got = client.post("/v1/chat/completions", json=BODY, headers={"x-user": "ann"})
        assert got.status_code == 200
        assert got.json() == chat_answer(usage=usage(25, 150))
        assert got.headers["x-credits-used"] == "175"
        assert got.headers["x-credits-remaining"] == "825"
        streamed = client.post(
            "/v1/chat/completions", json={**BODY, "stream": True}, headers={"x-user": "ann"}
        )
        assert streamed.text.endswith(": credits used=175 remaining=650\n\ndata: [DONE]\n\n")
        assert "usage" not in streamed.text
        nobody = client.post("/v1/chat/completions", json=BODY)
        assert nobody.status_code == 401


def test_what_is_not_metered_belongs_to_the_app(redis_url: str) -> None:
    app = MeterMiddleware(Starlette(routes=routes()), meter=new_meter(redis_url))
    with served(app, redis_url) as client:
        got = client.post("/v1/other")
        assert (got.text, got.headers["x-credits-used"]) == ("mine", "of the app")
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.post("/v1/chat/completions/").status_code == 404


def test_strict_refuses_what_is_not_metered(redis_url: str) -> None:
    app = MeterMiddleware(Starlette(routes=routes()), meter=new_meter(redis_url), strict=True)
    with served(app, redis_url) as client:
        got = client.get("/v1/other")
        assert got.status_code == 404
        assert got.json()["error"]["type"] == "invalid_request_error"


def test_an_app_that_fails_charges_nothing(redis_url: str) -> None:
    app = MeterMiddleware(Starlette(routes=routes(fail)), meter=new_meter(redis_url), identify=by_header)
    with served(app, redis_url) as client:
        got = client.post("/v1/chat/completions", json=BODY, headers={"x-user": "ann"})
        assert got.status_code == 500
        assert (got.headers["x-credits-used"], got.headers["x-credits-remaining"]) == ("0", "1000")


def test_a_bare_app_that_raises_or_says_nothing(redis_url: str) -> None:
    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a defect of the app")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return

    for bare, status in ((raises, 500), (silent, 502)):
        app = MeterMiddleware(bare, meter=new_meter(redis_url), identify=by_header)
        with served(app, redis_url) as client:
            got = client.post("/v1/chat/completions", json=BODY, headers={"x-user": "ann"})
            assert got.status_code == status
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}
            assert (got.headers["x-credits-used"], got.headers["x-credits-remaining"]) == ("0", "1000")


def test_a_mounted_app_is_metered_by_its_own_path(redis_url: str) -> None:
    meter = new_meter(redis_url)
    metered = MeterMiddleware(Starlette(routes=routes()), meter=meter, identify=by_header)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A mounted app gets no lifespan: who mounts it starts and closes the meter.
        await meter.start()
        yield
        await meter.aclose()

    app = Starlette(routes=[Mount("/llm", metered)], lifespan=lifespan)
    with served(app, redis_url) as client:
        got = client.post("/llm/v1/chat/completions", json=BODY, headers={"x-user": "ann"})
        assert got.headers["x-credits-used"] == "175"


def test_cors_lists_the_headers(redis_url: str) -> None:
    async def open_to_all(scope: Any, receive: Any, send: Any) -> None:
        app = CORSMiddleware(Starlette(routes=routes()), allow_origins=["*"])
        await app(scope, receive, send)

    app = MeterMiddleware(open_to_all, meter=new_meter(redis_url), identify=by_header)
    with served(app, redis_url) as client:
        headers = {"x-user": "ann", "origin": "https://example.org"}
        got = client.post("/v1/chat/completions", json=BODY, headers=headers)
        assert "x-credits-remaining" in got.headers["access-control-expose-headers"]


async def test_websockets_pass_untouched(redis_url: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope, receive, send = {"type": "websocket", "path": "/v1/realtime"}, object(), object()
    meter = new_meter(redis_url)
    await MeterMiddleware(app, meter=meter)(scope, receive, send)  # type: ignore[arg-type]
    assert seen == [(scope, receive, send)]
    await meter.aclose()


class Server:
    """A hand-made server: what it sends, when its client leaves, when it cancels."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.messages = [{"type": "http.request", "body": body, "more_body": False}]
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": headers,
        }

    async def receive(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def test_a_server_that_cancels_leaves_no_hold(redis_url: str) -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    meter = new_meter(redis_url)
    app = MeterMiddleware(never, meter=meter, identify=by_header)
    server = Server(json.dumps(BODY).encode(), [(b"x-user", b"ann")])
    task = asyncio.create_task(app(server.scope, server.receive, server.send))
    while (figures := await meter.wallet.figures("ann")) is None or not figures.held:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await meter.aclose()
    with closing(connect(redis_url)) as redis:
        holds = [key for key in redis.scan_iter("*:holds")]
        assert holds == []


async def test_cancelled_anywhere_a_request_leaves_no_hold(redis_url: str) -> None:
    app_meter = new_meter(redis_url)
    app = MeterMiddleware(Starlette(routes=routes()), meter=app_meter, identify=by_header)
    await app_meter.start()
    await app_meter.accounts.ensure(Account("ann"))
    await app_meter.wallet.credit("ann", 10**12, "adjust", id="plenty")
    body = json.dumps(BODY).encode()
    for microseconds in range(0, 12_000, 150):
        server = Server(body, [(b"x-user", b"ann"), (b"content-type", b"application/json")])
        task = asyncio.create_task(app(server.scope, server.receive, server.send))
        await asyncio.sleep(microseconds / 1_000_000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await app_meter.finisher.drain(5)
    figures = await app_meter.wallet.figures("ann")
    report = await audit(app_meter.scripts)
    await app_meter.aclose()
    assert figures is not None
    assert figures.held == 0
    assert report.differences == 0, report.findings
    # Each request was charged whole or not at all.
    assert (10**12 + 1000 * 10_000 - figures.balance) % (175 * 10_000) == 0


async def test_an_app_that_does_not_notice_is_cancelled_after_a_grace(redis_url: str) -> None:
    cancelled = asyncio.Event()

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        event = b'data: {"choices":[{"index":0,"delta":{"content":" hello"}}]}\n\n'
        await send({"type": "http.response.body", "body": event, "more_body": True})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    meter = new_meter(redis_url)
    app = MeterMiddleware(deaf, meter=meter, identify=by_header)
    server = Server(json.dumps({**BODY, "stream": True}).encode(), [(b"x-user", b"ann")])
    task = asyncio.create_task(app(server.scope, server.receive, server.send))
    while len(server.sent) < 2:
        await asyncio.sleep(0.01)
    server.gone.set()
    await asyncio.wait_for(task, 5)
    assert cancelled.is_set()
    figures = await meter.wallet.figures("ann")
    assert figures is not None
    # 8 prompt tokens and one of output.
    assert (figures.balance, figures.held) == ((1000 - 9) * 10_000, 0)
    await meter.aclose()


async def test_lifespan_starts_the_meter_before_the_app_and_closes_it_after(redis_url: str) -> None:
    meter = new_meter(redis_url)
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for name in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{name}"
            await meter.scripts.command("PING")
            order.append(name)
            await send({"type": f"lifespan.{name}.complete"})

    await run_lifespan(MeterMiddleware(app, meter=meter), order)
    assert order == ["startup", "startup.complete", "shutdown", "shutdown.complete"]


async def test_lifespan_of_an_app_that_has_none(redis_url: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("only http here")

    order: list[str] = []
    await run_lifespan(MeterMiddleware(app, meter=new_meter(redis_url)), order)
    assert order == ["startup.complete", "shutdown.complete"]


async def run_lifespan(app: MeterMiddleware, order: list[str]) -> None:
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        order.append(message["type"].removeprefix("lifespan."))

    await app({"type": "lifespan"}, receive, send)


async def test_a_redis_that_evicts_stops_the_start(redis_url: str) -> None:
    with closing(connect(redis_url)) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            meter = new_meter(redis_url)
            with pytest.raises(ConfigError, match="evicts"):
                await meter.start()
            await meter.aclose()
        finally:
            redis.config_set("maxmemory-policy", "noeviction")
