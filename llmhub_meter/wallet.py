"""The wallet's verbs: each one script call, each idempotent by its id. Amounts are ticks."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from . import keys
from .errors import (
    AccountRestricted,
    CreditsHeld,
    IdConflict,
    IdempotencyInProgress,
    IdempotencyMismatch,
    IdempotencyReplay,
    InsufficientCredits,
    InvalidRequest,
    MeteringUnavailable,
    OverCap,
    UnknownAccount,
    WalletError,
)
from .money import MAX_TICKS, credits
from .scripts import Scripts
from .types import Ending, Entry, Figures, Hold, Idempotency

logger = logging.getLogger("llmhub_meter.wallet")

CLOCK_DIFFERENCE_MS = 60_000
"""How far the clock of a process may be ahead of Redis's, when the ledger is searched."""

CreditCode = Literal["top_up", "grant", "refund", "adjust"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request asks to set aside.

    `fixed` is the certain part (input, flat fees); output takes `rate` ticks per 1,000 units, `want` units
    where they can be had, `least` at any rate, and of what is available at most `share` per mille.
    """

    model: str
    fixed: int = 0
    rate: int = 0
    want: int = 0
    least: int = 0
    share: int = 1000
    rich_above: int = 0
    """With less than this available `fixed` is to be counted exactly first; 0: it is exact already."""
    free: bool = False


@dataclass(frozen=True, slots=True)
class Extension:
    """What came of asking more for a hold."""

    status: Literal["ok", "insufficient", "ended"]
    amount: int
    figures: Figures


class Wallet:
    """Balances and holds on one Redis."""

    def __init__(self, scripts: Scripts, *, lease_seconds: float = 600) -> None:
        self._scripts = scripts
        self._lease_ms = int(lease_seconds * 1000)

    async def reserve(
        self, request: str, account: str, terms: Terms, idempotency: Idempotency | None = None
    ) -> Hold | None:
        """Sets credits aside, or returns None when the input must be counted exactly first.

        Raises InsufficientCredits, CreditsHeld, AccountRestricted, UnknownAccount, InvalidRequest (this id
        ended before), IdempotencyInProgress, IdempotencyReplay, IdempotencyMismatch, MeteringUnavailable
        (perhaps reserved all the same: release it).
        """
        status, amount, granted, *figures = await self._scripts.call(
            "reserve",
            [keys.wallet(account)],
            [
                request,
                account,
                terms.model,
                terms.fixed,
                terms.rate,
                terms.want,
                terms.least,
                terms.share,
                terms.rich_above,
                self._lease_ms,
                "free" if terms.free else "paid",
                idempotency.key if idempotency else "",
                idempotency.body if idempotency else "",
            ],
        )
        match status:
            case "ok" | "exists":
                return Hold(request, account, int(amount), _figures(figures), int(granted))
            case "count":
                return None
            case "insufficient":
                raise InsufficientCredits(remaining=_figures(figures).remaining)
            case "held":
                raise CreditsHeld(remaining=_figures(figures).remaining)
            case "suspended":
                raise AccountRestricted("This account is suspended. Please contact support.")
            case "no_account":
                raise UnknownAccount(f"there is no account {account!r}")
            case "idem_running":
                raise IdempotencyInProgress(amount)
            case "idem_charged":
                raise IdempotencyReplay(amount)
            case "idem_mismatch":
                raise IdempotencyMismatch()
        raise InvalidRequest("This request has ended already.")

    async def extend(
        self, hold: Hold, *, model: str, to_total: int, least_total: int, units: int
    ) -> Extension:
        """More for a living hold, up to `to_total` and at least `least_total`; its lease begins anew."""
        status, amount, *figures = await self._scripts.call(
            "extend",
            [keys.wallet(hold.account)],
            [hold.id, hold.account, model, to_total, least_total, units, self._lease_ms],
        )
        outcomes: dict[str, Literal["ok", "insufficient"]] = {"ok": "ok", "insufficient": "insufficient"}
        return Extension(outcomes.get(status, "ended"), int(amount), _figures(figures))

    async def renew(self, hold: Hold, *, model: str) -> None:
        """A new lease for a hold whose request still runs; an expired one is taken anew where it can be."""
        await self.extend(
            hold, model=model, to_total=hold.amount, least_total=hold.amount, units=hold.granted
        )

    async def settle(
        self,
        request: str,
        account: str,
        charge: int,
        record: Mapping[str, object],
        idempotency: Idempotency | None = None,
    ) -> Ending:
        """Takes the charge, once; whatever the hold was, the rest of it returns.

        From then on the idempotency key that the hold was made with is a replay, if anything was charged.
        Raises MeteringUnavailable, also where the account is gone: then Redis has lost its data.
        """
        # Redis would refuse to add what passes 64 bits, in the middle of the script.
        if not 0 <= charge <= MAX_TICKS:
            raise ValueError(f"a charge is 0 to {MAX_TICKS} ticks, not {charge}")
        answer = await self._scripts.call(
            "settle",
            [keys.wallet(account)],
            [request, account, charge, _json(record), idempotency.key if idempotency else ""],
        )
        if answer[0] == "no_account":
            logger.error("there is no account %r to charge %s: Redis has lost its data", account, request)
            raise MeteringUnavailable()
        return _ending(answer)

    async def release(self, request: str, account: str, record: Mapping[str, object]) -> Ending:
        """Gives the hold back whole; of an id never seen it leaves a mark, so that a late reserve fails."""
        return _ending(
            await self._scripts.call("release", [keys.wallet(account)], [request, account, _json(record)])
        )

    async def credit(
        self,
        account: str,
        amount: int,
        code: CreditCode,
        *,
        id: str,
        record: Mapping[str, object] | None = None,
        request: str = "",
        charge: int = 0,
        from_grants: int = 0,
    ) -> Figures:
        """Adds to a balance (or takes, where `amount` is negative), once per `id` for ever.

        A refund names the `request`, its `charge` and the part of that which was spent from grants. Raises
        UnknownAccount, OverCap, IdConflict (the id stands for another amount, code or request), WalletError.
        """
        if code == "refund" and amount <= 0:
            raise WalletError("a refund gives back more than nothing")
        noted = {**(record or {}), "request": request} if request else record or {}
        status, balance, held, promo, seen = await self._scripts.call(
            "credit",
            [keys.wallet(account), keys.credited(account)],
            [id, account, amount, code, MAX_TICKS, _json(noted), request, charge, from_grants],
        )
        match status:
            case "no_account":
                raise UnknownAccount(f"there is no account {account!r}")
            case "conflict":
                raise IdConflict(f"id {id!r} was used before for another amount; take a new id")
            case "over_cap":
                raise OverCap(f"the balance would pass {credits(MAX_TICKS)} credits; nothing was changed")
            case "over_charge":
                raise WalletError(
                    f"{request} was charged {credits(charge)} credits; refunds together may not be more"
                )
        # A repeated call gives the balance that the first one left.
        return _figures([seen if status == "exists" else balance, held, promo])

    async def figures(self, account: str) -> Figures | None:
        """The wallet as it stands, or None where there is no such account."""
        found = await self._scripts.command("HMGET", keys.wallet(account), "balance", "held", "promo")
        return None if found[0] is None else _figures(found)

    async def ending(self, request: str) -> Entry | None:
        """The ledger entry that ended a request, if that is remembered or still in the stream."""
        done = await self._scripts.command("HGET", keys.done(request), request)
        ledger = keys.ledger(keys.partition_of(request))
        if done is not None:
            stream_id = str(done).split()[2]
            if stream_id == "-":
                return None
            for _, fields in _stream(await self._scripts.command("XRANGE", ledger, stream_id, stream_id)):
                return entry(fields)
        return await self._search(ledger, request)

    async def held(self, request: str) -> tuple[int, str, str] | None:
        """A living hold's amount, account and model."""
        packed = await self._scripts.command("HGET", keys.holds(keys.partition_of(request)), request)
        if packed is None:
            return None
        amount, _, account, model = str(packed).split(" ", 3)
        return int(amount), account, model

    async def refunded(self, request: str) -> int:
        """How much of a request's charge was given back so far."""
        return int(
            await self._scripts.command("HGET", keys.refunds(keys.partition_of(request)), request) or 0
        )

    async def sweep(self, number: int, limit: int = 100) -> int:
        """Returns up to `limit` holds of a partition whose leases ran out."""
        return int(await self._scripts.call("sweep", [keys.leases(number)], [limit]))

    async def overdue(self) -> list[int]:
        """The partitions that have a hold past its lease."""
        seconds, micros = await self._scripts.command("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        found = await self._scripts.commands(
            [["ZCOUNT", keys.leases(number), "-inf", now] for number in range(keys.PARTITIONS)]
        )
        return [number for number, count in enumerate(found) if count]

    async def _search(self, ledger: str, request: str) -> Entry | None:
        """Beyond the remembered window: along the stream from the time inside the id."""
        # The id's time is that of another clock than the stream's.
        position = str(max(0, keys.started_at(request) - CLOCK_DIFFERENCE_MS))
        # A request ends at most a day after it began: its upstream's timeout is far below that.
        end = str(keys.started_at(request) + 86_400_000)
        expired = None
        while True:
            batch = _stream(await self._scripts.command("XRANGE", ledger, position, end, "COUNT", 1000))
            for _, fields in batch:
                if fields["id"] == request and fields["code"] in ("charge", "release"):
                    return entry(fields)
                # What was used may be charged after its hold expired, and that is the ending then.
                if fields["id"] == request and fields["code"] == "expire":
                    expired = entry(fields)
            if len(batch) < 1000:
                return expired
            position = f"({batch[-1][0]}"


def entry(fields: Mapping[str, str]) -> Entry:
    """A ledger entry from the fields of its stream message; what the script noted beside it joins `data`."""
    data = msgspec.json.decode(fields["data"])
    return Entry(
        id=fields["id"],
        account=fields["account"],
        code=fields["code"],
        amount=int(fields["amount"]),
        balance=int(fields["balance"]),
        seq=int(fields["seq"]),
        at=int(fields["at"]),
        data={
            **data,
            "promo": int(fields["promo"]),
            "held": int(fields["held"]),
            "late": fields["late"] == "1",
        },
    )


def _stream(answer: Any) -> list[tuple[str, dict[str, str]]]:
    return [(str(id), dict(fields)) for id, fields in answer]


def _figures(found: list[str | None]) -> Figures:
    return Figures(*(int(value or 0) for value in found))


def _ending(answer: list[str]) -> Ending:
    status, how, charge, *figures = answer
    return Ending(how, int(charge), _figures(list(figures)), late=status == "late")  # type: ignore[arg-type]


def _json(record: Mapping[str, object]) -> str:
    return msgspec.json.encode(record).decode()
