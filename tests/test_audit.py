import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from llmhub_meter import keys
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive import audit as module
from llmhub_meter.archive.audit import Finding, audit
from llmhub_meter.errors import CreditsHeld, InsufficientCredits
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.types import Account
from llmhub_meter.wallet import Terms, Wallet

GRANT = 1_000_000


@pytest.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    async with aclosing(Scripts(connect(redis_url))) as scripts:
        yield scripts


@pytest.fixture
async def wallet(scripts: Scripts) -> Wallet:
    """A wallet whose account `alice` has one charge, one refund of it, and one hold."""
    await Accounts(scripts, signup_grant=GRANT).ensure(Account("alice"))
    wallet = Wallet(scripts)
    charged = keys.new_request_id("alice")
    await wallet.reserve(charged, "alice", Terms("m", fixed=100))
    await wallet.settle(charged, "alice", 70, {})
    await wallet.credit("alice", 30, "refund", id="refund:1", request=charged, charge=70)
    await wallet.reserve(keys.new_request_id("alice"), "alice", Terms("m", fixed=500))
    return wallet


NUMBER = keys.partition("alice")


async def test_nothing_is_clean(scripts: Scripts) -> None:
    assert (await audit(scripts)) == module.Report(0, 0, 0, [])


async def test_a_live_account_is_clean(scripts: Scripts, wallet: Wallet) -> None:
    # account, grant, charge, refund; a living hold has none
    assert (await audit(scripts)) == module.Report(1, 4, 0, [])


async def test_the_ledger_is_read_in_pages(
    scripts: Scripts, wallet: Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in (1, 2, 3, 4, 5):
        monkeypatch.setattr(module, "PAGE", page)
        assert (await audit(scripts)) == module.Report(1, 4, 0, [])


@pytest.mark.parametrize(
    ("field", "difference", "what"),
    [("balance", 1, "balance"), ("promo", -1, "promo"), ("seq", 1, "seq"), ("held", 7, "held")],
)
async def test_a_wallet_that_was_changed_beside_the_scripts(
    scripts: Scripts, wallet: Wallet, field: str, difference: int, what: str
) -> None:
    before = int(await scripts.command("HGET", keys.wallet("alice"), field))
    await scripts.command("HINCRBY", keys.wallet("alice"), field, difference)
    report = await audit(scripts)
    assert Finding("alice", what, before, before + difference) in report.findings
    assert report.differences == len(report.findings) == 1


async def test_held_below_zero(scripts: Scripts, wallet: Wallet) -> None:
    await scripts.command("HSET", keys.wallet("alice"), "held", -5)
    report = await audit(scripts)
    assert Finding("alice", "held", "0 or more", -5) in report.findings


async def test_promo_above_the_balance(scripts: Scripts, wallet: Wallet) -> None:
    await scripts.command("HINCRBY", keys.wallet("alice"), "promo", 1_000)
    report = await audit(scripts)
    assert Finding("alice", "promo", f"0 to {GRANT - 40}", GRANT - 70 + 1_000) in report.findings


async def test_an_entry_that_was_removed(scripts: Scripts, wallet: Wallet) -> None:
    ledger = keys.ledger(NUMBER)
    entries = await scripts.command("XRANGE", ledger, "-", "+")
    await scripts.command("XDEL", ledger, entries[2][0])
    report = await audit(scripts)
    whats = {finding.what.split()[0] for finding in report.findings}
    assert {"partition", "seq", "balance"} <= whats
    assert Finding("alice", "seq of entry refund:1", 3, 4) in report.findings


async def test_a_last_entry_that_was_removed(scripts: Scripts, wallet: Wallet) -> None:
    ledger = keys.ledger(NUMBER)
    ((last, _),) = await scripts.command("XREVRANGE", ledger, "+", "-", "COUNT", 1)
    await scripts.command("XDEL", ledger, last)
    report = await audit(scripts)
    assert Finding("", f"partition {NUMBER}: sequence", 3, 4) in report.findings
    assert Finding("alice", "balance", GRANT - 70, GRANT - 40) in report.findings


async def test_a_request_that_was_charged_twice(scripts: Scripts, wallet: Wallet) -> None:
    request = keys.new_request_id("alice")
    await wallet.settle(request, "alice", 5, {})
    await scripts.command("DEL", keys.done(request))
    await wallet.settle(request, "alice", 5, {})
    report = await audit(scripts)
    assert report.findings == [Finding("alice", f"endings of request {request}", "one", "a further charge")]


async def test_an_expired_hold_may_be_charged_late(scripts: Scripts, wallet: Wallet) -> None:
    request = keys.new_request_id("alice")
    hold = await wallet.reserve(request, "alice", Terms("m", fixed=9))
    assert hold is not None
    for _ in range(2):
        await scripts.command("ZADD", keys.leases(NUMBER), 1, request)
        assert await wallet.sweep(NUMBER) == 1
        await wallet.extend(hold, model="m", to_total=9, least_total=9, units=0)
    await scripts.command("ZADD", keys.leases(NUMBER), 1, request)
    await wallet.sweep(NUMBER)
    assert (await wallet.settle(request, "alice", 9, {})).late
    assert (await audit(scripts)).differences == 0


async def test_a_hold_without_lease_and_a_lease_without_hold(scripts: Scripts, wallet: Wallet) -> None:
    (request,) = await scripts.command("ZRANGE", keys.leases(NUMBER), 0, -1)
    await scripts.command("ZREM", keys.leases(NUMBER), request)
    await scripts.command("ZADD", keys.leases(NUMBER), 1, "req_lost")
    report = await audit(scripts)
    assert report.findings == [
        Finding("alice", f"lease of hold {request}", "there", "missing"),
        Finding("", "hold of lease req_lost", "there", "missing"),
    ]


async def test_a_wallet_that_no_list_names(scripts: Scripts, wallet: Wallet) -> None:
    await scripts.command("SREM", keys.accounts(NUMBER), "alice")
    report = await audit(scripts)
    assert report.findings == [
        Finding("alice", f"place among the accounts of partition {NUMBER}", "listed", "missing")
    ]


async def test_a_bare_wallet_that_no_list_names(scripts: Scripts, wallet: Wallet) -> None:
    place = f"place among the accounts of partition {keys.partition('ghost')}"
    await scripts.command("HSET", keys.wallet("ghost"), "balance", 5)
    await scripts.command("HSET", keys.wallet("other:ghost"), "balance", 0)
    report = await audit(scripts)
    assert Finding("ghost", place, "listed", "missing") in report.findings
    assert (report.differences, {finding.account for finding in report.findings}) == (
        2,
        {"ghost", "other:ghost"},
    )


async def test_a_listed_account_without_a_wallet(scripts: Scripts, wallet: Wallet) -> None:
    await scripts.command("SADD", keys.accounts(NUMBER), "ghost")
    report = await audit(scripts)
    assert report.findings == [Finding("ghost", "wallet", "there", "missing")]


async def test_refunds_beyond_the_charge(scripts: Scripts, wallet: Wallet) -> None:
    request = keys.new_request_id("alice")
    await wallet.settle(request, "alice", 10, {})
    await wallet.credit("alice", 11, "refund", id="refund:2", request=request, charge=11)
    report = await audit(scripts)
    assert report.findings == [Finding("alice", f"refunds of {request}", "at most 10", 11)]


async def test_refunds_that_the_wallet_forgot(scripts: Scripts, wallet: Wallet) -> None:
    (request,) = await scripts.command("HKEYS", keys.refunds(NUMBER))
    await scripts.command("HINCRBY", keys.refunds(NUMBER), request, -10)
    report = await audit(scripts)
    assert report.findings == [Finding("alice", f"refunds of {request}", 30, 20)]


async def test_only_so_many_findings_are_listed(
    scripts: Scripts, wallet: Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FINDINGS", 2)
    for number in range(5):
        await scripts.command("ZADD", keys.leases(NUMBER), 1, f"req_{number}")
    report = await audit(scripts)
    assert (report.differences, len(report.findings)) == (5, 2)


async def test_clean_while_requests_go_on(scripts: Scripts, wallet: Wallet) -> None:
    """Accounts are opened, holds taken, charged and expired all the while; each audit sees one moment."""
    stop = time.monotonic() + 1.5
    accounts = Accounts(scripts, signup_grant=GRANT)

    async def spend(worker: int) -> None:
        turn = 0
        while time.monotonic() < stop:
            turn += 1
            account = f"live{worker}.{turn // 10}"
            await accounts.ensure(Account(account))
            request = keys.new_request_id(account)
            try:
                await wallet.reserve(request, account, Terms("m", fixed=1_000))
            except (InsufficientCredits, CreditsHeld):
                continue
            if turn % 3:
                await wallet.settle(request, account, 900 + turn % 200, {})
            elif turn % 2:
                await wallet.release(request, account, {})

    async def look() -> list[module.Report]:
        reports = []
        while time.monotonic() < stop:
            reports.append(await audit(scripts))
        return reports

    reports, *_ = await asyncio.gather(look(), *(spend(worker) for worker in range(8)))
    assert [finding for report in reports for finding in report.findings] == []
    assert len(reports) >= 3
    assert reports[-1].entries > reports[0].entries


async def test_a_crowded_partition_is_seen_at_one_moment(scripts: Scripts, redis_url: str) -> None:
    """Reading 1,500 wallets takes Redis several turns, unless they are read in one transaction."""
    crowd = [name for i in range(500_000) if keys.partition(name := f"u{i}") == NUMBER][:1_500]
    accounts = Accounts(scripts, signup_grant=GRANT)
    for start in range(0, len(crowd), 50):
        await asyncio.gather(*(accounts.ensure(Account(name)) for name in crowd[start : start + 50]))
    started, stop = threading.Event(), threading.Event()

    async def spend() -> int:
        """From a thread of its own, so that its calls really come while the audit's are read."""
        turns = 0
        async with aclosing(Scripts(connect(redis_url))) as others:
            wallet = Wallet(others)
            while not stop.is_set():
                for name in (crowd[0], crowd[-1]):
                    request = keys.new_request_id(name)
                    await wallet.reserve(request, name, Terms("m", fixed=10))
                    await wallet.settle(request, name, 1, {})
                    turns += 1
                    started.set()
        return turns

    spending = asyncio.create_task(asyncio.to_thread(asyncio.run, spend()))
    await asyncio.to_thread(started.wait, 10)
    reports = [await audit(scripts) for _ in range(8)]
    stop.set()
    assert await spending > 10
    assert [finding for report in reports for finding in report.findings] == []
    assert reports[-1].accounts == 1_500
    assert reports[-1].entries > reports[0].entries > 3_000
