import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pytest
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import RedisError

from llmhub_meter import keys
from llmhub_meter import scripts as module
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.errors import ConfigError, MeteringUnavailable
from llmhub_meter.scripts import SCRIPTS, Scripts, connect, script_source
from llmhub_meter.types import Account, Figures, Hold
from llmhub_meter.wallet import Terms, Wallet

LUA = resources.files("llmhub_meter") / "lua"
GRANT = 1000


@pytest.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    """Scripts on an empty server, whose ledger is proved after the test."""
    async with aclosing(Scripts(connect(redis_url))) as scripts:
        yield scripts
        await prove(scripts)


async def prove(scripts: Scripts) -> None:
    report = await audit(scripts)
    assert report.differences == 0, report.findings


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """The time a client waits for Redis, short enough to wait for it in a test."""
    monkeypatch.setattr(module, "REDIS_TIMEOUT_SECONDS", 0.2)
    return 0.2


Loss = Literal["before", "cut", "swallow"]
"""A call that never arrives, a connection cut instead of the reply, a reply that never comes."""


@dataclass
class Proxy:
    """Stands between the client and Redis, loses the replies it is told to lose, and can be slow."""

    target: str
    losses: list[Loss] = field(default_factory=list)
    marker: bytes = b"EVAL"
    delay_seconds: float = 0.0
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
            if self.delay_seconds:
                await asyncio.sleep(random.uniform(0, self.delay_seconds))
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


# What the scripts say of themselves


def header_and_body(name: str) -> tuple[str, str]:
    text = script_source(name)
    match = re.fullmatch(r"--\[\[\n(.*?)\n\]\]\n(.*)", text, re.DOTALL)
    assert match is not None, f"{name}.lua begins with its contract"
    return match[1], match[2]


def named(kind: str, text: str) -> set[str]:
    return set(re.findall(kind + r"\[(\d+)", text))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_names_exactly_the_keys_and_arguments_of_its_body(name: str) -> None:
    header, body = header_and_body(name)
    assert named("KEYS", header) == named("KEYS", body)
    listed = named("ARGV", header)
    used = named("ARGV", body)
    # A list of arguments at the end: ARGV[8...] in the header, a loop in the body.
    if tail := re.search(r"ARGV\[(\d+)\.\.\.\]", header):
        assert re.search(rf"for i = {tail[1]}, #ARGV do", body)
        used.add(tail[1])
    else:
        assert "#ARGV" not in body
    assert listed == used
    assert listed == {str(number) for number in range(1, len(listed) + 1)}


def statuses(header: str) -> set[str]:
    _, colon, words = header.partition("status:")
    plain = re.sub(r"\([^()]*\)", "", words if colon else "")
    return {word.strip() for word in plain.replace("\n", " ").split(",") if word.strip()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_lists_exactly_the_words_that_its_body_answers(name: str) -> None:
    header, body = header_and_body(name)
    first = re.findall(r"return (?:\{|answer\()([^,})]*)", body)
    words = {word for part in first for word in re.findall(r'"(\w+)"', re.sub(r'== "\w+"', "", part))}
    assert statuses(header) == words
    assert (words == set()) == (name == "sweep")


def test_all_scripts_are_called_and_all_includes_used() -> None:
    folder = Path(str(LUA))
    assert sorted(path.stem for path in folder.glob("*.lua")) == sorted(SCRIPTS)
    assert list(SCRIPTS) == sorted(SCRIPTS)
    included = {
        word
        for path in folder.glob("*.lua")
        for word in re.findall(r"^--@include (.*)$", path.read_text(), re.M)
    }
    assert included == {path.stem for path in (folder / "includes").glob("*.lua")}
    for name in SCRIPTS:
        assert "@include" not in script_source(name)


# Keys


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    account=st.text(min_size=1, max_size=40).filter(
        lambda text: text.isprintable() and not any(letter.isspace() for letter in text)
    )
)
def test_scripts_and_keys_module_spell_the_same_keys(redis_url: str, account: str) -> None:
    async def check() -> None:
        async with aclosing(Scripts(connect(redis_url))) as scripts:
            await scripts.command("FLUSHALL")
            wallet, accounts = Wallet(scripts), Accounts(scripts, signup_grant=GRANT)
            await accounts.ensure(Account(account))
            charged, held = keys.new_request_id(account), keys.new_request_id(account)
            for request in (charged, held):
                await wallet.reserve(request, account, Terms("m", fixed=10))
            await wallet.settle(charged, account, 10, {})
            await wallet.credit(account, 3, "refund", id="r", request=charged, charge=10)
            _, key = await accounts.issue_key(account)
            number = keys.partition(account)
            expected = {
                keys.wallet(account),
                keys.credited(account),
                keys.account_keys(account),
                keys.api_key(key.id),
                keys.accounts(number),
                keys.holds(number),
                keys.leases(number),
                keys.ledger(number),
                keys.head(number),
                keys.refunds(number),
                keys.done(charged),
                # An account's opening, and what else was done in another ten minutes than the charge.
                *{keys.done(entry_id) for entry_id in await change_ids(scripts, number)},
            }
            assert set(await scripts.command("KEYS", "*")) == expected
            assert all(key.startswith(f"{{p{number}}}:") for key in expected)
            assert await scripts.command("HKEYS", keys.done(charged)) != []

    asyncio.run(check())


async def change_ids(scripts: Scripts, number: int) -> list[str]:
    stream = await scripts.command("XRANGE", keys.ledger(number), "-", "+")
    return [fields["id"] for _, fields in stream if fields["id"].startswith("chg_")]


def test_an_id_tells_its_time_and_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_123.456)
    request = keys.new_request_id("ada")
    assert keys.is_request_id(request)
    assert keys.started_at(request) == 1_700_000_123_456
    assert keys.partition_of(request) == keys.partition("ada")
    assert keys.done(request) == f"{{p{keys.partition('ada')}}}:done:{1_700_000_123_456 // 600_000}"
    assert keys.new_change_id("ada")[4:18] == request[4:18]
    assert len({keys.new_request_id("ada") for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "text", ["", "req_", "req_" + "0" * 31, "req_" + "0" * 33, "req_" + "G" * 32, "REQ_" + "0" * 32]
)
def test_what_is_no_request_id(text: str) -> None:
    assert not keys.is_request_id(text)
    assert keys.is_request_id("req_" + "0" * 32)


# Lost scripts


async def test_a_flushed_script_cache_is_filled_again_and_runs_once(scripts: Scripts) -> None:
    world = await World.make(scripts)
    for amount in (1, 10, 100):
        await scripts.command("SCRIPT", "FLUSH")
        await world.wallet.credit("ada", amount, "top_up", id=f"topup:{amount}")
    assert await world.wallet.figures("ada") == Figures(GRANT + 111, 100, GRANT)
    await scripts.command("SCRIPT", "FLUSH")
    ending = await world.wallet.settle(world.hold.id, "ada", 70, {})
    assert (ending.state, ending.charge) == ("settled", 70)
    assert (await world.seen())["codes"] == {"account": 1, "grant": 1, "top_up": 3, "charge": 1}


async def test_after_one_miss_the_script_is_cached(scripts: Scripts) -> None:
    await scripts.command("SCRIPT", "FLUSH")
    await scripts.command("CONFIG", "RESETSTAT")
    wallet = Wallet(scripts)
    for _ in range(5):
        assert await wallet.sweep(7) == 0
    stats = await scripts.command("INFO", "commandstats")
    assert stats["cmdstat_eval"]["calls"] == 1
    assert stats["cmdstat_evalsha"]["calls"] == 5


# Lost replies


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
    redis_url: str, scripts: Scripts, short_timeout: float, verb: Verb, loss: Loss
) -> None:
    world = await World.make(scripts)
    expected_answer, expected = await verb(world), await world.seen()
    await scripts.command("FLUSHALL")

    world = await World.make(scripts)
    async with through_proxy(redis_url) as (proxy, lossy):
        proxy.losses = [loss]
        answer = await verb(world.through(lossy))
        assert proxy.losses == [], "nothing was lost"
    assert without_ids(answer) == without_ids(expected_answer)
    assert await world.seen() == expected


@pytest.mark.parametrize("loss", ["before", "cut", "swallow"])
@pytest.mark.parametrize("verb", VERBS)
async def test_a_call_that_gets_no_reply_at_all_is_unavailable_and_happened_once_or_not(
    redis_url: str, scripts: Scripts, short_timeout: float, verb: Verb, loss: Loss
) -> None:
    world = await World.make(scripts)
    untouched = await world.seen()
    await verb(world)
    expected = await world.seen()
    await scripts.command("FLUSHALL")

    world = await World.make(scripts)
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


async def test_a_lost_claim_of_a_name_is_the_makers_own(redis_url: str, scripts: Scripts) -> None:
    async with through_proxy(redis_url) as (proxy, lossy):
        proxy.marker, proxy.losses = b"HSETNX", ["cut"]
        made = await Accounts(lossy, signup_grant=GRANT).create("bob")
        assert proxy.losses == []
    assert (await Accounts(scripts, signup_grant=GRANT).get("bob")).account == made


@asynccontextmanager
async def through_proxy(redis_url: str) -> AsyncIterator[tuple[Proxy, Scripts]]:
    async with proxied(redis_url) as proxy, aclosing(Scripts(connect(proxy.url))) as scripts:
        yield proxy, scripts


# Cancelled calls


async def test_calls_cancelled_at_random_moments_never_get_each_others_answers(
    redis_url: str, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 3)
    accounts = Accounts(scripts, signup_grant=0)
    wallet = Wallet(scripts)
    for number in range(40):
        await accounts.ensure(Account(f"a{number}"))
        await wallet.credit(f"a{number}", 1_000_000 + number, "top_up", id="topup")
    chance = random.Random(5)
    outcomes: Counter[str] = Counter()
    wrong: list[object] = []

    async with through_proxy(redis_url) as (proxy, slow):
        proxy.delay_seconds = 0.004

        async def ask(number: int) -> None:
            """Two calls whose answers tell whose they are."""
            account = f"a{number % 40}"
            figures = await Wallet(slow).figures(account)
            if figures is None or figures.balance != 1_000_000 + number % 40:
                wrong.append((account, figures))
            request = keys.new_request_id(account)
            hold = await Wallet(slow).reserve(request, account, Terms("m", fixed=100 + number))
            if hold is None or (hold.amount, hold.figures.balance) != (100 + number, 1_000_000 + number % 40):
                wrong.append((account, hold))
            ending = await Wallet(slow).release(request, account, {})
            if (ending.state, ending.figures.balance) != ("released", 1_000_000 + number % 40):
                wrong.append((account, ending))

        async def cancelled(number: int) -> None:
            call = asyncio.create_task(ask(number))
            await asyncio.sleep(chance.uniform(0, 0.25))
            outcomes["done" if call.done() else "cancelled"] += 1
            call.cancel()
            for result in await asyncio.gather(call, return_exceptions=True):
                if not isinstance(result, asyncio.CancelledError | None):
                    wrong.append(result)

        for _ in range(8):
            await asyncio.gather(*(cancelled(number) for number in range(60)))
        assert wrong == []
        assert outcomes["done"] >= 20 and outcomes["cancelled"] >= 100
        # All three connections serve still: none was lost with the call that had it.
        started = time.monotonic()
        await asyncio.gather(*(ask(number) for number in range(12)))
        assert wrong == []
        assert time.monotonic() - started < 2


# Redis away, restarted, full, evicting, wiped


async def test_a_redis_that_is_not_there_is_unavailable_at_once(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/nothing.sock", "redis://127.0.0.1:1/0"):
        async with aclosing(Scripts(connect(url))) as scripts:
            for call in every_call(scripts):
                started = time.monotonic()
                with pytest.raises(MeteringUnavailable):
                    await call
                assert time.monotonic() - started < 1


async def test_a_redis_that_never_answers_is_unavailable_after_two_time_outs(short_timeout: float) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.read(-1)

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with aclosing(Scripts(connect(url))) as scripts:
        for call in every_call(scripts):
            started = time.monotonic()
            with pytest.raises(MeteringUnavailable):
                await call
            assert time.monotonic() - started < 2 * short_timeout + 0.5
    server.close()
    await server.wait_closed()


def every_call(scripts: Scripts) -> list[Awaitable[object]]:
    return [
        scripts.call("sweep", [keys.leases(0)], [1]),
        scripts.command("GET", keys.EPOCH),
        scripts.commands([["GET", keys.EPOCH]]),
        scripts.commands([["GET", keys.EPOCH]], atomic=True),
        scripts.check_server(),
        scripts.open_epoch(),
        scripts.check_epoch(),
    ]


async def test_more_callers_than_connections_wait_for_their_turn(
    redis_url: str, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    world = await World.make(scripts)
    async with through_proxy(redis_url) as (_, narrow):
        await asyncio.gather(
            *(Wallet(narrow).credit("ada", 1, "top_up", id=f"topup:{number}") for number in range(200))
        )
        clients = str(await scripts.command("CLIENT", "LIST")).splitlines()
    assert await world.wallet.figures("ada") == Figures(GRANT + 200, 100, GRANT)
    assert len(clients) <= 2 + 1


async def test_a_refused_command_is_unavailable_and_not_repeated(scripts: Scripts) -> None:
    await scripts.command("SET", "text", "abc")
    with pytest.raises(MeteringUnavailable) as caught:
        await scripts.command("INCR", "text")
    assert isinstance(caught.value.__cause__, RedisError)
    with pytest.raises(MeteringUnavailable):
        await scripts.commands([["INCR", "counter"], ["INCR", "text"]])
    assert await scripts.command("GET", "counter") == "1"
    assert await scripts.command("DEL", "text", "counter") == 2


async def test_a_full_redis_changes_nothing_by_halves(scripts: Scripts) -> None:
    world = await World.make(scripts)
    before = await world.seen()
    await scripts.command("CONFIG", "SET", "maxmemory", "1")
    try:
        for verb in (reserve, extend, late_settle, top_up, create, suspend, issue):
            with pytest.raises(MeteringUnavailable):
                await verb(world)
    finally:
        await scripts.command("CONFIG", "SET", "maxmemory", "0")
    assert await world.seen() == before
    await prove(scripts)


async def test_a_full_redis_still_ends_what_it_holds(scripts: Scripts) -> None:
    world = await World.make(scripts)
    await scripts.command("CONFIG", "SET", "maxmemory", "1")
    try:
        ending = await world.wallet.settle(world.hold.id, "ada", 70, {})
    finally:
        await scripts.command("CONFIG", "SET", "maxmemory", "0")
    assert ending.figures == Figures(GRANT - 70, 0, GRANT - 70)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "allkeys-random"])
async def test_a_redis_that_evicts_is_refused(scripts: Scripts, policy: str) -> None:
    await scripts.check_server()
    await scripts.command("CONFIG", "SET", "maxmemory-policy", policy)
    try:
        with pytest.raises(ConfigError, match=f"evicts keys .maxmemory-policy {policy}"):
            await scripts.check_server()
    finally:
        await scripts.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await scripts.check_server()


@pytest.mark.parametrize("url", ["", "ftp://x", "localhost:6379", "redis://127.0.0.1:99999999"])
def test_a_url_that_can_not_be(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[redis\] url"):
        connect(url)


async def test_the_epoch_of_a_redis_is_opened_once_for_all(redis_url: str, scripts: Scripts) -> None:
    await scripts.open_epoch()
    epoch = await scripts.command("GET", keys.EPOCH)
    async with aclosing(Scripts(connect(redis_url))) as other:
        await other.open_epoch()
        assert await scripts.command("GET", keys.EPOCH) == epoch
        await other.check_epoch()
        await scripts.check_epoch()
        # Another process may begin a new epoch on the empty Redis; the old one is gone all the same.
        await scripts.command("FLUSHALL")
        with pytest.raises(MeteringUnavailable):
            await scripts.check_epoch()
        await other.open_epoch()
        await other.check_epoch()
        with pytest.raises(MeteringUnavailable):
            await scripts.check_epoch()


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
            await prove(scripts)


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
