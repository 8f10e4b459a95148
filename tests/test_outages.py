"""What the wallet promises while Redis, or the way to it, fails: lost replies, kills, full memory."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import servers

from llmhub_meter import keys
from llmhub_meter import scripts as module
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.errors import MeteringUnavailable
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.types import Account, Figures, Hold
from llmhub_meter.wallet import Terms, Wallet

GRANT = 1000


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """The time a client waits for Redis, short enough to wait for it in a test."""
    monkeypatch.setattr(module, "REDIS_TIMEOUT_SECONDS", 0.2)
    return 0.2


Loss = Literal["before", "cut", "swallow"]
"""A call that never arrives, a connection cut instead of the reply, a reply that never comes."""


@dataclass
class Proxy:
    """Stands between the client and Redis, and loses what it is told to lose."""

    target: str
    losses: list[Loss] = field(default_factory=list)
    marker: bytes = b"EVAL"
    url: str = ""
    links: set[asyncio.Task[None]] = field(default_factory=set)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.create_task(self.serve(reader, writer))
        self.links.add(link)
        link.add_done_callback(self.links.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                redis_reader, redis_writer = await asyncio.open_unix_connection(self.target)
            except OSError:
                return
            with closing(redis_writer):
                lost: list[Loss] = []
                ways = {
                    asyncio.ensure_future(self.forward(reader, redis_writer, lost)),
                    asyncio.ensure_future(self.answer(redis_reader, writer, lost)),
                }
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def forward(
        self, reader: asyncio.StreamReader, redis: asyncio.StreamWriter, lost: list[Loss]
    ) -> None:
        while data := await reader.read(1 << 16):
            if self.losses and self.marker in data:
                lost.append(self.losses.pop(0))
                if lost == ["before"]:
                    return
            redis.write(data)
            await redis.drain()

    async def answer(
        self, redis: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: list[Loss]
    ) -> None:
        while data := await redis.read(1 << 16):
            if lost == ["cut"]:
                return
            if lost == ["swallow"]:
                continue
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def proxied(redis_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(redis_url.removeprefix("unix://"))
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        links = list(proxy.links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        await server.wait_closed()


@dataclass
class World:
    """An account `ada` with 1,000 ticks, 100 of them held, seen through one connection to Redis."""

    scripts: Scripts
    wallet: Wallet
    accounts: Accounts
    hold: Hold

    @classmethod
    async def make(cls, scripts: Scripts) -> "World":
        wallet, accounts = Wallet(scripts), Accounts(scripts, signup_grant=GRANT)
        await accounts.ensure(Account("ada"))
        hold = await wallet.reserve(keys.new_request_id("ada"), "ada", Terms("m", fixed=100))
        assert hold is not None
        return cls(scripts, wallet, accounts, hold)

    def through(self, scripts: Scripts) -> "World":
        """The same world by another way."""
        return World(scripts, Wallet(scripts), Accounts(scripts, signup_grant=GRANT), self.hold)

    async def seen(self) -> dict[str, Any]:
        """What is there, without the ids and times that differ from run to run."""
        ledgers = await self.scripts.commands(
            [["XRANGE", keys.ledger(number), "-", "+"] for number in range(keys.PARTITIONS)]
        )
        codes = Counter(fields["code"] for stream in ledgers for _, fields in stream)
        number = keys.partition("ada")
        return {
            "codes": dict(codes),
            "figures": {holder.account.name: holder.figures async for holder in self.accounts.all()},
            "holds": sorted((await self.scripts.command("HGETALL", keys.holds(number))).values()),
            "leases": await self.scripts.command("ZCARD", keys.leases(number)),
            "keys": len(await self.accounts.list_keys("ada")),
            "names": await self.scripts.command("HLEN", keys.NAMES),
        }


async def reserve(world: World) -> object:
    return await world.wallet.reserve(REQUEST, "ada", Terms("m", fixed=200))


async def extend(world: World) -> object:
    return await world.wallet.extend(world.hold, model="m", to_total=300, least_total=300, units=7)


async def settle(world: World) -> object:
    return await world.wallet.settle(world.hold.id, "ada", 70, {})


async def late_settle(world: World) -> object:
    return await world.wallet.settle(REQUEST, "ada", 70, {})


async def release(world: World) -> object:
    return await world.wallet.release(world.hold.id, "ada", {})


async def top_up(world: World) -> object:
    return await world.wallet.credit("ada", 500, "top_up", id="topup:1")


async def create(world: World) -> object:
    return (await world.accounts.create("bob")).name


async def suspend(world: World) -> object:
    return (await world.accounts.set("ada", {"status": "suspended"})).account.status


async def issue(world: World) -> object:
    secret, key = await world.accounts.issue_key("ada", name="k")
    return (await world.accounts.find(secret)).id == key.id


REQUEST = keys.new_request_id("ada")
VERBS = [reserve, extend, settle, late_settle, release, top_up, create, suspend, issue]
Verb = Callable[[World], Awaitable[object]]


def without_ids(answer: object) -> str:
    return re.sub(r"req_[0-9a-f]{32}", "req", repr(answer))


@pytest.mark.parametrize("loss", ["before", "cut", "swallow"])
@pytest.mark.parametrize("verb", VERBS)
async def test_a_call_whose_reply_is_lost_happens_once_and_is_answered(
    redis_url: str, audited: Scripts, short_timeout: float, verb: Verb, loss: Loss
) -> None:
    world = await World.make(audited)
    expected_answer, expected = await verb(world), await world.seen()
    await audited.command("FLUSHALL")

    world = await World.make(audited)
    async with through_proxy(redis_url) as (proxy, lossy):
        proxy.losses = [loss]
        answer = await verb(world.through(lossy))
        assert proxy.losses == [], "nothing was lost"
    assert without_ids(answer) == without_ids(expected_answer)
    assert await world.seen() == expected


@pytest.mark.parametrize("loss", ["before", "cut", "swallow"])
@pytest.mark.parametrize("verb", VERBS)
async def test_a_call_that_gets_no_reply_at_all_is_unavailable_and_happened_once_or_not(
    redis_url: str, audited: Scripts, short_timeout: float, verb: Verb, loss: Loss
) -> None:
    world = await World.make(audited)
    untouched = await world.seen()
    await verb(world)
    expected = await world.seen()
    await audited.command("FLUSHALL")

    world = await World.make(audited)
    async with through_proxy(redis_url) as (proxy, lossy):
        proxy.losses = [loss, loss]
        with pytest.raises(MeteringUnavailable):
            await verb(world.through(lossy))
        assert proxy.losses == [], "nothing was lost"
    if loss == "before":
        # A name is claimed before its account is opened; the next maker takes the claim over.
        assert await world.seen() == {**untouched, "names": expected["names"]}
        await verb(world)
    assert await world.seen() == expected


async def test_a_lost_claim_of_a_name_is_the_makers_own(redis_url: str, audited: Scripts) -> None:
    async with through_proxy(redis_url) as (proxy, lossy):
        proxy.marker, proxy.losses = b"HSETNX", ["cut"]
        made = await Accounts(lossy, signup_grant=GRANT).create("bob")
        assert proxy.losses == []
    assert (await Accounts(audited, signup_grant=GRANT).get("bob")).account == made


@asynccontextmanager
async def through_proxy(redis_url: str) -> AsyncIterator[tuple[Proxy, Scripts]]:
    async with proxied(redis_url) as proxy, aclosing(Scripts(connect(proxy.url))) as scripts:
        yield proxy, scripts


# Kills


async def test_calls_go_on_after_the_server_was_killed_and_started_again(tmp_path: Path) -> None:
    async with proxied("unix:///nowhere") as proxy, aclosing(Scripts(connect(proxy.url))) as scripts:
        with servers.valkey(tmp_path, appendonly=True) as url:
            proxy.target = url.removeprefix("unix://")
            world = await World.make(scripts)
            await asyncio.gather(*(world.wallet.figures("ada") for _ in range(20)))
        proxy.target = "/nowhere"
        started = time.monotonic()
        outcomes = await asyncio.gather(
            *(world.wallet.settle(world.hold.id, "ada", 70, {}) for _ in range(20)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} == {MeteringUnavailable}
        assert time.monotonic() - started < 3
        with servers.valkey(tmp_path, appendonly=True) as url:
            proxy.target = url.removeprefix("unix://")
            endings = await asyncio.gather(
                *(world.wallet.settle(world.hold.id, "ada", 70, {}) for _ in range(20))
            )
            assert {(ending.state, ending.charge, ending.figures) for ending in endings} == {
                ("settled", 70, Figures(GRANT - 70, 0, GRANT - 70))
            }
            assert (await world.seen())["codes"] == {"account": 1, "grant": 1, "charge": 1}
            assert (await audit(scripts)).findings == []


async def test_a_kill_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """30 payers in a row of requests each, repeated by their ids until Redis answers."""
    async with proxied("unix:///nowhere") as proxy, aclosing(Scripts(connect(proxy.url))) as scripts:
        wallet = Wallet(scripts)
        refused = 0

        async def until_answered(call: Callable[[], Awaitable[object]]) -> None:
            nonlocal refused
            while True:
                try:
                    await call()
                    return
                except MeteringUnavailable:
                    refused += 1
                    await asyncio.sleep(0.01)

        async def pay(payer: int) -> None:
            for _ in range(15):
                request = keys.new_request_id("ada")
                await until_answered(lambda: wallet.reserve(request, "ada", Terms("m", fixed=50)))  # noqa: B023
                await until_answered(lambda: wallet.settle(request, "ada", 10 + payer, {}))  # noqa: B023

        with servers.valkey(tmp_path, appendonly=True) as url:
            proxy.target = url.removeprefix("unix://")
            await Accounts(scripts, signup_grant=1_000_000).ensure(Account("ada"))
            payers = [asyncio.create_task(pay(payer)) for payer in range(30)]
            while await scripts.command("XLEN", keys.ledger(keys.partition("ada"))) < 120:
                await asyncio.sleep(0.005)
        proxy.target = "/nowhere"
        await asyncio.sleep(0.1)
        with servers.valkey(tmp_path, appendonly=True) as url:
            proxy.target = url.removeprefix("unix://")
            await asyncio.gather(*payers)
            spent = sum(15 * (10 + payer) for payer in range(30))
            assert await wallet.figures("ada") == Figures(1_000_000 - spent, 0, 1_000_000 - spent)
            assert refused > 0
            report = await audit(scripts)
            assert (report.differences, report.entries) == (0, 2 + 30 * 15)


# Memory and connections


async def test_more_callers_than_connections_wait_for_their_turn(
    redis_url: str, audited: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    world = await World.make(audited)
    async with through_proxy(redis_url) as (_, narrow):
        await asyncio.gather(
            *(Wallet(narrow).credit("ada", 1, "top_up", id=f"topup:{number}") for number in range(200))
        )
        clients = str(await audited.command("CLIENT", "LIST")).splitlines()
    assert await world.wallet.figures("ada") == Figures(GRANT + 200, 100, GRANT)
    assert len(clients) <= 2 + 1


async def test_a_full_redis_changes_nothing_by_halves(audited: Scripts) -> None:
    world = await World.make(audited)
    before = await world.seen()
    await audited.command("CONFIG", "SET", "maxmemory", "1")
    try:
        for verb in (reserve, extend, late_settle, top_up, create, suspend, issue):
            with pytest.raises(MeteringUnavailable):
                await verb(world)
    finally:
        await audited.command("CONFIG", "SET", "maxmemory", "0")
    assert await world.seen() == before


async def test_a_full_redis_still_ends_what_it_holds(audited: Scripts) -> None:
    world = await World.make(audited)
    await audited.command("CONFIG", "SET", "maxmemory", "1")
    try:
        ending = await world.wallet.settle(world.hold.id, "ada", 70, {})
    finally:
        await audited.command("CONFIG", "SET", "maxmemory", "0")
    assert ending.figures == Figures(GRANT - 70, 0, GRANT - 70)
