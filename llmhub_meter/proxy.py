"""The reverse proxy: metered routes to the upstreams, and what customers and load balancers read."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import dialects
from .config import Config, load_config
from .errors import ApiError, MeteringUnavailable, ModelNotFound, NotFound, UpstreamError
from .exchange import CONTEXT, Context
from .meter import Meter
from .middleware import MeterMiddleware, api_key
from .replies import ASGIApp, Message, Receive, Scope, Send, error_json, send_error
from .upstream import Upstream

CONFIG_VARIABLE = "LLMHUB_METER_CONFIG"
"""Where `serve` leaves the path of its config file for its workers."""

Handler = Callable[[Request], Awaitable[Response]]


def create_app(config: Config, meter: Meter, *, upstreams: Mapping[str, Upstream] | None = None) -> ASGIApp:
    """The proxy as an ASGI app. It starts and closes the meter and the upstreams with its lifespan."""
    if upstreams is None:
        upstreams = {
            name: Upstream(
                name,
                base_url=each.base_url,
                api_key=None if each.api_key is None else each.api_key.get_secret_value(),
                auth=each.auth,
                headers=each.headers,
                query=each.query,
                timeout_seconds=each.timeout_seconds,
            )
            for name, each in config.upstreams.items()
        }
    return MeterMiddleware(_Proxy(meter, upstreams), meter=meter, strict=False, rewrite_model=True)


def worker_app() -> ASGIApp:
    """The app of one worker of `serve`, made in the worker's own process."""
    path = os.environ.get(CONFIG_VARIABLE)
    config = load_config(Path(path) if path else None, environ=os.environ)
    background = os.environ.get(f"{CONFIG_VARIABLE}_BACKGROUND") != "off"
    return create_app(config, Meter.from_config(config, background=background, adopt_prices=True))


class _Proxy:
    """Forwards what was metered; everything else is a page of ours or 404."""

    def __init__(self, meter: Meter, upstreams: Mapping[str, Upstream]) -> None:
        self._upstreams = upstreams
        self._pages = _pages(meter, upstreams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        context: Context | None = scope.get(CONTEXT)
        if context is None:
            await self._pages(scope, receive, send)
            return
        # A model that the table does not know goes to the default, which is the first.
        upstream = self._upstreams.get(context.upstream or next(iter(self._upstreams), ""))
        if upstream is None:
            error = UpstreamError(f"There is no upstream for the model {context.model!r}.")
            await send_error(send, error, anthropic=context.anthropic)
            return
        context.sent = False
        await upstream.forward(
            scope,
            receive,
            send,
            path=context.path,
            on_sent=context.mark_sent,
            anthropic=context.anthropic,
            model=context.model,
            plain_body=context.plain_body,
        )


def _pages(meter: Meter, upstreams: Mapping[str, Upstream]) -> Starlette:
    from .api import credits

    async def models(request: Request) -> Response:
        await meter.ready()
        return _json({"object": "list", "data": meter.prices.table.public()})

    async def model(request: Request) -> Response:
        await meter.ready()
        name: str = request.path_params["id"]
        table = meter.prices.table
        found = table.find(name)
        if found is None:
            raise ModelNotFound(f"The model {name[:200]!r} does not exist.", param="model")
        return _json(next(each for each in table.public() if each["id"] == found.name))

    async def balance(request: Request) -> Response:
        account = await _account(meter, request)
        return _json(credits.balance(await meter.accounts.get(account)), private=True)

    async def one_request(request: Request) -> Response:
        account = await _account(meter, request)
        return _json(await credits.request(meter.wallet, account, request.path_params["id"]), private=True)

    async def alive(request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        try:
            await meter.ready()
            await meter.scripts.command("PING")
            await meter.scripts.check_epoch()
        except MeteringUnavailable:
            return _json({"status": "unavailable", "redis": "unavailable"}, status=503)
        return _json({"status": "ok", "redis": "ok", "prices": meter.prices.table.version})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for upstream in upstreams.values():
            await upstream.aclose()

    pages: dict[str, Handler] = {
        "/v1/models": models,
        "/v1/models/{id:path}": model,
        "/v1/credits": balance,
        "/v1/credits/requests/{id}": one_request,
        "/healthz": alive,
        "/readyz": ready,
    }
    app = Starlette(
        routes=[Route(path, handler, methods=["GET"]) for path, handler in pages.items()],
        exception_handlers={ApiError: _api_error, 404: _not_found, 405: _not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _account(meter: Meter, request: Request) -> str:
    await meter.ready()
    return (await meter.identify(api_key(request.scope))).account.id


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return Response(error_json(error), error.status, error.headers(), "application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    """What is not listed does not exist, whatever the method; a preflight is told what there is."""
    path = request.url.path
    if request.method == "OPTIONS" and (dialects.find(path) or getattr(error, "status_code", 404) == 405):
        return Response(status_code=204, headers={"allow": "POST" if dialects.find(path) else "GET, HEAD"})
    return await _api_error(request, NotFound(f"There is no {request.method} {path[:200]} here."))


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Nothing is metered over websockets yet, and nothing passes unmetered."""
    await receive()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        # The server answers 403.
        await send({"type": "websocket.close", "code": 1008})
        return

    async def send_wrapper(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await send_error(send_wrapper, NotFound(f"There is no websocket {scope['path'][:200]} here."))


def _json(body: Mapping[str, object], *, status: int = 200, private: bool = False) -> Response:
    headers = {"cache-control": "no-store"} if private else None
    return Response(msgspec.json.encode(body), status, headers, "application/json")
