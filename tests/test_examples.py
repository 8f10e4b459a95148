"""The examples run: real Redis, real servers, real clients, and the charge is right."""

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hub import DONE, Scripted, chat_answer, chunk, usage
from servers import serve_app
from starlette.applications import Starlette
from starlette.routing import Route

from llmhub_meter import demo
from llmhub_meter.accounts import Accounts
from llmhub_meter.config import Config, load_config
from llmhub_meter.errors import ConfigError
from llmhub_meter.meter import Meter
from llmhub_meter.middleware import MeterMiddleware
from llmhub_meter.money import credits, ticks
from llmhub_meter.proxy import create_app
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.testing import temporary_meter

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GREETING = [{"role": "user", "content": "one two three"}]


def run(redis_url: str, work: Any, *, signup_grant: int = 0) -> Any:
    """Works on the accounts of the Redis from an event loop of its own."""

    async def with_redis() -> Any:
        scripts = Scripts(connect(redis_url))
        try:
            return await work(Accounts(scripts, signup_grant=signup_grant))
        finally:
            await scripts.aclose()

    return asyncio.run(with_redis())


def open_account(redis_url: str, grant: int = 100_000) -> str:
    async def work(accounts: Accounts) -> str:
        await accounts.create("anna")
        return (await accounts.issue_key("anna"))[0]

    key: str = run(redis_url, work, signup_grant=ticks(grant))
    return key


def balance(redis_url: str, account: str) -> str:
    """What an account has left, once nothing of it is held."""

    async def work(accounts: Accounts) -> str:
        for _ in range(200):
            figures = (await accounts.get(account)).figures
            if not figures.held:
                return credits(figures.balance)
            await asyncio.sleep(0.02)
        raise AssertionError(f"a hold stays: {figures}")

    left: str = run(redis_url, work)
    return left


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The app of an example, as `uvicorn --factory main:create_app` would run it."""
    path = EXAMPLES / folder / "main.py"
    name = f"example_{folder}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        with serve_app(module.create_app()) as url:
            yield url
    finally:
        del sys.modules[name]


def test_the_fastapi_app(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMHUB_METER__REDIS__URL", redis_url)
    key = open_account(redis_url)
    with served("fastapi_app") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            raw = client.chat.completions.with_raw_response.create(
                model="house-model", messages=GREETING, max_tokens=50
            )
            answer = raw.parse()
            words = (answer.choices[0].message.content or "").split()
            assert words[0] == "Hello"
            used = 3 + 2 * len(words)
            assert raw.headers["x-credits-used"] == str(used)
            assert raw.headers["x-credits-remaining"] == str(100_000 - used)

            stream = client.chat.completions.create(
                model="house-model",
                messages=GREETING,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            figures: Any = chunks[-1].usage
            assert figures.credits_used == str(used)
            assert figures.credits_remaining == str(100_000 - 2 * used)

            hidden = list(client.chat.completions.create(model="house-model", messages=GREETING, stream=True))
            assert all(each.choices and each.usage is None for each in hidden)
        assert httpx.get(url).json() == {"hello": "world"}
        assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 401
    assert balance(redis_url, "anna") == str(100_000 - 3 * used)


def test_the_starlette_app(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMHUB_METER__REDIS__URL", redis_url)
    body = {"model": "house-model", "messages": GREETING}
    with served("starlette_app") as url:
        path = f"{url}/v1/chat/completions"
        answer = httpx.post(path, json=body, headers={"X-App-Token": "token-of-anna"})
        assert answer.status_code == 200
        # 10 tokens at 0.1, 2 at 0.4, and 0.5 for the request.
        assert answer.headers["x-credits-used"] == "2.3"
        assert answer.headers["x-credits-remaining"] == "4997.7"
        nobody = httpx.post(path, json=body, headers={"X-App-Token": "wrong"})
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/hello").text == "hello"
    assert balance(redis_url, "customer-17") == "4997.7"


@contextmanager
def proxy(
    redis_url: str, file: str, upstream: str, environ: dict[str, str]
) -> Iterator[tuple[str, Scripted]]:
    """The proxy on an example's config, with one of its upstreams moved to this machine."""
    scripted = Scripted()
    with serve_app(scripted) as target:
        moved = {
            "LLMHUB_METER__REDIS__URL": redis_url,
            f"LLMHUB_METER__UPSTREAMS__{upstream.upper()}__BASE_URL": f"{target}/v1",
        }
        config = load_config(EXAMPLES / "proxy" / file, environ={**environ, **moved})
        with serve_app(create_app(config, Meter.from_config(config))) as url:
            yield url, scripted


def test_the_proxy_before_openai(redis_url: str) -> None:
    key = open_account(redis_url)
    with proxy(redis_url, "openai.toml", "openai", {"OPENAI_API_KEY": "upstream-secret"}) as (url, upstream):
        upstream.json(chat_answer(usage=usage(1000, 500)))
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            raw = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=GREETING)
            assert raw.parse().choices[0].message.content == "hi"
            # 1,000 tokens at 14 and 500 at 56 per 1,000.
            assert raw.headers["x-credits-used"] == "42"
            assert raw.headers["x-credits-remaining"] == "99958"

            upstream.json({"created": 1, "data": [{"b64_json": "QQ=="}]})
            image = client.images.with_raw_response.generate(
                model="dall-e-3", prompt="a cat", size="1792x1024", quality="hd"
            )
            assert image.headers["x-credits-used"] == "11100"
            models = {model.id for model in client.models.list()}
        assert {"gpt-4o-mini", "o4-mini", "gpt-image-1", "text-embedding-3-small"} <= models
    assert upstream.seen[0].headers["authorization"] == "Bearer upstream-secret"
    assert balance(redis_url, "anna") == "88858"


def test_the_proxy_before_ollama_and_vllm(redis_url: str) -> None:
    key = open_account(redis_url, grant=1_000)
    environ = {"VLLM_API_KEY": "upstream-secret"}
    body: dict[str, Any] = {"messages": GREETING}
    auth = {"authorization": f"Bearer {key}"}
    with proxy(redis_url, "ollama_vllm.toml", "vllm", environ) as (url, upstream):
        upstream.stream(chunk("hi"), chunk(usage=usage(1000, 500)), DONE)
        path = f"{url}/v1/chat/completions"
        answer = httpx.post(path, json={**body, "model": "qwen3", "stream": True}, headers=auth)
        assert b": credits used=30 remaining=970\n\n" in answer.content
        assert upstream.seen[0].body["model"] == "Qwen/Qwen3-32B"
    with proxy(redis_url, "ollama_vllm.toml", "ollama", environ) as (url, upstream):
        upstream.json(chat_answer(usage=usage(1000, 500)))
        path = f"{url}/v1/chat/completions"
        free = httpx.post(path, json={**body, "model": "llama3.2"}, headers=auth)
        assert (free.status_code, free.headers["x-credits-used"]) == (200, "0")
        assert "authorization" not in upstream.seen[0].headers
    assert balance(redis_url, "anna") == "970"


def test_the_configs_ask_for_their_keys() -> None:
    for path in (EXAMPLES / "proxy").glob("*.toml"):
        with pytest.raises(ConfigError, match="environment variable .*_API_KEY is not set"):
            load_config(path, environ={})


async def test_a_temporary_meter_for_the_tests_of_an_app() -> None:
    spec = importlib.util.spec_from_file_location("starlette_example", EXAMPLES / "starlette_app" / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = Starlette(routes=[Route("/v1/chat/completions", module.chat, methods=["POST"])])
    models = {"house-model": {"type": "chat", "input_per_1k": 1000, "output_per_1k": 1000}}
    body = {"model": "house-model", "messages": GREETING}
    async with temporary_meter(models, credits=500) as paid:
        transport = httpx.ASGITransport(MeterMiddleware(app, meter=paid.meter))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answer = await client.post("/v1/chat/completions", json=body, headers=paid.headers)
        assert answer.headers["x-credits-used"] == "12"
        assert (await paid.balance(), await paid.held()) == ("488", "0")
    async with temporary_meter(models, credits=0) as broke:
        transport = httpx.ASGITransport(MeterMiddleware(app, meter=broke.meter))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answer = await client.post("/v1/chat/completions", json=body, headers=broke.headers)
        assert answer.status_code == 402


def test_the_numbers_of_the_readme_and_the_tutorial(redis_url: str) -> None:
    """What the pages show is what the demo's upstream and prices give."""
    key = open_account(redis_url)
    hello = {"model": "demo-chat", "messages": [{"role": "user", "content": "Hello"}]}
    with serve_app(demo.create_upstream(chunk_seconds=0)) as target:
        config = Config.model_validate(
            {
                "redis": {"url": redis_url},
                "upstreams": {"demo": {"base_url": f"{target}/v1"}},
                "models": demo.MODELS,
            }
        )
        with serve_app(create_app(config, Meter.from_config(config))) as url:
            auth = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{url}/v1/chat/completions", json=hello, headers=auth)
            stream = httpx.post(f"{url}/v1/chat/completions", json={**hello, "stream": True}, headers=auth)
            path = f"{url}/v1/credits/requests/{answer.headers['x-request-id']}"
            record = httpx.get(path, headers=auth).json()
    names = ("content-length", "content-type", "x-credits-used", "x-credits-remaining")
    readme, tutorial = (ROOT / "README.md").read_text(), (ROOT / "docs" / "tutorial.md").read_text()
    for name in names:
        for page in (readme, tutorial):
            assert f"\n{name}: {answer.headers[name]}\n" in page
    comment = next(line for line in stream.text.splitlines() if line.startswith(": credits"))
    assert f"\n{comment}\n" in tutorial
    shown = next(
        json.loads(text)
        for text in re.findall(r"^```json\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)
        if "breakdown" in text
    )
    assert {**record, "id": shown["id"]}.items() >= shown.items()
