"""Forward one request to an upstream and stream its answer back.

The seam is httpx's transport interface, called directly; `PooledTransport` is the one for production.
"""

import asyncio
import logging
import re
import select
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from httpx_aiohttp import AiohttpTransport

from .errors import ConfigError, UpstreamAuthFailed, UpstreamError, UpstreamTimeout
from .replies import RawHeaders, Receive, Scope, Send, send_error

Auth = Literal["bearer", "x-api-key", "api-key", "none"]

_logger = logging.getLogger("llmhub_meter.upstream")


class UpstreamBroken(UpstreamError):
    """The answer broke off after its start was passed on: the client's answer must not look complete."""


class Upstream:
    """One place that requests are forwarded to, with the operator's key for it."""

    def __init__(
        self,
        name: str,
        *,
        base_url: str,
        api_key: str | None,
        auth: Auth = "bearer",
        headers: Mapping[str, str] = {},
        query: Mapping[str, str] = {},
        timeout_seconds: float = 600,
        connect_seconds: float = 10,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = name
        self._base_url = _checked_url(name, base_url)
        self._query = dict(query)
        self._fixed_headers = _fixed_headers(name, api_key, auth, headers)
        self._replaced = frozenset(header for header, _ in self._fixed_headers)
        self._answer_seconds = connect_seconds + timeout_seconds
        self._timeout = {
            "connect": connect_seconds,
            "read": timeout_seconds,
            "write": timeout_seconds,
            "pool": connect_seconds,
        }
        self._transport = PooledTransport() if transport is None else transport
        self._plain_models: set[str] = set()
        self._url = lru_cache(maxsize=64)(self._join)

    async def forward(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        path: str,
        on_sent: Callable[[], None],
        anthropic: bool = False,
        model: str = "",
        plain_body: Callable[[], bytes] | None = None,
    ) -> None:
        """Send the request to `path` below the base URL and pass the answer on, piece by piece.

        `path` comes from the matched route, never from the client. `on_sent` is called once, when the
        request goes out on a connected upstream. A client that goes away ends the upstream call, and
        this returns. Failures before the answer are answered as 502 or 504; later ones raise
        `UpstreamBroken`. With `anthropic` our own errors come in that API's envelope.

        `plain_body` gives the body without the `stream_options` that were added to it. An upstream that
        refuses these (400 or 422) is asked once more with that, and for this model never again with them.
        """
        client = _Client(receive)
        body = await client.read_body()
        if body is None:
            return
        if plain_body is not None and model in self._plain_models:
            body, plain_body = plain_body(), None
        departure = _Departure(on_sent)

        def request_with(body: bytes) -> httpx.Request:
            return httpx.Request(
                scope["method"],
                self._url(path),
                headers=self._request_headers(scope["headers"], len(body)),
                content=body if len(body) <= _WHOLE_BODY_BYTES else _slices(body),
                extensions={"timeout": self._timeout, "trace": departure.trace},
            )

        plain = None if plain_body is None else _Plain(model, plain_body, request_with)
        client.watch()
        try:
            await self._exchange(request_with(body), client, send, departure, anthropic, plain)
        except _ClientGone:
            pass
        finally:
            await client.unwatch()

    async def aclose(self) -> None:
        """Close the connections that are kept for reuse."""
        await self._transport.aclose()

    async def _exchange(
        self,
        request: httpx.Request,
        client: "_Client",
        send: Send,
        departure: "_Departure",
        anthropic: bool,
        plain: "_Plain | None" = None,
    ) -> None:
        try:
            with client.interruptible():
                response = await self._answer(request)
        except UpstreamError as error:
            await send_error(send, error, anthropic=anthropic)
            return
        departure.mark()
        try:
            if plain is not None and response.status_code in (400, 422):
                refused = await _read_error(response, client)
                if not _speaks_of_options(refused):
                    await _send_whole(response, refused, send)
                    return
                _logger.info("upstream %s takes no stream_options for %s", self.name, plain.model)
            elif refusal := self._refusal(response.status_code):
                await send_error(send, refusal, anthropic=anthropic)
                return
            else:
                await _relay(response, client, send)
                return
        finally:
            await response.aclose()
        if len(self._plain_models) < _PLAIN_MODELS:
            self._plain_models.add(plain.model)
        await self._exchange(plain.request_with(plain.body()), client, send, departure, anthropic)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        try:
            # The transport's own timeouts leave out an upstream that never reads a large body.
            async with asyncio.timeout(self._answer_seconds):
                return await self._transport.handle_async_request(request)
        except httpx.ConnectTimeout as error:
            raise UpstreamTimeout("The upstream did not accept a connection in time.") from error
        except (httpx.TimeoutException, TimeoutError) as error:
            raise UpstreamTimeout("The upstream did not answer in time.") from error
        except httpx.ConnectError as error:
            raise UpstreamError("The upstream could not be reached.") from error
        except httpx.TransportError as error:
            raise UpstreamError("The upstream ended the connection without a valid answer.") from error

    def _refusal(self, status: int) -> UpstreamError | None:
        """What the client gets in place of an answer that concerns only the operator."""
        if status in (401, 403):
            _logger.error("upstream %s answered %d: check its api_key", self.name, status)
            return UpstreamAuthFailed(
                "The upstream refused this service's own credentials. Its operator has to check them."
            )
        if 300 <= status < 400 and status != 304:
            return UpstreamError("The upstream answered with a redirect, which is not followed.")
        return None

    def _join(self, path: str) -> httpx.URL:
        if not path.startswith("/") or not {".", ".."}.isdisjoint(path.split("/")):
            raise ValueError("path is not one of a route")
        url = httpx.URL(self._base_url + quote(path))
        return url.copy_merge_params(self._query) if self._query else url

    def _request_headers(self, headers: RawHeaders, length: int) -> list[tuple[bytes, bytes]]:
        kept = [(name.lower(), value) for name, value in headers]
        dropped = _named_in_connection(kept) | self._replaced
        forwarded = [
            (name, value)
            for name, value in kept
            if name not in _NOT_FORWARDED
            and name not in dropped
            and not name.startswith((b"x-credits-", b"x-forwarded-"))
            and not _breaks_lines(name + value)
        ]
        if length:
            forwarded.append((b"content-length", str(length).encode()))
        return forwarded + self._fixed_headers


_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)

_NOT_FORWARDED = _HOP_BY_HOP | {
    # made anew for the upstream
    b"host",
    b"content-length",
    b"accept-encoding",
    b"expect",
    # between the client and us
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"cookie",
    b"idempotency-key",
    # the operator's accounts at the upstream are not the client's to choose
    b"openai-organization",
    b"openai-project",
    # where the client is
    b"forwarded",
    b"x-real-ip",
    b"x-client-ip",
    b"true-client-ip",
    b"cf-connecting-ip",
}

_NOT_RELAYED = _HOP_BY_HOP | {
    b"set-cookie",
    # they speak for the upstream's host or for the operator's account there
    b"alt-svc",
    b"strict-transport-security",
    b"openai-organization",
    b"openai-project",
}

# aiohttp writes a body of bytes in one go, and warns of that above this size.
_WHOLE_BODY_BYTES = 2**20
_SLICE_BYTES = 2**16

_PLAIN_MODELS = 10_000
_ERROR_BYTES = 2**20
_speaks_of_options = re.compile(rb"stream_options|include_usage").search

_breaks_lines = re.compile(rb"[\r\n\0]").search


def _checked_url(name: str, base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError([f"upstreams.{name}.base_url: {error}"]) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError([f"upstreams.{name}.base_url: not an http or https URL"])
    if url.userinfo or url.query or url.fragment:
        raise ConfigError([f"upstreams.{name}.base_url: no user, query or fragment can stand in it"])
    return base_url.rstrip("/")


def _fixed_headers(
    name: str, api_key: str | None, auth: Auth, headers: Mapping[str, str]
) -> list[tuple[bytes, bytes]]:
    """What every request carries, whatever the client sent."""
    fixed = {"accept-encoding": "identity"}
    if api_key is not None and auth == "bearer":
        fixed["authorization"] = f"Bearer {api_key}"
    elif api_key is not None and auth != "none":
        fixed[auth] = api_key
    fixed |= {header.lower(): value for header, value in headers.items()}
    for header, value in fixed.items():
        if not (header.isascii() and value.isascii() and (header + value).isprintable()):
            raise ConfigError([f"upstreams.{name}: the {header!r} header has characters that none can have"])
    return [(header.encode(), value.encode()) for header, value in fixed.items()]


def _named_in_connection(headers: RawHeaders) -> set[bytes]:
    """Headers that a Connection header declares hop-by-hop."""
    return {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _SLICE_BYTES):
        yield body[start : start + _SLICE_BYTES]


class _ClientGone(Exception):
    """The client went away while the upstream was being waited for."""


class _Client:
    """The one reader of `receive`: the body first, then an eye on the client's leaving."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False
        self._interruption: _Interruption | None = None

    async def read_body(self) -> bytes | None:
        """The whole body, or None if the client left before its end."""
        pieces: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(pieces)

    def watch(self) -> None:
        self._watcher = asyncio.create_task(self._wait_until_gone())

    async def unwatch(self) -> None:
        """Stop reading `receive`; what it raised is raised here."""
        self._watcher.cancel()
        await asyncio.wait([self._watcher])
        if not self._watcher.cancelled():
            self._watcher.result()

    def interruptible(self) -> "_Interruption":
        """A wait for the upstream that ends with `_ClientGone` as soon as the client is gone.

        Nothing but such waits is interrupted: a `send` under way may be moving money.
        """
        self._interruption = _Interruption(self)
        return self._interruption

    async def _wait_until_gone(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        finally:
            self.gone = True
            if self._interruption is not None:
                self._interruption.interrupt()


class _Interruption:
    """Cancels the wait inside it and takes the cancellation back, as asyncio.timeout does."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._task: asyncio.Task[Any] | None = None
        self._interrupted = False

    def __enter__(self) -> None:
        if self._client.gone:
            raise _ClientGone
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def interrupt(self) -> None:
        if self._task is not None and not self._interrupted:
            self._interrupted = True
            self._task.cancel()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if not self._interrupted:
            return
        if task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise _ClientGone from exc


class _Departure:
    """Tells once that the request went out; `trace` is httpcore's extension of that name."""

    def __init__(self, on_sent: Callable[[], None]) -> None:
        self._on_sent: Callable[[], None] | None = on_sent

    def mark(self) -> None:
        on_sent, self._on_sent = self._on_sent, None
        if on_sent is not None:
            on_sent()

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(".send_request_headers.started"):
            self.mark()


@dataclass(frozen=True, slots=True)
class _Plain:
    """The same request without the stream_options that were added."""

    model: str
    body: Callable[[], bytes]
    request_with: Callable[[bytes], httpx.Request]


async def _read_error(response: httpx.Response, client: _Client) -> bytes:
    """The body of an error, which has to be read before it is known whether it goes on."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    pieces = aiter(response.stream)
    body = b""
    while (piece := await _next_piece(pieces, client)) is not None:
        body += piece
        if len(body) > _ERROR_BYTES:
            raise UpstreamBroken("The upstream's error is too long.")
    return body


async def _send_whole(response: httpx.Response, body: bytes, send: Send) -> None:
    headers = _answer_headers(response.headers.raw)
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _relay(response: httpx.Response, client: _Client, send: Send) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": _answer_headers(response.headers.raw),
        }
    )
    assert isinstance(response.stream, httpx.AsyncByteStream)
    pieces = aiter(response.stream)
    try:
        while (piece := await _next_piece(pieces, client)) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
    await send({"type": "http.response.body", "body": b""})


async def _next_piece(pieces: AsyncIterator[bytes], client: _Client) -> bytes | None:
    try:
        with client.interruptible():
            return await anext(pieces, None)
    except httpx.TimeoutException as error:
        raise UpstreamBroken("The upstream stopped sending in the middle of its answer.") from error
    except httpx.TransportError as error:
        raise UpstreamBroken("The upstream broke off in the middle of its answer.") from error


def _answer_headers(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    kept = [(name.lower(), value) for name, value in headers]
    dropped = _named_in_connection(kept)
    if any(name == b"transfer-encoding" for name, _ in kept):
        # RFC 9112 6.3: a length beside a transfer coding means nothing.
        dropped.add(b"content-length")
    return [
        (b"x-upstream-request-id" if name == b"x-request-id" else name, value)
        for name, value in kept
        if name not in _NOT_RELAYED
        and name not in dropped
        and not name.startswith((b"x-credits-", b"access-control-"))
    ]


TraceHook = Callable[[str, Mapping[str, Any]], Awaitable[None]]

_trace: ContextVar[TraceHook | None] = ContextVar("trace", default=None)


class PooledTransport(AiohttpTransport):
    """aiohttp's connection pool behind httpx's interface: no redirects, cookies, proxies, decoding.

    Serves the part of httpcore's `trace` extension that tells when a request goes out.
    """

    def __init__(self) -> None:
        self._context = ssl.create_default_context()
        super().__init__(verify=self._context, client=self._session)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        _trace.set(request.extensions.get("trace"))
        try:
            return await super().handle_async_request(request)
        except httpx.ConnectTimeout as error:
            raise _corrected(error) from error.__cause__
        except aiohttp.ClientError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=_Connector(context=self._context),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
            trust_env=False,
        )


def _corrected(error: httpx.ConnectTimeout) -> httpx.TransportError:
    """httpx-aiohttp reports each lost or refused connection as a timeout of connecting."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ServerTimeoutError):
        return error
    if isinstance(cause, aiohttp.ClientConnectorError):
        return httpx.ConnectError(str(error))
    return httpx.ReadError(str(error))


class _Connector(aiohttp.TCPConnector):
    """Never sends on a kept connection that the upstream has closed meanwhile.

    aiohttp repeats only idempotent requests on a fresh connection, and nobody can know whether a POST
    whose connection died was carried out. So the check is made before a byte is sent.
    """

    def __init__(self, *, context: ssl.SSLContext) -> None:
        super().__init__(limit=0, ssl=context)
        protocol: type[ResponseHandler] = _Protocol
        self._factory = partial(protocol, loop=self._loop)

    async def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            assert isinstance(protocol, _Protocol)
            if not protocol.used or not _is_readable(connection):
                break
            connection.close()
        protocol.used = True
        if trace := _trace.get():
            await trace("http11.send_request_headers.started", {})
        return connection


class _Protocol(ResponseHandler):
    """aiohttp's protocol, which leaves the reader of a body with malformed chunks waiting for ever."""

    used = False

    def connection_lost(self, exc: BaseException | None) -> None:
        body = self._payload
        super().connection_lost(exc)
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection ended before the body did"))


def _is_readable(connection: Connection) -> bool:
    """Whether bytes or the end have come in that the event loop has not read yet: neither is asked for."""
    transport = connection.transport
    assert transport is not None
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))
