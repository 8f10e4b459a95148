import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from llmhub_meter import accounts as module
from llmhub_meter import keys
from llmhub_meter.accounts import CACHE_SECONDS, KEY_PATTERN, Accounts, Holder, check_account_id
from llmhub_meter.archive.audit import audit
from llmhub_meter.errors import (
    AccountExists,
    CreditsHeld,
    InsufficientCredits,
    InvalidApiKey,
    MeteringUnavailable,
    UnknownAccount,
    UnknownKey,
    WalletError,
)
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.types import Account, Figures
from llmhub_meter.wallet import Terms, Wallet

GRANT = 1_000_000_000
"""The signup grant of 100,000 credits."""


@pytest.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    """Scripts on an empty server, whose ledger is proved after the test."""
    async with aclosing(Scripts(connect(redis_url))) as scripts:
        await scripts.open_epoch()
        yield scripts
        report = await audit(scripts)
        assert report.differences == 0, report.findings


@pytest.fixture
def accounts(scripts: Scripts) -> Accounts:
    return Accounts(scripts, signup_grant=GRANT)


async def entries(scripts: Scripts, account: str) -> list[tuple[str, str, int]]:
    """The ledger of an account: code, id, amount."""
    stream = await scripts.command("XRANGE", keys.ledger(keys.partition(account)), "-", "+")
    return [
        (fields["code"], fields["id"], int(fields["amount"]))
        for _, fields in stream
        if fields["account"] == account
    ]


class Clock:
    """Stands in for the `time` module: the monotonic clock moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.25


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


# Accounts


async def test_a_new_account_has_the_signup_grant_and_two_entries(
    accounts: Accounts, scripts: Scripts, clock: Clock
) -> None:
    made = await accounts.create("Ada Lovelace", email="ada@example.org")
    assert made.id.startswith("acct_") and len(made.id) == 21
    expected = Account(made.id, "Ada Lovelace", "ada@example.org", "active", 1_700_000_000_250)
    assert made == expected
    holder = Holder(expected, Figures(GRANT, 0, GRANT), signup_grant=GRANT, last_topup=None)
    assert await accounts.get("Ada Lovelace") == holder
    assert await accounts.get(made.id) == holder
    (opened, granted) = await entries(scripts, made.id)
    assert (opened[0], opened[2]) == ("account", 0)
    assert granted == ("grant", f"grant:signup:{made.id}", GRANT)


async def test_without_a_signup_grant_there_is_no_grant_entry(scripts: Scripts) -> None:
    made = await Accounts(scripts, signup_grant=0).create("ada")
    assert [code for code, _, _ in await entries(scripts, made.id)] == ["account"]
    assert (await Accounts(scripts, signup_grant=0).get("ada")).figures == Figures(0, 0, 0)


async def test_a_name_that_exists_is_refused_and_nothing_changes(
    accounts: Accounts, scripts: Scripts
) -> None:
    made = await accounts.create("ada", email="ada@example.org")
    before = await accounts.get("ada")
    with pytest.raises(AccountExists, match="'ada'"):
        await accounts.create("ada", email="other@example.org")
    assert await accounts.get("ada") == before
    assert len(await entries(scripts, made.id)) == 2
    assert [holder.account.id async for holder in accounts.all()] == [made.id]


async def test_a_name_that_was_claimed_by_a_dead_maker_is_taken_over(
    accounts: Accounts, scripts: Scripts
) -> None:
    await scripts.command("HSET", keys.NAMES, "ada", "acct_0123456789abcdef")
    with pytest.raises(UnknownAccount):
        await accounts.get("ada")
    made = await accounts.create("ada")
    assert made.id == "acct_0123456789abcdef"
    assert (await accounts.get("ada")).figures.balance == GRANT


async def test_of_concurrent_creators_one_wins(redis_url: str, scripts: Scripts) -> None:
    async def create(number: int) -> Account:
        async with aclosing(Scripts(connect(redis_url))) as own:
            return await Accounts(own, signup_grant=GRANT).create("ada", email=f"{number}@example.org")

    outcomes = await asyncio.gather(*(create(number) for number in range(20)), return_exceptions=True)
    made = [outcome for outcome in outcomes if isinstance(outcome, Account)]
    assert len(made) == 1
    assert sum(isinstance(outcome, AccountExists) for outcome in outcomes) == 19
    holder = await Accounts(scripts, signup_grant=GRANT).get("ada")
    assert holder.account.id == made[0].id and holder.account.email == made[0].email
    assert holder.figures == Figures(GRANT, 0, GRANT)
    assert [code for code, _, _ in await entries(scripts, made[0].id)] == ["account", "grant"]


async def test_an_account_seen_first_by_20_requests_is_granted_once(redis_url: str, scripts: Scripts) -> None:
    """FAULTS 8 and 10: 20 first calls at 100 each, on a grant of 1,000."""

    async def first_call() -> bool:
        async with aclosing(Scripts(connect(redis_url))) as own:
            await Accounts(own, signup_grant=1000).ensure(Account("newcomer"))
            wallet, request = Wallet(own), keys.new_request_id("newcomer")
            try:
                await wallet.reserve(request, "newcomer", Terms("m", fixed=100))
            except (InsufficientCredits, CreditsHeld):
                return False
            await asyncio.sleep(0.05)
            await wallet.settle(request, "newcomer", 100, {})
            return True

    admitted = await asyncio.gather(*(first_call() for _ in range(20)))
    assert sum(admitted) == 10
    codes = [entry for entry in await entries(scripts, "newcomer") if entry[0] == "grant"]
    assert codes == [("grant", "grant:signup:newcomer", 1000)]
    assert (await Accounts(scripts, signup_grant=1000).get("newcomer")).figures == Figures(0, 0, 0)


async def test_ensure_changes_nothing_of_an_account_that_is_there(
    accounts: Accounts, scripts: Scripts
) -> None:
    await accounts.ensure(Account("u-1", name="One", email="one@example.org"))
    before = await accounts.get("u-1")
    assert before.account.name == "One" and before.account.email == "one@example.org"
    await accounts.ensure(Account("u-1", name="Other", email="other@example.org"))
    await Accounts(scripts, signup_grant=5).ensure(Account("u-1"))
    assert await accounts.get("u-1") == before


async def test_an_account_without_a_name_is_called_by_its_id(accounts: Accounts) -> None:
    await accounts.ensure(Account("u-1"))
    assert (await accounts.get("u-1")).account.name == "u-1"


@pytest.mark.parametrize(
    "id", ["", "two words", "tab\tbed", "new\nline", "nul\0", "a" * 201, "\u00a0", "\u2028"]
)
async def test_account_ids_that_keys_can_not_carry(accounts: Accounts, id: str) -> None:
    with pytest.raises(WalletError):
        await accounts.ensure(Account(id))
    assert [holder async for holder in accounts.all()] == []


@pytest.mark.parametrize("id", ["a", "user:1}{p3}", "größe", "🦉", "%s", "a" * 200])
async def test_account_ids_of_any_printable_kind(accounts: Accounts, scripts: Scripts, id: str) -> None:
    check_account_id(id)
    await accounts.ensure(Account(id))
    wallet, request = Wallet(scripts), keys.new_request_id(id)
    await wallet.reserve(request, id, Terms("a model", fixed=10))
    assert await wallet.held(request) == (10, id, "a model")
    assert (await wallet.settle(request, id, 4, {})).figures == Figures(GRANT - 4, 0, GRANT - 4)
    assert (await accounts.get(id)).account.id == id


@pytest.mark.parametrize("name", ["", " ada", "ada ", "new\nline", "nul\0", "a" * 201, "\t"])
async def test_names_that_can_not_be(accounts: Accounts, scripts: Scripts, name: str) -> None:
    with pytest.raises(WalletError, match="name"):
        await accounts.create(name)
    assert await scripts.command("HLEN", keys.NAMES) == 0


@pytest.mark.parametrize(
    "email", ["", "ada", "@", "ada@", "@example.org", "a b@c.d", "a@b@c", "a@b\n", "a" * 320 + "@b"]
)
async def test_emails_that_can_not_be(accounts: Accounts, scripts: Scripts, email: str) -> None:
    with pytest.raises(WalletError, match="e-mail"):
        await accounts.create("ada", email=email)
    assert await scripts.command("HLEN", keys.NAMES) == 0
    await accounts.create("ada")
    with pytest.raises(WalletError, match="e-mail"):
        await accounts.set("ada", {"email": email})
    assert (await accounts.get("ada")).account.email is None


async def test_all_lists_every_account_of_every_partition(accounts: Accounts) -> None:
    made = {(await accounts.create(f"account {number}")).id for number in range(30)}
    assert len({keys.partition(id) for id in made}) > 10
    listed = [holder async for holder in accounts.all()]
    assert len(listed) == 30
    assert {holder.account.id for holder in listed} == made
    assert {holder.figures for holder in listed} == {Figures(GRANT, 0, GRANT)}


async def test_set_changes_fields_and_says_so_in_the_ledger(accounts: Accounts, scripts: Scripts) -> None:
    made = await accounts.create("ada", email="ada@example.org")
    holder = await accounts.set("ada", {"status": "suspended", "email": "new@example.org"})
    assert holder.account == Account(made.id, "ada", "new@example.org", "suspended", made.created_at)
    assert await accounts.get("ada") == holder
    stream = await scripts.command("XREVRANGE", keys.ledger(keys.partition(made.id)), "+", "-", "COUNT", 1)
    assert stream[0][1]["code"] == "account"
    assert stream[0][1]["data"] == '{"status":"suspended","email":"new@example.org"}'
    assert (await accounts.set(made.id, {"status": "active"})).account.status == "active"


async def test_setting_nothing_writes_no_entry(accounts: Accounts, scripts: Scripts) -> None:
    made = await accounts.create("ada")
    assert await accounts.set("ada", {}) == await accounts.get("ada")
    assert len(await entries(scripts, made.id)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": "5"}, "'balance' can't be set"),
        ({"name": "b"}, "'name' can't be set"),
        ({"email": "ok@example.org", "held": "0"}, "'held' can't be set"),
        ({"status": "deleted"}, "active or suspended"),
    ],
)
async def test_fields_that_can_not_be_set(accounts: Accounts, changes: dict[str, str], message: str) -> None:
    await accounts.create("ada")
    before = await accounts.get("ada")
    with pytest.raises(WalletError, match=message):
        await accounts.set("ada", changes)
    assert await accounts.get("ada") == before


async def test_accounts_that_are_not_there(accounts: Accounts) -> None:
    for call in (
        accounts.get("nobody"),
        accounts.set("nobody", {"status": "suspended"}),
        accounts.issue_key("nobody"),
        accounts.list_keys("nobody"),
    ):
        with pytest.raises(UnknownAccount, match="'nobody'"):
            await call
    assert [holder async for holder in accounts.all()] == []


# Keys


async def test_a_key_is_found_by_its_secret_alone(accounts: Accounts, clock: Clock) -> None:
    made = await accounts.create("ada")
    secret, key = await accounts.issue_key("ada", name="laptop")
    assert KEY_PATTERN.fullmatch(secret) and secret.startswith("llmhub_sk_") and len(secret) == 53
    assert key.account == made.id and key.kind == "sk" and key.name == "laptop"
    assert key.hint == f"{secret[:13]}...{secret[-4:]}"
    assert key.created_at == 1_700_000_000_250 and key.revoked_at is None
    assert await accounts.find(secret) == key
    assert await accounts.list_keys("ada") == [key]


async def test_a_limited_key_is_of_its_own_kind(accounts: Accounts) -> None:
    await accounts.create("ada")
    secret, key = await accounts.issue_key("ada", kind="pk")
    assert KEY_PATTERN.fullmatch(secret) and secret.startswith("llmhub_pk_")
    assert key.kind == "pk"
    assert (await accounts.find(secret)).kind == "pk"


async def test_keys_are_each_their_own_and_share_the_slot_of_their_account(accounts: Accounts) -> None:
    made = await accounts.create("ada")
    other = await accounts.create("bob")
    issued = [await accounts.issue_key("ada", name=str(number)) for number in range(5)]
    _, foreign = await accounts.issue_key("bob")
    assert len({secret for secret, _ in issued}) == len({key.id for _, key in issued}) == 5
    for _, key in issued:
        assert keys.is_key_id(key.id)
        assert keys.api_key(key.id).startswith(f"{{p{keys.partition(made.id)}}}:")
    assert sorted(key.name for key in await accounts.list_keys("ada")) == ["0", "1", "2", "3", "4"]
    assert await accounts.list_keys(other.id) == [foreign]


async def test_keys_are_listed_oldest_first(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    await accounts.create("ada")
    for moment in (3000, 1000, 2000):
        monkeypatch.setattr(module, "_now", lambda moment=moment: moment)
        await accounts.issue_key("ada", name=str(moment))
    assert [key.name for key in await accounts.list_keys("ada")] == ["1000", "2000", "3000"]


async def test_no_secret_stands_anywhere_in_redis(accounts: Accounts, scripts: Scripts) -> None:
    await accounts.create("ada", email="ada@example.org")
    issued = [await accounts.issue_key("ada", kind=kind) for kind in ("sk", "pk")]
    for secret, key in issued:
        await accounts.find(secret)
        await accounts.revoke_key(key.id)
    text = "\n".join([line async for line in everything(scripts)])
    assert "ada@example.org" in text and "llmhub_sk_" in text
    for secret, key in issued:
        assert hashlib.sha256(secret.encode()).hexdigest() in text
        assert key.hint in text
        # Prefix and last four stand in the hint; no longer piece of the random part may.
        assert not any(secret[start : start + 8] in text for start in range(10, len(secret) - 7))


async def everything(scripts: Scripts) -> AsyncIterator[str]:
    """Every key of a Redis with its value."""
    reads: dict[str, list[str | int]] = {
        "string": ["GET"],
        "hash": ["HGETALL"],
        "set": ["SMEMBERS"],
        "zset": ["ZRANGE", 0, -1],
        "stream": ["XRANGE", "-", "+"],
    }
    cursor: int = 0
    while True:
        cursor, found = await scripts.command("SCAN", cursor, "COUNT", 1000)
        for key in found:
            command, *rest = reads[await scripts.command("TYPE", key)]
            yield f"{key} {await scripts.command(command, key, *rest)}"
        if not cursor:
            return


async def test_a_revoked_key_is_refused_and_stays_revoked(accounts: Accounts, scripts: Scripts) -> None:
    made = await accounts.create("ada")
    secret, key = await accounts.issue_key("ada")
    other_secret, other = await accounts.issue_key("ada")
    assert await accounts.find(secret) == key
    revoked = await accounts.revoke_key(key.id)
    assert revoked.id == key.id and revoked.revoked_at is not None
    with pytest.raises(InvalidApiKey, match="revoked"):
        await accounts.find(secret)
    assert await accounts.find(other_secret) == other
    codes = [code for code, _, _ in await entries(scripts, made.id)]
    assert codes == ["account", "grant", "key", "key", "key"]
    assert await accounts.revoke_key(key.id) == revoked
    assert len(await entries(scripts, made.id)) == 5
    assert revoked in await accounts.list_keys("ada")


async def test_another_process_refuses_a_revoked_key_within_a_second(
    redis_url: str, accounts: Accounts, clock: Clock
) -> None:
    await accounts.create("ada")
    secret, key = await accounts.issue_key("ada")
    async with aclosing(Scripts(connect(redis_url))) as scripts:
        await scripts.open_epoch()
        elsewhere = Accounts(scripts, signup_grant=GRANT)
        assert await elsewhere.find(secret) == key
        await accounts.revoke_key(key.id)
        clock.now += CACHE_SECONDS - 0.01
        assert await elsewhere.find(secret) == key, "a found key is not asked for again at once"
        clock.now += 0.01
        with pytest.raises(InvalidApiKey, match="revoked"):
            await elsewhere.find(secret)
        with pytest.raises(InvalidApiKey, match="revoked"):
            await elsewhere.find(secret)
    assert CACHE_SECONDS <= 1


async def test_the_cache_of_keys_is_bounded(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_SIZE", 2)
    await accounts.create("ada")
    issued = [await accounts.issue_key("ada") for _ in range(4)]
    for secret, key in issued:
        assert await accounts.find(secret) == key
        assert len(accounts._found) <= 2


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "sk-proj-0123456789",
        "llmhub_sk_",
        "llmhub_sk_" + "a" * 42,
        "llmhub_sk_" + "a" * 44,
        "llmhub_xk_" + "a" * 43,
        "LLMHUB_SK_" + "a" * 43,
        "llmhub_sk_" + "a" * 42 + "\n",
        "llmhub_sk_" + "a" * 43 + "\n",
        "llmhub_sk_" + "a" * 42 + "ä",
        " llmhub_sk_" + "a" * 43,
        "llmhub_sk_" + "a" * 43,
    ],
)
async def test_keys_that_were_never_issued(accounts: Accounts, secret: str) -> None:
    with pytest.raises(InvalidApiKey):
        await accounts.find(secret)


async def test_a_key_of_the_other_kind_is_another_key(accounts: Accounts) -> None:
    await accounts.create("ada")
    secret, _ = await accounts.issue_key("ada", kind="pk")
    with pytest.raises(InvalidApiKey):
        await accounts.find(secret.replace("_pk_", "_sk_"))


async def test_a_key_whose_id_alone_agrees_is_refused(accounts: Accounts, scripts: Scripts) -> None:
    """The id holds 96 of the 256 bits; the whole hash decides."""
    await accounts.create("ada")
    secret, key = await accounts.issue_key("ada")
    digest = hashlib.sha256(secret.encode()).hexdigest()
    forged = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    await scripts.command("HSET", keys.api_key(key.id), "hash", forged)
    with pytest.raises(InvalidApiKey):
        await accounts.find(secret)


@pytest.mark.parametrize("id", ["", "key_", "key_zz", "key_" + "0" * 24, "key_" + "f" * 25, "llmhub_sk_x"])
async def test_key_ids_that_are_not_there(accounts: Accounts, id: str) -> None:
    with pytest.raises(UnknownKey):
        await accounts.revoke_key(id)


@pytest.mark.parametrize("name", ["a" * 201, "new\nline", "nul\0"])
async def test_key_names_that_can_not_be(accounts: Accounts, name: str) -> None:
    await accounts.create("ada")
    with pytest.raises(WalletError, match="name"):
        await accounts.issue_key("ada", name=name)
    assert await accounts.list_keys("ada") == []


async def test_a_wiped_redis_is_not_believed_when_it_knows_no_key(
    accounts: Accounts, scripts: Scripts
) -> None:
    await accounts.create("ada")
    secret, _ = await accounts.issue_key("ada")
    await scripts.command("FLUSHALL")
    with pytest.raises(MeteringUnavailable):
        await accounts.find(secret)
    with pytest.raises(MeteringUnavailable):
        await accounts.find("llmhub_sk_" + "a" * 43)
