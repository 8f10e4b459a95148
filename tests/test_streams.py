"""Streams through the proxy: passed as they come, covered by their hold, settled once however they end."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hub import DONE, Hub, chunk, hub, raw_connection, usage

from llmhub_meter import exchange, sse


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        yield running


PROMPT = 8
"""Tokens of the message `hello` with what the chat format adds."""


def test_chunks_do_not_wait_for_each_other(site: Hub) -> None:
    site.upstream.stream(chunk("a"), chunk("b"), chunk(usage=usage(10, 2)), DONE, seconds=0.2)
    body = {"model": "m-chat", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    arrived = []
    with site.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for piece in answer.iter_raw():
            arrived.append((piece, time.monotonic()))
    assert arrived[0][0] == chunk("a")
    assert arrived[1][0] == chunk("b")
    assert arrived[1][1] - arrived[0][1] > 0.1


@pytest.mark.parametrize(
    "pieces",
    [
        [chunk("a"), chunk("b", usage=usage(1000, 500)), DONE],
        [chunk("a"), chunk(usage=usage(1000, 500)), DONE],
        [chunk("a", usage=usage(1000, 1)), chunk("b", usage=usage(1000, 500)), DONE],
        [chunk("a", usage=usage(1000, 500)), chunk("b", usage=None), DONE],
        [chunk("a", x_groq={"usage": usage(1000, 500)}), DONE],
        [chunk("a"), DONE, chunk(usage=usage(1000, 500))],
        [chunk("a"), chunk(usage=usage(1000, 500))],
        [chunk(prompt_filter_results=[{"prompt_index": 0}]), chunk("a"), chunk(usage=usage(1000, 500)), DONE],
        [
            chunk("a").replace(b"data: ", b"data:"),
            chunk(usage=usage(1000, 500)).replace(b"\n", b"\r\n"),
            DONE,
        ],
        [b": PROCESSING\n\n: \n\ndata: : keepalive\n\n", chunk("a"), chunk(usage=usage(1000, 500)), DONE],
        [b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1000,"completion_tokens":500}}\n\n', DONE],
        [chunk('the "usage": {"prompt_tokens": 7}'), chunk(usage=usage(1000, 500)), DONE],
    ],
    ids=[
        "last chunk",
        "usage chunk",
        "every chunk",
        "then null",
        "x_groq",
        "after DONE",
        "no DONE",
        "azure",
        "no space, CRLF",
        "comments",
        "several lines",
        "talk of usage",
    ],
)
@pytest.mark.parametrize("size", [7, 100_000])
def test_usage_is_read_wherever_it_stands(site: Hub, pieces: list[bytes], size: int) -> None:
    whole = b"".join(pieces)
    site.upstream.stream(*(whole[start : start + size] for start in range(0, len(whole), size)))
    answer = site.chat(stream=True)
    assert site.record(answer)["credits"] == "90"
    assert b": credits used=90 remaining=99910\n\n" in answer.content
    assert answer.content.count(DONE.strip()) == whole.count(DONE.strip())


def test_an_asked_for_usage_chunk_is_the_last_before_done(site: Hub) -> None:
    site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 500)), DONE)
    answer = site.chat(stream=True, stream_options={"include_usage": True})
    events = answer.content.split(b"\n\n")
    assert events[0] + b"\n\n" == chunk("a")
    assert b'"credits_used":"90","credits_remaining":"99910"}' in events[1]
    assert events[2:] == [b": credits used=90 remaining=99910", b"data: [DONE]", b""]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_last_event_without_its_blank_line(site: Hub, end: bytes, asked: bool) -> None:
    site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 500)).rstrip() + end)
    options = {"stream_options": {"include_usage": True}} if asked else {}
    events = site.chat(stream=True, **options).content.replace(b"\r", b"").split(b"\n\n")
    events = [event.strip() for event in events if event.strip()]
    assert events[-1] == b": credits used=90 remaining=99910"
    assert len(events) == (3 if asked else 2)


def test_other_stream_options_are_kept(site: Hub) -> None:
    site.upstream.stream(chunk("a", usage=usage(1, 1)), DONE)
    site.chat(stream=True, stream_options={"include_obfuscation": False, "include_usage": False})
    assert site.upstream.seen[0].body["stream_options"] == {
        "include_obfuscation": False,
        "include_usage": True,
    }


def test_done_waits_a_second_at_most(site: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "DONE_SECONDS", 0.2)
    site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 500)), DONE, linger=10)
    started = time.monotonic()
    answer = site.chat(stream=True)
    assert time.monotonic() - started < 5
    assert answer.content.endswith(b": credits used=90 remaining=99910\n\n" + DONE)
    assert site.upstream.gone.wait(2)


def test_the_comment_can_be_turned_off(redis_url: str) -> None:
    with hub(redis_url, metering={"sse_comment": False}) as site:
        site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 500)), DONE)
        assert site.chat(stream=True).content == chunk("a") + DONE


def test_without_usage_the_stream_is_counted(site: Hub) -> None:
    site.upstream.stream(*[chunk(" hello")] * 40, DONE)
    record = site.record(site.chat(stream=True))
    assert record["estimated"] is True
    assert record["tokens"] == {"prompt_tokens": PROMPT, "completion_tokens": 40, "total_tokens": PROMPT + 40}


@pytest.mark.parametrize(("deltas", "credits"), [(0, "0"), (40, "5.04")])
def test_an_error_event_inside_a_200(site: Hub, deltas: int, credits: str) -> None:
    error = b'data: {"error":{"message":"upstream overloaded","code":502}}\n\n'
    site.upstream.stream(*[chunk(" hello")] * deltas, error)
    answer = site.chat(stream=True)
    assert error in answer.content
    assert site.record(answer)["credits"] == credits
    assert site.record(answer)["state"] == ("settled" if deltas else "released")


def test_an_error_event_that_carries_usage_is_charged_that(site: Hub) -> None:
    site.upstream.stream(
        b'data: {"error":{"message":"x"},"usage":{"prompt_tokens":1000,"completion_tokens":0}}\n\n'
    )
    assert site.record(site.chat(stream=True))["credits"] == "30"


def test_a_broken_upstream_is_charged_what_it_delivered(site: Hub) -> None:
    site.upstream.stream(*[chunk(" hello")] * 30, cut=True)
    body = {"model": "m-chat", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    received = b""
    with pytest.raises(Exception, match="peer closed|incomplete"):
        with site.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_raw():
                received += piece
    # The break goes on to the client: no end that the upstream never gave.
    assert DONE not in received
    site.wait_until_free()
    assert site.record(answer)["tokens"]["completion_tokens"] == 30
    assert site.record(answer)["estimated"] is True


def test_output_far_above_the_maximum_is_not_believed(site: Hub) -> None:
    site.upstream.stream(chunk("ok"), chunk(usage=usage(10, 100_000)), DONE)
    record = site.record(site.chat(stream=True, max_tokens=16))
    assert record["credits"] == "0.42"
    assert record["usage_invalid"] is True


def test_running_out_mid_stream(redis_url: str) -> None:
    # 8 prompt tokens cost 0.24; what is left pays 100 tokens of output.
    with hub(redis_url, credits="12.24") as site:
        site.upstream.stream(*[chunk(" hello")] * 300, linger=10)
        answer = site.chat(stream=True)
        body = answer.content
        assert body.count(b"hello") == 100
        assert body.endswith(
            b'data: {"error":{"message":"Insufficient credits. Please add more credits to continue.",'
            b'"type":"insufficient_credits","code":"credits_exhausted"}}\n\n'
            b": credits used=12.24 remaining=0\n\n" + DONE
        )
        assert site.upstream.gone.wait(2)
        assert site.wait_until_free().figures.balance == 0


def test_a_big_maximum_does_not_block_a_small_balance(redis_url: str) -> None:
    with hub(redis_url, credits=100) as site:
        site.upstream.stream(chunk("a"), chunk(usage=usage(8, 1)), DONE)
        answer = site.chat(stream=True, max_tokens=16_000)
        assert answer.status_code == 200
        assert site.upstream.seen[0].body["max_tokens"] == 16_000
        assert float(answer.headers["x-credits-reserved"]) <= 100


def test_a_top_up_saves_the_stream(redis_url: str) -> None:
    with hub(redis_url, credits="12.24") as site:
        site.upstream.stream(*[chunk(" hello")] * 150, chunk(usage=usage(8, 150)), DONE, seconds=0.01)
        body = {"model": "m-chat", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        received = b""
        with site.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_raw():
                if not received:
                    site.adjust(100)
                received += piece
        assert received.count(b"hello") == 150
        assert received.endswith(DONE)
        assert site.record(answer)["credits"] == "18.24"


def test_a_long_stream_extends_its_hold(site: Hub) -> None:
    site.upstream.stream(*[chunk(" hello" * 100)] * 60, chunk(usage=usage(8, 6000)), DONE)
    record = site.record(site.chat(stream=True))
    assert record["credits"] == "720.24"


async def leave(site: Hub, body: str, after: bytes) -> str:
    """Sends a request over a bare connection and leaves when these bytes have come; gives its id."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    async with raw_connection(site.url) as (reader, writer):
        writer.write((head + body).encode())
        received = b""
        while after not in received:
            piece = await reader.read(65536)
            assert piece, received
            received += piece
    for line in received.split(b"\r\n"):
        if line.lower().startswith(b"x-request-id: "):
            return line.split(b": ")[1].decode()
    return ""


STREAM = '{"model":"m-chat","stream":true,"messages":[{"role":"user","content":"hello"}]}'


def test_a_client_that_leaves_mid_stream(site: Hub) -> None:
    site.upstream.stream(*[chunk(" hello")] * 200, seconds=0.02)
    id = asyncio.run(leave(site, STREAM, b" hello"))
    assert site.upstream.gone.wait(2), "the upstream was not cancelled"
    site.wait_until_free()
    record: dict[str, Any] = site.client.get(f"/v1/credits/requests/{id}", headers=site.auth).json()
    assert record["state"] == "settled"
    assert record["tokens"]["prompt_tokens"] == PROMPT
    assert 1 <= record["tokens"]["completion_tokens"] < 200


def test_on_disconnect_drain_charges_the_usage(redis_url: str) -> None:
    with hub(redis_url, metering={"on_disconnect": "drain"}) as site:
        site.upstream.stream(*[chunk(" hello")] * 20, chunk(usage=usage(1000, 500)), DONE, seconds=0.02)
        id = asyncio.run(leave(site, STREAM, b" hello"))
        site.wait_until_free()
        record = site.client.get(f"/v1/credits/requests/{id}", headers=site.auth).json()
        assert record["credits"] == "90"


def test_a_json_client_that_leaves_is_drained_and_charged(site: Hub) -> None:
    from hub import chat_answer

    site.upstream.json(chat_answer(usage=usage(1000, 500)))
    answer = site.upstream.answer
    assert answer is not None

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)
        await answer(scope, receive, send)

    site.upstream.answer = late

    async def give_up() -> None:
        body = STREAM.replace('"stream":true,', "")
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        async with raw_connection(site.url) as (_, writer):
            writer.write((head + body).encode())
            await writer.drain()
            await asyncio.sleep(0.15)

    asyncio.run(give_up())
    deadline = time.monotonic() + 5
    while site.holder().figures.balance == 100_000 * 10_000:
        assert time.monotonic() < deadline, "the drained answer was never charged"
        time.sleep(0.02)
    assert site.holder().figures.balance == (100_000 - 90) * 10_000


def test_a_client_that_leaves_before_the_upstream_is_reached_pays_nothing(redis_url: str) -> None:
    # An address that swallows connections: nothing is ever sent.
    with hub(redis_url, upstream_url="http://192.0.2.1:9") as site:

        async def give_up() -> None:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\n"
                f"content-length: {len(STREAM)}\r\n\r\n"
            )
            async with raw_connection(site.url) as (_, writer):
                writer.write((head + STREAM).encode())
                await writer.drain()
                await asyncio.sleep(0.2)

        asyncio.run(give_up())
        assert site.wait_until_free(2).figures.balance == 100_000 * 10_000


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", None])
def test_a_stream_that_is_called_something_else(site: Hub, kind: str | None, size: int) -> None:
    whole = chunk("a") + chunk(usage=usage(1000, 500)) + DONE

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [] if kind is None else [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(whole), size):
            body = whole[start : start + size]
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    site.upstream.answer = answer
    response = site.chat(stream=True)
    assert response.content == chunk("a") + b": credits used=90 remaining=99910\n\n" + DONE
    assert site.record(response)["credits"] == "90"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", None),
        (b"dat", None),
        (b"data:x", True),
        (b": ping", True),
        (b"\xef\xbb", None),
        (b"\xef\xbb\xbfevent: x", True),
        (b"\r\nid:1", True),
        (b"{", False),
        (b"date", False),
    ],
)
def test_how_a_stream_begins(text: bytes, found: bool | None) -> None:
    assert sse.begins_stream(text) is found
