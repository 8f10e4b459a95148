"""Proves over Redis alone that wallets, holds and ledger agree, while requests go on.

Each partition is compared as of one moment: its wallets, holds and the ledger's last entry are read in one
transaction, then the ledger is read in pages up to that entry.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .. import keys
from ..scripts import Scripts

PAGE = 1000
MOST_FINDINGS = 1000
"""Differences beyond these are counted, not listed."""
SNAPSHOT_ATTEMPTS = 100

_FIELDS = ("balance", "held", "promo", "seq")
_ENDINGS = ("charge", "release", "expire")
_UNLISTED = ("listed", "missing")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not agree; `account` is empty where it concerns a whole partition."""

    account: str
    what: str
    expected: int | str
    found: int | str


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit saw. `differences` is 0 when all agrees."""

    accounts: int
    entries: int
    differences: int
    findings: list[Finding]


async def audit(scripts: Scripts) -> Report:
    """Compares every partition with its ledger. Raises MeteringUnavailable.

    Memory grows with the accounts and the ended requests of one partition, not with its entries.
    """
    accounts = entries = differences = 0
    findings: list[Finding] = []
    strays: set[str] = set()
    for number in await _partitions_in_use(scripts):
        moment = await _moment(scripts, number)
        books = _Books(number, moment)
        async for fields in _entries(scripts, number, moment.last):
            books.add(fields)
        books.close()
        accounts += len(moment.wallets)
        entries += books.entries
        differences += books.differences
        strays |= books.strays
        findings += books.findings[: MOST_FINDINGS - len(findings)]
    async for account in _unlisted(scripts, strays):
        differences += 1
        stray = Finding(
            account, f"place among the accounts of partition {keys.partition(account)}", *_UNLISTED
        )
        findings += [stray][: MOST_FINDINGS - len(findings)]
    return Report(accounts, entries, differences, findings)


@dataclass(frozen=True, slots=True)
class _Moment:
    """A partition without its ledger, at one moment."""

    wallets: Mapping[str, Mapping[str, int]]
    bare: frozenset[str]
    """Listed accounts that have no wallet; in `wallets` they are all zeros."""
    holds: Mapping[str, str]
    leases: frozenset[str]
    refunds: Mapping[str, int]
    sequence: int
    last: str | None
    """Stream id of the ledger's last entry."""


async def _partitions_in_use(scripts: Scripts) -> list[int]:
    numbers = range(keys.PARTITIONS)
    found = await scripts.commands(
        [
            [
                "EXISTS",
                *(key(number) for key in (keys.accounts, keys.holds, keys.leases, keys.ledger, keys.head)),
            ]
            for number in numbers
        ]
    )
    return [number for number, count in zip(numbers, found, strict=True) if count]


async def _moment(scripts: Scripts, number: int) -> _Moment:
    members = await scripts.command("SMEMBERS", keys.accounts(number))
    for _ in range(SNAPSHOT_ATTEMPTS):
        names = sorted(members)
        found = await scripts.commands(
            [
                ["SMEMBERS", keys.accounts(number)],
                ["HGETALL", keys.holds(number)],
                ["ZRANGE", keys.leases(number), 0, -1],
                ["HGETALL", keys.refunds(number)],
                ["HGET", keys.head(number), "sequence"],
                ["XREVRANGE", keys.ledger(number), "+", "-", "COUNT", 1],
                *(["HMGET", keys.wallet(name), *_FIELDS] for name in names),
            ],
            atomic=True,
        )
        members, holds, leases, refunds, sequence, last, *wallets = found
        # An account that was opened between the two reads has no wallet in this moment's answer.
        if sorted(members) == names:
            break
    return _Moment(
        wallets={name: _numbers(values) for name, values in zip(names, wallets, strict=True)},
        bare=frozenset(name for name, values in zip(names, wallets, strict=True) if values[0] is None),
        holds=holds,
        leases=frozenset(leases),
        refunds={request: int(amount) for request, amount in refunds.items()},
        sequence=int(sequence or 0),
        last=last[0][0] if last else None,
    )


def _numbers(values: Iterable[str | None]) -> dict[str, int]:
    return {name: int(value or 0) for name, value in zip(_FIELDS, values, strict=True)}


async def _entries(scripts: Scripts, number: int, last: str | None) -> AsyncIterator[dict[str, str]]:
    position = "-"
    while last is not None:
        page: list[Any] = await scripts.command("XRANGE", keys.ledger(number), position, last, "COUNT", PAGE)
        for _, fields in page:
            yield dict(fields)
        if len(page) < PAGE:
            return
        position = f"({page[-1][0]}"


async def _unlisted(scripts: Scripts, known: set[str]) -> AsyncIterator[str]:
    """Accounts whose wallet no partition lists, the known ones left out."""
    # A new account and its place in the list come in one call: none is found here just for being new.
    cursor = 0
    while True:
        cursor, found = await scripts.command("SCAN", cursor, "MATCH", "{p*}:wallet:*", "COUNT", PAGE)
        accounts = [key.split(":", 2)[2] for key in found]
        listed = await scripts.commands(
            [["SISMEMBER", keys.accounts(keys.partition(account)), account] for account in accounts]
        )
        for account, is_listed in zip(accounts, listed, strict=True):
            if not is_listed and account not in known:
                known.add(account)
                yield account
        if not cursor:
            return


@dataclass(slots=True)
class _Sums:
    """An account's ledger, added up."""

    balance: int = 0
    promo: int = 0
    seq: int = 0


@dataclass(slots=True)
class _Books:
    """One partition's ledger read entry by entry, then laid beside the moment."""

    number: int
    moment: _Moment
    entries: int = 0
    differences: int = 0
    findings: list[Finding] = field(default_factory=list)
    sums: dict[str, _Sums] = field(default_factory=dict)
    n: int = 0
    ended: set[str] = field(default_factory=set)
    """Requests that were charged or released: nothing may end them again."""
    charges: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Account and charge, of the requests of which something was refunded."""
    refunded: dict[str, int] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    """Accounts with entries or holds that the partition does not list."""

    def add(self, fields: Mapping[str, str]) -> None:
        account, code, id = fields["account"], fields["code"], fields["id"]
        amount = int(fields["amount"])
        sums = self.sums.setdefault(account, _Sums())
        self.entries += 1
        self.compare("", f"partition {self.number}: n of entry {id}", self.n + 1, int(fields["n"]))
        self.compare(account, f"seq of entry {id}", sums.seq + 1, int(fields["seq"]))
        self.compare(account, f"balance after entry {id}", sums.balance + amount, int(fields["balance"]))
        # What an entry says is taken on from here, so that one fault is found once.
        self.n, sums.seq = int(fields["n"]), int(fields["seq"])
        sums.balance += amount
        sums.promo += int(fields["promo"])
        if code in _ENDINGS:
            self.end(account, code, id, amount)
        elif code == "refund":
            request = msgspec.json.decode(fields["data"]).get("request", "")
            self.refunded[request] = self.refunded.get(request, 0) + amount

    def end(self, account: str, code: str, request: str, amount: int) -> None:
        if request in self.ended:
            self.differ(account, f"endings of request {request}", "one", f"a further {code}")
        # An expired hold may be charged late, or be extended and end once more.
        if code != "expire":
            self.ended.add(request)
        if code == "charge" and request in self.moment.refunds:
            self.charges[request] = account, -amount

    def close(self) -> None:
        self.compare("", f"partition {self.number}: sequence", self.n, self.moment.sequence)
        self.compare_wallets()
        self.compare_leases()
        self.compare_refunds()

    def compare_wallets(self) -> None:
        held: dict[str, int] = {}
        for packed in self.moment.holds.values():
            amount, _, account, _ = packed.split(" ", 3)
            held[account] = held.get(account, 0) + int(amount)
        for account in sorted(self.moment.bare):
            self.differ(account, "wallet", "there", "missing")
        for account, wallet in self.moment.wallets.items():
            sums = self.sums.get(account, _Sums())
            self.compare(account, "balance", sums.balance, wallet["balance"])
            self.compare(account, "promo", sums.promo, wallet["promo"])
            self.compare(account, "seq", sums.seq, wallet["seq"])
            self.compare(account, "held", held.get(account, 0), wallet["held"])
            if wallet["held"] < 0:
                self.differ(account, "held", "0 or more", wallet["held"])
            if not 0 <= wallet["promo"] <= max(0, wallet["balance"]):
                self.differ(account, "promo", f"0 to {max(0, wallet['balance'])}", wallet["promo"])
        self.strays = (self.sums.keys() | held.keys()) - self.moment.wallets.keys()
        for account in sorted(self.strays):
            self.differ(account, f"place among the accounts of partition {self.number}", *_UNLISTED)

    def compare_leases(self) -> None:
        for request, packed in self.moment.holds.items():
            account = packed.split(" ", 3)[2]
            if request not in self.moment.leases:
                self.differ(account, f"lease of hold {request}", "there", "missing")
            if request in self.ended:
                self.differ(account, f"hold {request}", "none, as it has ended", "there")
        for request in sorted(self.moment.leases - self.moment.holds.keys()):
            self.differ("", f"hold of lease {request}", "there", "missing")

    def compare_refunds(self) -> None:
        for request in sorted(self.refunded.keys() | self.moment.refunds.keys()):
            account, charge = self.charges.get(request, ("", 0))
            total = self.refunded.get(request, 0)
            self.compare(account, f"refunds of {request}", total, self.moment.refunds.get(request, 0))
            if total > charge:
                self.differ(account, f"refunds of {request}", f"at most {charge}", total)

    def compare(self, account: str, what: str, expected: int, found: int) -> None:
        if expected != found:
            self.differ(account, what, expected, found)

    def differ(self, account: str, what: str, expected: int | str, found: int | str) -> None:
        self.differences += 1
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(account, what, expected, found))
