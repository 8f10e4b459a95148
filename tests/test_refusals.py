"""Upstreams that refuse what the meter adds, and doors that are not open: websockets."""

from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from hub import DONE, Hub, chunk, hub, usage

REFUSAL = b'{"detail":[{"type":"extra_forbidden","loc":["body","stream_options","include_usage"]}]}'


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        yield running


def refuses_options(site: Hub, status: int) -> None:
    """The upstream takes no stream_options from now on."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        refused = "stream_options" in site.upstream.seen[-1].body
        kind = b"application/json" if refused else b"text/event-stream"
        body = REFUSAL if refused else chunk(" hello") * 100 + DONE
        start = {"type": "http.response.start", "status": status if refused else 200}
        await send({**start, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})

    site.upstream.answer = answer


@pytest.mark.parametrize("status", [400, 422])
def test_added_stream_options_are_taken_back(site: Hub, status: int) -> None:
    refuses_options(site, status)
    for calls in (2, 3):
        record = site.record(site.chat(stream=True))
        assert record["tokens"]["completion_tokens"] == 100
        assert record["estimated"] is True
        assert len(site.upstream.seen) == calls


def test_the_client_s_own_stream_options_are_the_client_s(site: Hub) -> None:
    refuses_options(site, 422)
    answer = site.chat(stream=True, stream_options={"include_usage": True})
    assert answer.status_code == 422
    assert answer.content == REFUSAL
    assert answer.headers["x-credits-used"] == "0"
    assert len(site.upstream.seen) == 1


def test_another_error_is_passed_on_at_once(site: Hub) -> None:
    site.upstream.json({"error": {"message": "too long"}}, 400)
    answer = site.chat(stream=True)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "too long"}})
    assert len(site.upstream.seen) == 1


def test_a_refusal_again_is_passed_on(site: Hub) -> None:
    site.upstream.bytes(REFUSAL, 422, {"content-type": "application/json"})
    answer = site.chat(stream=True)
    assert (answer.status_code, answer.content) == (422, REFUSAL)
    assert len(site.upstream.seen) == 2


async def test_a_websocket_is_refused(site: Hub) -> None:
    url = site.url.replace("http", "ws") + "/v1/realtime?model=m-chat"
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url, additional_headers=site.auth)
    answer = refused.value.response
    assert answer.status_code == 404
    assert b'"type":"invalid_request_error"' in (answer.body or b"")
    assert not site.upstream.seen


def test_usage_is_still_read_where_it_is_taken(site: Hub) -> None:
    site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 500)), DONE)
    assert site.record(site.chat(stream=True))["credits"] == "90"
