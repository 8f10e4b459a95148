import asyncio
import gzip
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest
import respx
from servers import serve_app

from llmhub_meter.errors import ConfigError, UpstreamError
from llmhub_meter.replies import ASGIApp, Message, Receive, Scope, Send
from llmhub_meter.upstream import Upstream, UpstreamBroken

KEY = "sk-operator-secret"
URL = "https://api.example.com/v1"

RawServer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Client:
    """The client's side of one request, with hand-written receive and send."""

    body: bytes = b'{"model":"m"}'
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    method: str = "POST"
    pieces: int = 1
    messages: list[Message] = field(default_factory=list)
    sent_upstream: int = 0

    def __post_init__(self) -> None:
        self.gone = asyncio.Event()
        self.news = asyncio.Event()
        self.readers = 0
        step = max(1, -(-len(self.body) // self.pieces))
        parts = [self.body[at : at + step] for at in range(0, len(self.body), step)] or [b""]
        self.requests = [
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, 1)
        ]

    async def receive(self) -> Message:
        assert self.readers == 0, "receive has one reader"
        self.readers += 1
        try:
            if self.requests:
                return self.requests.pop(0)
            await self.gone.wait()
            return {"type": "http.disconnect"}
        finally:
            self.readers -= 1

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        self.news.set()

    def on_sent(self) -> None:
        self.sent_upstream += 1

    async def ask(self, upstream: Upstream, path: str = "/chat/completions") -> None:
        scope: Scope = {
            "type": "http",
            "method": self.method,
            "path": "/v1//Chat/../completions",
            "query_string": b"api-version=theirs",
            "headers": self.headers,
        }
        await upstream.forward(scope, self.receive, self.send, path=path, on_sent=self.on_sent)

    async def wait_for_messages(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.messages) < count:
                self.news.clear()
                await self.news.wait()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def answer_headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.messages[0]["headers"])

    @property
    def answer(self) -> bytes:
        assert [message["type"] for message in self.messages] == [
            "http.response.start",
            *["http.response.body"] * (len(self.messages) - 1),
        ]
        assert [message.get("more_body", False) for message in self.messages[1:]] == [
            *[True] * (len(self.messages) - 2),
            False,
        ]
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        found = msgspec.json.decode(self.answer)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return dict(found)


def mocked(**settings: Any) -> Upstream:
    settings = {"base_url": URL, "api_key": KEY, "transport": httpx.AsyncHTTPTransport(), **settings}
    return Upstream("openai", **settings)


@asynccontextmanager
async def real(base_url: str, **settings: Any) -> AsyncIterator[Upstream]:
    upstream = Upstream("openai", base_url=f"{base_url}/v1", api_key=KEY, **settings)
    try:
        yield upstream
    finally:
        await upstream.aclose()


@asynccontextmanager
async def raw_server(handle: RawServer) -> AsyncIterator[str]:
    """A TCP server whose connections `handle` treats as it likes."""
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of one request with a Content-Length, if it has a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, await reader.readexactly(length)


# What goes out


@respx.mock
async def test_the_url_comes_from_the_route_and_the_configuration() -> None:
    route = respx.post(f"{URL}/chat/completions", params={"api-version": "ours"}).respond(200, json={})
    client = Client()

    await client.ask(mocked(base_url=f"{URL}/", query={"api-version": "ours"}))

    assert str(route.calls.last.request.url) == f"{URL}/chat/completions?api-version=ours"
    assert client.status == 200


@pytest.mark.parametrize("path", ["/responses/../files", "/./models", "chat", ""])
async def test_a_path_that_is_no_route_is_a_programming_error(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        await Client().ask(mocked(), path)


@respx.mock
async def test_a_path_cannot_smuggle_a_query() -> None:
    route = respx.route(host="api.example.com").respond(200)

    await Client(method="GET", body=b"").ask(mocked(), "/responses/a?b=c#d%2e")

    assert route.calls.last.request.url.raw_path == b"/v1/responses/a%3Fb%3Dc%23d%252e"


@respx.mock
@pytest.mark.parametrize("pieces", [1, 3])
async def test_the_body_arrives_whole_with_its_own_length(pieces: int) -> None:
    route = respx.post(f"{URL}/chat/completions").respond(200)
    client = Client(body=b"0123456789", pieces=pieces, headers=[(b"content-length", b"9")])

    await client.ask(mocked())

    request = route.calls.last.request
    assert request.content == b"0123456789"
    assert request.headers.get_list("content-length") == ["10"]


@respx.mock
async def test_headers_between_client_and_proxy_stay_here() -> None:
    route = respx.post(f"{URL}/chat/completions").respond(200)
    dropped = [
        (b"host", b"meter.example.com"),
        (b"Authorization", b"Bearer client-key"),
        (b"x-api-key", b"client-key"),
        (b"api-key", b"client-key"),
        (b"cookie", b"client-key"),
        (b"accept-encoding", b"br"),
        (b"expect", b"100-continue"),
        (b"openai-organization", b"theirs"),
        (b"openai-project", b"theirs"),
        (b"x-credits-used", b"0"),
        (b"X-Credits-Anything", b"0"),
        (b"forwarded", b"for=192.0.2.7"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-real-ip", b"192.0.2.7"),
        (b"idempotency-key", b"theirs"),
        (b"connection", b"keep-alive, X-Hop"),
        (b"connection", b"x-jump"),
        (b"x-hop", b"1"),
        (b"x-jump", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"te", b"trailers"),
        (b"trailer", b"x-end"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"proxy-authorization", b"Basic client-key"),
        (b"proxy-connection", b"close"),
        (b"x-inject", b"a\r\nx-evil: 1"),
        (b"x-null", b"a\0b"),
    ]
    kept = [
        (b"content-type", b"application/json"),
        (b"user-agent", b"openai/2"),
        (b"x-app", b"caf\xe9"),
        (b"x-app", b"two"),
    ]

    await Client(headers=[*dropped, *kept]).ask(mocked())

    sent = [(name.lower(), value) for name, value in route.calls.last.request.headers.raw]
    assert sorted(sent) == sorted(
        [
            (b"host", b"api.example.com"),
            (b"content-length", b"13"),
            (b"accept-encoding", b"identity"),
            (b"authorization", f"Bearer {KEY}".encode()),
            *kept,
        ]
    )


@respx.mock
@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        ("bearer", {"authorization": f"Bearer {KEY}"}),
        ("x-api-key", {"x-api-key": KEY}),
        ("api-key", {"api-key": KEY}),
        ("none", {}),
    ],
)
async def test_the_operators_key_goes_where_auth_says(auth: str, expected: dict[str, str]) -> None:
    route = respx.post(f"{URL}/messages").respond(200)

    await Client(headers=[(b"authorization", b"Bearer client-key")]).ask(mocked(auth=auth), "/messages")

    headers = route.calls.last.request.headers
    found = {name: headers[name] for name in ("authorization", "x-api-key", "api-key") if name in headers}
    assert found == expected


@respx.mock
async def test_no_key_sends_no_key() -> None:
    route = respx.post(f"{URL}/chat/completions").respond(200)

    await Client().ask(mocked(api_key=None))

    assert "authorization" not in route.calls.last.request.headers


@respx.mock
async def test_configured_headers_win() -> None:
    route = respx.post(f"{URL}/messages").respond(200)
    client = Client(headers=[(b"anthropic-version", b"theirs"), (b"anthropic-beta", b"theirs")])

    await client.ask(mocked(headers={"Anthropic-Version": "2023-06-01"}), "/messages")

    headers = route.calls.last.request.headers
    assert headers.get_list("anthropic-version") == ["2023-06-01"]
    assert headers["anthropic-beta"] == "theirs"


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "ftp://api.example.com/v1"},
        {"base_url": "api.example.com/v1"},
        {"base_url": "https://user:secret@api.example.com/v1"},
        {"base_url": "https://api.example.com/v1?a=b"},
        {"base_url": "https://api.example.com:port/v1"},
        {"api_key": "sk-secret\n"},
        {"headers": {"x-name": "a\r\nb: c"}},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="upstreams.openai") as caught:
        mocked(**settings)
    assert "secret" not in str(caught.value)


# What comes back


@respx.mock
async def test_answer_headers_keep_order_and_duplicates() -> None:
    respx.post(f"{URL}/chat/completions").respond(
        200,
        content=b"{}",
        headers=[
            ("Content-Type", "application/json"),
            ("X-Two", "1"),
            ("Set-Cookie", "a=b"),
            ("X-Request-Id", "req_1"),
            ("X-Credits-Used", "0"),
            ("Connection", "close, x-hop"),
            ("X-Hop", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Alt-Svc", "h3"),
            ("OpenAI-Organization", "operator"),
            ("OpenAI-Processing-Ms", "7"),
            ("X-Two", "2"),
        ],
    )
    client = Client()

    await client.ask(mocked())

    assert client.answer == b"{}"
    assert client.answer_headers == [
        (b"content-type", b"application/json"),
        (b"x-two", b"1"),
        (b"x-upstream-request-id", b"req_1"),
        (b"openai-processing-ms", b"7"),
        (b"x-two", b"2"),
        (b"content-length", b"2"),
    ]


@respx.mock
async def test_a_length_beside_a_transfer_coding_is_dropped() -> None:
    headers = {"transfer-encoding": "chunked", "content-length": "1"}
    respx.post(f"{URL}/chat/completions").mock(
        return_value=httpx.Response(200, headers=headers, stream=Pieces(b"some"))
    )
    client = Client()

    await client.ask(mocked())

    assert (client.answer, client.answer_headers) == (b"some", [])


@respx.mock
@pytest.mark.parametrize("status", [400, 404, 408, 422, 429, 500, 502, 503, 529])
async def test_other_errors_pass_unchanged(status: int) -> None:
    body = b'{"error":{"message":"theirs"}}'
    respx.post(f"{URL}/chat/completions").respond(status, content=body, headers={"retry-after": "7"})
    client = Client()

    await client.ask(mocked())

    assert (client.status, client.answer) == (status, body)
    assert (b"retry-after", b"7") in client.answer_headers


@respx.mock
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_the_operators_affair(status: int, caplog: pytest.LogCaptureFixture) -> None:
    theirs = f"Incorrect API key provided: {KEY}"
    respx.post(f"{URL}/chat/completions").respond(
        status, json={"error": {"message": theirs}}, headers={"www-authenticate": "Bearer"}
    )
    client = Client()

    with caplog.at_level(logging.DEBUG, "llmhub_meter"):
        await client.ask(mocked())

    assert client.status == 502
    assert (client.error["type"], client.error["code"]) == ("upstream_error", "upstream_auth_failed")
    assert "operator" in client.error["message"]
    [record] = caplog.records
    assert (record.name, record.levelno) == ("llmhub_meter.upstream", logging.ERROR)
    assert "openai" in record.getMessage() and str(status) in record.getMessage()
    everything = repr(client.messages) + repr(record.__dict__)
    assert KEY not in everything and "example.com" not in everything and "www-authenticate" not in everything


@respx.mock
@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    elsewhere = respx.route(host="elsewhere.example.com").respond(200)
    respx.post(f"{URL}/chat/completions").respond(
        status, headers={"location": "https://elsewhere.example.com/"}
    )
    client = Client()

    await client.ask(mocked())

    assert (client.status, client.error["code"]) == (502, "upstream_error")
    assert "redirect" in client.error["message"]
    assert "elsewhere" not in repr(client.messages)
    assert not elsewhere.called


@respx.mock
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (httpx.ConnectError("no such host api.example.com"), 502, "upstream_error"),
        (httpx.ReadError("reset by 192.0.2.1"), 502, "upstream_error"),
        (httpx.WriteError("reset by 192.0.2.1"), 502, "upstream_error"),
        (httpx.RemoteProtocolError("nonsense"), 502, "upstream_error"),
        (httpx.ConnectTimeout("api.example.com"), 504, "upstream_timeout"),
        (httpx.ReadTimeout("api.example.com"), 504, "upstream_timeout"),
        (httpx.WriteTimeout("api.example.com"), 504, "upstream_timeout"),
        (httpx.PoolTimeout("api.example.com"), 504, "upstream_timeout"),
    ],
)
async def test_failures_before_the_answer(failure: Exception, status: int, code: str) -> None:
    respx.post(f"{URL}/chat/completions").mock(side_effect=failure)
    client = Client()

    await client.ask(mocked())

    assert (client.status, client.error["type"], client.error["code"]) == (status, "upstream_error", code)
    assert str(failure) not in client.error["message"]
    assert client.sent_upstream == 0


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *pieces: bytes, failure: Exception | None = None) -> None:
        self.pieces = pieces
        self.failure = failure
        self.ended = False
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self.pieces:
                yield piece
            if self.failure:
                raise self.failure
        finally:
            self.ended = True

    async def aclose(self) -> None:
        self.closed = True


@respx.mock
async def test_each_piece_is_sent_by_itself_as_it_came() -> None:
    stream = Pieces(b"data: 1\n", b"\ndata: [DO", b"NE]\n\n")
    respx.post(f"{URL}/chat/completions").mock(return_value=httpx.Response(200, stream=stream))
    client = Client()

    await client.ask(mocked())

    assert [message["body"] for message in client.messages[1:]] == [*stream.pieces, b""]
    assert client.sent_upstream == 1
    assert stream.ended and stream.closed


@respx.mock
@pytest.mark.parametrize(
    ("failure", "says"), [(httpx.ReadError("reset"), "broke off"), (httpx.ReadTimeout("idle"), "stopped")]
)
async def test_a_failure_within_the_answer_is_raised(failure: Exception, says: str) -> None:
    stream = Pieces(b"data: 1\n\n", failure=failure)
    respx.post(f"{URL}/chat/completions").mock(return_value=httpx.Response(200, stream=stream))
    client = Client()

    with pytest.raises(UpstreamBroken, match=says) as caught:
        await client.ask(mocked())

    assert isinstance(caught.value, UpstreamError)
    assert [message["body"] for message in client.messages[1:]] == [b"data: 1\n\n"]
    assert client.messages[-1]["more_body"] is True
    assert stream.ended and stream.closed


@respx.mock
async def test_what_send_raises_ends_the_call_and_passes() -> None:
    stream = Pieces(b"1", b"2")
    respx.post(f"{URL}/chat/completions").mock(return_value=httpx.Response(200, stream=stream))
    client = Client()

    async def refuse(message: Message) -> None:
        if "body" in message:
            raise UpstreamError("the layer above had enough")

    client.send = refuse  # type: ignore[method-assign]
    with pytest.raises(UpstreamError, match="had enough"):
        await client.ask(mocked())

    assert stream.ended and stream.closed
    assert client.messages == []


@respx.mock
async def test_what_receive_raises_ends_the_call_and_passes() -> None:
    waiting = asyncio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    respx.post(f"{URL}/chat/completions").mock(side_effect=hang)
    client = Client()
    receive = client.receive

    async def fail() -> Message:
        if client.requests:
            return await receive()
        await waiting.wait()
        raise OSError("broken pipe")

    client.receive = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken pipe"):
        await client.ask(mocked())


@respx.mock
async def test_a_client_gone_before_its_body_ended_sends_nothing() -> None:
    route = respx.post(f"{URL}/chat/completions").respond(200)
    client = Client(body=b"0123", pieces=2)
    client.requests.pop()
    client.gone.set()

    await client.ask(mocked())

    assert not route.called
    assert (client.messages, client.sent_upstream) == ([], 0)


@respx.mock
async def test_a_send_under_way_is_not_cancelled_when_the_client_goes() -> None:
    stream = Pieces(b"1", b"2", b"3")
    respx.post(f"{URL}/chat/completions").mock(return_value=httpx.Response(200, stream=stream))
    client = Client()
    finished: list[Message] = []

    async def slow(message: Message) -> None:
        if message.get("body") == b"2":
            client.gone.set()
        for _ in range(5):
            await asyncio.sleep(0)
        finished.append(message)

    client.send = slow  # type: ignore[method-assign]
    await client.ask(mocked())

    assert [message.get("body") for message in finished] == [None, b"1", b"2"]
    assert stream.ended and stream.closed


@respx.mock
@pytest.mark.parametrize("steps", range(6))
async def test_a_cancellation_beside_a_disconnect_is_not_swallowed(steps: int) -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    waiting = asyncio.Event()
    respx.post(f"{URL}/chat/completions").mock(side_effect=hang)
    client = Client()
    task = asyncio.create_task(client.ask(mocked()))
    await waiting.wait()
    client.gone.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = task.cancel()
    await asyncio.wait([task])

    assert cancelled or steps > 0
    assert task.cancelled() is cancelled
    assert client.readers == 0


# With real connections


def serve_http(app: ASGIApp) -> AbstractContextManager[str]:
    async def with_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})

    return serve_app(with_lifespan)


async def answer(send: Send, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


@pytest.mark.parametrize("size", [1, 1_000, 20_000])
async def test_a_whole_exchange(size: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["method"], scope["raw_path"], scope["query_string"], scope["headers"]))
        await answer(send, await read_body(receive), (b"x-two", b"1"), (b"x-b", b"2"), (b"x-two", b"3"))

    seen: list[tuple[str, bytes, bytes, list[tuple[bytes, bytes]]]] = []
    body = bytes(range(256)) * size
    client = Client(
        body=body,
        pieces=7,
        headers=[(b"x-name", "Größe".encode()), (b"x-latin", b"caf\xe9"), (b"content-type", b"a/b")],
    )

    with serve_http(app) as base_url:
        async with real(base_url, query={"v": "1 2"}) as upstream:
            await client.ask(upstream)

    assert client.status == 200
    assert client.answer == body
    assert client.sent_upstream == 1
    named = [(name, value) for name, value in client.answer_headers if name.startswith((b"x-", b"content-"))]
    assert named == [
        (b"content-length", b"%d" % len(body)),
        (b"x-two", b"1"),
        (b"x-b", b"2"),
        (b"x-two", b"3"),
    ]
    [(method, path, query, headers)] = seen
    assert (method, path) == ("POST", b"/v1/chat/completions")
    assert query in (b"v=1%202", b"v=1+2")
    assert {name for name, _ in headers} == {
        b"host",
        b"content-length",
        b"accept-encoding",
        b"authorization",
        b"content-type",
        b"x-name",
        b"x-latin",
    }


async def test_compressed_bytes_pass_unchanged() -> None:
    packed = gzip.compress(b'{"usage":{}}')

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, packed, (b"content-encoding", b"gzip"))

    client = Client()
    with serve_http(app) as base_url:
        async with real(base_url) as upstream:
            await client.ask(upstream)

    assert client.answer == packed
    assert (b"content-encoding", b"gzip") in client.answer_headers


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304), ("POST", 204)])
async def test_answers_without_a_body(method: str, status: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            length = b"" if status == 204 else b"content-length: 10\r\n"
            writer.write(b"HTTP/1.1 %d X\r\n%sx-a: 1\r\n\r\n" % (status, length))

    async with raw_server(handle) as base_url, real(base_url) as upstream:
        for _ in range(2):
            client = Client(method=method, body=b"")
            await client.ask(upstream)
            assert (client.status, client.answer) == (status, b"")
            assert (b"x-a", b"1") in client.answer_headers


async def test_a_stream_arrives_piece_by_piece() -> None:
    """The second piece is made only when the first one has reached the client."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            assert await asyncio.to_thread(seen.acquire, timeout=10)
        await send({"type": "http.response.body", "body": b""})

    seen = threading.Semaphore(0)
    client = Client()
    with serve_http(app) as base_url:
        async with real(base_url) as upstream:
            asking = asyncio.create_task(client.ask(upstream))
            for number in range(3):
                await client.wait_for_messages(2 + number)
                assert client.messages[-1]["body"] == b"data: %d\n\n" % number
                seen.release()
            await asking

    assert client.answer == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert b"transfer-encoding" not in dict(client.answer_headers)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("ending", ["disconnect", "cancel"])
async def test_the_upstream_learns_at_once_that_the_client_is_gone(begin: bool, ending: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        if begin:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        reached.set()
        assert (await receive())["type"] == "http.disconnect"
        noticed.set()

    reached, noticed = threading.Event(), threading.Event()
    client = Client()
    with serve_http(app) as base_url:
        async with real(base_url) as upstream:
            asking = asyncio.create_task(client.ask(upstream))
            assert await asyncio.to_thread(reached.wait, 10)
            if begin:
                await client.wait_for_messages(2)
            if ending == "disconnect":
                client.gone.set()
            else:
                asking.cancel()
            assert await asyncio.to_thread(noticed.wait, 1)
            [result] = await asyncio.gather(asking, return_exceptions=True)

    assert result is None if ending == "disconnect" else isinstance(result, asyncio.CancelledError)
    assert client.sent_upstream == 1
    assert len(client.messages) == (2 if begin else 0)
    assert client.readers == 0


async def test_the_connection_of_a_client_gone_is_not_used_again() -> None:
    connections: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = b"%d" % len(connections)
        connections.append(number)
        while True:
            await read_request(reader)
            if number == b"0":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome")
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + number)

    first, second = Client(), Client()
    async with raw_server(handle) as base_url, real(base_url) as upstream:
        asking = asyncio.create_task(first.ask(upstream))
        await first.wait_for_messages(2)
        first.gone.set()
        await asking
        await second.ask(upstream)

    assert second.answer == b"1"


async def test_connections_are_kept_for_the_next_request() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with raw_server(handle) as base_url, real(base_url) as upstream:
        for _ in range(5):
            client = Client()
            await client.ask(upstream)
            assert (client.answer, client.sent_upstream) == (b"{}", 1)

    assert connections == 1


async def test_a_kept_connection_that_the_upstream_closed_is_not_used() -> None:
    """The end of it has come in, but the event loop has not read it yet."""
    requests: list[bytes] = []

    def serve_one_each(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                answered.release()
                assert close.acquire(timeout=10)
            closed.set()

    answered, close, closed = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve_one_each, args=(listener,))
        server.start()
        async with real(f"http://127.0.0.1:{listener.getsockname()[1]}") as upstream:
            first, second = Client(), Client()
            await first.ask(upstream)
            close.release()
            assert closed.wait(10)  # blocks the loop on purpose
            close.release()
            await second.ask(upstream)
        server.join(10)

    assert (first.answer, second.answer) == (b"{}", b"{}")
    assert second.sent_upstream == 1
    assert len(requests) == 2


async def test_a_request_whose_kept_connection_dies_is_not_repeated() -> None:
    """It may have been carried out: 502, and never a second execution."""
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while True:
            await read_request(reader)
            requests += 1
            if requests == 2:
                return
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    first, second = Client(), Client()
    async with raw_server(handle) as base_url, real(base_url) as upstream:
        await first.ask(upstream)
        await second.ask(upstream)

    assert first.status == 200
    assert (second.status, second.error["code"]) == (502, "upstream_error")
    assert (second.sent_upstream, requests) == (1, 2)


async def test_a_refused_connection_is_502_and_nothing_was_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = Client()
    async with real(f"http://127.0.0.1:{port}") as upstream:
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (502, "upstream_error", 0)
    assert "reached" in client.error["message"]
    assert str(port) not in client.error["message"]


async def test_an_upstream_without_tls_is_502_and_nothing_was_sent() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    client = Client()
    async with raw_server(handle) as base_url, real(base_url.replace("http:", "https:")) as upstream:
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (502, "upstream_error", 0)


async def test_a_handshake_that_hangs_is_504_and_nothing_was_sent() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = Client()
    async with (
        raw_server(handle) as base_url,
        real(base_url.replace("http:", "https:"), connect_seconds=0.2) as upstream,
    ):
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (504, "upstream_timeout", 0)


async def test_an_upstream_that_hangs_is_504() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = Client()
    async with raw_server(handle) as base_url, real(base_url, timeout_seconds=0.2) as upstream:
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (504, "upstream_timeout", 1)
    assert "did not answer in time" in client.error["message"]


async def test_an_upstream_that_never_reads_a_large_body_is_504() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    client = Client(body=bytes(20_000_000))
    async with (
        raw_server(handle) as base_url,
        real(base_url, timeout_seconds=0.3, connect_seconds=0.2) as upstream,
    ):
        async with asyncio.timeout(20):
            await client.ask(upstream)

    assert (client.status, client.error["code"]) == (504, "upstream_timeout")


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
    ],
)
async def test_no_valid_answer_is_502(reply: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(reply)

    client = Client()
    async with raw_server(handle) as base_url, real(base_url) as upstream:
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (502, "upstream_error", 1)


async def test_a_reset_before_the_answer_is_502() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.transport.abort()

    client = Client()
    async with raw_server(handle) as base_url, real(base_url) as upstream:
        await client.ask(upstream)

    assert (client.status, client.error["code"], client.sent_upstream) == (502, "upstream_error", 1)


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"content-length: 100\r\n\r\nsome", b""),
        (b"transfer-encoding: chunked\r\n\r\n4\r\nsome\r\n", b""),
        (b"transfer-encoding: chunked\r\n\r\n4\r\nsome\r\n", b"nonsense\r\n"),
    ],
)
@pytest.mark.parametrize("abort", [False, True])
async def test_an_answer_that_breaks_off_is_raised(head: bytes, rest: bytes, abort: bool) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head)
        await client.wait_for_messages(2)
        writer.write(rest)
        await writer.drain()
        if abort:
            writer.transport.abort()

    client = Client()
    async with raw_server(handle) as base_url, real(base_url) as upstream:
        with pytest.raises(UpstreamBroken):
            await client.ask(upstream)

    assert client.status == 200
    assert [message["body"] for message in client.messages[1:]] == [b"some"]
    assert client.messages[-1]["more_body"] is True


async def test_an_answer_that_stops_is_raised() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome")
        await reader.read()
        noticed.set()

    noticed = asyncio.Event()
    client = Client()
    async with raw_server(handle) as base_url, real(base_url, timeout_seconds=0.2) as upstream:
        with pytest.raises(UpstreamBroken, match="stopped"):
            await client.ask(upstream)
        async with asyncio.timeout(1):
            await noticed.wait()

    assert client.messages[-1]["body"] == b"some"


async def test_many_at_once_keep_their_answers_apart() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, await read_body(receive))

    clients = [Client(body=b"%d" % number) for number in range(100)]
    with serve_http(app) as base_url:
        async with real(base_url) as upstream:
            await asyncio.gather(*(client.ask(upstream) for client in clients))

    assert [client.answer for client in clients] == [client.body for client in clients]
    assert {client.sent_upstream for client in clients} == {1}
