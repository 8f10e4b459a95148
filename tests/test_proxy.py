"""The proxy as clients see it: real servers on both sides."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hub import DONE, Hub, Scripted, chat_answer, chunk, hub, usage
from servers import serve_app

from llmhub_meter.config import Config
from llmhub_meter.embedded import EmbeddedServer
from llmhub_meter.meter import Meter
from llmhub_meter.proxy import create_app


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        yield running


def client(site: Hub) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=0)


def test_the_example_of_the_product_page(redis_url: str) -> None:
    with hub(redis_url, credits=95_000) as site:
        site.upstream.json(chat_answer(usage=usage(25, 150)))
        answer = client(site).chat.completions.with_raw_response.create(
            model="m-even", messages=[{"role": "user", "content": "hello"}], max_tokens=500
        )
        assert answer.headers["x-credits-used"] == "175"
        assert answer.headers["x-credits-remaining"] == "94825"
        assert answer.parse().usage.total_tokens == 175  # type: ignore[union-attr]
        assert site.holder().figures.available == 94_825 * 10_000


def test_a_stream_with_the_openai_client(site: Hub) -> None:
    site.upstream.stream(
        chunk("Hel", usage=None), chunk("lo", usage=None), chunk(usage=usage(1000, 500)), DONE
    )
    stream = client(site).chat.completions.create(
        model="m-chat",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "Hello"
    figures: Any = chunks[-1].usage
    assert figures.prompt_tokens == 1000
    assert figures.credits_used == "90"
    assert figures.credits_remaining == "99910"


def test_usage_that_nobody_asked_for_is_hidden(site: Hub) -> None:
    pieces = (chunk("Hel"), chunk("lo"), chunk(usage=usage(1000, 500)), DONE)
    site.upstream.stream(*pieces)
    answer = site.chat(stream=True)
    comment = b": credits used=90 remaining=99910\n\n"
    assert answer.content == pieces[0] + pieces[1] + comment + DONE
    assert site.upstream.seen[0].body["stream_options"] == {"include_usage": True}
    assert "x-credits-used" not in answer.headers
    assert answer.headers["x-credits-reserved"]
    assert site.record(answer)["credits"] == "90"


def test_embeddings_and_images_with_the_openai_client(site: Hub) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}
    site.upstream.json(
        {
            "object": "list",
            "data": [vector],
            "model": "m",
            "usage": {"prompt_tokens": 3000, "total_tokens": 3000},
        }
    )
    embedded = client(site).embeddings.with_raw_response.create(
        model="m-embed", input="hello", encoding_format="float"
    )
    assert embedded.headers["x-credits-used"] == "6"
    site.upstream.json({"created": 1, "data": [{"b64_json": "QQ=="}] * 2})
    images = client(site).images.with_raw_response.generate(
        model="m-img", prompt="a cat", n=3, size="1024x1024", quality="hd"
    )
    assert images.headers["x-credits-used"] == "16000"
    assert images.headers["x-credits-remaining"] == "83994"


def test_out_of_credits(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        answer = site.chat()
        assert answer.status_code == 402
        assert answer.content == (
            b'{"error":{"message":"Insufficient credits. Please add more credits to continue.",'
            b'"type":"insufficient_credits","code":"credits_exhausted"}}'
        )
        assert answer.headers["x-credits-used"] == "0"
        assert answer.headers["x-credits-remaining"] == "0"
        assert not site.upstream.seen
        site.upstream.json(chat_answer(usage=usage(900, 4000)))
        free = site.chat("m-free")
        assert (free.status_code, free.headers["x-credits-used"]) == (200, "0")


def test_an_embedded_server_that_dies_is_started_again(tmp_path: Path) -> None:
    upstream = Scripted()
    upstream.json(chat_answer(usage=usage(25, 150)))
    with serve_app(upstream) as url:
        config = Config.model_validate(
            {
                "data_dir": tmp_path,
                "upstreams": {"main": {"base_url": f"{url}/v1"}},
                "models": {"m": {"type": "chat", "input_per_1k": 1000, "output_per_1k": 1000}},
            }
        )
        with serve_app(create_app(config, Meter.from_config(config))) as proxy:
            own = EmbeddedServer.start(tmp_path)
            try:
                site = Hub(proxy, upstream, own.url, config)
                site.account, site.key = site.open_account("alice", 1000)
                assert site.chat("m").headers["x-credits-remaining"] == "825"
                os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)
                deadline = time.monotonic() + 20
                while (answer := site.chat("m")).status_code == 503:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                # Nothing that was acknowledged is lost, and nothing charged twice.
                assert answer.headers["x-credits-remaining"] == "650"
                assert site.audit().differences == 0
                site.client.close()
            finally:
                own.stop()


LOAD = """
import asyncio, sys, httpx

async def main(url, key):
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=50)) as client:
        async def one():
            body = {"model": "m-flat", "messages": [{"role": "user", "content": "hello"}]}
            answer = await client.post(url, json=body, headers={"authorization": f"Bearer {key}"})
            return answer.status_code
        print(*await asyncio.gather(*(one() for _ in range(50))))

asyncio.run(main(*sys.argv[1:]))
"""


def test_200_requests_from_4_processes_against_a_balance_for_37(redis_url: str) -> None:
    with hub(redis_url, credits=37 * 100 + 99) as site:
        site.upstream.json(chat_answer(usage=usage(25, 150)))
        url = f"{site.url}/v1/chat/completions"
        command = [sys.executable, "-c", LOAD, url, site.key]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        statuses = [status for client in clients for status in client.communicate()[0].split()]
        assert (statuses.count("200"), statuses.count("402")) == (37, 163)
        assert len(site.upstream.seen) == 37
        assert site.wait_until_free().figures.balance == 99 * 10_000


def test_credits_held_by_running_requests_say_so(redis_url: str) -> None:
    with hub(redis_url, credits=150) as site:
        site.upstream.stream(chunk("a"), linger=0.5)
        body = {"model": "m-flat", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        with site.client.stream("POST", "/v1/chat/completions", json=body) as first:
            second = site.chat("m-flat")
            assert second.status_code == 402
            assert second.json()["error"]["type"] == "insufficient_credits"
            assert second.json()["error"]["code"] == "credits_held"
            assert (second.headers["retry-after"], second.headers["x-should-retry"]) == ("1", "true")
            assert second.headers["x-credits-remaining"] == "50"
            first.read()


def test_a_small_balance_lowers_a_maximum_that_nobody_set(redis_url: str) -> None:
    # A quarter of 10 credits pays 20 tokens of output at 120 per 1,000.
    with hub(redis_url, credits=10) as site:
        site.upstream.json(chat_answer(usage=usage(8, 5)))
        assert site.chat().status_code == 200
        assert site.upstream.seen[0].body["max_completion_tokens"] == 20
        refused = site.chat(max_tokens=1000)
        assert refused.status_code == 402
        assert len(site.upstream.seen) == 1


def test_models_are_public_and_live(site: Hub) -> None:
    listed = site.client.get("/v1/models", headers={"authorization": ""}).json()
    assert listed["object"] == "list"
    by_id = {each["id"]: each for each in listed["data"]}
    assert by_id["m-chat"]["pricing"]["credits"]["input"] == "30"
    assert by_id["m-chat"]["pricing"]["eur"]["output"] == "0.0012"
    assert by_id["m-free"]["free_tier"] is True
    assert site.client.get("/v1/models/m-img").json()["pricing"]["unit"] == "generation"
    missing = site.client.get("/v1/models/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_reading_ones_own_credits(site: Hub) -> None:
    site.upstream.json(chat_answer(usage=usage(1000, 500)))
    answer = site.chat()
    found = site.client.get("/v1/credits", headers=site.auth).json()
    assert (found["balance"], found["held"], found["available"]) == ("99910", "0", "99910")
    assert found["eur"]["available"] == "0.9991"
    assert found["currency"] == "credits"
    record = site.record(answer)
    assert record["tokens"] == {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
    assert [line["credits"] for line in record["breakdown"]] == ["30", "60"]
    assert record["estimated"] is False
    other_id, other_key = site.open_account("bob", 5)
    path = f"/v1/credits/requests/{answer.headers['x-request-id']}"
    assert site.client.get(path, headers={"authorization": f"Bearer {other_key}"}).status_code == 404
    assert site.client.get(path, headers={"authorization": ""}).status_code == 401
    assert site.client.get("/v1/credits/requests/req_x", headers=site.auth).status_code == 404


def test_two_upstreams_and_their_model_names(redis_url: str) -> None:
    first, second = Scripted(), Scripted()
    for each in (first, second):
        each.json(chat_answer(usage=usage(1, 1)))
    with serve_app(first) as first_url, serve_app(second) as second_url:
        prices = {"type": "chat", "input_per_1k": 1, "output_per_1k": 1}
        config = Config.model_validate(
            {
                "redis": {"url": redis_url},
                "credits": {"signup_grant": 0},
                "upstreams": {
                    "one": {"base_url": f"{first_url}/v1", "api_key": "key-one"},
                    "two": {
                        "base_url": f"{second_url}/v1/",
                        "api_key": "key-two",
                        "auth": "api-key",
                        "query": {"api-version": "7"},
                        "headers": {"x-extra": "yes"},
                    },
                },
                "models": {
                    "a": {**prices, "aliases": ["a-latest"]},
                    "b": {**prices, "upstream": "two", "upstream_model": "b-inside"},
                },
            }
        )
        with serve_app(create_app(config, Meter.from_config(config))) as proxy:
            site = Hub(proxy, first, redis_url, config)
            site.account, site.key = site.open_account("alice", 1000)
            for name in ("a", "a-latest", "a-2026-01-31", "b"):
                assert site.chat(name).status_code == 200
            site.client.close()
    assert [seen.body["model"] for seen in first.seen] == ["a", "a", "a-2026-01-31"]
    assert first.seen[0].headers["authorization"] == "Bearer key-one"
    [seen] = second.seen
    assert seen.body["model"] == "b-inside"
    assert (seen.headers["api-key"], seen.headers["x-extra"]) == ("key-two", "yes")
    assert "authorization" not in seen.headers
