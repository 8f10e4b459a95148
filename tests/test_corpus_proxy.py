"""Recorded answers of many providers, through the running proxy: bytes, tokens and the exact charge."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, hub
from servers import connect

from llmhub_meter.money import round_half_up, ticks

WIRE = Path(__file__).parent / "data" / "wire"
CASES = sorted(folder.name for folder in WIRE.iterdir() if folder.is_dir())
# A detail larger than its whole: charged as the plain kind.
NONSENSE = {
    "073-azure-foundry-openai-chat-string-tool-results-azure-grok-4-1-fast": "cached_input_tokens",
    "163-openrouter-openai-chat-stream-openrouter-stream-error": "reasoning_tokens",
}
# All zeros beside output is no report: counted.
ZEROS = {"216-openai-openai-responses-responses"}
# An error event after output: what was delivered is charged, though the provider bills nothing.
BROKEN = {"142-groq-openai-chat-stream-tool-use-failed-error-streaming"}
PRICES: dict[str, Any] = {
    "input_per_1k": "30.0003",
    "output_per_1k": "120.0007",
    "cached_input_per_1k": "3.0001",
    "cache_write_per_1k": "37.5009",
    "reasoning_per_1k": "141.0011",
    "audio_input_per_1k": "400.0013",
    "audio_output_per_1k": "800.0017",
}
"""Each kind at a price of its own, so that one taken for another shows."""
MODELS: dict[str, dict[str, Any]] = {
    "chat": {"type": "chat", **PRICES, "max_output_tokens": 100_000},
    "completion": {"type": "completion", **PRICES, "max_output_tokens": 100_000},
    "embedding": {"type": "embedding", "input_per_1k": PRICES["input_per_1k"]},
    "rerank": {"type": "rerank", "input_per_1k": PRICES["input_per_1k"]},
    "image": {
        "type": "image",
        "input_per_1k": PRICES["input_per_1k"],
        "output_per_1k": PRICES["output_per_1k"],
    },
    "picture": {"type": "image", "per_generation": 4000},
}
HELLO = [{"role": "user", "content": "hello"}]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "openai.chat": ("/v1/chat/completions", {"model": "chat", "messages": HELLO}),
    "openai.completions": ("/v1/completions", {"model": "completion", "prompt": "hello"}),
    "openai.responses": ("/v1/responses", {"model": "chat", "input": "hello"}),
    "openai.embeddings": ("/v1/embeddings", {"model": "embedding", "input": "hello"}),
    "openai.images": ("/v1/images/generations", {"model": "image", "prompt": "a cat"}),
    "anthropic.messages": ("/v1/messages", {"model": "chat", "messages": HELLO, "max_tokens": 100_000}),
    "rerank": ("/v1/rerank", {"model": "rerank", "query": "hello", "documents": ["a", "b"]}),
}
"""The smallest request of each dialect."""


@pytest.fixture(scope="module")
def site(valkey_server: str) -> Iterator[Hub]:
    redis = connect(valkey_server)
    redis.flushall()
    redis.close()
    with hub(valkey_server, credits=1_000_000_000, models=MODELS) as running:
        yield running


def load(name: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The meta, what is expected and the body of a case."""
    meta, expected = (json.loads((WIRE / name / f"{file}.json").read_text()) for file in ("meta", "expected"))
    return meta, expected, (WIRE / name / "response.body").read_bytes()


def serve(site: Hub, status: int, content_type: str, body: bytes, seed: str) -> None:
    """Lets the upstream answer this body, cut anywhere."""
    places = random.Random(seed)
    cuts = sorted({places.randrange(len(body) + 1) for _ in range(places.randrange(1, 40))} | {0, len(body)})
    headers = [(b"content-type", content_type.encode())]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for start, end in zip(cuts, cuts[1:], strict=False):
            await send({"type": "http.response.body", "body": body[start:end], "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    site.upstream.answer = answer


def charged(expected: dict[str, Any], model: dict[str, Any]) -> int:
    """Ticks for the expected tokens, a detail taken out of its whole."""
    prompt, completion = expected["input_tokens"], expected["output_tokens"]
    total = Fraction(0)
    for kind, price in (
        ("cached_input_tokens", "cached_input_per_1k"),
        ("cache_write_tokens", "cache_write_per_1k"),
        ("audio_input_tokens", "audio_input_per_1k"),
    ):
        total += expected[kind] * ticks(model.get(price, model["input_per_1k"]))
        prompt -= expected[kind]
    for kind, price in (
        ("reasoning_tokens", "reasoning_per_1k"),
        ("audio_output_tokens", "audio_output_per_1k"),
    ):
        total += expected[kind] * ticks(model.get(price, model.get("output_per_1k", 0)))
        completion -= expected[kind]
    total += prompt * ticks(model["input_per_1k"]) + completion * ticks(model.get("output_per_1k", 0))
    return round_half_up(total / 1000)


def check(record: dict[str, Any], expected: dict[str, Any], name: str, model: str) -> None:
    """Compares the charge as its owner reads it."""
    wanted = dict(expected)
    if name in NONSENSE:
        wanted[NONSENSE[name]] = 0
    kinds = {
        "prompt_tokens": wanted["input_tokens"],
        "completion_tokens": wanted["output_tokens"],
        "total_tokens": wanted["input_tokens"] + wanted["output_tokens"],
        "cached_tokens": wanted["cached_input_tokens"],
        "cache_write_tokens": wanted["cache_write_tokens"],
        "reasoning_tokens": wanted["reasoning_tokens"],
        "audio_prompt_tokens": wanted["audio_input_tokens"],
        "audio_completion_tokens": wanted["audio_output_tokens"],
    }
    assert {kind: record["tokens"].get(kind, 0) for kind in kinds} == kinds
    assert ticks(record["credits"]) == charged(wanted, MODELS[model])
    assert (record["estimated"], record["usage_invalid"]) == (False, name in NONSENSE)


def shown(body: bytes) -> bytes:
    """A stream without its usage-only chunk, which a client that did not ask for it never sees."""
    events = re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", body)
    return b"".join(event for event in events if not usage_only(event))


def usage_only(event: bytes) -> bool:
    line = event.strip().removeprefix(b"data:").strip()
    if not line.startswith(b"{"):
        return False
    data = json.loads(line)
    return data.get("choices") == [] and isinstance(data.get("usage"), dict)


@pytest.mark.parametrize("name", CASES)
def test_through_the_proxy(site: Hub, name: str) -> None:
    meta, expected, body = load(name)
    status, streams = meta["status"], meta["dialect"].endswith(".stream")
    path, asked = ASKED[meta["dialect"].removesuffix(".stream")]
    if expected["images"] and not expected["usage_reported"]:
        asked = {**asked, "model": "picture"}
    # Three recordings of streams say that they are JSON, or nothing.
    content_type = meta["response_headers"].get("content-type", "")
    serve(site, status, content_type, body, name)
    answer = site.post(path, **asked, **({"stream": True} if streams else {}))
    assert answer.status_code == (502 if status in (401, 403) else status)
    record = site.record(answer)
    if streams:
        used = re.escape(record["credits"]).encode()
        rest, found = re.subn(rb": credits used=%b remaining=[0-9.]+\n\n" % used, b"", answer.content)
        assert found == 1
        assert rest == (shown(body) if asked.keys() & {"messages", "prompt"} else body)
    elif status not in (401, 403):
        assert answer.content == body
        assert answer.headers["x-credits-used"] == record["credits"]
    if expected["usage_reported"] and name not in ZEROS:
        check(record, expected, name, asked["model"])
        return
    pays = expected["billable"] or name in BROKEN
    assert (ticks(record["credits"]) > 0) == pays
    assert record["state"] == ("settled" if pays else "released")
    if asked["model"] == "picture":
        assert ticks(record["credits"]) == ticks(4000 * expected["images"])
    else:
        assert record["estimated"] == pays
