"""The public faults of other meters, by their number, each with the right charge."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import brotli
import openai
import pytest
from hub import DONE, MODELS, Hub, chat_answer, chunk, hub, raw_connection, usage
from pydantic import ValidationError
from servers import connect, valkey

from llmhub_meter import keys
from llmhub_meter import scripts as redis_seam
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.config import Config
from llmhub_meter.errors import CreditsHeld, InsufficientCredits, OverCap
from llmhub_meter.money import MAX_TICKS, ticks
from llmhub_meter.pricing import PriceTable, check_change
from llmhub_meter.scripts import Scripts
from llmhub_meter.types import Account, Usage
from llmhub_meter.wallet import Terms, Wallet

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
    answer = card.chat(model, **(dict[str, Any](n=3) if reported["completion_tokens"] == 1500 else {}))
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
    maximum: dict[str, Any] = {"max_tokens": 16} if field == "usage_invalid" else {}
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


def late(site: Hub, body: dict[str, Any], seconds: float) -> None:
    """Lets the upstream answer this object after a while."""
    site.upstream.json(body)
    answer = site.upstream.answer
    assert answer is not None

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(seconds)
        await answer(scope, receive, send)

    site.upstream.answer = wait


@pytest.mark.parametrize(
    ("balance", "model", "calls", "admitted", "rest"),
    [
        pytest.param(1000, "m-chat", 50, 6, 100, id="001"),
        pytest.param(1, "m-1", 2, 1, 0, id="002"),
        pytest.param(500, "m-50", 100, 10, 0, id="004"),
    ],
)
def test_parallel_requests(
    redis_url: str, balance: int, model: str, calls: int, admitted: int, rest: int
) -> None:
    with hub(redis_url, credits=balance, models=CARD) as site, ThreadPoolExecutor(50) as pool:
        late(site, chat_answer(usage=usage(1000, 1000)), 0.7)
        answers = list(pool.map(lambda _: site.chat(model, THOUSAND, max_tokens=1000), range(calls)))
        assert [answer.status_code for answer in answers].count(200) == admitted
        assert {answer.status_code for answer in answers} == {200, 402}
        assert len(site.upstream.seen) == admitted
        assert site.wait_until_free().figures.balance == ticks(rest)


@pytest.mark.parametrize(
    ("balance", "first", "second", "charge"),
    [pytest.param(100, 92, 52, 40, id="006"), pytest.param(200, 172, 42, 180, id="013")],
)
def test_held_is_said_apart(redis_url: str, balance: int, first: int, second: int, charge: int) -> None:
    with hub(redis_url, credits=balance) as site:
        site.upstream.stream(chunk("a"), chunk(usage=usage(8, charge - 8)), DONE, seconds=0.3)
        body = {"model": "m-even", "stream": True, "messages": said("hello"), "max_tokens": first}
        with site.client.stream("POST", "/v1/chat/completions", json=body) as running:
            refused = site.chat("m-even", max_tokens=second)
            running.read()
        assert (refused.status_code, refused.json()["error"]["code"]) == (402, "credits_held")
        assert (refused.headers["retry-after"], refused.headers["x-credits-used"]) == ("1", "0")
        assert refused.headers["x-credits-remaining"] == str(balance - first - 8)
        left = balance - charge
        assert site.wait_until_free().figures.balance == ticks(left)
        site.upstream.json(chat_answer(usage=usage(8, second)))
        again = site.chat("m-even", max_tokens=second)
        assert again.status_code == (200 if left >= second + 8 else 402)


async def test_008_first_requests_of_a_new_account(scripts: Scripts) -> None:
    accounts, wallet = Accounts(scripts, signup_grant=ticks(1000)), Wallet(scripts)

    async def first() -> bool:
        await accounts.ensure(Account("new"))
        id = keys.new_request_id("new")
        try:
            await wallet.reserve(id, "new", Terms("m", fixed=ticks(100)))
        except (InsufficientCredits, CreditsHeld):
            return False
        await wallet.settle(id, "new", ticks(100), {})
        return True

    assert sum(await asyncio.gather(*(first() for _ in range(20)))) == 10
    assert (await accounts.get("new")).figures.balance == 0
    assert (await audit(scripts)).findings == []


async def test_010_one_signup_grant(scripts: Scripts) -> None:
    accounts = Accounts(scripts, signup_grant=ticks(100_000))
    await asyncio.gather(*(accounts.ensure(Account("new")) for _ in range(2)))
    for _ in range(3):
        await accounts.ensure(Account("new"))
    assert (await accounts.get("new")).figures.balance == ticks(100_000)


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf"), "much", True])
def test_011_prices_that_are_none(price: object) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate(
            {"models": {"m-x": {"type": "chat", "input_per_1k": price, "output_per_1k": price}}}
        )


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1"])
def test_014_failures_leave_no_hold(redis_url: str, url: str | None) -> None:
    with hub(redis_url, credits=3000, upstream_url=url) as site:
        site.upstream.json(ERROR, 500)
        for _ in range(10):
            answer = site.chat(text=THOUSAND, max_tokens=1000)
            assert (answer.status_code, answer.headers["x-credits-used"]) == (502 if url else 500, "0")
        assert site.wait_until_free().figures.balance == ticks(3000)


async def test_016_a_hold_whose_owner_died_returns(scripts: Scripts) -> None:
    await Accounts(scripts, signup_grant=ticks(1000)).ensure(Account("alice"))
    dying, wallet = Wallet(scripts, lease_seconds=0.05), Wallet(scripts)
    id = keys.new_request_id("alice")
    assert await dying.reserve(id, "alice", Terms("m", fixed=ticks(400)))
    await asyncio.sleep(0.1)
    hold = await wallet.reserve(keys.new_request_id("alice"), "alice", Terms("m", fixed=ticks(1000)))
    assert hold is not None and hold.amount == ticks(1000)
    await wallet.release(hold.id, "alice", {})
    await wallet.settle(id, "alice", ticks(60), {})
    ended = await wallet.ending(id)
    assert ended is not None and ended.data["late"]
    assert (await Accounts(scripts, signup_grant=0).get("alice")).figures.balance == ticks(940)


def test_020_a_huge_maximum(redis_url: str) -> None:
    with hub(redis_url, credits=10_000, models=CARD, reserve={"clamp": "always"}) as site:
        site.upstream.json(chat_answer(usage=usage(500, 300)))
        answer = site.chat("m-pro", "hello" + " hello" * 492, max_tokens=64000)
        assert answer.headers["x-credits-used"] == "600"
        assert site.upstream.seen[0].body["max_tokens"] == 6566


def test_022_a_hold_is_not_spent(redis_url: str) -> None:
    with hub(redis_url, credits=1000) as site:
        site.upstream.json(chat_answer(usage=usage(1000, 50)))
        assert site.chat().headers["x-credits-used"] == "36"
        site.upstream.stream(chunk("a"), chunk(usage=usage(8, 2)), DONE, seconds=0.2)
        body = {"model": "m-even", "stream": True, "messages": said("hello"), "max_tokens": 492}
        with site.client.stream("POST", "/v1/chat/completions", json=body) as running:
            figures = site.client.get("/v1/credits").json()
            running.read()
        assert (figures["balance"], figures["held"], figures["available"]) == ("964", "500", "464")


@pytest.mark.parametrize("balance", [0, -40])
def test_023_a_free_model_at_any_balance(redis_url: str, balance: int) -> None:
    with hub(redis_url, credits=balance) as site:
        site.upstream.json(chat_answer(usage=usage(900, 4000)))
        answer = site.chat("m-free")
        assert (answer.status_code, answer.headers["x-credits-used"]) == (200, "0")
        assert answer.headers["x-credits-remaining"] == "0"
        assert site.wait_until_free().figures.balance == ticks(balance)


def test_025_047_an_empty_balance_is_not_retried(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=2)
        tries: list[str] = []
        client._client.event_hooks["request"].append(lambda request: tries.append(request.method))
        with client, pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(model="m-chat", messages=[{"role": "user", "content": "hello"}])
        assert (error.value.status_code, error.value.code) == (402, "credits_exhausted")
        assert tries == ["POST"]
        assert not site.upstream.seen


def priced(**prices: Any) -> PriceTable:
    model = {"type": "chat", "input_per_1k": 30, "output_per_1k": 120, **prices}
    return PriceTable.from_config(Config.model_validate({"models": {"m-chat": model}}).models)


@pytest.mark.parametrize("price", ["3000000", "0.03"])
def test_039_040_a_wrong_unit_is_found(price: str) -> None:
    (fault,) = check_change(priced(), priced(input_per_1k=price))
    assert "m-chat" in fault and "credits per 1,000 tokens" in fault


def test_048_the_price_of_the_admission(redis_url: str) -> None:
    with hub(redis_url) as site, closing(connect(redis_url)) as redis:
        assert site.client.get("/readyz").status_code == 200
        table = str(redis.hget(keys.PRICES, "table"))
        dearer = table.replace('"input_per_1k":"30"', '"input_per_1k":"60"', 1)
        assert dearer != table
        site.upstream.stream(chunk("a"), chunk(usage=usage(1000, 1000)), DONE, seconds=0.4)
        body = {**STREAM, "messages": said("hello")}
        with site.client.stream("POST", "/v1/chat/completions", json=body) as running:
            redis.hset(keys.PRICES, mapping={"table": dearer, "version": "next"})
            running.read()
        assert site.record(running)["credits"] == "150"
        site.upstream.json(chat_answer(usage=usage(1000, 1000)))
        assert site.chat().headers["x-credits-used"] == "180"


def test_052_no_drift() -> None:
    model = priced().models["m-chat"]
    assert sum(model.charge(Usage(prompt_tokens=1)).amount for _ in range(10_000)) == ticks(300)


def test_053_plain_numbers(redis_url: str) -> None:
    with hub(redis_url, credits="172.0001") as site:
        site.upstream.json(chat_answer(usage=usage(1, 1)))
        assert site.chat("m-free").headers["x-credits-remaining"] == "172.0001"


def test_054_a_charge_above_the_balance(redis_url: str) -> None:
    with hub(redis_url, credits=100) as site:
        site.upstream.json(chat_answer(usage=usage(129, 1)))
        answer = site.chat("m-even", max_tokens=92)
        assert (answer.headers["x-credits-used"], answer.headers["x-credits-remaining"]) == ("130", "0")
        assert site.wait_until_free().figures.balance == ticks(-30)
        assert site.chat("m-even").status_code == 402


async def test_057_a_repeated_settle(scripts: Scripts) -> None:
    await Accounts(scripts, signup_grant=ticks(1000)).ensure(Account("alice"))
    wallet, id = Wallet(scripts), keys.new_request_id("alice")
    assert await wallet.reserve(id, "alice", Terms("m", fixed=ticks(50)))
    await asyncio.gather(*(wallet.settle(id, "alice", ticks(36), {}) for _ in range(5)))
    assert (await Accounts(scripts, signup_grant=0).get("alice")).figures.balance == ticks(964)
    assert (await audit(scripts)).findings == []


async def leave(site: Hub, text: str, words: int) -> str:
    """Leaves a stream when this many words have come; gives the id of its request."""
    body = json.dumps({**STREAM, "messages": said(text)})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\n"
    async with raw_connection(site.url) as (reader, writer):
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        received = b""
        while received.count(b" hello") < words:
            piece = await reader.read(65536)
            assert piece, received
            received += piece
    (id,) = (line for line in received.split(b"\r\n") if line.lower().startswith(b"x-request-id: "))
    return id.split(b": ")[1].decode()


def read(site: Hub, id: str) -> dict[str, Any]:
    found: dict[str, Any] = site.client.get(f"/v1/credits/requests/{id}").raise_for_status().json()
    return found


def test_065_069_a_client_that_left_is_drained(redis_url: str) -> None:
    with hub(redis_url, metering={"on_disconnect": "drain"}) as site:
        site.upstream.stream(*[WORD] * 20, chunk(usage=USED), DONE, seconds=0.02)
        id = asyncio.run(leave(site, "hello", 8))
        site.wait_until_free()
        assert read(site, id)["credits"] == "90"


def test_077_a_client_that_left_cancels_the_upstream(redis_url: str) -> None:
    with hub(redis_url) as site:
        site.upstream.stream(*[WORD] * 100, linger=10)
        id = asyncio.run(leave(site, THOUSAND, 100))
        assert site.upstream.gone.wait(1)
        site.wait_until_free()
        record = read(site, id)
        assert (record["credits"], record["estimated"]) == ("42", True)


def test_115_an_image_is_no_text(redis_url: str) -> None:
    with hub(redis_url, credits=200) as site:
        site.upstream.json(chat_answer(usage=usage(1400, 50)))
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 440_000}}
        answer = site.post(model="m-chat", messages=[{"role": "user", "content": [image]}])
        assert (answer.status_code, answer.headers["x-credits-used"]) == (200, "48")


@pytest.mark.parametrize("balance", [0, 5000])
def test_119_no_websocket_is_let_through(redis_url: str, balance: int) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    with hub(redis_url, credits=balance) as site:
        answer = site.client.get("/v1/realtime", headers={**upgrade, "sec-websocket-key": "a" * 22 + "=="})
        assert answer.status_code == 404
        assert not site.upstream.seen


def test_134_head_and_options_are_not_metered(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        head = site.client.head("/v1/models")
        assert (head.status_code, head.content) == (200, b"")
        assert site.client.options("/v1/chat/completions").status_code == 204


def test_135_hop_by_hop_headers(card: Hub) -> None:
    body = json.dumps(chat_answer(usage=USED)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"connection", b"close, x-foo"),
        (b"x-foo", b"1"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"x-credits-used", b"9"),
    ]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    card.upstream.answer = answer
    got = card.chat().headers
    assert "x-foo" not in got
    assert got.get_list("set-cookie") in (["a=1", "b=2"], [])
    assert got.get_list("x-credits-used") == ["90"]
    assert len(got.get_list("x-credits-remaining")) == 1


def test_136_the_figures_of_a_stream(redis_url: str) -> None:
    with hub(redis_url, credits=1000) as site:
        site.upstream.stream(WORD, chunk(usage=usage(1000, 375)), DONE)
        answer = site.chat(text=THOUSAND, stream=True, max_tokens=1000)
        assert (answer.headers["x-credits-remaining"], answer.headers["x-credits-reserved"]) == ("850", "150")
        assert "x-credits-used" not in answer.headers
        assert b": credits used=75 remaining=925\n\n" in answer.content


def test_137_redis_down(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_seam, "REDIS_TIMEOUT_SECONDS", 0.3)
    with hub(redis_url) as site, closing(connect(redis_url)) as redis:
        site.upstream.json(chat_answer(usage=USED))
        site.chat()
        redis.client_pause(800)
        answer = site.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "metering_unavailable")
        assert "retry-after" in answer.headers
        assert len(site.upstream.seen) == 1
        redis.ping()
        assert site.wait_until_free().figures.balance == ticks(100_000 - 90)


def test_018_a_settle_that_fails_is_sent_again(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_seam, "REDIS_TIMEOUT_SECONDS", 0.3)
    with hub(redis_url) as site, closing(connect(redis_url)) as redis:
        site.upstream.json(chat_answer(usage=USED))
        answer = site.upstream.answer
        assert answer is not None

        async def pause(scope: Any, receive: Any, send: Any) -> None:
            redis.client_pause(1200)
            await answer(scope, receive, send)

        site.upstream.answer = pause
        answered = site.chat()
        assert (answered.status_code, answered.headers["x-credits-used"]) == (200, "90")
        assert "x-credits-remaining" not in answered.headers
        redis.ping()
        assert site.wait_until_free().figures.balance == ticks(100_000 - 90)


def test_139_one_slot_for_an_account() -> None:
    number = keys.partition("u1")
    named = [keys.wallet("u1"), keys.credited("u1"), keys.holds(number), keys.leases(number)]
    named += [keys.ledger(number), keys.head(number), keys.refunds(number)]
    assert len({name[name.index("{") : name.index("}")] for name in named}) == 1


def test_140_a_flushed_script_cache(redis_url: str) -> None:
    with hub(redis_url) as site, closing(connect(redis_url)) as redis:
        site.upstream.json(chat_answer(usage=USED))
        for _ in range(2):
            assert site.chat().headers["x-credits-used"] == "90"
            redis.script_flush()
        assert site.wait_until_free().figures.balance == ticks(100_000 - 180)


async def test_141_big_numbers_stay_exact(scripts: Scripts) -> None:
    accounts, wallet = Accounts(scripts, signup_grant=0), Wallet(scripts)
    await accounts.ensure(Account("rich"))
    await wallet.credit("rich", MAX_TICKS, "top_up", id="all")
    await wallet.credit("rich", -1, "adjust", id="one")
    assert (await accounts.get("rich")).figures.balance == MAX_TICKS - 1
    with pytest.raises(OverCap):
        await wallet.credit("rich", 2, "adjust", id="two")
