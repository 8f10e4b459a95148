"""The two proxies that are compared, each the only thing in its process.

Both forward through the same `Upstream` under the same uvicorn settings; one of them meters.
"""

import argparse
from typing import Any

import uvicorn

from llmhub_meter.config import Config
from llmhub_meter.meter import Meter
from llmhub_meter.proxy import create_app
from llmhub_meter.replies import ASGIApp, Receive, Scope, Send
from llmhub_meter.upstream import Upstream

MODEL = "m-chat"
KINDS = ("unmetered", "metered")


class UnmeteredProxy:
    """Forwards every request as it came: what the metered proxy does, without the metering."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path = scope["path"].removeprefix("/v1")
        await self._upstream.forward(scope, receive, send, path=path, on_sent=_nothing)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._upstream.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def unmetered_app(upstream_url: str) -> ASGIApp:
    """The baseline."""
    return UnmeteredProxy(Upstream("stub", base_url=upstream_url, api_key="upstream-key"))


def metered_app(upstream_url: str, redis_url: str) -> ASGIApp:
    """The product, with one chat model that is priced by tokens."""
    config = Config.model_validate(
        {
            "redis": {"url": redis_url},
            "upstreams": {"stub": {"base_url": upstream_url, "api_key": "upstream-key"}},
            "credits": {"signup_grant": 0},
            "models": {
                MODEL: {
                    "type": "chat",
                    "input_per_1k": 30,
                    "output_per_1k": 120,
                    "cached_input_per_1k": 3,
                    "max_output_tokens": 16_384,
                }
            },
        }
    )
    return create_app(config, Meter.from_config(config, background=True))


def serve(app: ASGIApp, port: int) -> None:
    """Serves until SIGTERM."""
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "loop": "uvloop",
        "http": "httptools",
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "log_level": "warning",
        "proxy_headers": False,
        "timeout_graceful_shutdown": 3,
    }
    uvicorn.run(app, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.proxies", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--redis", required=True)
    options = parser.parse_args()
    if options.kind == "metered":
        serve(metered_app(options.upstream, options.redis), options.port)
    else:
        serve(unmetered_app(options.upstream), options.port)


def _nothing() -> None:
    pass


if __name__ == "__main__":
    main()
