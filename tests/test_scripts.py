import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from servers import connect as connect_directly
from servers import valkey

from llmhub_meter import keys
from llmhub_meter import scripts as module
from llmhub_meter.accounts import Accounts
from llmhub_meter.archive.audit import audit
from llmhub_meter.errors import ConfigError, InvalidApiKey, MeteringUnavailable
from llmhub_meter.scripts import SCRIPTS, Scripts, connect, script_source
from llmhub_meter.types import Account, Figures
from llmhub_meter.wallet import Terms, Wallet

ALICE = "alice"
LUA = Path(module.__file__).parent / "lua"


def header_and_body(name: str) -> tuple[str, str]:
    text = (LUA / f"{name}.lua").read_text()
    assert text.startswith("--[[\n"), f"{name} begins with its contract"
    header, body = text.split("]]\n", 1)
    return header, body


# the files


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("array", ["KEYS", "ARGV"])
def test_headers_name_what_bodies_use(name: str, array: str) -> None:
    header, body = header_and_body(name)
    named = [int(number) for number in re.findall(rf"{array}\[(\d+)(?:\.\.\.)?\]", header)]
    used = {
        int(number) for number in re.findall(rf"{array}\[(\d+)\]", script_source(name).split("]]\n", 1)[1])
    }
    if rest := re.search(rf"{array}\[(\d+)\.\.\.\]", header):
        assert f"for i = {rest[1]}, #{array} do" in body
        used.add(int(rest[1]))
    assert named == list(range(1, len(named) + 1)), "each once, in order"
    assert used == set(named)


@pytest.mark.parametrize("name", SCRIPTS)
def test_headers_list_the_words_that_bodies_answer(name: str) -> None:
    header, body = header_and_body(name)
    answered = set(re.findall(r'(?:\breturn \{|\banswer\()"(\w+)"', body))
    answered |= set(re.findall(r'\breturn \{\w+ == "1" and "(\w+)" or "\w+"', body))
    answered |= set(re.findall(r'\breturn \{\w+ == "1" and "\w+" or "(\w+)"', body))
    listed = re.search(r"\bstatus: (.*)", header, re.DOTALL)
    words = set(re.findall(r"\b\w+\b", re.sub(r"\([^)]*\)", "", listed[1]))) if listed else set()
    assert answered == words & ALL_WORDS
    assert answered <= ALL_WORDS
    assert bool(answered) == (name != "sweep")


ALL_WORDS = set(
    "ok exists ended unknown no_account suspended insufficient held count late conflict over_cap over_charge "
    "marked idem_running idem_charged idem_mismatch".split()
)


def test_every_file_is_a_script_and_every_include_is_included() -> None:
    assert {path.stem for path in LUA.glob("*.lua")} == set(SCRIPTS)
    included = {
        found
        for name in SCRIPTS
        for found in re.findall(r"^--@include (\w+)$", header_and_body(name)[1], re.M)
    }
    assert {path.stem for path in (LUA / "includes").glob("*.lua")} == included


@pytest.mark.parametrize("name", SCRIPTS)
def test_includes_stand_in_the_source(name: str) -> None:
    source = script_source(name)
    assert "@include" not in source
    assert "local function figures(wallet)" in source
    for include in re.findall(r"^--@include (\w+)$", header_and_body(name)[1], re.M):
        assert (LUA / "includes" / f"{include}.lua").read_text().strip() in source


@pytest.mark.parametrize("name", SCRIPTS)
def test_lua_never_joins_a_number_to_text(name: str) -> None:
    """`..` prints 100000000000001 as 1e+14, so what is joined is text that came from Redis or a caller."""
    body = script_source(name).split("]]\n", 1)[1]
    numbers = re.findall(r"local (\w+) = (?:tonumber|math\.\w+)\(", body)
    for number in numbers:
        assert not re.search(rf"\.\. *{number}\b|\b{number} *\.\.", body), number


async def test_keys_and_lua_spell_the_same_keys(scripts: Scripts) -> None:
    account, number = ALICE, keys.partition(ALICE)
    request = keys.new_request_id(account)
    probe = (
        (LUA / "includes" / "partition.lua").read_text()
        + "return {HOLDS, LEASES, LEDGER, HEAD, wallet_of(ARGV[1]), done_of(ARGV[2]), slot .. 'refunds', "
        "idem_of(ARGV[1], ARGV[3])}"
    )
    assert 'slot .. "refunds"' in (LUA / "credit.lua").read_text()
    assert await scripts.redis.eval(probe, 1, keys.wallet(account), account, request, "ab") == [
        keys.holds(number),
        keys.leases(number),
        keys.ledger(number),
        keys.head(number),
        keys.wallet(account),
        keys.done(request),
        keys.refunds(number),
        keys.idempotency(account, "ab"),
    ]


def test_the_keys_of_an_account_share_a_slot() -> None:
    number = keys.partition(ALICE)
    request = keys.new_request_id(ALICE)
    found = [
        keys.wallet(ALICE),
        keys.account_keys(ALICE),
        keys.credited(ALICE),
        keys.accounts(number),
        keys.holds(number),
        keys.leases(number),
        keys.ledger(number),
        keys.head(number),
        keys.refunds(number),
        keys.idempotency(ALICE, "0" * 64),
        keys.done(request),
        keys.done(keys.new_change_id(ALICE)),
        keys.api_key(keys.key_id(f"{number:02x}" + "0" * 62)),
    ]
    assert {key.split("}")[0] for key in found} == {f"{{p{number}"}
    assert len(set(found)) == len(found) - 1, "both ids are of the same ten minutes"


def test_ids_carry_their_time_and_partition() -> None:
    before = int(time.time() * 1000)
    request = keys.new_request_id(ALICE)
    assert keys.is_request_id(request)
    assert before <= keys.started_at(request) <= int(time.time() * 1000)
    assert keys.partition_of(request) == keys.partition(ALICE)
    for text in ("", "req_", request + "0", request[:-1], request.upper(), request + "\n", "x" + request):
        assert not keys.is_request_id(text)


# calls


@pytest.fixture
async def open_account(scripts: Scripts) -> None:
    await Accounts(scripts, signup_grant=1_000).ensure(Account(ALICE))


async def spend(scripts: Scripts, amount: int = 100) -> str:
    wallet, request = Wallet(scripts), keys.new_request_id(ALICE)
    await wallet.reserve(request, ALICE, Terms("m", fixed=amount))
    await wallet.settle(request, ALICE, amount, {})
    return request


async def codes(scripts: Scripts) -> list[str]:
    found = await scripts.command("XRANGE", keys.ledger(keys.partition(ALICE)), "-", "+")
    return [dict(fields)["code"] for _, fields in found]


async def test_an_emptied_script_cache_is_filled_again(audited: Scripts, open_account: None) -> None:
    for _ in range(3):
        await audited.command("SCRIPT", "FLUSH")
        await spend(audited)
    await audited.command("SCRIPT", "FLUSH")
    await Wallet(audited).credit(ALICE, 5, "grant", id="grant:1")
    assert await codes(audited) == ["account", "grant", "charge", "charge", "charge", "grant"]
    assert await Wallet(audited).figures(ALICE) == Figures(705, 0, 705)


async def test_a_script_is_sent_once(scripts: Scripts, open_account: None) -> None:
    await spend(scripts)
    await scripts.command("CONFIG", "RESETSTAT")
    for _ in range(5):
        await spend(scripts)
    stats = await scripts.command("INFO", "commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 10
    assert "cmdstat_eval" not in stats


async def test_a_command_that_redis_refuses_is_unavailable(scripts: Scripts) -> None:
    await scripts.command("SET", keys.wallet(ALICE), "no hash")
    with pytest.raises(MeteringUnavailable):
        await Wallet(scripts).figures(ALICE)
    with pytest.raises(MeteringUnavailable):
        await Wallet(scripts).reserve(keys.new_request_id(ALICE), ALICE, Terms("m", fixed=1))
    with pytest.raises(MeteringUnavailable):
        await scripts.commands([["HGETALL", keys.wallet(ALICE)]])


async def test_a_batch_can_be_of_one_moment(scripts: Scripts) -> None:
    await scripts.command("CONFIG", "RESETSTAT")
    assert await scripts.commands([["SET", "{a}1", 1], ["GET", "{a}1"]], atomic=True) == [True, "1"]
    assert "cmdstat_multi" in await scripts.command("INFO", "commandstats")


# failures of the server


async def test_a_server_that_restarts_between_calls(tmp_path: Path) -> None:
    """Its socket has the same place again, with the data; the connections that were open are dead."""
    async with restartable(tmp_path) as (server, scripts):
        await Accounts(scripts, signup_grant=1_000).ensure(Account(ALICE))
        await spend(scripts)
        await asyncio.gather(*(Wallet(scripts).figures(ALICE) for _ in range(5)))
        await server.stop()
        started = time.monotonic()
        with pytest.raises(MeteringUnavailable):
            await spend(scripts)
        assert time.monotonic() - started < 1
        await server.start()
        await spend(scripts)
        assert await Wallet(scripts).figures(ALICE) == Figures(800, 0, 800)
        await server.stop()
        await server.start()
        await asyncio.gather(*(spend(scripts, 10) for _ in range(5)))
        assert await Wallet(scripts).figures(ALICE) == Figures(750, 0, 750)
        assert (await audit(scripts)).findings == []


async def test_no_server_at_all(tmp_path: Path) -> None:
    async with aclosing(Scripts(connect(f"unix://{tmp_path}/nobody.sock"))) as scripts:
        started = time.monotonic()
        for call in (
            spend(scripts),
            scripts.command("GET", "x"),
            scripts.commands([["GET", "x"]]),
            scripts.check_server(),
            scripts.open_epoch(),
            scripts.check_epoch(),
            audit(scripts),
            Accounts(scripts, signup_grant=0).find(f"llmhub_sk_{'a' * 43}"),
            Wallet(scripts).settle(keys.new_request_id(ALICE), ALICE, 1, {}),
        ):
            with pytest.raises(MeteringUnavailable):
                await call
        assert time.monotonic() - started < 2


async def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDIS_TIMEOUT_SECONDS", 0.2)
    path = tmp_path / "silent.sock"
    handlers: set[asyncio.Task[Any]] = set()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(this_task())
        await reader.read()
        writer.close()

    async with (
        await asyncio.start_unix_server(silent, path),
        aclosing(Scripts(connect(f"unix://{path}"))) as scripts,
    ):
        started = time.monotonic()
        found = await asyncio.gather(*(spend(scripts) for _ in range(100)), return_exceptions=True)
        assert {type(error) for error in found} == {MeteringUnavailable}
        assert time.monotonic() - started < 5
        await scripts.aclose()
        await asyncio.wait_for(asyncio.gather(*handlers), 5)


def test_a_url_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"\[redis\] url"):
        connect("postgresql://localhost")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random"])
async def test_a_redis_that_evicts_is_refused(tmp_path: Path, policy: str) -> None:
    with valkey(tmp_path) as url:
        async with aclosing(Scripts(connect(url))) as scripts:
            await scripts.check_server()
            await scripts.command("CONFIG", "SET", "maxmemory-policy", policy)
            with pytest.raises(ConfigError, match=f"maxmemory-policy {policy}"):
                await scripts.check_server()


async def test_lost_data_is_no_empty_account(scripts: Scripts, redis_url: str) -> None:
    await scripts.open_epoch()
    await scripts.check_epoch()
    accounts = Accounts(scripts, signup_grant=1_000)
    await accounts.create("acme")
    secret, _ = await accounts.issue_key("acme")
    with pytest.raises(InvalidApiKey):
        await accounts.find(f"llmhub_sk_{'a' * 43}")
    with closing(connect_directly(redis_url)) as client:
        client.flushall()
    with pytest.raises(MeteringUnavailable):
        await scripts.check_epoch()
    with pytest.raises(MeteringUnavailable):
        await accounts.find(secret)
    async with aclosing(Scripts(connect(redis_url))) as another:
        await another.open_epoch()
        await another.check_epoch()
    # A new epoch that another process began is not the data that this one knew.
    with pytest.raises(MeteringUnavailable):
        await scripts.check_epoch()


async def test_an_epoch_is_begun_once(scripts: Scripts, redis_url: str) -> None:
    await asyncio.gather(*(scripts.open_epoch() for _ in range(10)))
    first = await scripts.command("GET", keys.EPOCH)
    async with aclosing(Scripts(connect(redis_url))) as another:
        await another.open_epoch()
        await another.check_epoch()
    await scripts.check_epoch()
    assert await scripts.command("GET", keys.EPOCH) == first
    assert re.fullmatch("[0-9a-f]{16}", first)


# lost replies and cancelled calls


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


class Proxy:
    """Stands before the server: cuts the reply to a call after the server made it, or delays replies."""

    def __init__(self, target: Path, path: Path) -> None:
        self.target = target
        self.path = path
        self.cuts = 0
        self.delay: tuple[float, float] | None = None
        self.connections = 0
        self.handlers: set[asyncio.Task[Any]] = set()
        self._random = random.Random(7)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.handlers.add(this_task())
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self.target)
        there = asyncio.create_task(self.forward(reader, upstream_writer))
        with suppress(ConnectionError):
            while reply := await upstream_reader.read(65536):
                if self.delay is not None:
                    await asyncio.sleep(self._random.uniform(*self.delay))
                # Only a script's answer is cut, which is a list: errors and greetings begin otherwise.
                if self.cuts and reply.startswith(b"*"):
                    self.cuts -= 1
                    break
                writer.write(reply)
                await writer.drain()
        there.cancel()
        for open_writer in (upstream_writer, writer):
            open_writer.close()
            with suppress(ConnectionError):
                await open_writer.wait_closed()
        with suppress(asyncio.CancelledError):
            await there

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
        writer.close()


@pytest.fixture
async def proxy(redis_url: str, tmp_path: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(Path(redis_url.removeprefix("unix://")), tmp_path / "proxy.sock")
    async with await asyncio.start_unix_server(proxy.serve, proxy.path):
        yield proxy
        await asyncio.wait_for(asyncio.gather(*proxy.handlers), 5)


@pytest.fixture
async def proxied(proxy: Proxy, audited: Scripts, open_account: None) -> AsyncIterator[Scripts]:
    """Scripts whose calls go through the proxy, beside `audited` that sees the server as it is."""
    async with aclosing(Scripts(connect(f"unix://{proxy.path}"))) as scripts:
        await spend(scripts)
        await Wallet(scripts).release(keys.new_request_id(ALICE), ALICE, {})
        await Wallet(scripts).credit(ALICE, 1, "grant", id="grant:first")
        yield scripts


async def test_a_lost_reply_is_one_change(proxy: Proxy, proxied: Scripts, audited: Scripts) -> None:
    wallet, request = Wallet(proxied), keys.new_request_id(ALICE)
    before = len(await codes(audited))
    proxy.cuts = 1
    hold = await wallet.reserve(request, ALICE, Terms("m", fixed=100))
    assert hold is not None and (hold.amount, hold.figures) == (100, Figures(901, 100, 901))
    proxy.cuts = 1
    ending = await wallet.settle(request, ALICE, 70, {})
    assert (ending.state, ending.charge, ending.figures) == ("settled", 70, Figures(831, 0, 831))
    proxy.cuts = 1
    assert await wallet.credit(ALICE, 500, "top_up", id="topup:1") == Figures(1_331, 0, 831)
    proxy.cuts = 1
    assert (await wallet.release(keys.new_request_id(ALICE), ALICE, {})).state == "released"
    proxy.cuts = 1
    await Accounts(proxied, signup_grant=0).set(ALICE, {"email": "a@example.com"})
    assert proxy.cuts == 0
    assert (await codes(audited))[before:] == ["charge", "top_up", "account"]


@pytest.mark.parametrize("verb", ["reserve", "settle", "credit"])
async def test_two_lost_replies_are_unavailable_and_one_change(
    proxy: Proxy, proxied: Scripts, audited: Scripts, verb: str
) -> None:
    wallet, request = Wallet(proxied), keys.new_request_id(ALICE)
    proxy.cuts = 2

    async def call() -> Any:
        match verb:
            case "reserve":
                return await wallet.reserve(request, ALICE, Terms("m", fixed=100))
            case "settle":
                return await wallet.settle(request, ALICE, 100, {})
            case "credit":
                return await wallet.credit(ALICE, 100, "top_up", id="topup:1")

    before = await codes(audited)
    with pytest.raises(MeteringUnavailable):
        await call()
    assert proxy.cuts == 0
    await call()
    await call()
    after = {"reserve": [], "settle": ["charge"], "credit": ["top_up"]}[verb]
    assert (await codes(audited))[len(before) :] == after
    figures = {"reserve": (901, 100), "settle": (801, 0), "credit": (1_001, 0)}[verb]
    found = await wallet.figures(ALICE)
    assert found is not None and (found.balance, found.held) == figures


@pytest.mark.parametrize("batch", [False, True])
async def test_a_cancelled_call_never_leaves_its_answer_to_another(
    proxy: Proxy, proxied: Scripts, audited: Scripts, monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    """Hundreds of calls over four connections, most cancelled at some moment of their way."""
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 4)
    await audited.commands([["SET", f"test:{number}", f"value {number}"] for number in range(600)])
    proxy.delay = 0.0, 0.003
    chance = random.Random(11)

    async with aclosing(Scripts(connect(f"unix://{proxy.path}"))) as few:

        async def read(number: int) -> bool:
            command = ["GET", f"test:{number}"]
            found = (await few.commands([command, command]))[1] if batch else await few.command(*command)
            assert found == f"value {number}"
            return True

        async def read_or_leave(number: int) -> bool:
            if number % 3 == 0:
                return await read(number)
            task = asyncio.create_task(read(number))
            await asyncio.sleep(chance.uniform(0, 0.02))
            task.cancel()
            with suppress(asyncio.CancelledError):
                return await task
            return False

        finished: Counter[bool] = Counter()
        for start in range(0, 600, 40):
            finished.update(await asyncio.gather(*(read_or_leave(n) for n in range(start, start + 40))))
        assert finished[True] >= 200 and finished[False] >= 100
        # No connection was lost to a cancelled call: four calls at once are still answered.
        await asyncio.gather(*(read(number) for number in range(4)))
        proxy.delay = 0.4, 0.4
        started = time.monotonic()
        assert await asyncio.gather(*(read(number) for number in range(4))) == [True] * 4
        assert time.monotonic() - started < 0.75
    assert proxy.connections > 4


async def test_a_cancelled_reserve_is_whole_or_not_at_all(
    proxy: Proxy, proxied: Scripts, audited: Scripts
) -> None:
    """Whatever became of a cancelled call, a release ends it and nothing stays held."""
    proxy.delay = 0.0, 0.003
    chance = random.Random(13)
    wallet = Wallet(proxied)

    async def reserve_and_leave() -> None:
        request = keys.new_request_id(ALICE)
        task = asyncio.create_task(wallet.reserve(request, ALICE, Terms("m", fixed=1)))
        await asyncio.sleep(chance.uniform(0, 0.006))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await wallet.release(request, ALICE, {})

    await asyncio.gather(*(reserve_and_leave() for _ in range(200)))
    assert await Wallet(audited).figures(ALICE) == Figures(901, 0, 901)


# a server that can be stopped and started


class Server:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "valkey.sock"
        self._running: Any = None

    async def start(self) -> None:
        self._running = valkey(self.directory, appendonly=True)
        url = self._running.__enter__()
        # The url is another one at each start, and a link to it is not.
        self.path.symlink_to(url.removeprefix("unix://"))

    async def stop(self) -> None:
        self.path.unlink()
        self._running.__exit__(None, None, None)


@asynccontextmanager
async def restartable(directory: Path) -> AsyncIterator[tuple[Server, Scripts]]:
    server = Server(directory)
    await server.start()
    try:
        async with aclosing(Scripts(connect(f"unix://{server.path}"))) as scripts:
            yield server, scripts
    finally:
        await server.stop()
