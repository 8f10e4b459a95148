"""Compressed bodies: read from a decoded copy within a limit, passed on as they came."""

import gzip
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import httpx
import pytest
from hub import DONE, Hub, chat_answer, chunk, hub, usage
from hypothesis import given
from hypothesis import strategies as st

from llmhub_meter.codings import Decoder, TooLarge, Undecodable, decoded

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "br": brotli.compress,
    "zstd": zstd.compress,
    "zstd ": lambda data: zstd.compress(data[:9]) + zstd.compress(data[9:]),
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
    "identity": lambda data: data,
}
BY_CODING = pytest.mark.parametrize("coding", PACKERS)


@given(data=st.binary(max_size=5000), coding=st.sampled_from(sorted(PACKERS)), size=st.integers(1, 5000))
def test_any_cut_gives_the_same(data: bytes, coding: str, size: int) -> None:
    packed = PACKERS[coding](data)
    decoder = Decoder(coding.encode(), 10_000)
    pieces = [decoder.feed(packed[start : start + size]) for start in range(0, len(packed), size)]
    assert b"".join(pieces) == data


@given(data=st.binary(max_size=200), coding=st.sampled_from(sorted(PACKERS)))
def test_junk_is_refused_or_read(data: bytes, coding: str) -> None:
    try:
        decoded(data, coding.encode(), 10_000)
    except Undecodable:
        pass


@pytest.mark.parametrize("coding", sorted(PACKERS.keys() - {"identity"}))
def test_the_limit_holds(coding: str) -> None:
    packed = PACKERS[coding](b"a" * 5_000_000)
    assert decoded(packed, coding.encode(), 5_000_000) == b"a" * 5_000_000
    with pytest.raises(TooLarge):
        decoded(packed, coding.encode(), 4_999_999)


@pytest.mark.parametrize("coding", [b"lzma", b"gzip,gzip,gzip,gzip"])
def test_unknown_codings(coding: bytes) -> None:
    with pytest.raises(Undecodable):
        decoded(b"x", coding, 100)


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url, metering={"max_body_bytes": 100_000}) as running:
        yield running


def raw_post(site: Hub, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
    """The answer and its bytes as they came over the wire."""
    with site.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        return answer, b"".join(answer.iter_raw())


BODY = {"model": "m-chat", "messages": [{"role": "user", "content": "hello"}]}


@BY_CODING
def test_a_json_answer(site: Hub, coding: str) -> None:
    plain = httpx.Response(200, json=chat_answer(usage=usage(1000, 500))).content
    packed = PACKERS[coding](plain)
    headers = {"content-type": "application/json", "content-encoding": coding.strip()}
    site.upstream.bytes(packed, 200, headers)
    answer, got = raw_post(site, BODY)
    assert got == packed
    assert answer.headers["x-credits-used"] == "90"


@BY_CODING
def test_a_stream(site: Hub, coding: str) -> None:
    plain = chunk("a") + chunk("b") + chunk(usage=usage(1000, 500)) + DONE
    packed = PACKERS[coding](plain)
    cuts = sorted(random.Random(coding).sample(range(1, len(packed)), 5))
    stream = [packed[start:end] for start, end in zip([0, *cuts], [*cuts, len(packed)], strict=True)]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", coding.strip().encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in stream:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    site.upstream.answer = answer
    response, got = raw_post(site, {**BODY, "stream": True})
    if coding != "identity":
        assert got == packed
    assert site.record(response)["credits"] == "90"


def test_a_stream_that_is_not_in_its_coding(site: Hub) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": chunk("a"), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    site.upstream.answer = answer
    response, got = raw_post(site, {**BODY, "stream": True})
    assert got == b""
    assert site.record(response)["state"] == "released"


@BY_CODING
def test_a_request_body(site: Hub, coding: str) -> None:
    site.upstream.json(chat_answer(usage=usage(1000, 500)))
    plain = httpx.Request("POST", "http://x", json=BODY).read()
    answer = site.client.post(
        "/v1/chat/completions",
        content=PACKERS[coding](plain),
        headers={"content-encoding": coding.strip(), "content-type": "application/json"},
    )
    assert answer.headers["x-credits-used"] == "90"
    assert site.upstream.seen[0].raw == plain
    assert "content-encoding" not in site.upstream.seen[0].headers


@pytest.mark.parametrize(
    ("content", "coding", "status"),
    [
        (b"junk", "gzip", 400),
        (b"{}", "lzma", 400),
        (gzip.compress(b" " * 200_000), "gzip", 413),
    ],
)
def test_a_request_body_that_can_not_be_read(site: Hub, content: bytes, coding: str, status: int) -> None:
    headers = {"content-encoding": coding}
    answer = site.client.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-credits-remaining"] == "100000"
    assert not site.upstream.seen
