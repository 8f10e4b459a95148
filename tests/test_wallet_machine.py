"""The wallet's scripts against a plain model: calls repeated, late, reordered, with lost replies."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from servers import connect as connect_directly

from llmhub_meter import keys
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.errors import MeterError
from llmhub_meter.money import MAX_TICKS
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.types import Account, Figures, Hold
from llmhub_meter.wallet import CreditCode, Terms, Wallet

Result = TypeVar("Result")

GRANT = 10_000
SWEPT_BY_RESERVE = 16
NOBODY = "nobody"
"""An account that is never opened."""


def accounts_of_one_partition(count: int) -> list[str]:
    number = keys.partition(NOBODY)
    found: list[str] = []
    candidate = 0
    while len(found) < count:
        if keys.partition(f"a{candidate}") == number:
            found.append(f"a{candidate}")
        candidate += 1
    return found


OPEN = accounts_of_one_partition(2)
NUMBER = keys.partition(NOBODY)


class LosesReplies(Scripts):
    """Drops the next answer after the call was made, so that the call is made once more."""

    lose = False

    async def _evaluate(self, *call: Any) -> Any:
        answer = await super()._evaluate(*call)
        if self.lose:
            self.lose = False
            raise RedisConnectionError("the reply was lost")
        return answer


@dataclass
class ModelAccount:
    balance: int = GRANT
    held: int = 0
    promo: int = GRANT
    suspended: bool = False

    @property
    def available(self) -> int:
        return self.balance - self.held


@dataclass
class ModelHold:
    account: str
    amount: int
    granted: int


@dataclass
class Model:
    """What the wallet promises, in exact integers and without Redis. Refusals are words."""

    accounts: dict[str, ModelAccount]
    holds: dict[str, ModelHold] = field(default_factory=dict)
    overdue: list[str] = field(default_factory=list)
    """Holds whose lease ran out, oldest first."""
    done: dict[str, tuple[str, int]] = field(default_factory=dict)
    credited: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    refunded: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    """Requests that were charged without a living hold."""
    gifts: dict[str, int] = field(default_factory=dict)
    """The part of a charge that was spent from grants."""

    def expire(self, requests: list[str]) -> int:
        for request in requests:
            self._drop(request)
            self.done[request] = "expired", 0
        return len(requests)

    def overdue_of(self, account: str) -> list[str]:
        return [request for request in self.overdue if self.holds[request].account == account]

    def sweep(self, limit: int) -> int:
        return self.expire(self.overdue[:limit])

    def reserve(self, request: str, account: str, terms: Terms) -> object:
        if request in self.holds:
            return self.holds[request].amount, self.holds[request].granted
        if request in self.done:
            return "InvalidRequest"
        self.expire(self.overdue[:SWEPT_BY_RESERVE])
        if account not in self.accounts:
            return "UnknownAccount"
        wallet = self.accounts[account]
        if wallet.suspended:
            return "AccountRestricted"
        amount, granted = 0, terms.want
        if not terms.free:
            smallest = terms.fixed + output_cost(terms, terms.least)
            if wallet.available < smallest:
                self.expire(self.overdue_of(account))
            free = wallet.available
            if wallet.balance <= 0:
                return "InsufficientCredits"
            if 0 < terms.rich_above and free < terms.rich_above:
                return None
            if terms.rate:
                affordable = (free - terms.fixed) * 1000 // terms.rate
                portion = free * terms.share // terms.rate
                granted = min(terms.want, max(terms.least, portion), affordable)
            amount = terms.fixed + output_cost(terms, max(granted, terms.least))
            if wallet.balance < amount:
                return "InsufficientCredits"
            if free < amount:
                return "CreditsHeld"
        self.holds[request] = ModelHold(account, amount, granted)
        wallet.held += amount
        return amount, granted

    def extend(self, request: str, to_total: int, least_total: int, units: int) -> tuple[str, int]:
        hold = self.holds.get(request)
        if hold is None and self.done.get(request, ("unknown", 0))[0] != "expired":
            return "ended", 0
        account = keys_account(request)
        wallet = self.accounts[account]
        current = hold.amount if hold else 0
        if hold and to_total <= current:
            self._renew(request)
            return "ok", current
        if wallet.available < to_total - current:
            self.expire(self.overdue_of(account))
            hold = self.holds.get(request)
            current = hold.amount if hold else 0
        free = wallet.available
        if free >= to_total - current:
            total = to_total
        elif least_total > current and free >= least_total - current:
            total = current + free
        else:
            self._renew(request)
            return "insufficient", current
        self.done.pop(request, None)
        self._renew(request)
        self.holds[request] = ModelHold(account, total, units)
        wallet.held += total - current
        return "ok", total

    def settle(self, request: str, charge: int) -> object:
        late = request not in self.holds
        if late and self.done.get(request, ("expired", 0))[0] != "expired":
            return (*self.done[request], request in self.late)
        account = keys_account(request)
        if account not in self.accounts:
            return "MeteringUnavailable"
        self._drop(request)
        wallet = self.accounts[account]
        wallet.balance -= charge
        self.gifts[request] = min(wallet.promo, charge)
        wallet.promo -= self.gifts[request]
        self.done[request] = "settled", charge
        if late:
            self.late.add(request)
        return "settled", charge, late

    def release(self, request: str) -> tuple[str, int, bool]:
        if request in self.holds:
            self._drop(request)
            self.done[request] = "released", 0
        return (*self.done.setdefault(request, ("released", 0)), False)

    def credit(self, account: str, amount: int, code: str, id: str, request: str = "") -> object:
        if id in self.credited:
            return None if self.credited[id] == (amount, code, request) else "IdConflict"
        if account not in self.accounts:
            return "UnknownAccount"
        wallet = self.accounts[account]
        if abs(wallet.balance + amount) > MAX_TICKS:
            return "OverCap"
        promo = wallet.promo
        if code == "grant":
            promo += amount
        if code == "refund":
            charge = self.done[request][1]
            before = self.refunded.get(request, 0)
            if before + amount > charge:
                return "WalletError"
            paid = charge - self.gifts[request]
            promo += max(0, before + amount - paid) - max(0, before - paid)
            self.refunded[request] = before + amount
        wallet.balance += amount
        wallet.promo = max(0, min(promo, wallet.balance))
        self.credited[id] = amount, code, request
        return None

    def _drop(self, request: str) -> None:
        hold = self.holds.pop(request, None)
        if hold is not None:
            self.accounts[hold.account].held -= hold.amount
        self._renew(request)

    def _renew(self, request: str) -> None:
        if request in self.overdue:
            self.overdue.remove(request)


def output_cost(terms: Terms, units: int) -> int:
    return -(-units * terms.rate // 1000)


def request_id(account: str, number: int) -> str:
    """A request id whose last digits name its account, so that the model can tell."""
    place = [*OPEN, NOBODY].index(account)
    return f"req_{int(time.time() * 1000):012x}{NUMBER:02x}{number:017x}{place}"


def keys_account(request: str) -> str:
    return [*OPEN, NOBODY][int(request[-1])]


small = st.integers(0, 12_000)
large = st.sampled_from([10**14 + 1, 10**15, MAX_TICKS - GRANT, MAX_TICKS])
amounts = st.one_of(small, small, small, large)
signed = st.builds(lambda amount, sign: amount * sign, amounts, st.sampled_from([1, 1, -1]))
terms = st.builds(
    Terms,
    model=st.sampled_from(["m", "a model with blanks"]),
    fixed=amounts,
    rate=st.one_of(st.just(0), st.integers(1, 5_000), st.integers(1, 10_000_000)),
    want=st.integers(0, 10_000),
    least=st.integers(0, 50),
    share=st.sampled_from([0, 1, 250, 1000]),
    rich_above=st.sampled_from([0, 0, 0, 5_000, 20_000]),
    free=st.sampled_from([False, False, False, True]),
)
lost = st.booleans()


class WalletMachine(RuleBasedStateMachine):
    requests: Bundle[str] = Bundle("requests")
    credits: Bundle[tuple[str, str, int, CreditCode, str]] = Bundle("credits")

    def __init__(self, redis_url: str) -> None:
        super().__init__()
        with closing(connect_directly(redis_url)) as client:
            client.flushall()
        self.runner = asyncio.Runner()
        self.model = Model({account: ModelAccount() for account in OPEN})
        self.counter = 0
        self.arrived: set[str] = set()
        self.runner.run(self.open(redis_url))

    async def open(self, redis_url: str) -> None:
        self.scripts = LosesReplies(connect(redis_url))
        self.wallet = Wallet(self.scripts)
        self.accounts = Accounts(self.scripts, signup_grant=GRANT)
        for account in OPEN:
            await self.accounts.ensure(Account(account))

    def teardown(self) -> None:
        self.runner.run(self.scripts.aclose())
        self.runner.close()

    def arrive_for(self, account: str) -> str:
        request = request_id(account, self.next())
        self.arrived.add(request)
        return request

    def next(self) -> int:
        self.counter += 1
        return self.counter

    def check(
        self,
        call: Callable[[], Coroutine[Any, Any, object]],
        expect: Callable[[], object],
        lost: bool,
    ) -> None:
        """Makes a call, its answer perhaps lost and the call repeated; compares with the model."""
        if lost:
            expect()
        expected = expect()
        self.scripts.lose = lost
        try:
            found = self.runner.run(call())
        except MeterError as error:
            found = type(error).__name__
        self.scripts.lose = False
        assert found == expected

    @rule(target=requests, account=st.sampled_from([*OPEN, *OPEN, NOBODY]))
    def arrive(self, account: str) -> str:
        return self.arrive_for(account)

    @rule(target=requests, account=st.sampled_from(OPEN), terms=terms, lost=lost)
    def arrive_and_reserve(self, account: str, terms: Terms, lost: bool) -> str:
        request = self.arrive_for(account)
        self.reserve(request, terms, lost)
        return request

    @rule(target=requests, account=st.sampled_from(OPEN), quarters=st.integers(1, 4), lost=lost)
    def arrive_and_hold_much(self, account: str, quarters: int, lost: bool) -> str:
        request = self.arrive_for(account)
        self.reserve(request, Terms("m", fixed=quarters * GRANT // 4), lost)
        return request

    @rule(request=requests, terms=terms, lost=lost)
    def reserve_again(self, request: str, terms: Terms, lost: bool) -> None:
        self.reserve(request, terms, lost)

    def reserve(self, request: str, terms: Terms, lost: bool) -> None:
        account = keys_account(request)

        async def call() -> object:
            hold = await self.wallet.reserve(request, account, terms)
            if hold is not None:
                assert hold.figures == self.figures(account)
            return hold and (hold.amount, hold.granted)

        self.check(call, lambda: self.model.reserve(request, account, terms), lost)

    @rule(request=requests, to_total=amounts, least_total=small, units=small, lost=lost)
    def extend(self, request: str, to_total: int, least_total: int, units: int, lost: bool) -> None:
        hold = Hold(request, keys_account(request), 0, Figures(0, 0))

        async def call() -> object:
            extension = await self.wallet.extend(
                hold, model="m", to_total=to_total, least_total=least_total, units=units
            )
            if keys_account(request) != NOBODY:
                assert extension.figures == self.figures(keys_account(request))
            return extension.status, extension.amount

        self.check(call, lambda: self.model.extend(request, to_total, least_total, units), lost)

    @rule(request=requests, amount=small, units=small, lost=lost)
    def renew(self, request: str, amount: int, units: int, lost: bool) -> None:
        hold = Hold(request, keys_account(request), amount, Figures(0, 0), units)

        async def call() -> None:
            await self.wallet.renew(hold, model="m")

        def expect() -> None:
            self.model.extend(request, amount, amount, units)

        self.check(call, expect, lost)

    @rule(request=requests, charge=amounts, lost=lost)
    def settle(self, request: str, charge: int, lost: bool) -> None:
        async def call() -> object:
            ending = await self.wallet.settle(request, keys_account(request), charge, {"tokens": charge})
            return ending.state, ending.charge, ending.late

        self.check(call, lambda: self.model.settle(request, charge), lost)

    @rule(request=requests, lost=lost)
    def release(self, request: str, lost: bool) -> None:
        async def call() -> object:
            ending = await self.wallet.release(request, keys_account(request), {})
            return ending.state, ending.charge, ending.late

        self.check(call, lambda: self.model.release(request), lost)

    @rule(
        target=credits,
        account=st.sampled_from([*OPEN, *OPEN, NOBODY]),
        amount=signed,
        code=st.sampled_from(["top_up", "grant", "adjust"]),
        lost=lost,
    )
    def credit(self, account: str, amount: int, code: CreditCode, lost: bool) -> object:
        made = (f"credit:{self.next()}", account, amount, code, "")
        self.credit_again(made, lost)
        return made

    @rule(target=credits, request=requests, amount=st.integers(1, 12_000), lost=lost)
    def refund(self, request: str, amount: int, lost: bool) -> object:
        if self.model.done.get(request, ("", 0))[0] != "settled":
            return multiple()
        made = (f"refund:{self.next()}", keys_account(request), amount, "refund", request)
        self.credit_again(made, lost)
        return made

    @rule(made=credits, lost=lost)
    def credit_again(self, made: tuple[str, str, int, CreditCode, str], lost: bool) -> None:
        id, account, amount, code, request = made

        async def call() -> object:
            charge = self.model.done[request][1] if request else 0
            await self.wallet.credit(
                account,
                amount,
                code,
                id=id,
                request=request,
                charge=charge,
                from_grants=self.model.gifts.get(request, 0),
            )
            return None

        self.check(call, lambda: self.model.credit(account, amount, code, id, request), lost)

    @rule(made=credits, more=st.integers(1, 5))
    def credit_with_another_amount(self, made: tuple[str, str, int, CreditCode, str], more: int) -> None:
        id, account, amount, code, request = made
        if id in self.model.credited:
            self.credit_again((id, account, amount + more, code, request), False)

    @rule(request=requests)
    def run_out(self, request: str) -> None:
        if request in self.model.holds and request not in self.model.overdue:
            self.model.overdue.append(request)
            self.runner.run(self.scripts.command("ZADD", keys.leases(NUMBER), self.next(), request))

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        self.check(lambda: self.wallet.sweep(NUMBER, limit), lambda: self.model.sweep(limit), False)

    @rule(account=st.sampled_from(OPEN), suspended=st.sampled_from([True, False, False]), lost=lost)
    def suspend(self, account: str, suspended: bool, lost: bool) -> None:
        async def call() -> None:
            await self.accounts.set(account, {"status": "suspended" if suspended else "active"})

        self.check(call, lambda: None, lost)
        self.model.accounts[account].suspended = suspended

    def figures(self, account: str) -> Figures:
        wallet = self.model.accounts[account]
        return Figures(wallet.balance, wallet.held, wallet.promo)

    @invariant()
    def wallets_are_the_models(self) -> None:
        for account in OPEN:
            found = self.runner.run(self.wallet.figures(account))
            assert found == self.figures(account)
            assert found.available == self.model.accounts[account].available
            assert found.held == sum(h.amount for h in self.model.holds.values() if h.account == account)
        assert self.runner.run(self.wallet.figures(NOBODY)) is None

    @invariant()
    def holds_are_the_models(self) -> None:
        packed = self.runner.run(self.scripts.commands([["HGETALL", keys.holds(NUMBER)]]))[0]
        found = {request: value.split(" ", 3)[:3] for request, value in packed.items()}
        assert found == {
            request: [str(hold.amount), str(hold.granted), hold.account]
            for request, hold in self.model.holds.items()
        }

    @invariant()
    def endings_are_the_models(self) -> None:
        buckets = sorted({keys.done(request) for request in self.arrived})
        found: dict[str, tuple[str, int]] = {}
        for kept in self.runner.run(self.scripts.commands([["HGETALL", bucket] for bucket in buckets])):
            for request, value in kept.items():
                how, charge = value.split(" ")[:2]
                if keys.is_request_id(request):
                    found[request] = how, int(charge)
        assert found == self.model.done

    @invariant()
    def the_books_agree(self) -> None:
        assert self.runner.run(audit(self.scripts)).findings == []


def run(redis_url: str, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: WalletMachine(redis_url),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            # Each step is many calls to a real server: looking for the smallest failure takes minutes.
            phases=[Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_calls_leave_what_the_model_says(redis_url: str) -> None:
    run(redis_url, examples=25, steps=35)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_random_calls(redis_url: str) -> None:
    run(redis_url, examples=400, steps=60)
