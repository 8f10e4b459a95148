"""The public faults of other meters, by their number, each with the right charge."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import brotli
import pytest
from hub import DONE, MODELS, Hub, chat_answer, chunk, hub, usage
from servers import valkey

from llmhub_meter.money import ticks

CARD: dict[str, dict[str, Any]] = MODELS | {
    "m-pro": {
        "type": "chat",
        "input_per_1k": 300,
        "output_per_1k": 1500,
        "cached_input_per_1k": 30,
        "cache_write_per_1k": 375,
        "max_output_tokens": 64000,
    },
    "m-nocache": {"type": "chat", "input_per_1k": 30, "output_per_1k": 120},
    "m-double": {"type": "chat", "input_per_1k": 60, "output_per_1k": 120},
    "m-50": {"type": "chat", "per_request": 50},
    "m-1": {"type": "chat", "per_request": 1},
}
USED = usage(1000, 500)
THOUSAND = "hello" + " hello" * 992
"""A message of 1,000 tokens with what the chat format adds."""
HUNDRED = "hello" + " hello" * 92
WORD = chunk(" hello")
STREAM = {"model": "m-chat", "stream": True}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One hub with enough credits, for whatever is only about a charge."""
    with valkey(tmp_path_factory.mktemp("card")) as url, hub(url, credits=100_000_000, models=CARD) as site:
        yield site


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def event(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def used(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {**usage(prompt, completion), **more}


CACHED = used(2006, 300, prompt_tokens_details={"cached_tokens": 1920})
RESPONSES_USED = {"input_tokens": 1000, "output_tokens": 500}


@pytest.mark.parametrize(
    ("model", "reported", "credits"),
    [
        pytest.param("m-chat", usage(1000, 1000), "150", id="039"),
        pytest.param("m-chat", usage(10, 10), "1.5", id="041"),
        pytest.param("m-pro-2026-09-30", usage(1000, 200), "600", id="045-dash"),
        pytest.param("m-pro-20260930", usage(1000, 200), "600", id="045-eight"),
        pytest.param("m-pro-0930", usage(1000, 200), "600", id="045-four"),
        pytest.param("m-double", usage(1000, 0), "60", id="046"),
        pytest.param("m-chat", usage(100, 5), "3.6", id="056"),
        pytest.param("m-chat", CACHED, "44.34", id="079"),
        pytest.param("m-nocache", CACHED, "96.18", id="083"),
        pytest.param(
            "m-chat",
            used(64, 135, completion_tokens_details={"reasoning_tokens": 78}),
            "18.12",
            id="088",
        ),
        pytest.param("m-chat", usage(1000, 1500), "210", id="098"),
        pytest.param(
            "m-chat",
            {
                "prompt_tokens": "1000",
                "completion_tokens": 500.0,
                "cost": 0,
                "is_byok": True,
                "cost_details": {"upstream_inference_cost": 0.01},
            },
            "90",
            id="105",
        ),
        pytest.param("m-chat", usage(20, 10), "1.8", id="132"),
    ],
)
def test_a_reported_usage(card: Hub, model: str, reported: dict[str, Any], credits: str) -> None:
    text = "hi" if reported["completion_tokens"] else ""
    card.upstream.json(chat_answer(text, usage=reported, model="m-other-2026-09-30"))
    answer = card.chat(model, **({"n": 3} if reported["completion_tokens"] == 1500 else {}))
    record = card.record(answer)
    assert (answer.headers["x-credits-used"], record["credits"]) == (credits, credits)
    assert (record["estimated"], record["usage_invalid"]) == (False, False)


def plain(reported: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": reported}).encode() + b"\n\n"


NO_SPACE = b"data:" + json.dumps({"choices": [], "usage": USED}).encode() + b"\n\ndata:[DONE]\n\n"
LINES = WORD + plain(USED) + DONE
CUT_EURO = (
    b'\xef\xbb\xbfdata: {"choices":[],"x":"\xe2\x82\xac","usage":' + json.dumps(USED).encode() + b"}\n\n"
)
OTHER_LINES = b": PROCESSING\n\n:\n\ndata: : keepalive\n\ndata:\n\nevent: ping\n\nretry: 3000\n\n"
GROQ = {"id": "req_1", "usage": {**USED, "queue_time": 0.01}}
FILTERED = chunk(prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])


@pytest.mark.parametrize(
    ("pieces", "credits"),
    [
        pytest.param([WORD, plain(USED)], "90", id="074"),
        pytest.param([WORD, chunk(x_groq=GROQ), DONE], "90", id="091"),
        pytest.param([WORD, chunk(x_groq=GROQ, usage=USED), DONE], "90", id="091-both"),
        pytest.param([chunk("a", usage=usage(6179, n)) for n in range(1, 223)], "212.01", id="092"),
        pytest.param([chunk("a", usage=None), chunk(usage=USED), DONE], "90", id="094"),
        pytest.param([WORD, chunk("a", usage=USED), chunk("b", usage=None), WORD, DONE], "90", id="096"),
        pytest.param([FILTERED, WORD, chunk(usage=USED), FILTERED, DONE], "90", id="097"),
        pytest.param([NO_SPACE], "90", id="120"),
        pytest.param([LINES.replace(b"\n", b"\r\n")], "90", id="121"),
        pytest.param(
            [part for line in LINES.split(b"\n")[:-1] for part in (line + b"\r", b"\n")],
            "90",
            id="121-cut",
        ),
        pytest.param([LINES.replace(b"\n", b"\r")], "90", id="122"),
        pytest.param([CUT_EURO[:26], CUT_EURO[26:27], CUT_EURO[27:], DONE], "90", id="123"),
        pytest.param(
            [
                b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1000,"completion_tokens":500}}\n\n',
                DONE,
            ],
            "90",
            id="124",
        ),
        pytest.param([OTHER_LINES, chunk(usage=USED), DONE], "90", id="125"),
        pytest.param([WORD, chunk(usage=USED), DONE], "90", id="131"),
    ],
)
def test_a_chat_stream(card: Hub, pieces: list[bytes], credits: str) -> None:
    card.upstream.stream(*pieces)
    answer = card.chat(stream=True, stream_options={"include_obfuscation": False})
    record = card.record(answer)
    assert (record["credits"], record["estimated"], record["usage_invalid"]) == (credits, False, False)
    assert f"credits used={credits} ".encode() in answer.content
    sent = card.upstream.seen[-1].body["stream_options"]
    assert sent == {"include_obfuscation": False, "include_usage": True}


@pytest.mark.parametrize(
    ("path", "asked", "answered", "credits"),
    [
        pytest.param(
            "/v1/messages",
            {"model": "m-pro", "max_tokens": 1000, "messages": said("hello")},
            {
                "content": [{"type": "text", "text": "hello"}],
                "usage": {
                    "input_tokens": 3,
                    "cache_creation_input_tokens": 12304,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 550,
                },
            },
            "5439.9",
            id="080",
        ),
        pytest.param(
            "/v1/messages/count_tokens",
            {"model": "m-chat", "messages": said("hello")},
            {"input_tokens": 2095},
            "0",
            id="106",
        ),
        pytest.param(
            "/v1/embeddings",
            {"model": "m-embed", "input": "hello"},
            {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 3000, "total_tokens": 3000}},
            "6",
            id="108",
        ),
        pytest.param(
            "/v1/embeddings",
            {"model": "m-embed", "input": "hello"},
            {"data": [{"embedding": [0.1]}], "usage": {"total_tokens": 3000}},
            "6",
            id="109",
        ),
        pytest.param(
            "/v1/embeddings",
            {"model": "m-embed", "input": "hello"},
            {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 3, "total_tokens": 0}},
            "0.006",
            id="110",
        ),
        pytest.param(
            "/v1/images/generations",
            {"model": "m-imgtok", "prompt": "x"},
            {
                "data": [{"b64_json": "QQ=="}],
                "usage": {
                    "input_tokens": 150,
                    "input_tokens_details": {"text_tokens": 150, "image_tokens": 0},
                    "output_tokens": 8000,
                    "total_tokens": 8150,
                },
            },
            "24075",
            id="111",
        ),
        pytest.param(
            "/v1/images/generations",
            {"model": "m-img", "prompt": "x", "n": 3, "size": "1024x1024", "quality": "hd"},
            {"data": [{"url": "a"}, {"url": "b"}]},
            "16000",
            id="113",
        ),
        pytest.param(
            "/v1/images/generations",
            {"model": "m-img", "prompt": "x"},
            {"data": [{"url": "a"}]},
            "4000",
            id="113-default",
        ),
        pytest.param(
            "/v1/images/generations",
            {"model": "m-img", "prompt": "x"},
            {"created": 1, "data": []},
            "0",
            id="114",
        ),
    ],
)
def test_another_dialect(
    card: Hub, path: str, asked: dict[str, Any], answered: dict[str, Any], credits: str
) -> None:
    card.upstream.json({"model": "m", **answered})
    answer = card.post(path, **asked)
    assert (answer.status_code, answer.headers["x-credits-used"]) == (200, credits)
    assert card.record(answer)["credits"] == credits


def responses_stream(reported: dict[str, Any], **more: Any) -> list[bytes]:
    return [
        event("response.created", response={"id": "resp_1", "usage": None}, **more),
        event("response.output_text.delta", output_index=0, content_index=0, delta="Hello", **more),
        event("response.completed", response={"id": "resp_1", "usage": reported}, **more),
    ]


def messages_stream(start: dict[str, int], end: dict[str, int]) -> list[bytes]:
    return [
        event("message_start", message={"model": "m", "usage": start}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": " hello"}),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage=end),
        event("message_stop"),
    ]


TO_RESPONSES = ("/v1/responses", {"model": "m-chat", "input": "hello"})
TO_MESSAGES = ("/v1/messages", {"model": "m-pro", "max_tokens": 1000, "messages": said("hello")})


@pytest.mark.parametrize(
    ("to", "pieces", "credits"),
    [
        pytest.param(
            TO_RESPONSES,
            responses_stream(
                {
                    "input_tokens": 30000,
                    "input_tokens_details": {"cached_tokens": 27136},
                    "output_tokens": 200,
                }
            ),
            "191.328",
            id="085",
        ),
        pytest.param(
            TO_MESSAGES,
            messages_stream(
                {"input_tokens": 3602, "output_tokens": 0},
                {"cache_read_input_tokens": 3604, "output_tokens": 878},
            ),
            "2505.72",
            id="086",
        ),
        pytest.param(
            TO_MESSAGES,
            messages_stream({"input_tokens": 20, "output_tokens": 1}, {"output_tokens": 15}),
            "28.5",
            id="087",
        ),
        pytest.param(
            TO_RESPONSES,
            [plain({}).replace(b'"choices": [], "usage": {}', b'"type": "x"')]
            + [b"data: " + each.split(b"data: ")[1] for each in responses_stream(RESPONSES_USED)],
            "90",
            id="103",
        ),
        pytest.param(TO_RESPONSES, responses_stream(RESPONSES_USED, sequence_number=7), "90", id="104"),
    ],
)
def test_a_stream_of_another_dialect(
    card: Hub, to: tuple[str, dict[str, Any]], pieces: list[bytes], credits: str
) -> None:
    card.upstream.stream(*pieces)
    answer = card.post(to[0], **to[1], stream=True)
    assert card.record(answer)["credits"] == credits
    assert answer.content.startswith(b"".join(pieces))


CALL = {"id": "c", "type": "function", "function": {"name": "hello", "arguments": " hello" * 39}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("answered", "credits", "field"),
    [
        pytest.param(chat_answer("ok", usage=usage(10, 100_000)), "0.42", "usage_invalid", id="050"),
        pytest.param(chat_answer("hello", usage=usage(0, 12)), "31.44", "estimated", id="099"),
        pytest.param(
            chat_answer(choices=[{"index": 0, "message": CALLED}], usage=usage(0, 0)),
            "34.8",
            "estimated",
            id="101",
        ),
        pytest.param(chat_answer("hello" + " hello" * 99), "42", "estimated", id="102-absent"),
        pytest.param(chat_answer("hello" + " hello" * 99, usage=None), "42", "estimated", id="102-null"),
    ],
)
def test_a_counted_answer(card: Hub, answered: dict[str, Any], credits: str, field: str) -> None:
    card.upstream.json(answered)
    maximum = {"max_tokens": 16} if field == "usage_invalid" else {}
    record = card.record(card.chat(text=THOUSAND, **maximum))
    assert record[field] is True
    assert record["credits"] == credits


ERROR = {"error": {"message": "overloaded"}}


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 502, 504])
@pytest.mark.parametrize(
    "body", [pytest.param(ERROR, id="070"), pytest.param({**ERROR, "usage": usage(1000, 0)}, id="071")]
)
def test_an_error_answer(card: Hub, status: int, body: dict[str, Any]) -> None:
    card.upstream.json(body, status)
    answer = card.chat()
    assert answer.status_code == (502 if status == 401 else status)
    assert answer.headers["x-credits-used"] == "0"
    assert card.record(answer)["state"] == "released"


FRAME = b'data: {"error":{"message":"upstream overloaded","code":502}}\n\n'


@pytest.mark.parametrize(
    ("pieces", "text", "credits"),
    [
        pytest.param([FRAME], THOUSAND, "0", id="072-first"),
        pytest.param([*[WORD] * 40, FRAME], THOUSAND, "34.8", id="072-after"),
    ],
)
def test_an_error_frame(card: Hub, pieces: list[bytes], text: str, credits: str) -> None:
    card.upstream.stream(*pieces)
    assert card.record(card.chat(text=text, stream=True))["credits"] == credits


@pytest.mark.parametrize(
    ("deltas", "text", "maximum", "credits"),
    [
        pytest.param(5, HUNDRED, 16000, "3.6", id="067"),
        pytest.param(30, THOUSAND, 1000, "33.6", id="076"),
    ],
)
def test_an_upstream_that_breaks(card: Hub, deltas: int, text: str, maximum: int, credits: str) -> None:
    card.upstream.stream(*[WORD] * deltas, cut=True)
    received = b""
    body = {**STREAM, "messages": said(text), "max_tokens": maximum}
    with pytest.raises(Exception, match="peer closed|incomplete"):
        with card.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_raw():
                received += piece
    assert DONE not in received
    card.wait_until_free()
    record = card.record(answer)
    assert (record["credits"], record["estimated"]) == (credits, True)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, br"])
def test_127_a_compressed_answer(card: Hub, coding: str) -> None:
    body = plain_body = json.dumps(chat_answer(usage=USED)).encode()
    for each in coding.split(", "):
        body = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress}[each](body)
    card.upstream.bytes(body, 200, {"content-type": "application/json", "content-encoding": coding})
    request = {"model": "m-chat", "messages": said("hello")}
    with card.client.stream("POST", "/v1/chat/completions", json=request) as answer:
        assert b"".join(answer.iter_raw()) == body != plain_body
    assert answer.headers["x-credits-used"] == "90"


def test_058_two_requests_share_the_providers_id(card: Hub) -> None:
    card.upstream.json(chat_answer(id="chatcmpl-1", usage=usage(1000, 1000)))
    before = card.holder().figures.balance
    first, second = card.chat(), card.chat()
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert before - card.holder().figures.balance == ticks(300)


def test_061_reading_a_response_is_not_billed(card: Hub) -> None:
    reported = {"input_tokens": 1000, "output_tokens": 1000}
    card.upstream.json({"id": "resp_1", "output": [], "usage": reported})
    before = card.holder().figures.balance
    assert card.post(*TO_RESPONSES[:1], **TO_RESPONSES[1]).headers["x-credits-used"] == "150"
    asked = len(card.upstream.seen)
    for method, end in (("GET", ""), ("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
        assert card.client.request(method, f"/v1/responses/resp_1{end}").status_code == 404
    assert len(card.upstream.seen) == asked
    assert before - card.holder().figures.balance == ticks(150)


def test_042_an_unknown_model_is_refused(card: Hub) -> None:
    asked = len(card.upstream.seen)
    answer = card.chat("m-new-preview")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(card.upstream.seen) == asked
