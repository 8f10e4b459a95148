"""Idempotency keys of clients: through the running hub, and the wallet below it."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hub import DONE, Hub, chat_answer, chunk, hub, usage
from servers import serve_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmhub_meter import Account, Meter, MeterMiddleware, keys
from llmhub_meter.accounts import Accounts
from llmhub_meter.config import CreditsConfig
from llmhub_meter.errors import IdempotencyInProgress, IdempotencyMismatch, IdempotencyReplay
from llmhub_meter.money import ticks
from llmhub_meter.scripts import Scripts
from llmhub_meter.types import Figures, Idempotency
from llmhub_meter.wallet import Terms, Wallet

ALICE = "alice"
NUMBER = keys.partition(ALICE)
KEY = Idempotency("a" * 64, "b" * 64)
OTHER_BODY = Idempotency(KEY.key, "c" * 64)
DAY = 86_400


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        running.upstream.json(chat_answer(usage=usage(15, 5)))
        yield running


def send(site: Hub, key: str | bytes | None, text: str = "hello", **more: Any) -> httpx.Response:
    """A request for `m-even`, 1 credit a token, under an idempotency key."""
    body = {"model": "m-even", "messages": [{"role": "user", "content": text}], **more}
    path = body.pop("path", "/v1/chat/completions")
    secret = body.pop("secret", site.key)
    headers: list[tuple[str, str | bytes]] = [("authorization", f"Bearer {secret}")]
    if key is not None:
        headers.append(("idempotency-key", key))
    return httpx.post(f"{site.url}{path}", json=body, headers=headers, timeout=20)  # type: ignore[arg-type]


def error(answer: httpx.Response) -> tuple[int, str]:
    found = answer.json()["error"]
    assert found["type"] == "invalid_request_error"
    assert answer.headers["x-credits-used"] == "0"
    return answer.status_code, found["code"]


class Gate:
    """An upstream that answers once it is let."""

    def __init__(self, site: Hub) -> None:
        self.open = threading.Event()
        after = site.upstream.answer
        assert after is not None

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            while not self.open.is_set():
                await asyncio.sleep(0.01)
            await after(scope, receive, send)

        site.upstream.answer = answer


# through the hub


def test_of_20_at_once_one_goes_upstream(site: Hub) -> None:
    gate = Gate(site)
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(send, site, "k1") for _ in range(20)]
        while sum(call.done() for call in calls) < 19:
            threading.Event().wait(0.01)
        gate.open.set()
        answers = [call.result() for call in calls]
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 19}
    (first,) = (answer for answer in answers if answer.status_code == 200)
    for answer in answers:
        if answer is not first:
            assert error(answer) == (409, "idempotency_in_progress")
            assert answer.headers["retry-after"] == "1"
            assert first.headers["x-request-id"] in answer.json()["error"]["message"]
    assert len(site.upstream.seen) == 1
    assert "idempotency-key" not in site.upstream.seen[0].headers
    assert site.holder().figures.available == ticks(100_000 - 20)


def test_what_was_charged_is_not_run_again(site: Hub) -> None:
    first = send(site, "k1")
    assert first.headers["x-credits-used"] == "20"
    for _ in range(2):
        again = send(site, "k1")
        assert error(again) == (409, "idempotency_replay")
        assert again.headers["x-should-retry"] == "false"
        assert again.headers["x-credits-remaining"] == "99980"
        assert first.headers["x-request-id"] in again.json()["error"]["message"]
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(site.upstream.seen) == 1
    # Without a key, and with another one, each is a request of its own.
    assert [send(site, key).status_code for key in (None, None, "k2")] == [200] * 3
    assert site.holder().figures.available == ticks(100_000 - 4 * 20)


def test_another_body_or_path_is_no_retry(site: Hub) -> None:
    assert send(site, "k1").status_code == 200
    assert error(send(site, "k1", "other")) == (422, "idempotency_mismatch")
    assert error(send(site, "k1", path="/v1/responses", input="x")) == (422, "idempotency_mismatch")
    gate = Gate(site)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, site, "k2")
        while len(site.upstream.seen) < 2:
            threading.Event().wait(0.01)
        assert error(send(site, "k2", "other")) == (422, "idempotency_mismatch")
        gate.open.set()
        assert running.result().status_code == 200
    assert len(site.upstream.seen) == 2


def test_a_failure_frees_the_key_for_any_body(site: Hub) -> None:
    site.upstream.json({"error": {"message": "down"}}, 500)
    assert [send(site, "k1").status_code for _ in range(2)] == [500, 500]
    site.upstream.json(chat_answer(usage=usage(15, 5)))
    assert send(site, "k1", "other").status_code == 200
    assert error(send(site, "k1", "other")) == (409, "idempotency_replay")
    assert error(send(site, "k1")) == (422, "idempotency_mismatch")
    assert site.holder().figures.available == ticks(100_000 - 20)


def test_a_refusal_takes_no_key(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        site.upstream.json(chat_answer(usage=usage(15, 5)))
        assert send(site, "k1").status_code == 402
        site.adjust(1000)
        assert send(site, "k1").status_code == 200


def test_a_free_model_frees_the_key(site: Hub) -> None:
    assert [send(site, "k1", model="m-free").status_code for _ in range(2)] == [200, 200]
    assert len(site.upstream.seen) == 2


def test_a_key_belongs_to_its_account(site: Hub) -> None:
    _, secret = site.open_account("bob", 1000)
    assert send(site, "k1").status_code == 200
    assert send(site, "k1", secret=secret).status_code == 200
    assert error(send(site, "k1", secret=secret)) == (409, "idempotency_replay")


def test_a_stream_is_charged_once(site: Hub) -> None:
    site.upstream.stream(chunk("hi"), chunk(usage=usage(15, 5)), DONE)
    assert send(site, "k1", stream=True).status_code == 200
    assert error(send(site, "k1", stream=True)) == (409, "idempotency_replay")
    assert site.holder().figures.available == ticks(100_000 - 20)


def test_a_client_that_lost_the_answer(site: Hub) -> None:
    """It leaves while the upstream works; the answer is paid for, so its retry is told so."""
    gate = Gate(site)
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=0, timeout=0.5)
    ask: dict[str, Any] = {"model": "m-even", "messages": [{"role": "user", "content": "hello"}]}
    key = {"Idempotency-Key": "k1"}
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**ask, extra_headers=key)
    with pytest.raises(openai.ConflictError, match="still running"):
        client.chat.completions.create(**ask, extra_headers=key)
    gate.open.set()
    site.wait_until_free()
    with pytest.raises(openai.ConflictError, match="charged already"):
        client.with_options(max_retries=3).chat.completions.create(**ask, extra_headers=key)
    assert len(site.upstream.seen) == 1
    assert site.holder().figures.available == ticks(100_000 - 20)


@pytest.mark.parametrize("key", ["", "k" * 256, "kö".encode(), b"a\tb"])
def test_a_key_that_cannot_be_one(site: Hub, key: str | bytes) -> None:
    answer = send(site, key)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert not site.upstream.seen


def test_two_keys_are_none(site: Hub) -> None:
    headers = [*site.auth.items(), ("idempotency-key", "a"), ("idempotency-key", "b")]
    body = {"model": "m-even", "messages": [{"role": "user", "content": "hello"}]}
    assert httpx.post(f"{site.url}/v1/chat/completions", json=body, headers=headers).status_code == 400
    assert send(site, "k" * 255).status_code == 200


def test_in_the_middleware_with_identify(redis_url: str) -> None:
    calls: list[Request] = []

    async def answer(request: Request) -> Response:
        calls.append(request)
        return JSONResponse(chat_answer(usage=usage(15, 5)))

    meter = Meter(
        redis=redis_url,
        prices={"m-even": {"type": "chat", "input_per_1k": 1000, "output_per_1k": 1000}},
        credits=CreditsConfig.model_validate({"signup_grant": 100_000}),
    )
    app = MeterMiddleware(
        Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])]),
        meter=meter,
        identify=lambda scope: Account(dict(scope["headers"])[b"x-user"].decode()),
    )
    body = {"model": "m-even", "messages": [{"role": "user", "content": "hello"}]}
    with serve_app(app) as url, httpx.Client(base_url=url) as client:
        found = [
            client.post(
                "/v1/chat/completions", json=body, headers={"x-user": user, "idempotency-key": "k"}
            ).status_code
            for user in ("ada", "ada", "bob")
        ]
    assert found == [200, 409, 200]
    assert len(calls) == 2


# the wallet


@pytest.fixture
async def wallet(audited: Scripts) -> Wallet:
    await Accounts(audited, signup_grant=1_000).ensure(Account(ALICE))
    return Wallet(audited)


async def reserve(wallet: Wallet, idempotency: Idempotency | None = KEY) -> str:
    request = keys.new_request_id(ALICE)
    assert await wallet.reserve(request, ALICE, Terms("a model", fixed=50), idempotency)
    return request


async def run_out(scripts: Scripts, request: str) -> None:
    await scripts.command("ZADD", keys.leases(NUMBER), 0, request)


async def test_the_words_of_a_key(wallet: Wallet, audited: Scripts) -> None:
    first = await reserve(wallet)
    with pytest.raises(IdempotencyInProgress, match=first):
        await reserve(wallet)
    with pytest.raises(IdempotencyMismatch):
        await reserve(wallet, OTHER_BODY)
    # The same call once more is its own retry.
    assert await wallet.reserve(first, ALICE, Terms("a model", fixed=50), KEY)
    assert await wallet.figures(ALICE) == Figures(1_000, 50, 1_000)
    await wallet.settle(first, ALICE, 30, {}, KEY)
    with pytest.raises(IdempotencyReplay, match=first):
        await reserve(wallet)
    with pytest.raises(IdempotencyMismatch):
        await reserve(wallet, OTHER_BODY)
    assert await wallet.figures(ALICE) == Figures(970, 0, 970)


async def test_a_key_is_kept_for_a_day_after_the_charge(wallet: Wallet, audited: Scripts) -> None:
    key = keys.idempotency(ALICE, KEY.key)
    request = await reserve(wallet)
    assert DAY - 5 <= await audited.command("TTL", key) <= DAY
    await audited.command("EXPIRE", key, 100)
    await wallet.settle(request, ALICE, 30, {}, KEY)
    assert DAY - 5 <= await audited.command("TTL", key) <= DAY
    # How the request ended is forgotten long before.
    await audited.command("DEL", keys.done(request))
    with pytest.raises(IdempotencyReplay):
        await reserve(wallet)
    await audited.command("DEL", key)
    await wallet.release(await reserve(wallet), ALICE, {})


@pytest.mark.parametrize("end", ["released", "charged nothing", "expired", "overdue"])
@pytest.mark.parametrize("retry", [KEY, OTHER_BODY], ids=["same body", "other body"])
async def test_what_was_not_charged_frees_its_key(
    wallet: Wallet, audited: Scripts, end: str, retry: Idempotency
) -> None:
    first = await reserve(wallet)
    match end:
        case "released":
            await wallet.release(first, ALICE, {})
        case "charged nothing":
            await wallet.settle(first, ALICE, 0, {}, KEY)
        case "expired":
            await run_out(audited, first)
            await wallet.sweep(NUMBER)
        case "overdue":
            # More than one reserve returns ran out before it.
            for _ in range(17):
                await run_out(audited, await reserve(wallet, None))
            await audited.command("ZADD", keys.leases(NUMBER), 1, first)
    second = await reserve(wallet, retry)
    with pytest.raises(IdempotencyInProgress, match=second):
        await reserve(wallet, retry)
    await wallet.settle(second, ALICE, 10, {}, retry)


async def test_a_late_charge_marks_its_key(wallet: Wallet, audited: Scripts) -> None:
    first = await reserve(wallet)
    await run_out(audited, first)
    await wallet.sweep(NUMBER)
    await wallet.settle(first, ALICE, 30, {}, KEY)
    with pytest.raises(IdempotencyReplay, match=first):
        await reserve(wallet)


async def test_a_late_charge_leaves_the_key_of_another_request(wallet: Wallet, audited: Scripts) -> None:
    first = await reserve(wallet)
    await run_out(audited, first)
    second = await reserve(wallet)
    await wallet.settle(first, ALICE, 30, {}, KEY)
    with pytest.raises(IdempotencyInProgress, match=second):
        await reserve(wallet)
    await wallet.release(second, ALICE, {})
    await wallet.release(await reserve(wallet), ALICE, {})


async def test_without_a_key_redis_does_no_more(wallet: Wallet, audited: Scripts) -> None:
    async def commands(idempotency: Idempotency | None) -> int:
        await audited.command("CONFIG", "RESETSTAT")
        await wallet.settle(await reserve(wallet, idempotency), ALICE, 1, {}, idempotency)
        stats = await audited.command("INFO", "commandstats")
        return sum(each["calls"] for each in stats.values())

    await commands(None)
    without = await commands(None)
    assert await commands(KEY) == without + 6
    assert await audited.command("KEYS", "*:idem:*") == [keys.idempotency(ALICE, KEY.key)]
