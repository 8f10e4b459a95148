"""What a reviewer broke once: odd JSON in requests and answers, races at the end of a stream."""

import asyncio
import functools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub import DONE, MODELS, Hub, chat_answer, chunk, hub, raw_connection, usage
from servers import connect, serve_app, valkey, wait_until_it_answers

from llmhub_meter import Account, Meter, MeterMiddleware, exchange, keys, scripts
from llmhub_meter.config import CreditsConfig
from llmhub_meter.embedded import find_binary
from llmhub_meter.errors import MeteringUnavailable
from llmhub_meter.finishing import Finisher
from llmhub_meter.types import Ending, Figures

MESSAGES = '"messages":[{"role":"user","content":"hi"}]'


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        running.upstream.json(chat_answer(usage=usage(1000, 500)))
        yield running


def test_a_body_in_utf16_can_not_say_a_key_twice(site: Hub) -> None:
    body = f'{{"model":"m-chat",{MESSAGES},"model":"m-free"}}'
    for coding in ("utf-16", "utf-16-le", "utf-32"):
        assert site.client.post("/v1/chat/completions", content=body.encode(coding)).status_code == 400
    assert not site.upstream.seen


@pytest.mark.parametrize("depth", [100, 600, 900])
@pytest.mark.parametrize("field", ["input", "prompt", "documents"])
def test_deep_nesting_is_no_failure(site: Hub, depth: int, field: str) -> None:
    nested = "[" * depth + '"x"' + "]" * depth
    path, model = {
        "input": ("/v1/embeddings", "m-embed"),
        "prompt": ("/v1/completions", "m-text"),
        "documents": ("/v1/rerank", "m-embed"),
    }[field]
    body = f'{{"model":"{model}","query":"q","{field}":{nested}}}'
    answer = site.client.post(path, content=body.encode())
    assert answer.status_code in (200, 400)


def test_a_lone_surrogate_as_the_answers_model_is_charged(site: Hub) -> None:
    site.upstream.json(chat_answer(usage=usage(1000, 500), model="m\ud800" + "x" * 1000))
    answer = site.chat()
    assert answer.status_code == 200
    assert answer.headers["x-credits-used"] == "90"
    assert site.record(answer)["answered_by"].startswith("m?xx")
    site.upstream.stream(chunk("hi", model="\ud800"), chunk(usage=usage(1000, 500), model="\ud800"), DONE)
    streamed = site.chat(stream=True)
    assert site.record(streamed)["credits"] == "90"


@pytest.mark.parametrize("name", ["m\ud800", "m\0", "m" * 201, "m\n"])
def test_an_unknown_models_name_that_can_be_none(redis_url: str, name: str) -> None:
    with hub(redis_url, metering={"unknown_models": "free"}) as site:
        site.upstream.json(chat_answer(usage=usage(1000, 500)))
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
        answer = site.client.post("/v1/chat/completions", content=json.dumps(body).encode())
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["m-new preview", "größer/中文:free", 'm\' "quoted"'])
def test_an_unknown_model_of_any_printable_name(redis_url: str, name: str) -> None:
    with hub(redis_url, metering={"unknown_models": "m-chat"}) as site:
        site.upstream.json(chat_answer(usage=usage(1000, 500)))
        answer = site.chat(name)
        assert answer.status_code == 200
        assert answer.headers["x-credits-used"] == "90"
        assert site.record(answer)["model"] == name
        assert site.upstream.seen[0].body["model"] == name


@pytest.mark.parametrize("index", [[], {}, [[1]], None, 1.5, "x", True])
def test_places_of_any_kind_in_chunks(site: Hub, index: object) -> None:
    choice = {
        "index": index,
        "delta": {"content": "hi", "tool_calls": [{"index": index, "function": {"name": "f"}}]},
    }
    pieces = [chunk(choices=[choice]), chunk(usage=usage(1000, 500)), DONE]
    site.upstream.stream(*pieces)
    answer = site.chat(stream=True)
    assert answer.content.startswith(pieces[0])
    assert site.record(answer)["credits"] == "90"
    event = {
        "type": "response.output_text.delta",
        "output_index": index,
        "content_index": index,
        "delta": "hi",
    }
    site.upstream.stream(b"data: " + json.dumps(event).encode() + b"\n\n")
    answer = site.post("/v1/responses", model="m-chat", input="hi", stream=True)
    assert site.record(answer)["tokens"]["completion_tokens"] == 1
    event = {"type": "content_block_delta", "index": index, "delta": {"text": "hi"}}
    site.upstream.stream(b"data: " + json.dumps(event).encode() + b"\n\n")
    answer = site.post("/v1/messages", model="m-chat", messages=[], max_tokens=9, stream=True)
    assert site.record(answer)["tokens"]["completion_tokens"] == 1


def test_holds_above_the_balance_are_no_failure(redis_url: str) -> None:
    with hub(redis_url, credits=200) as site:
        hold = threading.Event()

        async def slow(scope: object, receive: object, send: object) -> None:
            while not hold.is_set():
                await asyncio.sleep(0.01)
            site.upstream.json(chat_answer(usage=usage(10, 10)))
            await site.upstream.answer(scope, receive, send)  # type: ignore[misc]

        site.upstream.answer = slow
        first = threading.Thread(target=lambda: site.chat(max_tokens=1000))
        first.start()
        while not site.holder().figures.held:
            pass
        site.adjust(-150)
        assert site.holder().figures.available < 0
        for model in ("m-chat", "m-flat"):
            answer = site.chat(model)
            assert answer.status_code == 402
            assert answer.headers["x-credits-remaining"] == "0"
        hold.set()
        first.join()


def test_a_stream_with_a_declared_length(site: Hub) -> None:
    body = chunk("hi") + chunk(usage=usage(1000, 500)) + DONE
    headers = {"content-type": "text/event-stream", "content-length": str(len(body))}
    site.upstream.bytes(body, 200, headers)
    answer = site.chat(stream=True)
    assert answer.content == chunk("hi") + b": credits used=90 remaining=99910\n\n" + DONE


def test_an_upstream_that_breaks_while_its_stream_is_settled(site: Hub) -> None:
    async def answer(scope: object, receive: object, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = chunk("hi") + chunk(usage=usage(1000, 500)) + DONE
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # A second after [DONE] the relay ends the stream itself; Redis takes its time for that.
        await asyncio.sleep(1.3)
        raise ConnectionResetError("cut")

    def pause() -> None:
        with closing(connect(site.redis_url)) as redis:
            time.sleep(0.8)
            redis.client_pause(1000)

    site.upstream.answer = answer
    pausing = threading.Thread(target=pause)
    pausing.start()
    assert site.chat(stream=True).content.endswith(b": credits used=90 remaining=99910\n\n" + DONE)
    pausing.join()


def test_an_app_whose_answer_has_no_headers(redis_url: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200})
        body = json.dumps(chat_answer(usage=usage(1000, 500))).encode()
        await send({"type": "http.response.body", "body": body})

    meter = Meter(
        redis=redis_url,
        prices={"m": {"type": "chat", "input_per_1k": 10, "output_per_1k": 0}},
        credits=CreditsConfig(),
    )
    with serve_app(MeterMiddleware(app, meter=meter, identify=lambda scope: Account("alice"))) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": []})
    assert answer.status_code == 200
    assert answer.headers["x-credits-used"] == "10"


@contextmanager
def mortal_valkey(directory: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A server whose data outlive it: its url, a way to kill it and a way to start it again."""
    with valkey(directory, appendonly=True) as url:
        path = Path(url.removeprefix("unix://"))
        again: list[subprocess.Popen[bytes]] = []

        def kill() -> None:
            with closing(connect(url)) as redis:
                redis.shutdown(nosave=True, now=True, force=True)

        def start() -> None:
            where = ["--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", ""]
            data = ["--appendonly", "yes", "--maxmemory-policy", "noeviction", "--logfile", "valkey.log"]
            again.append(subprocess.Popen([find_binary(), *where, *data], stdin=subprocess.DEVNULL))
            wait_until_it_answers(path, again[-1])

        try:
            yield url, kill, start
        finally:
            for process in again:
                process.kill()
                process.wait()


@pytest.mark.parametrize("stream", [False, True])
def test_redis_dies_between_reserve_and_settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(scripts, "REDIS_TIMEOUT_SECONDS", 0.5)
    with mortal_valkey(tmp_path) as (url, kill, start), hub(url) as site:
        if stream:
            site.upstream.stream(chunk("hi"), chunk(usage=usage(1000, 500)), DONE)
        else:
            site.upstream.json(chat_answer(usage=usage(1000, 500)))
        rest = site.upstream.answer
        assert rest is not None

        async def killing(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.to_thread(kill)
            await rest(scope, receive, send)

        site.upstream.answer = killing
        answer = site.chat(stream=stream)
        assert answer.status_code == 200
        if stream:
            assert answer.content == chunk("hi") + b": credits used=90\n\n" + DONE
        else:
            assert answer.headers["x-credits-used"] == "90"
            assert "x-credits-remaining" not in answer.headers
        site.upstream.answer = rest
        refused = site.chat(stream=stream)
        assert refused.status_code == 503
        assert "x-credits-remaining" not in refused.headers
        start()
        assert site.wait_until_free().figures.balance == (100_000 - 90) * 10_000
        record = site.record(answer)
        assert (record["state"], record["credits"], record["late"]) == ("settled", "90", False)
        assert site.chat(stream=stream).status_code == 200


async def test_an_ending_that_can_not_be_does_not_stop_the_others() -> None:
    finisher = Finisher()
    ended: list[int] = []
    up = False

    async def lost() -> Ending:
        raise MeteringUnavailable()

    async def ending(number: int) -> Ending:
        if not up:
            raise MeteringUnavailable()
        ended.append(number)
        return Ending("settled", 0, Figures(0, 0))

    await finisher.finish(lost)
    for number in range(3):
        await finisher.finish(functools.partial(ending, number))
    up = True
    await finisher.drain(1)
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("odd", ['"\\ud800"', "1" + "0" * 40, "[" * 200 + "]" * 200])
def test_what_is_rewritten_may_hold_any_json(redis_url: str, odd: str) -> None:
    models = {**MODELS, "m-chat": {**MODELS["m-chat"], "aliases": ["m"], "upstream_model": "theirs"}}
    with hub(redis_url, models=models) as site:
        site.upstream.stream(chunk("hi"), chunk(usage=usage(1000, 500)), DONE)
        surrogate = f'"\\ud800":{odd},' if "ud800" in odd else ""
        body = (
            f'{{"model":"m",{MESSAGES},"stream":true,"stream_options":{{"x":{odd}}},{surrogate}"user":{odd}}}'
        )
        answer = site.client.post("/v1/chat/completions", content=body.encode())
        assert answer.status_code == 200
        expected = {**json.loads(body), "model": "theirs"}
        expected["stream_options"] = {**expected["stream_options"], "include_usage": True}
        assert site.upstream.seen[0].body == expected
        assert site.record(answer)["credits"] == "90"


def test_a_lowered_maximum_lifts_no_other(redis_url: str) -> None:
    with hub(redis_url, credits=10, reserve={"clamp": "always"}) as site:
        site.upstream.json(chat_answer(usage=usage(10, 5)))
        assert site.chat(max_tokens=20, max_completion_tokens=10_000).status_code == 200
        sent = site.upstream.seen[0].body
        assert sent["max_tokens"] == 20
        assert 16 <= sent["max_completion_tokens"] < 100


ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'


@pytest.mark.parametrize(
    ("path", "pieces"),
    [
        (
            "/v1/messages",
            [
                b'data: {"type":"message_start",'
                b'"message":{"usage":{"input_tokens":1000,"output_tokens":1}}}\n\n',
                b'data: {"type":"content_block_start","index":0,'
                b'"content_block":{"type":"text","text":""}}\n\n',
                ERROR,
            ],
        ),
        ("/v1/chat/completions", [chunk(""), ERROR, DONE]),
        ("/v1/chat/completions", [chunk("", usage=usage(1000, 0)), ERROR, DONE]),
    ],
)
def test_an_error_event_before_any_output_is_free(site: Hub, path: str, pieces: list[bytes]) -> None:
    site.upstream.stream(*pieces)
    answer = site.post(path, model="m-chat", messages=[], max_tokens=100, stream=True)
    assert ERROR in answer.content
    assert b": credits used=0 remaining=100000\n\n" in answer.content
    assert site.record(answer)["state"] == "released"


LARGE = {"data": [{"b64_json": "x" * 3000}]}


@pytest.mark.parametrize(
    ("path", "body", "answer", "credits"),
    [
        ("chat/completions", {"model": "m-chat", "messages": []}, chat_answer("x" * 3000), "0.09"),
        (
            "chat/completions",
            {"model": "m-chat", "messages": []},
            {"usage": usage(1000, 500), **chat_answer("x" * 3000)},
            "90",
        ),
        (
            "chat/completions",
            {"model": "m-chat", "messages": []},
            {**chat_answer("x" * 3000), "usage": usage(1000, 500)},
            "90",
        ),
        ("embeddings", {"model": "m-embed", "input": "x " * 1000}, LARGE, "2.002"),
        ("images/generations", {"model": "m-img", "prompt": "x", "n": 2}, LARGE, "8000"),
        (
            "images/generations",
            {"model": "m-img", "prompt": "x", "quality": "hd", "size": "1024x1024"},
            {**LARGE, "usage": {"input_tokens": 5, "output_tokens": 5}},
            "8000",
        ),
    ],
)
def test_an_answer_too_large_to_keep_is_charged(
    site: Hub, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, answer: Any, credits: str
) -> None:
    monkeypatch.setattr(exchange, "MAX_BUFFERED_BYTES", 1000)
    monkeypatch.setattr(exchange, "TAIL_BYTES", 500)
    raw = json.dumps(answer).encode()

    async def in_pieces(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(raw), 700):
            await send({"type": "http.response.body", "body": raw[start : start + 700], "more_body": True})
            await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b""})

    site.upstream.answer = in_pieces
    found = site.post(f"/v1/{path}", **body)
    assert found.content == raw
    assert site.record(found)["credits"] == credits


def test_a_broken_table_in_redis_does_not_end_the_following(site: Hub) -> None:
    with closing(connect(site.redis_url)) as redis:
        good = redis.hgetall(keys.PRICES)
        redis.hset(keys.PRICES, mapping={"table": "{", "version": "broken"})
        time.sleep(0.8)
        assert site.chat().headers["x-credits-used"] == "90"
        dearer = str(good["table"]).replace('"per_request":"100"', '"per_request":"200"')
        redis.hset(keys.PRICES, mapping={"table": dearer, "version": "next"})
        deadline = time.monotonic() + 5
        while site.chat("m-flat").headers["x-credits-used"] != "200":
            assert time.monotonic() < deadline


async def test_a_client_that_leaves_while_credits_are_reserved_pays_nothing(site: Hub) -> None:
    body = json.dumps({"model": "m-chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\n"
    await asyncio.to_thread(site.chat)
    with closing(connect(site.redis_url)) as redis:
        redis.client_pause(700)
        async with raw_connection(site.url) as (_, writer):
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)
    holder = await asyncio.to_thread(site.wait_until_free)
    assert len(site.upstream.seen) == 1
    assert holder.figures.balance == (100_000 - 90) * 10_000


def test_an_unknown_model_goes_free_to_the_first_upstream(redis_url: str) -> None:
    with hub(redis_url, credits=0, metering={"unknown_models": "free"}) as site:
        site.upstream.json(chat_answer(usage=usage(1000, 500)))
        answer = site.chat("m new")
        assert (answer.status_code, answer.headers["x-credits-used"]) == (200, "0")
        record = site.record(answer)
        assert (record["model"], record["tokens"]["total_tokens"]) == ("m new", 1500)
