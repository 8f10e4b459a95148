"""A hub for tests: a scripted upstream, the proxy before it on real ports, and a hand on its wallet."""

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from servers import serve_app

from llmhub_meter.accounts import Accounts, Holder
from llmhub_meter.config import Config
from llmhub_meter.meter import Meter
from llmhub_meter.money import ticks
from llmhub_meter.proxy import create_app
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.wallet import Wallet

MODELS: dict[str, dict[str, Any]] = {
    "m-chat": {
        "type": "chat",
        "input_per_1k": 30,
        "output_per_1k": 120,
        "cached_input_per_1k": 3,
        "cache_write_per_1k": "37.5",
        "max_output_tokens": 16384,
    },
    "m-even": {"type": "chat", "input_per_1k": 1000, "output_per_1k": 1000, "max_output_tokens": 1000},
    "m-flat": {"type": "chat", "per_request": 100},
    "m-free": {"type": "chat", "free": True},
    "m-text": {"type": "completion", "input_per_1k": 30, "output_per_1k": 120, "max_output_tokens": 4096},
    "m-embed": {"type": "embedding", "input_per_1k": 2},
    "m-img": {
        "type": "image",
        "per_generation": 4000,
        "per_generation_by": {"1024x1024/hd": 8000},
    },
    "m-imgtok": {"type": "image", "input_per_1k": 500, "image_input_per_1k": 800, "output_per_1k": 3000},
}
"""The reference card of the public faults, in credits."""


@dataclass
class Seen:
    """One request as the upstream got it."""

    path: str
    headers: dict[str, str]
    body: Any
    raw: bytes


@dataclass
class Scripted:
    """An upstream that answers what a test lays down, and remembers what it was asked."""

    answer: Callable[[Any, Any, Any], Awaitable[None]] | None = None
    seen: list[Seen] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client of the upstream left before the end of its answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        # A form is kept raw.
        body = json.loads(raw) if raw and raw[:2] != b"--" else None
        self.seen.append(Seen(scope["path"], headers, body, raw))
        assert self.answer is not None
        await self.answer(scope, receive, send)

    def json(self, body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answers this object from now on."""
        self.bytes(json.dumps(body).encode(), status, {"content-type": "application/json", **(headers or {})})

    def bytes(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        """Answers these bytes from now on."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": raw})
            await send({"type": "http.response.body", "body": body})

        self.answer = answer

    def stream(self, *pieces: bytes, seconds: float = 0, cut: bool = False, linger: float = 0) -> None:
        """Streams these pieces from now on; `cut` breaks the connection after the last one."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            watch = asyncio.ensure_future(receive())
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                done, _ = await asyncio.wait([watch], timeout=seconds)
                if done:
                    self.gone.set()
                    return
            if linger:
                done, _ = await asyncio.wait([watch], timeout=linger)
                if done:
                    self.gone.set()
                    return
            watch.cancel()
            if cut:
                raise ConnectionResetError("cut")
            await send({"type": "http.response.body", "body": b""})

        self.answer = answer


def chunk(text: str | None = None, **more: Any) -> bytes:
    """One chat chunk as an event."""
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    body = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices, **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def chat_answer(text: str = "hi", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], **more}


DONE = b"data: [DONE]\n\n"


@dataclass
class Hub:
    """The running proxy and an account with a key."""

    url: str
    upstream: Scripted
    redis_url: str
    config: Config
    key: str = ""
    account: str = ""

    @functools.cached_property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, headers=self.auth)

    @property
    def auth(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers=self.auth)

    def chat(self, model: str = "m-chat", text: str = "hello", **more: Any) -> httpx.Response:
        return self.post(model=model, messages=[{"role": "user", "content": text}], **more)

    def record(self, answer: httpx.Response) -> dict[str, Any]:
        """The charge of an answer's request, as its owner reads it."""
        path = f"/v1/credits/requests/{answer.headers['x-request-id']}"
        found: dict[str, Any] = self.client.get(path, headers=self.auth).raise_for_status().json()
        return found

    def run(self, work: Callable[[Accounts, Wallet], Awaitable[Any]]) -> Any:
        """Works on the same Redis from the test's own event loop."""

        async def with_redis() -> Any:
            scripts = Scripts(connect(self.redis_url))
            try:
                accounts = Accounts(scripts, signup_grant=0)
                return await work(accounts, Wallet(scripts))
            finally:
                await scripts.aclose()

        return asyncio.run(with_redis())

    def open_account(self, name: str, credits: int | str) -> tuple[str, str]:
        """A new account with a balance: its id and a key."""

        async def work(accounts: Accounts, wallet: Wallet) -> tuple[str, str]:
            account = await accounts.create(name)
            if ticks(credits):
                await wallet.credit(account.id, ticks(credits), "adjust", id="start")
            return account.id, (await accounts.issue_key(name))[0]

        return self.run(work)

    def holder(self) -> Holder:
        async def work(accounts: Accounts, wallet: Wallet) -> Holder:
            return await accounts.get(self.account)

        return self.run(work)

    def adjust(self, credits: int | str, id: str = "more") -> None:
        async def work(accounts: Accounts, wallet: Wallet) -> None:
            await wallet.credit(self.account, ticks(credits), "adjust", id=id)

        self.run(work)

    def wait_until_free(self, seconds: float = 5) -> Holder:
        """Waits for the last hold to end; fails when one stays."""
        deadline = time.monotonic() + seconds
        while True:
            holder = self.holder()
            if not holder.figures.held:
                return holder
            assert time.monotonic() < deadline, f"a hold stays: {holder.figures}"
            time.sleep(0.02)

    def audit(self) -> Any:
        from llmhub_meter.archive.audit import audit

        async def run() -> Any:
            scripts = Scripts(connect(self.redis_url))
            try:
                return await audit(scripts)
            finally:
                await scripts.aclose()

        return asyncio.run(run())


@contextmanager
def hub(
    redis_url: str, *, credits: int | str = 100_000, upstream_url: str | None = None, **tables: Any
) -> Iterator[Hub]:
    """Starts upstream and proxy; afterwards nothing may be held and the ledger must add up."""
    scripted = Scripted()
    with serve_app(scripted) as url:
        upstream = {
            "base_url": (upstream_url or url) + "/v1",
            "api_key": "upstream-secret",
            "timeout_seconds": 2,
            **tables.pop("upstream", {}),
        }
        config = Config.model_validate(
            {
                "redis": {"url": redis_url},
                "upstreams": {"main": upstream},
                "models": tables.pop("models", MODELS),
                "credits": {"signup_grant": 0},
                **tables,
            }
        )
        with serve_app(create_app(config, Meter.from_config(config))) as proxy:
            running = Hub(proxy, scripted, redis_url, config)
            running.account, running.key = running.open_account("alice", credits)
            try:
                yield running
            finally:
                running.client.close()
            running.wait_until_free()
            report = running.audit()
            assert report.differences == 0, report.findings


@asynccontextmanager
async def raw_connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare TCP connection, to leave whenever a test likes."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port), family=socket.AF_INET)
    try:
        yield reader, writer
    finally:
        writer.close()
