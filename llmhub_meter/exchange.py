"""One admitted request: forward it, read the usage in the answer, end its hold once."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import requests, sse
from .codings import Decoder, Undecodable, decoded
from .dialects import Answer, Output
from .errors import ApiError, UpstreamError
from .meter import Meter, Metered, Receipt
from .money import credits
from .replies import ASGIApp, Message, Receive, Scope, Send, send_error
from .streams import StreamRelay
from .types import Usage

Header = tuple[bytes, bytes]

CONTEXT = "llmhub_meter"
"""Where an app finds the `Context` of its request in the scope."""
DONE_SECONDS = 1.0
"""How long `[DONE]` waits for the upstream to end."""
GRACE_SECONDS = 0.5
"""How long an app may take to notice that its client is gone, before it is cancelled."""
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""A larger JSON answer streams on; its usage is read from its ends."""
TAIL_BYTES = 256 * 1024

_EXPOSED = b"x-credits-used, x-credits-remaining, x-credits-reserved, x-request-id"
_TRAILERS = "http.response.trailers"
_NOT_FOR_APPS = ("http.response.pathsend", "http.response.zerocopysend", _TRAILERS)
"""Ways past us to the client, and the trailers, which are ours."""


@dataclass(slots=True)
class Context:
    """What a metered app may know of its request, in `scope["llmhub_meter"]`."""

    request_id: str
    account: str
    model: str
    """The name that the upstream is to be asked for."""
    upstream: str | None
    path: str
    """The matched route below /v1."""
    anthropic: bool = False
    """Whether errors come in Anthropic's envelope."""
    sent: bool = True
    """Whether the request went upstream. An app that knows better sets it to False, and calls `mark_sent`."""

    plain_body: Callable[[], bytes] | None = None
    """Where the stream's usage was asked for in the client's place: the body without that."""

    def mark_sent(self) -> None:
        self.sent = True


class ClientGone(OSError):
    """Raised into the app's `send` when nobody reads its answer any more."""


class Exchange:
    """The app's turn with one metered request. `receive` has one reader: this."""

    def __init__(
        self,
        app: ASGIApp,
        meter: Meter,
        metered: Metered,
        path: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        quote = metered.quote
        self.app = app
        self.meter = meter
        self.metered = metered
        self.scope = scope
        self.receive = receive
        self.send = send
        self.context = Context(
            metered.hold.id,
            metered.hold.account,
            quote.upstream_model,
            quote.model.upstream,
            path,
            quote.dialect.anthropic,
        )
        self._body = b""
        self._body_given = False
        self._kind: Literal["none", "passed", "unclear", "json", "large", "binary", "stream"] = "none"
        self._start: Message = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._head = b""
        self._relay = StreamRelay(metered, comment=meter.rules.sse_comment)
        self._decoder: Decoder | None = None
        """Of a compressed stream, which is read from a decoded copy and passed on as it came."""
        self._trailers = False
        self._lock = asyncio.Lock()
        self._complete = False
        """The client has its whole answer."""
        self._stopped = False
        """The app is told to stop: its client left, or its answer was ended here."""
        self._disconnect = asyncio.Event()
        self._timer: asyncio.Task[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelled = False

    async def run(self, body: bytes, *, rewrite_model: bool) -> None:
        """Runs the app; whatever happens to it, to the client or to the caller, the request ends once."""
        self._task = asyncio.current_task()
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            field = self.meter.token_field(self.metered.quote.model)
            forwarded = partial(
                requests.forwarded, body, self.metered, token_field=field, rewrite_model=rewrite_model
            )
            self._body = forwarded()
            if requests.asks_in_their_place(self.metered):
                self.context.plain_body = partial(forwarded, ask_for_usage=False)
            # A client that left while credits were set aside is noticed before anything goes upstream.
            self.context.sent = False
            await asyncio.sleep(0)
            if not self._stopped:
                self.context.sent = True
                await self._run_app()
        finally:
            watch.cancel()
            if self._timer is not None:
                self._timer.cancel()
            self._task = None
            self._disconnect.set()
            if not self.metered.ended:
                await asyncio.shield(self.meter.finisher.spawn(self._conclude()))

    async def _run_app(self) -> None:
        try:
            await self._give_app_its_turn()
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            if self._task is not None:
                self._task.uncancel()

    async def _give_app_its_turn(self) -> None:
        failure: Exception | None = None
        try:
            await self.app(self._inner_scope(), self._app_receive, self._app_send)
        except Exception as error:
            failure = error
        # The timer may be ending the stream at this moment.
        async with self._lock:
            if self._stopped:
                return
            if failure is not None:
                await self._app_failed(failure)
            elif self._kind == "none" and not self._complete:
                await self._answer_instead(UpstreamError("The application sent no answer."))

    def _inner_scope(self) -> Scope:
        """The app's scope: the new body's length, our request id, and no way to send files past us."""
        scope = dict(self.scope)
        dropped = (b"content-length", b"content-encoding", b"transfer-encoding", b"x-request-id")
        scope["headers"] = [
            *((name, value) for name, value in self.scope["headers"] if not _ours(name, dropped)),
            (b"content-length", str(len(self._body)).encode()),
            (b"x-request-id", self.context.request_id.encode()),
        ]
        scope["extensions"] = {
            name: value
            for name, value in (self.scope.get("extensions") or {}).items()
            if name not in _NOT_FOR_APPS
        }
        scope[CONTEXT] = self.context
        return scope

    async def _app_receive(self) -> Message:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._disconnect.wait()
        return {"type": "http.disconnect"}

    async def _watch(self) -> None:
        """Notices that the client left, and stops the app where reading on is of no use."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        streams = self.metered.quote.ask.stream and self.meter.rules.on_disconnect == "cancel"
        if not self.context.sent or streams:
            self._stop_app()

    def _stop_app(self) -> None:
        self._stopped = True
        self._disconnect.set()
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cancel_app)

    def _cancel_app(self) -> None:
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    async def _app_send(self, message: Message) -> None:
        async with self._lock:
            if self._stopped:
                raise ClientGone("the client is gone")
            if message["type"] == "http.response.start":
                await self._take_start(message)
            elif message["type"] == "http.response.body":
                await self._take_body(message.get("body", b""), message.get("more_body", False))
            else:
                await self.send(message)

    async def _take_start(self, message: Message) -> None:
        status = message["status"]
        if not 200 <= status < 300:
            self._kind = "passed"
            await self._send_start(message, await self.metered.release(http=status))
        elif _header(message, b"content-type") == b"text/event-stream":
            await self._begin_stream(message)
        else:
            quote = self.metered.quote
            unclear = quote.ask.stream and _coding(message) is None
            self._kind = "binary" if quote.dialect.binary else "unclear" if unclear else "json"
            self._start = message

    async def _begin_stream(self, message: Message) -> None:
        if (coding := _coding(message)) is not None:
            try:
                self._decoder = Decoder(coding, MAX_BUFFERED_BYTES)
            except Undecodable:
                await self._answer_instead(
                    UpstreamError("The upstream compressed its stream in a way that is not known.")
                )
                self._stop_app()
                return
        self._kind = "stream"
        await self._send_start(message)

    async def _tell_kind(self, data: bytes, more: bool) -> None:
        """Some upstreams call a stream JSON, or give it no type: its first bytes say what it is."""
        self._parts.append(data)
        first = b"".join(self._parts)
        is_stream = sse.begins_stream(first)
        if is_stream is None and more:
            return
        self._parts = []
        if is_stream:
            await self._begin_stream(self._start)
        else:
            self._kind = "json"
        if not self._complete:
            await self._take_body(first, more)

    async def _take_body(self, data: bytes, more: bool) -> None:
        if self._kind == "stream":
            await self._pass_events(data, more)
        elif self._kind == "unclear":
            await self._tell_kind(data, more)
        elif self._kind == "json":
            self._parts.append(data)
            self._size += len(data)
            if not more:
                await self._answer_json(b"".join(self._parts))
            elif self._size > MAX_BUFFERED_BYTES:
                self._kind = "large"
                whole = b"".join(self._parts)
                self._head, self._parts = whole[:TAIL_BYTES], []
                await self._send_start(self._start)
                await self._pass_large(whole, more)
        elif self._kind == "large":
            await self._pass_large(data, more)
        elif self._kind == "binary":
            await self._begin_binary(data, more)
        else:
            await self._send_body(data, more)

    async def _answer_json(self, body: bytes) -> None:
        """Settles, then answers with exact headers and the body as it came."""
        coding = _coding(self._start)
        try:
            clear = body if coding is None else decoded(body, coding, MAX_BUFFERED_BYTES)
        except Undecodable:
            clear = b""
        answer = Answer(clear)
        quote = self.metered.quote
        if not answer.is_object and quote.dialect.answers_text(quote.body):
            answer = Answer.of_text(clear)
        if not answer.is_object:
            self._kind = "none"
            await self._answer_instead(
                UpstreamError("The upstream answered something that is no JSON object. Nothing was charged.")
            )
            return
        await self._send_start(self._start, await self._settle_json(answer))
        await self._send_body(body, False)

    async def _settle_json(self, answer: Answer) -> Receipt:
        metered, dialect = self.metered, self.metered.quote.dialect
        reported = dialect.reported(answer)
        if reported is None and not dialect.output(answer.full).seen:
            return await metered.release(http=self._start["status"])
        usage = await self.meter.usage(
            metered.quote, reported, lambda: dialect.output(answer.full), sent=metered.sent_maximum
        )
        usage = dialect.measure(usage, metered.quote.ask, answer)
        model = answer.head.model
        return await metered.settle(usage, model=model if isinstance(model, str) else None)

    async def _begin_binary(self, data: bytes, more: bool) -> None:
        """Settles at the first byte: what is charged is known, and nothing has to wait for the end."""
        if not data and more:
            return
        metered = self.metered
        if data:
            usage = metered.quote.dialect.measure(Usage(), metered.quote.ask, Answer(b"{}"))
            receipt = await metered.settle(usage)
        else:
            receipt = await metered.release(http=self._start["status"])
        self._kind = "passed"
        await self._send_start(self._start, receipt)
        await self._send_body(data, more)

    async def _pass_large(self, data: bytes, more: bool) -> None:
        self._parts = [b"".join([*self._parts, data])[-TAIL_BYTES:]]
        if not more:
            await self._settle_large()
        await self._send_body(data, more)

    async def _settle_large(self) -> Receipt:
        """Usage stands at either end; without any the input is counted, and images are those asked for."""
        quote = self.metered.quote
        output = Output(images=quote.ask.images, seen=True)
        ends = (quote.dialect.reported(Answer.of_tail(end)) for end in (self._parts[0], self._head))
        reported = next((found for found in ends if found is not None), None)
        usage = await self.meter.usage(quote, reported, lambda: output, sent=None)
        return await self.metered.settle(quote.dialect.measure_stream(usage, quote.ask, output))

    async def _pass_events(self, data: bytes, more: bool) -> None:
        relay = self._relay
        if self._decoder is not None:
            try:
                clear = self._decoder.feed(data)
            except Undecodable:
                await relay.finish("broken")
                await self._send_body(b"", False)
                self._stop_app()
                return
            await relay.feed(clear)
            passed = b"" if relay.cut is not None else data
        else:
            passed = await relay.feed(data)
        if relay.cut is not None or not more:
            await self._end_stream(passed)
            return
        if passed:
            await self._send_body(passed, True)
        if relay.waits and self._timer is None:
            self._timer = asyncio.get_running_loop().create_task(self._wait_for_end())

    async def _end_stream(self, passed: bytes = b"") -> None:
        cut = self._relay.cut is not None
        if passed and not cut:
            # What is there goes on before the settle is waited for.
            await self._send_body(passed, True)
            passed = b""
        last = await self._relay.finish("cut" if cut else "ok")
        # Nothing of ours can stand inside a compressed stream.
        await self._send_body(passed + last if self._decoder is None else b"", False)
        if cut:
            self._stop_app()

    async def _wait_for_end(self) -> None:
        """Ends a stream whose upstream lingers after `[DONE]`."""
        await asyncio.sleep(DONE_SECONDS)
        async with self._lock:
            self._timer = None
            if self._complete or self._stopped:
                return
            if self._relay.done:
                await self._end_stream()
                self._stop_app()
            elif self._decoder is None:
                await self._send_body(self._relay.let_go(), True)

    async def _app_failed(self, error: Exception) -> None:
        """The app raised. Before its answer began the client gets an error; later the break goes on to it."""
        if self._kind in ("none", "unclear", "json", "binary"):
            instead = (
                error if isinstance(error, ApiError) else ApiError("The server failed. Nothing was charged.")
            )
            await self._answer_instead(instead)
            if isinstance(error, ApiError):
                return
        elif self._kind == "stream" and self._relay.done and not self._complete:
            # All was said before the break.
            await self._end_stream()
            return
        elif self._kind == "stream" and not self._complete:
            last = await self._relay.finish("broken")
            await self._send_body(last if self._decoder is None else b"", True)
        raise error

    async def _answer_instead(self, error: ApiError) -> None:
        receipt = await self.metered.release(http=error.status)
        headers = self._credit_headers(receipt)
        anthropic = self.metered.quote.dialect.anthropic
        self._complete = True
        await send_error(self.send, error, headers=headers, anthropic=anthropic)

    async def _conclude(self) -> None:
        """The end of a request whose app ended without an answer of its own."""
        if self._kind == "stream":
            await self._relay.finish("gone" if self._stopped else "broken")
        elif self._stopped and self.context.sent and self._kind == "none":
            # The upstream works on the input all the same.
            quote = self.metered.quote
            usage = await self.meter.usage(quote, None, Output, sent=None)
            usage = quote.dialect.measure_stream(usage, quote.ask, Output())
            await self.metered.settle(usage, end="gone")
        else:
            await self.metered.release(end="gone" if self._stopped else "broken")

    async def _send_start(self, message: Message, receipt: Receipt | None = None) -> None:
        """The start with our headers: exact after a settle, else with what is there while the hold stands."""
        # A stream gets other events than came: a length that was declared no longer holds.
        dropped = (b"x-request-id", b"content-length") if self._kind == "stream" else (b"x-request-id",)
        headers = [
            (name, value) for name, value in message.get("headers", ()) if not _ours(name.lower(), dropped)
        ]
        headers += self._credit_headers(receipt)
        if self._kind == "stream" and _TRAILERS in (self.scope.get("extensions") or {}):
            self._trailers = True
            message = {**message, "trailers": True}
            headers.append((b"trailer", b"x-credits-used, x-credits-remaining"))
        if any(name.lower() == b"access-control-allow-origin" for name, _ in headers):
            headers.append((b"access-control-expose-headers", _EXPOSED))
        await self.send({**message, "headers": headers})

    def _credit_headers(self, receipt: Receipt | None) -> list[Header]:
        hold = self.metered.hold
        if receipt is None:
            return credit_headers(hold.id, remaining=hold.figures.remaining, reserved=hold.amount)
        figures = receipt.figures
        return credit_headers(
            hold.id, used=receipt.used, remaining=None if figures is None else figures.remaining
        )

    async def _send_body(self, data: bytes, more: bool) -> None:
        if self._complete:
            return
        self._complete = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        if self._trailers and not more:
            receipt = self._relay.receipt
            final = [] if receipt is None else self._credit_headers(receipt)[1:]
            await self.send({"type": _TRAILERS, "headers": final, "more_trailers": False})


def credit_headers(
    request: str, *, used: int | None = None, remaining: int | None = None, reserved: int | None = None
) -> list[Header]:
    """The headers of a metered answer; amounts in ticks, absent where None."""
    headers = [(b"x-request-id", request.encode())]
    amounts = (
        (b"x-credits-used", used),
        (b"x-credits-remaining", remaining),
        (b"x-credits-reserved", reserved),
    )
    headers += [(name, credits(amount).encode()) for name, amount in amounts if amount is not None]
    return headers


def _ours(name: bytes, also: Iterable[bytes] = (b"x-request-id",)) -> bool:
    return name.startswith(b"x-credits-") or name in also


def _coding(message: Message) -> bytes | None:
    """The content coding of an answer, where it has one."""
    coding = _header(message, b"content-encoding")
    return None if coding in (b"", b"identity") else coding


def _header(message: Message, wanted: bytes) -> bytes:
    """A header's first value without parameters, in lower case; empty where it is missing."""
    for name, value in message.get("headers", ()):
        if name.lower() == wanted:
            return bytes(value).split(b";")[0].strip().lower()
    return b""
