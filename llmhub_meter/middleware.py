"""MeterMiddleware: the path of a metered request through an ASGI app."""

import hashlib
import logging
import re
from collections.abc import Callable

from . import dialects, keys, requests
from .dialects import Dialect
from .errors import (
    ApiError,
    ConfigError,
    InsufficientCredits,
    InvalidApiKey,
    InvalidRequest,
    MeteringUnavailable,
    NotFound,
)
from .exchange import Exchange, credit_headers
from .meter import Meter, Payer
from .replies import ASGIApp, Message, Receive, Scope, Send, send_error
from .types import Account, Idempotency

logger = logging.getLogger("llmhub_meter")

Identify = Callable[[Scope], Account | None]

MAX_IDEMPOTENCY_KEY = 255
"""Characters of an idempotency key."""

_BEARER = re.compile(rb"bearer +(\S+) *", re.IGNORECASE)


class MeterMiddleware:
    """Meters the LLM endpoints of an ASGI app; all else passes untouched."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        meter: Meter,
        identify: Identify | None = None,
        strict: bool | None = None,
        rewrite_model: bool = False,
    ) -> None:
        """`identify` names the payer instead of an API key; it returns None for nobody.

        `strict` refuses unmetered paths under /v1 (by default as the config says); `rewrite_model` gives the
        app the upstream's model name in the body.
        """
        self.app = app
        self.meter = meter
        self.identify = identify
        self.strict = meter.rules.strict if strict is None else strict
        self.rewrite_model = rewrite_model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _path(scope)
        dialect = dialects.find(path) if scope["method"] == "POST" else None
        if dialect is not None:
            await self._meter(dialect, scope, receive, send)
        elif scope["method"] == "POST" and dialects.misspelled(path):
            await _refuse(send, NotFound(f"There is no POST {path[:200]} here."), keys.new_request_id(""))
        elif self.strict and path.startswith(dialects.PREFIX + "/"):
            error = NotFound(f"There is no {scope['method']} {path[:200]} here.")
            await _refuse(send, error, keys.new_request_id(""))
        else:
            await self.app(scope, receive, send)

    async def _meter(self, dialect: Dialect, scope: Scope, receive: Receive, send: Send) -> None:
        payer: Payer | None = None
        try:
            await self.meter.ready()
            payer = await self._identify(scope)
            body = await requests.read_body(scope, receive, self.meter.rules.max_body_bytes)
            if body is None:
                return
            parsed = requests.parse(body, dialect, requests.content_type(scope))
            quote = self.meter.quote(dialect, parsed, payer)
            metered = await self.meter.reserve(
                payer, quote, body_bytes=len(body), idempotency=idempotency(scope, body)
            )
        except ApiError as error:
            await self._refuse(dialect, error, payer, send)
            return
        except ConfigError as error:
            logger.error("metering can't start: %s", error.message)
            await self._refuse(dialect, MeteringUnavailable(), payer, send)
            return
        path = _path(scope).removeprefix(dialects.PREFIX)
        exchange = Exchange(self.app, self.meter, metered, path, scope, receive, send)
        await exchange.run(body, rewrite_model=self.rewrite_model)

    async def _identify(self, scope: Scope) -> Payer:
        if self.identify is None:
            return await self.meter.identify(api_key(scope))
        account = self.identify(scope)
        if account is None:
            raise InvalidApiKey("This request could not be attributed to an account.")
        return Payer(account)

    async def _refuse(self, dialect: Dialect, error: ApiError, payer: Payer | None, send: Send) -> None:
        """Answers an error before anything went upstream, with what the account can spend."""
        figures: int | None = None
        if isinstance(error, InsufficientCredits):
            figures = error.remaining
        elif payer is not None and not isinstance(error, MeteringUnavailable):
            try:
                found = await self.meter.wallet.figures(payer.account.id)
            except MeteringUnavailable as unavailable:
                error, found = unavailable, None
            figures = None if found is None else found.remaining
        request = keys.new_request_id("" if payer is None else payer.account.id)
        await _refuse(send, error, request, figures, anthropic=dialect.anthropic)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The meter starts before the app and ends after it, also for an app that knows no lifespan."""
        asked = False
        failed = False

        async def receive_wrapper() -> Message:
            nonlocal asked, failed
            message = await receive()
            asked = True
            if message["type"] == "lifespan.startup":
                try:
                    await self.meter.start()
                except MeteringUnavailable:
                    logger.error("Redis can't be reached; metered requests are refused until it is")
                except ConfigError as error:
                    failed = True
                    await send({"type": "lifespan.startup.failed", "message": error.message})
                    raise
            return message

        async def send_wrapper(message: Message) -> None:
            if failed:
                return
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self.meter.aclose()
            await send(message)

        try:
            await self.app(scope, receive_wrapper, send_wrapper)
        except ConfigError:
            if not failed:
                raise
            return
        except Exception:
            # ASGI: an app that raises before it asked has no lifespan. Later it is its own failure.
            if asked:
                raise
        if asked:
            return
        for name in ("startup", "shutdown"):
            try:
                await receive_wrapper()
            except ConfigError:
                return
            await send_wrapper({"type": f"lifespan.{name}.complete"})


def api_key(scope: Scope) -> str | None:
    """The key that a client showed: `Authorization: Bearer KEY`, `x-api-key` or `api-key`."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in (b"authorization", b"x-api-key", b"api-key"):
            found.setdefault(name, value)
    bearer = _BEARER.fullmatch(found.get(b"authorization", b""))
    key = bearer[1] if bearer else found.get(b"x-api-key") or found.get(b"api-key")
    return None if key is None else key.decode("latin-1").strip()


def idempotency(scope: Scope, body: bytes) -> Idempotency | None:
    """The client's `Idempotency-Key`, where it sent one. Raises InvalidRequest."""
    values: list[bytes] = [value for name, value in scope["headers"] if name == b"idempotency-key"]
    if not values:
        return None
    key = values[0].decode("latin-1").strip()
    if len(values) > 1 or not (1 <= len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key must be one header of 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters.",
            param="Idempotency-Key",
        )
    sent_with = hashlib.sha256(_path(scope).encode("utf-8", "replace") + b"\n")
    sent_with.update(body)
    return Idempotency(hashlib.sha256(key.encode()).hexdigest(), sent_with.hexdigest())


def _path(scope: Scope) -> str:
    """The path below where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _refuse(
    send: Send, error: ApiError, request: str, remaining: int | None = None, *, anthropic: bool = False
) -> None:
    headers = credit_headers(request, used=0, remaining=remaining)
    await send_error(send, error, headers=headers, anthropic=anthropic)
