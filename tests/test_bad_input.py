"""Bad requests and bad upstreams: a clear error in OpenAI's form, nothing held, nothing charged."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hub import DONE, Hub, chat_answer, chunk, hub, usage

from llmhub_meter import scripts


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        running.upstream.json(chat_answer(usage=usage(10, 10)))
        yield running


MESSAGES = '"messages":[{"role":"user","content":"hi"}]'

BAD_BODIES = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "not UTF-8": (b'{"model":"\xff"}', 400),
    "NaN": (f'{{"model":"m-chat",{MESSAGES},"temperature":NaN}}'.encode(), 400),
    "a list": (b"[]", 400),
    "deep": (b"[" * 100_000, 400),
    "deep, and twice": (
        b'{"model":"m-chat","model":"m-free","messages":' + b"[" * 900 + b"]" * 900 + b"}",
        400,
    ),
    "no model": (f"{{{MESSAGES}}}".encode(), 400),
    "model null": (f'{{"model":null,{MESSAGES}}}'.encode(), 400),
    "model a number": (f'{{"model":1,{MESSAGES}}}'.encode(), 400),
    "no messages": (b'{"model":"m-chat"}', 400),
    "unknown model": (f'{{"model":"m-new-preview",{MESSAGES}}}'.encode(), 404),
    "wrong type": (f'{{"model":"m-img",{MESSAGES}}}'.encode(), 400),
    "model twice": (f'{{"model":"m-free",{MESSAGES},"model":"m-chat"}}'.encode(), 400),
    "model twice, escaped": (f'{{"model":"m-free",{MESSAGES},"mod\\u0065l":"m-chat"}}'.encode(), 400),
    "case variant": (f'{{"model":"m-free",{MESSAGES},"Model":"m-chat"}}'.encode(), 400),
    "blank in a key": (f'{{"model":"m-free",{MESSAGES},"model ":"m-chat"}}'.encode(), 400),
    "max_tokens twice": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":1,"max_tokens":9}}'.encode(), 400),
    "negative": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":-1}}'.encode(), 400),
    "zero": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":0}}'.encode(), 400),
    "absurd": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":1000000000000}}'.encode(), 400),
    "beyond 64 bits": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":{10**40}}}'.encode(), 400),
    "a fraction": (f'{{"model":"m-chat",{MESSAGES},"max_tokens":1.5}}'.encode(), 400),
    "n zero": (f'{{"model":"m-chat",{MESSAGES},"n":0}}'.encode(), 400),
    "n true": (f'{{"model":"m-chat",{MESSAGES},"n":true}}'.encode(), 400),
    "stream a text": (f'{{"model":"m-chat",{MESSAGES},"stream":"true"}}'.encode(), 400),
    "priority": (f'{{"model":"m-chat",{MESSAGES},"service_tier":"priority"}}'.encode(), 400),
}


@pytest.mark.parametrize(("body", "status"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_in_the_documented_form(site: Hub, body: bytes, status: int) -> None:
    answer = site.client.post("/v1/chat/completions", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert answer.headers["x-credits-used"] == "0"
    assert answer.headers["x-credits-remaining"] == "100000"
    assert answer.headers["x-request-id"].startswith("req_")
    assert not site.upstream.seen


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer nonsense"},
        {"authorization": "Bearer llmhub_sk_" + "a" * 43},
        {"authorization": "Basic llmhub_sk_" + "a" * 43},
        {"authorization": "", "x-api-key": "llmhub_sk_" + "b" * 43},
    ],
)
def test_a_wrong_key(site: Hub, headers: dict[str, str]) -> None:
    body = {"model": "m-chat", "messages": []}
    answer = site.client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["x-credits-used"] == "0"
    assert not site.upstream.seen


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
def test_a_key_in_any_of_its_headers(site: Hub, name: str) -> None:
    value = f"Bearer {site.key}" if name == "authorization" else site.key
    body = {"model": "m-chat", "messages": [{"role": "user", "content": "hi"}]}
    answer = site.client.post("/v1/chat/completions", json=body, headers={"authorization": "", name: value})
    assert answer.status_code == 200
    seen = site.upstream.seen[0].headers
    assert seen["authorization"] == "Bearer upstream-secret"
    assert site.key not in str(seen)


def test_a_huge_body(redis_url: str) -> None:
    with hub(redis_url, metering={"max_body_bytes": 1000}) as site:
        answer = site.chat(text="x" * 1000)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"

        def pieces() -> Iterator[bytes]:
            yield from (b"x" * 100 for _ in range(20))

        # Without a content-length the limit holds as well.
        chunked = site.client.post("/v1/chat/completions", content=pieces())
        assert chunked.status_code == 413
        assert not site.upstream.seen


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/V1/Chat/Completions",
        "/v1/chat%252Fcompletions",
        "/v1/realtime",
        "/v1/responses/resp_1",
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/chat/completions",
        "/v1",
        "/",
    ],
)
def test_what_is_not_listed_does_not_exist(site: Hub, path: str) -> None:
    for method in ("POST", "GET", "PUT", "DELETE"):
        request = site.client.build_request(method, site.url + path)
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = site.client.send(request)
        assert answer.status_code == 404, method
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not site.upstream.seen


def test_other_methods_of_a_metered_path(site: Hub) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        assert site.client.request(method, "/v1/chat/completions").status_code == 404
    preflight = site.client.options("/v1/chat/completions")
    assert (preflight.status_code, preflight.headers["allow"]) == (204, "POST")
    assert site.client.head("/v1/models").status_code == 200


def test_an_upstream_that_hangs(redis_url: str) -> None:
    with hub(redis_url, upstream={"timeout_seconds": 0.3}) as site:
        site.upstream.stream(linger=5)

        async def silent(scope: object, receive: object, send: object) -> None:
            import asyncio

            await asyncio.sleep(1)

        site.upstream.answer = silent  # type: ignore[assignment]
        answer = site.chat()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "upstream_timeout"
        assert_free_of_charge(site, answer.headers)


@contextmanager
def raw_upstream(answer: bytes) -> Iterator[str]:
    """A server that reads a request, sends these bytes and resets the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
                    linger = b"\x01\0\0\0\0\0\0\0"
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = listener.getsockname()
        yield f"http://{host}:{port}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{",
    ],
    ids=["at once", "no HTTP", "in the head", "in the body"],
)
def test_an_upstream_that_resets(redis_url: str, answer: bytes) -> None:
    with raw_upstream(answer) as url, hub(redis_url, upstream_url=url) as site:
        refused = site.chat()
        assert refused.status_code == 502
        assert refused.json()["error"]["code"] == "upstream_error"
        assert_free_of_charge(site, refused.headers)


def test_an_upstream_that_is_not_there(redis_url: str) -> None:
    with hub(redis_url, upstream_url="http://127.0.0.1:9") as site:
        answer = site.chat()
        assert answer.status_code == 502
        assert_free_of_charge(site, answer.headers)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html><body>Welcome</body></html>", "text/html"),
        (b"<html>", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b'{"choices":', "application/json"),
    ],
)
def test_an_answer_that_is_no_json_object(site: Hub, body: bytes, content_type: str) -> None:
    site.upstream.bytes(body, 200, {"content-type": content_type})
    answer = site.chat()
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_error"
    assert_free_of_charge(site, answer.headers)


def test_invalid_utf8_in_an_answer_is_passed_on_and_charged(site: Hub) -> None:
    body = json.dumps(chat_answer("X", usage=usage(1000, 500))).encode().replace(b"X", b"\xff\xfe")
    site.upstream.bytes(body, 200, {"content-type": "application/json"})
    answer = site.chat()
    assert answer.content == body
    assert answer.headers["x-credits-used"] == "90"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"this is no event stream\n\n"],
        [b"data: {broken\n\n", b"data: \xff\xfe\n\n"],
        [b""],
        [b"\x00\x01\x02"],
    ],
)
def test_a_stream_that_can_not_be_read(site: Hub, pieces: list[bytes]) -> None:
    site.upstream.stream(*pieces)
    answer = site.chat(stream=True)
    assert answer.status_code == 200
    assert b'"code":"upstream_error"' in answer.content
    assert answer.content.endswith(DONE)
    assert site.wait_until_free().figures.balance == 100_000 * 10_000
    assert site.record(answer)["state"] == "released"


def test_broken_events_among_good_ones_are_passed_on(site: Hub) -> None:
    pieces = [chunk("a"), b"data: {broken\n\n", b"data: \xff\xfe\n\n", chunk("b"), DONE]
    site.upstream.stream(*pieces)
    answer = site.chat(stream=True)
    assert answer.content.startswith(b"".join(pieces[:4]))
    record = site.record(answer)
    assert record["estimated"] is True
    assert record["tokens"]["completion_tokens"] == 1


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
def test_the_upstreams_own_error_is_passed_on(site: Hub, status: int) -> None:
    site.upstream.json(
        {"error": {"message": "overloaded"}, "usage": usage(1000, 0)},
        status,
        {"retry-after": "7", "x-credits-used": "9", "x-credits-remaining": "1"},
    )
    answer = site.chat()
    assert answer.status_code == status
    assert answer.json()["error"] == {"message": "overloaded"}
    assert answer.headers["retry-after"] == "7"
    assert answer.headers.get_list("x-credits-used") == ["0"]
    assert_free_of_charge(site, answer.headers)


@pytest.mark.parametrize("status", [401, 403])
def test_the_operators_key_is_refused(site: Hub, status: int) -> None:
    site.upstream.json({"error": {"message": "Incorrect API key provided: upstream-secret"}}, status)
    answer = site.chat()
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_auth_failed"
    assert "upstream-secret" not in answer.text
    assert_free_of_charge(site, answer.headers)


def test_redis_is_down(redis_url: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from servers import valkey

    monkeypatch.setattr(scripts, "REDIS_TIMEOUT_SECONDS", 0.5)
    assert isinstance(tmp_path, Path)
    with hub(redis_url) as site:
        site.upstream.json(chat_answer(usage=usage(10, 10)))
        # A second proxy, whose Redis goes away under it.
        with valkey(tmp_path) as url:
            other = hub(url)
            lonely = other.__enter__()
            lonely.upstream.json(chat_answer(usage=usage(10, 10)))
            assert lonely.chat().status_code == 200
        answer = lonely.chat()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "metering_unavailable"
        assert answer.headers["retry-after"] == "1"
        assert len(lonely.upstream.seen) == 1
        assert lonely.client.get("/readyz").status_code == 503
        assert lonely.client.get("/healthz").status_code == 200
        with pytest.raises(Exception, match="unavailable|No such file|Connection"):
            other.__exit__(None, None, None)


def test_redis_has_lost_its_data(redis_url: str) -> None:
    from contextlib import closing

    from servers import connect

    with hub(redis_url) as site:
        site.upstream.json(chat_answer(usage=usage(10, 10)))
        assert site.chat().status_code == 200
        with closing(connect(redis_url)) as redis:
            saved = {key: redis.dump(key) for key in redis.scan_iter()}
            redis.flushall()
            answer = site.chat()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "metering_unavailable"
            for key, value in saved.items():
                redis.restore(key, 0, value)
        assert site.chat().status_code == 200


def assert_free_of_charge(site: Hub, headers: object) -> None:
    assert headers["x-credits-used"] == "0"  # type: ignore[index]
    assert headers["x-credits-remaining"] == "100000"  # type: ignore[index]
    figures = site.wait_until_free().figures
    assert (figures.balance, figures.held) == (100_000 * 10_000, 0)
