import asyncio
import multiprocessing
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest

from llmhub_meter import keys
from llmhub_meter.accounts import Accounts
from llmhub_meter.errors import (
    AccountRestricted,
    CreditsHeld,
    IdConflict,
    InsufficientCredits,
    InvalidRequest,
    MeteringUnavailable,
    OverCap,
    UnknownAccount,
    WalletError,
)
from llmhub_meter.money import MAX_TICKS, TICKS_PER_CREDIT
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.types import Account, Figures, Hold
from llmhub_meter.wallet import CreditCode, Terms, Wallet

CREDIT = TICKS_PER_CREDIT
ALICE = "alice"
NUMBER = keys.partition(ALICE)
NEIGHBOUR = next(name for i in range(10_000) if keys.partition(name := f"bob{i}") == NUMBER)
"""Another account of the same partition."""


@pytest.fixture
def wallet(audited: Scripts) -> Wallet:
    return Wallet(audited)


async def open_account(
    scripts: Scripts, balance: int = 0, *, account: str = ALICE, grant: int = 0, status: str = "active"
) -> None:
    accounts = Accounts(scripts, signup_grant=grant)
    await accounts.ensure(Account(account))
    if balance:
        code: CreditCode = "top_up" if balance > 0 else "adjust"
        await Wallet(scripts).credit(account, balance, code, id=f"opening:{account}")
    if status != "active":
        await accounts.set(account, {"status": status})


async def take(wallet: Wallet, amount: int, *, account: str = ALICE) -> Hold:
    hold = await wallet.reserve(keys.new_request_id(account), account, Terms("m", fixed=amount))
    assert hold is not None
    return hold


async def run_out(scripts: Scripts, *holds: Hold) -> None:
    """Their leases ended long ago, the first one first."""
    for score, hold in enumerate(holds):
        await scripts.command("ZADD", keys.leases(keys.partition_of(hold.id)), score, hold.id)


async def entries(scripts: Scripts, number: int = NUMBER) -> list[dict[str, str]]:
    return [dict(fields) for _, fields in await scripts.command("XRANGE", keys.ledger(number), "-", "+")]


async def codes(scripts: Scripts) -> list[str]:
    return [fields["code"] for fields in await entries(scripts)]


async def lease_left(scripts: Scripts, hold: Hold) -> float:
    score = await scripts.command("ZSCORE", keys.leases(NUMBER), hold.id)
    return float(score) / 1000 - time.time()


# reserve


async def test_a_hold_is_set_aside(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 300)
    assert (hold.amount, hold.figures) == (300, Figures(1_000, 300))
    assert hold.figures.available == hold.figures.remaining == 700
    assert 598 < await lease_left(audited, hold) <= 600.5


@pytest.mark.parametrize(
    ("balance", "terms", "granted", "amount"),
    [
        (1_000 * CREDIT, {"fixed": 30 * CREDIT, "rate": 120 * CREDIT, "want": 1000}, 1000, 150 * CREDIT),
        # The cost of output is rounded up: 0.001, 560.001 and 999.999 ticks.
        (1_000, {"rate": 1, "want": 1}, 1, 1),
        (1_000, {"rate": 560_001, "want": 1}, 1, 561),
        (1_000, {"rate": 333_333, "want": 3}, 3, 1_000),
        # What is affordable is rounded down: 3 units would cost 1,000.
        (999, {"rate": 333_333, "want": 3}, 2, 667),
        (999, {"rate": 1_000, "want": 2_000}, 999, 999),
        (100, {"fixed": 90, "rate": 1_000, "want": 50, "least": 10}, 10, 100),
        (100, {"fixed": 90, "rate": 300, "want": 50, "least": 1}, 33, 100),
        # A share of what is available, never less than the fewest, never more than what was wanted.
        (100_000, {"rate": 1_000, "want": 50_000, "least": 16, "share": 250}, 25_000, 25_000),
        (100_000, {"rate": 1_000, "want": 20_000, "least": 16, "share": 250}, 20_000, 20_000),
        (40, {"rate": 1_000, "want": 50_000, "least": 16, "share": 250}, 16, 16),
        (100, {"fixed": 80, "rate": 1_000, "want": 50_000, "least": 16, "share": 250}, 20, 100),
        (100, {"fixed": 10, "rate": 1_000, "want": 50_000, "least": 16, "share": 0}, 16, 26),
        # A maximum of 64,000 on a balance of 10,000 credits: what the rest pays for.
        (10_000 * CREDIT, {"fixed": 150 * CREDIT, "rate": 1_500 * CREDIT, "want": 64_000, "least": 16},
         6_566, 9_999 * CREDIT),
        (500, {"fixed": 500}, 0, 500),
        (500, {"want": 70}, 70, 0),
    ],
)  # fmt: skip
async def test_what_a_hold_covers(
    wallet: Wallet, audited: Scripts, balance: int, terms: dict[str, int], granted: int, amount: int
) -> None:
    await open_account(audited, balance)
    hold = await wallet.reserve(keys.new_request_id(ALICE), ALICE, Terms("m", **terms))
    assert hold is not None
    assert (hold.granted, hold.amount) == (granted, amount)
    assert hold.figures == Figures(balance, amount)


@pytest.mark.parametrize(
    "terms",
    [
        {"fixed": 101},
        {"fixed": 90, "rate": 1_000, "want": 50, "least": 11},
        {"fixed": 90, "rate": 300, "want": 50, "least": 34},
        {"rate": 100_001, "want": 1, "least": 1, "fixed": 0, "share": 1},
        {"fixed": MAX_TICKS},
    ],
)
async def test_what_the_balance_cannot_cover(wallet: Wallet, audited: Scripts, terms: dict[str, int]) -> None:
    await open_account(audited, 100)
    with pytest.raises(InsufficientCredits) as refused:
        await wallet.reserve(keys.new_request_id(ALICE), ALICE, Terms("m", **terms))
    assert type(refused.value) is InsufficientCredits
    assert refused.value.remaining == 100
    assert await wallet.figures(ALICE) == Figures(100, 0)


@pytest.mark.parametrize("balance", [0, -1])
@pytest.mark.parametrize("fixed", [0, 1])
async def test_nothing_is_left_at_zero(wallet: Wallet, audited: Scripts, balance: int, fixed: int) -> None:
    await open_account(audited, balance)
    with pytest.raises(InsufficientCredits) as refused:
        await take(wallet, fixed)
    assert type(refused.value) is InsufficientCredits
    assert refused.value.remaining == 0


async def test_held_is_not_exhausted(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 200)
    running = await take(wallet, 180)
    with pytest.raises(CreditsHeld) as held:
        await take(wallet, 50)
    assert held.value.remaining == 20
    with pytest.raises(InsufficientCredits) as refused:
        await take(wallet, 201)
    assert type(refused.value) is InsufficientCredits
    await wallet.release(running.id, ALICE, {})
    assert (await take(wallet, 50)).figures == Figures(200, 50)


async def test_an_exact_input_is_never_counted_again(wallet: Wallet, audited: Scripts) -> None:
    """Also where holds stand above the balance, so that less than nothing is available."""
    await open_account(audited, 200)
    await take(wallet, 150)
    await wallet.credit(ALICE, -100, "adjust", id="adjust:1")
    with pytest.raises(CreditsHeld) as held:
        await take(wallet, 10)
    assert held.value.remaining == 0


async def test_the_last_tick_can_be_held(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 200)
    await take(wallet, 199)
    assert (await take(wallet, 1)).figures.available == 0
    with pytest.raises(CreditsHeld):
        await take(wallet, 1)


async def test_a_rich_account_need_not_count(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    assert await wallet.reserve(request, ALICE, Terms("m", fixed=10, rich_above=1_001)) is None
    assert await wallet.figures(ALICE) == Figures(1_000, 0)
    hold = await wallet.reserve(request, ALICE, Terms("m", fixed=10, rich_above=1_000))
    assert hold is not None and hold.amount == 10


@pytest.mark.parametrize("balance", [0, -500, 7])
async def test_a_free_model_works_at_any_balance(wallet: Wallet, audited: Scripts, balance: int) -> None:
    await open_account(audited, balance)
    request = keys.new_request_id(ALICE)
    terms = Terms("m", fixed=9, rate=9_000, want=44, least=3, rich_above=99, free=True)
    hold = await wallet.reserve(request, ALICE, terms)
    assert hold is not None
    assert (hold.amount, hold.granted, hold.figures) == (0, 44, Figures(balance, 0))
    ending = await wallet.settle(request, ALICE, 0, {})
    assert (ending.state, ending.charge, ending.figures) == ("settled", 0, Figures(balance, 0))
    (charge,) = [fields for fields in await entries(audited) if fields["code"] == "charge"]
    assert (charge["amount"], charge["promo"], charge["held"], charge["late"]) == ("0", "0", "0", "0")


@pytest.mark.parametrize("free", [True, False])
async def test_a_suspended_account_is_refused(wallet: Wallet, audited: Scripts, free: bool) -> None:
    await open_account(audited, 1_000, status="suspended")
    with pytest.raises(AccountRestricted):
        await wallet.reserve(keys.new_request_id(ALICE), ALICE, Terms("m", fixed=1, free=free))
    assert await wallet.figures(ALICE) == Figures(1_000, 0)


async def test_a_running_request_ends_though_its_account_was_suspended(
    wallet: Wallet, audited: Scripts
) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await Accounts(audited, signup_grant=0).set(ALICE, {"status": "suspended"})
    assert (await wallet.settle(hold.id, ALICE, 80, {})).figures == Figures(920, 0)


async def test_an_unknown_account_is_refused(wallet: Wallet, audited: Scripts) -> None:
    with pytest.raises(UnknownAccount, match="'alice'"):
        await take(wallet, 1)
    assert await wallet.figures(ALICE) is None


async def test_the_same_reserve_twice_holds_once(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    first = await wallet.reserve(request, ALICE, Terms("m", rate=1_000, want=300))
    again = await wallet.reserve(request, ALICE, Terms("m", rate=1_000, want=999))
    assert first == again
    assert await wallet.figures(ALICE) == Figures(1_000, 300)


@pytest.mark.parametrize("end", ["settle", "release", "expire"])
async def test_a_request_that_ended_is_not_reserved_again(wallet: Wallet, audited: Scripts, end: str) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 300)
    match end:
        case "settle":
            await wallet.settle(hold.id, ALICE, 0, {})
        case "release":
            await wallet.release(hold.id, ALICE, {})
        case "expire":
            await run_out(audited, hold)
            assert await wallet.sweep(NUMBER) == 1
    with pytest.raises(InvalidRequest):
        await wallet.reserve(hold.id, ALICE, Terms("m", fixed=300))
    assert await wallet.figures(ALICE) == Figures(1_000, 0)


async def test_reserve_returns_what_has_expired(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100)
    dead = await take(wallet, 100)
    await run_out(audited, dead)
    assert (await take(wallet, 100)).figures == Figures(100, 100)
    (expired,) = [fields for fields in await entries(audited) if fields["code"] == "expire"]
    assert (expired["id"], expired["account"], expired["held"]) == (dead.id, ALICE, "100")
    assert (expired["amount"], expired["balance"]) == ("0", "100")


async def test_reserve_returns_a_few_of_the_neighbours_and_all_of_its_own(
    wallet: Wallet, audited: Scripts
) -> None:
    await open_account(audited, 100)
    await open_account(audited, 100, account=NEIGHBOUR)
    others = [await take(wallet, 1, account=NEIGHBOUR) for _ in range(20)]
    own = [await take(wallet, 50) for _ in range(2)]
    await run_out(audited, *others, *own)
    await take(wallet, 100)
    assert await wallet.figures(ALICE) == Figures(100, 100)
    assert await wallet.figures(NEIGHBOUR) == Figures(100, 4)


async def test_an_account_in_no_need_leaves_its_own_to_the_sweeper(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100)
    dead = [await take(wallet, 1) for _ in range(20)]
    await run_out(audited, *dead)
    assert (await take(wallet, 1)).figures == Figures(100, 5)
    assert await wallet.overdue() == [NUMBER]
    assert [await wallet.sweep(NUMBER, limit=3) for _ in range(3)] == [3, 1, 0]
    assert await wallet.figures(ALICE) == Figures(100, 1)
    assert await wallet.overdue() == []


async def test_a_lease_without_a_hold_is_cleared_away(wallet: Wallet, audited: Scripts) -> None:
    await audited.command("ZADD", keys.leases(NUMBER), 1, keys.new_request_id(ALICE))
    assert await wallet.sweep(NUMBER) == 0
    assert await audited.command("ZCARD", keys.leases(NUMBER)) == 0


# extend


async def extend(
    wallet: Wallet, hold: Hold, total: int, least: int | None = None
) -> tuple[str, int, Figures]:
    extension = await wallet.extend(
        hold, model="m", to_total=total, least_total=total if least is None else least, units=1
    )
    return extension.status, extension.amount, extension.figures


async def test_a_hold_is_extended_to_a_total(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    assert await extend(wallet, hold, 250) == ("ok", 250, Figures(1_000, 250))
    assert await extend(wallet, hold, 250) == ("ok", 250, Figures(1_000, 250))
    assert await extend(wallet, hold, 40) == ("ok", 250, Figures(1_000, 250))
    assert await extend(wallet, hold, 1_000) == ("ok", 1_000, Figures(1_000, 1_000))


async def test_what_is_there_where_the_whole_is_not(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await take(wallet, 700)
    assert await extend(wallet, hold, 500, least=301) == ("insufficient", 100, Figures(1_000, 800))
    assert await extend(wallet, hold, 500, least=300) == ("ok", 300, Figures(1_000, 1_000))
    assert await extend(wallet, hold, 500, least=300) == ("insufficient", 300, Figures(1_000, 1_000))
    await wallet.credit(ALICE, 1_000, "top_up", id="saved")
    assert await extend(wallet, hold, 500, least=301) == ("ok", 500, Figures(2_000, 1_200))


@pytest.mark.parametrize("total", [100, 500])
async def test_extending_begins_the_lease_anew(wallet: Wallet, audited: Scripts, total: int) -> None:
    """Also where the hold stays as it is, or can't be had."""
    await open_account(audited, 200)
    hold = await take(wallet, 100)
    await audited.command("ZADD", keys.leases(NUMBER), int(time.time() * 1000) + 5_000, hold.id)
    await extend(wallet, hold, total)
    assert 598 < await lease_left(audited, hold) <= 600.5


async def test_what_has_ended_is_not_extended(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    settled, released = await take(wallet, 100), await take(wallet, 100)
    await wallet.settle(settled.id, ALICE, 60, {})
    await wallet.release(released.id, ALICE, {})
    unknown = Hold(keys.new_request_id(ALICE), ALICE, 100, Figures(0, 0))
    for hold in (settled, released, unknown):
        assert await extend(wallet, hold, 200) == ("ended", 0, Figures(940, 0))
        await wallet.renew(hold, model="m")
    assert await audited.command("HLEN", keys.holds(NUMBER)) == 0


async def test_an_expired_hold_is_taken_anew_whole(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await run_out(audited, hold)
    await wallet.sweep(NUMBER)
    assert await extend(wallet, hold, 250) == ("ok", 250, Figures(1_000, 250))
    ending = await wallet.settle(hold.id, ALICE, 200, {})
    assert (ending.state, ending.late, ending.figures) == ("settled", False, Figures(800, 0))
    assert await codes(audited) == ["account", "top_up", "expire", "charge"]


async def test_an_expired_hold_is_refused_where_others_have_the_money(
    wallet: Wallet, audited: Scripts
) -> None:
    await open_account(audited, 100)
    hold = await take(wallet, 100)
    await run_out(audited, hold)
    await take(wallet, 60)
    assert await extend(wallet, hold, 100) == ("insufficient", 0, Figures(100, 60))
    assert await extend(wallet, hold, 100, least=40) == ("ok", 40, Figures(100, 100))


async def test_extend_returns_the_accounts_expired_holds_first(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100)
    dead, hold = await take(wallet, 90), await take(wallet, 10)
    await run_out(audited, dead)
    assert await extend(wallet, hold, 100) == ("ok", 100, Figures(100, 100))
    assert (await wallet.release(dead.id, ALICE, {})).state == "expired"


async def test_a_hold_that_expires_while_it_is_extended(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100)
    hold = await take(wallet, 90)
    await run_out(audited, hold)
    assert await extend(wallet, hold, 120) == ("insufficient", 0, Figures(100, 0))
    again = await take(wallet, 90)
    await run_out(audited, again)
    assert await extend(wallet, again, 120, least=95) == ("ok", 100, Figures(100, 100))


async def test_renewing_keeps_a_hold_and_takes_an_expired_one_anew(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await extend(wallet, hold, 300)
    await run_out(audited, hold)
    await wallet.renew(hold, model="m")
    assert await wallet.held(hold.id) == (300, ALICE, "m")
    assert 598 < await lease_left(audited, hold) <= 600.5
    await run_out(audited, hold)
    await wallet.sweep(NUMBER)
    await wallet.renew(hold, model="m")
    assert await wallet.held(hold.id) == (100, ALICE, "m")
    assert await wallet.figures(ALICE) == Figures(1_000, 100)


# settle


@pytest.mark.parametrize("charge", [0, 1, 60, 100])
async def test_the_charge_is_taken_and_the_rest_returns(
    wallet: Wallet, audited: Scripts, charge: int
) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    ending = await wallet.settle(hold.id, ALICE, charge, {"model": "m"})
    assert (ending.state, ending.charge, ending.late) == ("settled", charge, False)
    assert ending.figures == Figures(1_000 - charge, 0)
    last = (await entries(audited))[-1]
    assert last["amount"] == str(-charge)
    assert (last["held"], last["late"], last["data"]) == ("100", "0", '{"model":"m"}')


async def test_a_charge_above_its_hold_is_taken_in_full(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100 * CREDIT)
    hold = await take(wallet, 100 * CREDIT)
    ending = await wallet.settle(hold.id, ALICE, 130 * CREDIT, {})
    assert (ending.charge, ending.figures) == (130 * CREDIT, Figures(-30 * CREDIT, 0))
    assert ending.figures.remaining == 0
    with pytest.raises(InsufficientCredits):
        await take(wallet, 1)
    assert await codes(audited) == ["account", "top_up", "charge"]


async def test_settling_twice_charges_once(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await wallet.settle(hold.id, ALICE, 60, {})
    again = await wallet.settle(hold.id, ALICE, 99, {})
    assert (again.state, again.charge, again.figures) == ("settled", 60, Figures(940, 0))
    assert (await wallet.release(hold.id, ALICE, {})).charge == 60
    assert await codes(audited) == ["account", "top_up", "charge"]


async def test_a_charge_after_the_release_is_not_taken(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    await wallet.release(hold.id, ALICE, {})
    ending = await wallet.settle(hold.id, ALICE, 60, {})
    assert (ending.state, ending.charge, ending.figures) == ("released", 0, Figures(1_000, 0))


async def test_a_late_settle_is_charged_though_the_money_is_spent(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100 * CREDIT)
    late = await take(wallet, 100 * CREDIT)
    await run_out(audited, late)
    quick = await take(wallet, 100 * CREDIT)
    await wallet.settle(quick.id, ALICE, 100 * CREDIT, {})
    ending = await wallet.settle(late.id, ALICE, 60 * CREDIT, {})
    assert (ending.state, ending.charge, ending.late) == ("settled", 60 * CREDIT, True)
    assert ending.figures == Figures(-60 * CREDIT, 0)
    assert (await wallet.settle(late.id, ALICE, 60 * CREDIT, {})).figures == Figures(-60 * CREDIT, 0)
    last = (await entries(audited))[-1]
    assert (last["code"], last["late"], last["held"]) == ("charge", "1", "0")
    entry = await wallet.ending(late.id)
    assert entry is not None and entry.data["late"] is True


async def test_a_settle_that_overtakes_its_reserve(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    ending = await wallet.settle(request, ALICE, 70, {})
    assert (ending.state, ending.late, ending.figures) == ("settled", True, Figures(930, 0))
    with pytest.raises(InvalidRequest):
        await wallet.reserve(request, ALICE, Terms("m", fixed=100))
    assert await wallet.figures(ALICE) == Figures(930, 0)


async def test_a_settle_of_no_account_makes_none(wallet: Wallet, audited: Scripts) -> None:
    with pytest.raises(MeteringUnavailable):
        await wallet.settle(keys.new_request_id(ALICE), ALICE, 70, {})
    assert await audited.command("KEYS", f"{{p{NUMBER}}}:*") == []
    await open_account(audited, 500)
    assert await wallet.figures(ALICE) == Figures(500, 0)


@pytest.mark.parametrize("charge", [-1, MAX_TICKS + 1, 2**63, 10**30])
async def test_a_charge_beyond_all_bounds_is_impossible(
    wallet: Wallet, audited: Scripts, charge: int
) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    with pytest.raises(ValueError, match="a charge is 0 to 9000000000000000 ticks"):
        await wallet.settle(hold.id, ALICE, charge, {})
    assert await wallet.figures(ALICE) == Figures(1_000, 100)


async def test_grants_are_spent_before_paid_credits(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000, grant=300)
    assert await wallet.figures(ALICE) == Figures(1_300, 0, 300)
    for charge, promo in ((200, 100), (250, 0), (50, 0)):
        hold = await take(wallet, charge)
        assert (await wallet.settle(hold.id, ALICE, charge, {})).figures.promo == promo
    charges = [fields for fields in await entries(audited) if fields["code"] == "charge"]
    assert [fields["promo"] for fields in charges] == ["-200", "-100", "0"]


# release


async def test_a_release_returns_the_whole_hold(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    hold = await take(wallet, 100)
    for _ in range(2):
        ending = await wallet.release(hold.id, ALICE, {"why": "upstream"})
        assert (ending.state, ending.charge, ending.figures) == ("released", 0, Figures(1_000, 0))
    last = (await entries(audited))[-1]
    assert (last["code"], last["amount"], last["held"]) == ("release", "0", "100")
    assert last["data"] == '{"why":"upstream"}'
    assert await codes(audited) == ["account", "top_up", "release"]


async def test_a_release_that_overtakes_its_reserve_leaves_a_mark(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    assert (await wallet.release(request, ALICE, {})).state == "released"
    with pytest.raises(InvalidRequest):
        await wallet.reserve(request, ALICE, Terms("m", fixed=100))
    assert await wallet.figures(ALICE) == Figures(1_000, 0)
    assert await codes(audited) == ["account", "top_up"]
    assert await wallet.ending(request) is None


async def test_a_release_after_the_end_answers_with_the_end(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    expired = await take(wallet, 100)
    await run_out(audited, expired)
    await wallet.sweep(NUMBER)
    ending = await wallet.release(expired.id, ALICE, {})
    assert (ending.state, ending.charge, ending.figures) == ("expired", 0, Figures(1_000, 0))


async def test_what_has_ended_is_remembered_for_20_minutes_after_each_end(
    wallet: Wallet, audited: Scripts
) -> None:
    await open_account(audited, 1_000)
    an_hour_ago = int(time.time() * 1000) - 3_600_000
    bucket = an_hour_ago // keys.DONE_BUCKET_MS * keys.DONE_BUCKET_MS

    def of_one_bucket(digit: str) -> str:
        return f"req_{bucket:012x}{NUMBER:02x}{digit * 18}"

    expired = await wallet.reserve(of_one_bucket("a"), ALICE, Terms("m", fixed=10))
    released = await wallet.reserve(of_one_bucket("b"), ALICE, Terms("m", fixed=10))
    assert expired is not None and released is not None
    await run_out(audited, expired)
    done = keys.done(expired.id)
    for end in (
        wallet.sweep(NUMBER),
        wallet.release(released.id, ALICE, {}),
        wallet.release(of_one_bucket("c"), ALICE, {}),
        wallet.settle(of_one_bucket("d"), ALICE, 5, {}),
    ):
        await audited.command("PEXPIRE", done, 50_000)
        await end
        assert 1_199_000 <= await audited.command("PTTL", done) <= 1_200_000
    assert await audited.command("HLEN", done) == 4


# credit


async def test_each_credit_code(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited)
    assert await wallet.credit(ALICE, 1_000, "top_up", id="topup:1") == Figures(1_000, 0, 0)
    assert await wallet.credit(ALICE, 300, "grant", id="grant:1") == Figures(1_300, 0, 300)
    assert await wallet.credit(ALICE, 200, "adjust", id="adjust:1") == Figures(1_500, 0, 300)
    assert await wallet.credit(ALICE, -700, "adjust", id="adjust:2", record={"reason": "r"}) == Figures(
        800, 0, 300
    )
    last = (await entries(audited))[-1]
    assert (last["id"], last["code"], last["amount"], last["balance"]) == (
        "adjust:2",
        "adjust",
        "-700",
        "800",
    )
    assert last["data"] == '{"reason":"r"}'
    assert await audited.command("HGET", keys.wallet(ALICE), "last_topup") == "1000"


async def test_the_same_credit_twice_is_given_once(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited)
    for _ in range(3):
        assert await wallet.credit(ALICE, 1_000, "top_up", id="topup:1") == Figures(1_000, 0)
    assert await codes(audited) == ["account", "top_up"]


async def test_a_repeated_credit_gives_the_first_balance(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited)
    assert (await wallet.credit(ALICE, 100, "adjust", id="a")).balance == 100
    assert (await wallet.credit(ALICE, 50, "adjust", id="b")).balance == 150
    assert (await wallet.credit(ALICE, 100, "adjust", id="a")).balance == 100


@pytest.mark.parametrize(("amount", "code"), [(1_001, "top_up"), (1_000, "grant"), (-1_000, "top_up")])
async def test_an_id_stands_for_one_credit(
    wallet: Wallet, audited: Scripts, amount: int, code: CreditCode
) -> None:
    await open_account(audited)
    await wallet.credit(ALICE, 1_000, "top_up", id="topup:1")
    with pytest.raises(IdConflict, match="topup:1"):
        await wallet.credit(ALICE, amount, code, id="topup:1")
    assert await wallet.figures(ALICE) == Figures(1_000, 0)


async def test_a_credit_of_no_account(wallet: Wallet, audited: Scripts) -> None:
    with pytest.raises(UnknownAccount):
        await wallet.credit(ALICE, 1_000, "top_up", id="topup:1")
    await open_account(audited)
    assert await wallet.credit(ALICE, 1_000, "top_up", id="topup:1") == Figures(1_000, 0)


@pytest.mark.parametrize(
    ("balance", "amount"),
    [(0, MAX_TICKS + 1), (0, 10**30), (1, MAX_TICKS), (MAX_TICKS, 1), (0, -MAX_TICKS - 1), (-1, -MAX_TICKS)],
)
@pytest.mark.parametrize("code", ["top_up", "grant", "adjust"])
async def test_what_would_pass_the_cap_changes_nothing(
    wallet: Wallet, audited: Scripts, balance: int, amount: int, code: CreditCode
) -> None:
    await open_account(audited, balance)
    before = await audited.command("HGETALL", keys.wallet(ALICE)), await entries(audited)
    with pytest.raises(OverCap, match="900000000000 credits"):
        await wallet.credit(ALICE, amount, code, id="big")
    assert (await audited.command("HGETALL", keys.wallet(ALICE)), await entries(audited)) == before
    # The id was not used up.
    assert await wallet.credit(ALICE, -balance, "adjust", id="big") == Figures(0, 0)


async def test_an_account_can_be_filled_to_the_cap(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1)
    assert await wallet.credit(ALICE, MAX_TICKS - 1, "top_up", id="rest") == Figures(MAX_TICKS, 0)
    hold = await take(wallet, MAX_TICKS)
    assert (await wallet.settle(hold.id, ALICE, MAX_TICKS, {})).figures == Figures(0, 0)


async def test_a_grant_pays_a_debt_first(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, -100)
    assert await wallet.credit(ALICE, 60, "grant", id="grant:1") == Figures(-40, 0, 0)
    assert await wallet.credit(ALICE, 60, "grant", id="grant:2") == Figures(20, 0, 20)


async def test_a_grant_that_is_taken_back_after_it_was_spent(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 500, grant=100)
    hold = await take(wallet, 70)
    await wallet.settle(hold.id, ALICE, 70, {})
    assert await wallet.credit(ALICE, -100, "grant", id="grant:back") == Figures(430, 0, 0)
    assert await wallet.credit(ALICE, 50, "grant", id="grant:new") == Figures(480, 0, 50)


async def test_an_adjustment_below_the_given_part_lowers_it(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 100, grant=100)
    assert await wallet.credit(ALICE, -150, "adjust", id="adjust:1") == Figures(50, 0, 50)
    assert await wallet.credit(ALICE, -100, "adjust", id="adjust:2") == Figures(-50, 0, 0)


async def test_a_top_up_that_is_taken_back_is_not_the_last_one(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited)
    await wallet.credit(ALICE, 1_000, "top_up", id="topup:1")
    await wallet.credit(ALICE, -1_000, "top_up", id="topup:1:back")
    holder = await Accounts(audited, signup_grant=0).get(ALICE)
    assert (holder.figures.balance, holder.last_topup) == (0, 1_000)


# refund


async def charged(wallet: Wallet, amount: int) -> str:
    hold = await take(wallet, amount)
    await wallet.settle(hold.id, ALICE, amount, {})
    return hold.id


async def refund(wallet: Wallet, request: str, amount: int, id: str, charge: int, gift: int = 0) -> Figures:
    return await wallet.credit(
        ALICE, amount, "refund", id=id, request=request, charge=charge, from_grants=gift
    )


async def test_a_refund_restores_the_given_part_last(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000, grant=300)
    request = await charged(wallet, 500)
    entry = await wallet.ending(request)
    assert entry is not None and (entry.amount, entry.data["promo"]) == (-500, -300)
    assert await refund(wallet, request, 150, "refund:1", 500, 300) == Figures(950, 0, 0)
    assert await refund(wallet, request, 100, "refund:2", 500, 300) == Figures(1_050, 0, 50)
    assert await refund(wallet, request, 250, "refund:3", 500, 300) == Figures(1_300, 0, 300)
    assert await wallet.refunded(request) == 500
    with pytest.raises(WalletError, match="was charged 0.05 credits"):
        await refund(wallet, request, 1, "refund:4", 500, 300)
    assert (await entries(audited))[-1]["data"] == f'{{"request":"{request}"}}'


async def test_refunds_in_parts_are_never_more_than_the_charge(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = await charged(wallet, 100)
    with pytest.raises(WalletError):
        await refund(wallet, request, 101, "refund:1", 100)
    await refund(wallet, request, 60, "refund:1", 100)
    await refund(wallet, request, 60, "refund:1", 100)
    with pytest.raises(WalletError):
        await refund(wallet, request, 41, "refund:2", 100)
    assert await wallet.figures(ALICE) == Figures(960, 0)
    assert await refund(wallet, request, 40, "refund:2", 100) == Figures(1_000, 0)
    assert await wallet.refunded(request) == 100


async def test_a_refunds_id_stands_for_one_request(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    first, second = await charged(wallet, 100), await charged(wallet, 100)
    await refund(wallet, first, 50, "refund:1", 100)
    with pytest.raises(IdConflict):
        await refund(wallet, second, 50, "refund:1", 100)
    assert (await wallet.refunded(first), await wallet.refunded(second)) == (50, 0)


@pytest.mark.parametrize("amount", [0, -1])
async def test_a_refund_takes_nothing(wallet: Wallet, audited: Scripts, amount: int) -> None:
    await open_account(audited, 1_000)
    request = await charged(wallet, 100)
    with pytest.raises(WalletError, match="more than nothing"):
        await refund(wallet, request, amount, "refund:1", 100)


async def test_parallel_refunds_give_back_no_more_than_the_charge(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = await charged(wallet, 100)
    found = await asyncio.gather(
        *(refund(wallet, request, 30, f"refund:{i}", 100) for i in range(20)), return_exceptions=True
    )
    assert Counter(type(answer) for answer in found) == {Figures: 3, WalletError: 17}
    assert await wallet.figures(ALICE) == Figures(990, 0)


# reading


async def test_endings_are_found_by_record_and_by_search(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 10_000)
    settled, released, expired, late = [await take(wallet, 100) for _ in range(4)]
    await run_out(audited, expired, late)
    await wallet.sweep(NUMBER)
    await wallet.settle(settled.id, ALICE, 60, {"model": "m"})
    await wallet.release(released.id, ALICE, {})
    await wallet.settle(late.id, ALICE, 70, {})
    unknown = keys.new_request_id(ALICE)
    requests = [settled.id, released.id, expired.id, late.id, unknown]

    async def found() -> list[Any]:
        endings = [await wallet.ending(request) for request in requests]
        return [ending and (ending.id, ending.code, ending.amount) for ending in endings]

    by_record = await found()
    assert by_record == [
        (settled.id, "charge", -60),
        (released.id, "release", 0),
        (expired.id, "expire", 0),
        (late.id, "charge", -70),
        None,
    ]
    for request in requests:
        await audited.command("DEL", keys.done(request))
    assert await found() == by_record


async def test_a_search_goes_through_long_ledgers_and_other_clocks(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 10_000)
    ahead = f"req_{int(time.time() * 1000) + 30_000:012x}{NUMBER:02x}{'0' * 18}"
    first = await take(wallet, 10)
    for batch in range(11):
        requests = [keys.new_request_id(ALICE) for _ in range(100)]
        await asyncio.gather(*(wallet.settle(request, ALICE, 1, {}) for request in requests))
        if batch == 0:
            await wallet.settle(ahead, ALICE, 3, {})
    await wallet.settle(first.id, ALICE, 2, {})
    for request in (first.id, ahead):
        await audited.command("DEL", keys.done(request))
    endings = [await wallet.ending(request) for request in (first.id, ahead)]
    assert [ending and ending.amount for ending in endings] == [-2, -3]


async def test_a_living_hold_can_be_looked_at(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    await wallet.reserve(request, ALICE, Terms("a model with blanks", fixed=70))
    assert await wallet.held(request) == (70, ALICE, "a model with blanks")
    await wallet.settle(request, ALICE, 0, {})
    assert await wallet.held(request) is None


async def test_large_amounts_are_written_digit_by_digit(wallet: Wallet, audited: Scripts) -> None:
    """Lua prints 100000000000001 as 1e+14; here every script writes such amounts."""
    big = 1_234_567_890_123_457
    await open_account(audited, 5 * big, grant=big)
    settled = await wallet.reserve(
        keys.new_request_id(ALICE), ALICE, Terms("m", fixed=big - 1, rate=1_000_000_000, want=1)
    )
    assert settled is not None and settled.amount == big + 999_999
    assert await extend(wallet, settled, 2 * big + 1) == (
        "ok",
        2 * big + 1,
        Figures(6 * big, 2 * big + 1, big),
    )
    ending = await wallet.settle(settled.id, ALICE, 2 * big - 1, {})
    assert (ending.charge, ending.figures) == (2 * big - 1, Figures(4 * big + 1, 0, 0))
    await refund(wallet, settled.id, 2 * big - 1, "refund:1", 2 * big - 1, big)
    assert await wallet.figures(ALICE) == Figures(6 * big, 0, big)
    released, expired = await take(wallet, big), await take(wallet, big)
    await wallet.release(released.id, ALICE, {})
    await run_out(audited, expired)
    await wallet.sweep(NUMBER)
    await wallet.credit(ALICE, -big, "adjust", id="adjust:1")
    kept = await take(wallet, big + 1)
    assert await wallet.held(kept.id) == (big + 1, ALICE, "m")
    written = repr(await entries(audited))
    for key in await audited.command("KEYS", "*"):
        if await audited.command("TYPE", key) == "hash":
            written += repr(await audited.command("HGETALL", key))
    assert re.search(r"\d[eE][+-]?\d\d\b", re.sub(r"(req|chg)_\w+", "", written)) is None
    assert str(2 * big - 1) in written


# many at once


async def test_100_callers_at_once_on_a_balance_for_6(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000 * CREDIT)
    found = await asyncio.gather(*(take(wallet, 150 * CREDIT) for _ in range(100)), return_exceptions=True)
    holds = [hold for hold in found if isinstance(hold, Hold)]
    assert Counter(type(answer) for answer in found) == {Hold: 6, CreditsHeld: 94}
    for hold in holds:
        await wallet.settle(hold.id, ALICE, 150 * CREDIT, {})
    assert await wallet.figures(ALICE) == Figures(100 * CREDIT, 0)


async def test_one_credit_pays_for_one_of_two_calls(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, CREDIT)
    found = await asyncio.gather(take(wallet, CREDIT), take(wallet, CREDIT), return_exceptions=True)
    assert Counter(type(answer) for answer in found) == {Hold: 1, CreditsHeld: 1}


async def test_one_id_from_50_callers_is_one_change(wallet: Wallet, audited: Scripts) -> None:
    await open_account(audited, 1_000)
    request = keys.new_request_id(ALICE)
    holds = await asyncio.gather(*(wallet.reserve(request, ALICE, Terms("m", fixed=100)) for _ in range(50)))
    assert {hold and hold.amount for hold in holds} == {100}
    endings = await asyncio.gather(*(wallet.settle(request, ALICE, 70, {}) for _ in range(50)))
    assert {(ending.state, ending.charge) for ending in endings} == {("settled", 70)}
    await asyncio.gather(*(wallet.credit(ALICE, 5, "grant", id="grant:1") for _ in range(50)))
    assert await wallet.figures(ALICE) == Figures(935, 0, 5)
    assert await codes(audited) == ["account", "top_up", "charge", "grant"]


COST = 271
PROCESSES, CALLS = 4, 50


def spend_in_a_process(redis_url: str) -> dict[str, int]:
    """Reserves and settles many times at once, when all processes have come so far."""

    async def call(wallet: Wallet) -> str:
        try:
            hold = await take(wallet, COST)
        except InsufficientCredits as error:
            return type(error).__name__
        await wallet.settle(hold.id, ALICE, COST, {})
        return "settled"

    async def run() -> dict[str, int]:
        async with aclosing(Scripts(connect(redis_url))) as scripts:
            await scripts.command("SADD", "test:ready", multiprocessing.current_process().name)
            while await scripts.command("SCARD", "test:ready") < PROCESSES:
                await asyncio.sleep(0.001)
            return Counter(await asyncio.gather(*(call(Wallet(scripts)) for _ in range(CALLS))))

    return asyncio.run(run())


async def test_four_processes_spend_no_more_than_there_is(
    wallet: Wallet, audited: Scripts, redis_url: str
) -> None:
    await open_account(audited, 37 * COST)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(
            *(loop.run_in_executor(pool, spend_in_a_process, redis_url) for _ in range(PROCESSES))
        )
    total: Counter[str] = sum((Counter(counts) for counts in found), Counter())
    assert total["settled"] == 37
    assert total["InsufficientCredits"] + total["CreditsHeld"] == PROCESSES * CALLS - 37
    assert await wallet.figures(ALICE) == Figures(0, 0)
    assert await codes(audited) == ["account", "top_up", *["charge"] * 37]
