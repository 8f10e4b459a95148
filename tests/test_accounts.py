import asyncio
import hashlib
import re
import time
from collections import Counter
from typing import Any

import pytest

from llmhub_meter import accounts as module
from llmhub_meter import keys
from llmhub_meter.accounts import CACHE_SECONDS, KEY_PATTERN, Accounts
from llmhub_meter.errors import (
    AccountExists,
    AccountRestricted,
    IdConflict,
    InvalidApiKey,
    MeterError,
    UnknownAccount,
    UnknownKey,
    WalletError,
)
from llmhub_meter.money import ticks
from llmhub_meter.scripts import Scripts
from llmhub_meter.types import Account, Figures
from llmhub_meter.wallet import Terms, Wallet

GRANT = ticks(100_000)


@pytest.fixture
def accounts(audited: Scripts) -> Accounts:
    return Accounts(audited, signup_grant=GRANT)


async def entries(scripts: Scripts, account: str) -> list[dict[str, str]]:
    found = await scripts.command("XRANGE", keys.ledger(keys.partition(account)), "-", "+")
    return [dict(fields) for _, fields in found]


async def codes(scripts: Scripts, account: str) -> list[str]:
    return [fields["code"] for fields in await entries(scripts, account)]


# accounts


async def test_a_new_account_has_its_grant(accounts: Accounts, audited: Scripts) -> None:
    before = int(time.time() * 1000)
    made = await accounts.create("acme", email="a@example.com")
    assert re.fullmatch("acct_[0-9a-f]{16}", made.id)
    holder = await accounts.get("acme")
    assert (holder.account.id, holder.account.name, holder.account.email) == (
        made.id,
        "acme",
        "a@example.com",
    )
    assert holder.account == made
    assert holder.account.status == "active"
    assert before <= holder.account.created_at <= int(time.time() * 1000)
    assert holder.figures == Figures(GRANT, 0, GRANT)
    assert (holder.signup_grant, holder.last_topup) == (GRANT, None)
    assert await accounts.get(made.id) == holder
    opened, granted = await entries(audited, made.id)
    assert (opened["code"], opened["amount"]) == ("account", "0")
    assert (granted["id"], granted["code"]) == (f"grant:signup:{made.id}", "grant")
    assert (granted["amount"], granted["promo"]) == (str(GRANT), str(GRANT))


async def test_without_a_grant_nothing_is_booked(audited: Scripts) -> None:
    made = await Accounts(audited, signup_grant=0).create("acme")
    assert await codes(audited, made.id) == ["account"]
    assert await Wallet(audited).figures(made.id) == Figures(0, 0)


async def test_a_name_that_exists_changes_nothing(accounts: Accounts, audited: Scripts) -> None:
    made = await accounts.create("acme", email="a@example.com")
    before = await accounts.get("acme")
    for email in (None, "b@example.com"):
        with pytest.raises(AccountExists, match="'acme'"):
            await accounts.create("acme", email=email)
    assert await accounts.get("acme") == before
    assert await codes(audited, made.id) == ["account", "grant"]
    assert [holder async for holder in accounts.all()] == [before]


async def test_a_claimed_name_without_an_account_is_taken_over(accounts: Accounts, audited: Scripts) -> None:
    """Its maker died between the claim and the account."""
    await audited.command("HSET", keys.NAMES, "acme", "acct_0123456789abcdef")
    with pytest.raises(UnknownAccount):
        await accounts.get("acme")
    made = await accounts.create("acme")
    assert made.id == "acct_0123456789abcdef"
    assert (await accounts.get("acme")).figures == Figures(GRANT, 0, GRANT)
    with pytest.raises(AccountExists):
        await accounts.create("acme")


@pytest.mark.parametrize("dangling", [False, True])
async def test_of_many_creators_at_once_one_wins(audited: Scripts, dangling: bool) -> None:
    if dangling:
        await audited.command("HSET", keys.NAMES, "acme", "acct_0123456789abcdef")
    creators = [Accounts(audited, signup_grant=GRANT) for _ in range(20)]
    found = await asyncio.gather(*(one.create("acme") for one in creators), return_exceptions=True)
    assert Counter(type(answer) for answer in found) == {Account: 1, AccountExists: 19}
    (made,) = [answer for answer in found if isinstance(answer, Account)]
    assert (await creators[0].get("acme")).account.id == made.id
    assert await codes(audited, made.id) == ["account", "grant"]


async def test_an_account_seen_first_in_many_calls_has_one_grant(audited: Scripts) -> None:
    """20 first calls of a customer with holds of 100 on a grant of 1,000: ten are admitted."""
    accounts, wallet = Accounts(audited, signup_grant=ticks(1_000)), Wallet(audited)

    async def first_call() -> str:
        await accounts.ensure(Account("user-7", name="Seven"))
        request = keys.new_request_id("user-7")
        try:
            await wallet.reserve(request, "user-7", Terms("m", fixed=ticks(100)))
        except MeterError as error:
            return type(error).__name__
        return request

    found = await asyncio.gather(*(first_call() for _ in range(20)))
    admitted = [answer for answer in found if keys.is_request_id(answer)]
    assert (len(admitted), Counter(found)["CreditsHeld"]) == (10, 10)
    for request in admitted:
        await wallet.settle(request, "user-7", ticks(100), {})
    assert await wallet.figures("user-7") == Figures(0, 0)
    assert Counter(await codes(audited, "user-7")) == {"account": 1, "grant": 1, "charge": 10}


async def test_a_signup_grant_is_given_once(accounts: Accounts, audited: Scripts) -> None:
    for _ in range(3):
        await accounts.ensure(Account("user-7"))
    with pytest.raises(IdConflict):
        await Wallet(audited).credit("user-7", GRANT + 1, "grant", id="grant:signup:user-7")
    await Wallet(audited).credit("user-7", GRANT, "grant", id="grant:signup:user-7")
    assert await codes(audited, "user-7") == ["account", "grant"]
    assert (await accounts.get("user-7")).figures == Figures(GRANT, 0, GRANT)


async def test_an_account_without_a_name_is_called_by_its_id(accounts: Accounts) -> None:
    await accounts.ensure(Account("user-7"))
    assert (await accounts.get("user-7")).account.name == "user-7"


async def test_ensuring_keeps_what_was_set(accounts: Accounts) -> None:
    await accounts.ensure(Account("user-7", name="Seven", email="7@example.com"))
    await accounts.set("user-7", {"status": "suspended"})
    await accounts.ensure(Account("user-7", name="Eight"))
    account = (await accounts.get("user-7")).account
    assert (account.name, account.email, account.status) == ("Seven", "7@example.com", "suspended")


@pytest.mark.parametrize(
    "name", ["", "x" * 201, " acme", "acme ", "a\nb", "a\x00b", "a\u2028b", "\u202eacme"]
)
async def test_names_that_cannot_be(accounts: Accounts, audited: Scripts, name: str) -> None:
    with pytest.raises(WalletError, match="name"):
        await accounts.create(name)
    assert await audited.command("DBSIZE") == 0


@pytest.mark.parametrize("name", ["x" * 200, "Köln & Söhne", "日本", "a b", "'; FLUSHALL", "{p0}:wallet:x"])
async def test_names_that_can_be(accounts: Accounts, name: str) -> None:
    made = await accounts.create(name)
    assert (await accounts.get(name)).account.id == made.id


@pytest.mark.parametrize(
    "email", ["", "a", "a@", "@b", "a b@c", "a@b@c", "a@b\n", "a\r\nbcc: x@y", f"{'a' * 320}@b", "a@b\x00"]
)
async def test_emails_that_cannot_be(accounts: Accounts, audited: Scripts, email: str) -> None:
    with pytest.raises(WalletError, match="e-mail"):
        await accounts.create("acme", email=email)
    assert await audited.command("DBSIZE") == 0


@pytest.mark.parametrize("id", ["", "x" * 201, "a b", "a\tb", "a\u00a0b", "a\x00"])
async def test_account_ids_that_cannot_be(accounts: Accounts, audited: Scripts, id: str) -> None:
    with pytest.raises(WalletError, match="account id"):
        await accounts.ensure(Account(id))
    assert await audited.command("DBSIZE") == 0


@pytest.mark.parametrize("id", ["7", "x" * 200, "user:7", "{x}", "größe", "a|b", "%s", "-1"])
async def test_account_ids_that_can_be(accounts: Accounts, audited: Scripts, id: str) -> None:
    await accounts.ensure(Account(id))
    wallet, request = Wallet(audited), keys.new_request_id(id)
    hold = await wallet.reserve(request, id, Terms("m", fixed=5))
    assert hold is not None
    await audited.command("ZADD", keys.leases(keys.partition(id)), 1, request)
    assert await wallet.sweep(keys.partition(id)) == 1
    assert (await wallet.settle(request, id, 5, {})).figures.balance == GRANT - 5


async def test_all_accounts_are_listed(accounts: Accounts) -> None:
    made = {(await accounts.create(f"acme {number}")).id for number in range(30)}
    await accounts.ensure(Account("user-7"))
    listed = [holder async for holder in accounts.all()]
    assert {holder.account.id for holder in listed} == made | {"user-7"}
    assert len(listed) == 31
    assert {holder.figures for holder in listed} == {Figures(GRANT, 0, GRANT)}


async def test_fields_of_an_account_are_set(accounts: Accounts, audited: Scripts) -> None:
    made = await accounts.create("acme")
    holder = await accounts.set("acme", {"email": "new@example.com", "status": "suspended"})
    assert (holder.account.email, holder.account.status) == ("new@example.com", "suspended")
    assert (await accounts.set("acme", {"email": ""})).account.email is None
    with pytest.raises(AccountRestricted):
        await Wallet(audited).reserve(keys.new_request_id(made.id), made.id, Terms("m"))
    assert (await accounts.set(made.id, {"status": "active"})).account.status == "active"
    assert holder.figures == Figures(GRANT, 0, GRANT)
    last = (await entries(audited, made.id))[-1]
    assert (last["code"], last["amount"], last["data"]) == ("account", "0", '{"status":"active"}')


async def test_setting_nothing_changes_nothing(accounts: Accounts, audited: Scripts) -> None:
    made = await accounts.create("acme")
    assert await accounts.set("acme", {}) == await accounts.get("acme")
    assert await codes(audited, made.id) == ["account", "grant"]


@pytest.mark.parametrize(
    "changes",
    [
        {"balance": "1"},
        {"promo": "1"},
        {"name": "other"},
        {"status": "rich"},
        {"email": "none"},
        {"email": "good@example.com", "seq": "0"},
    ],
)
async def test_what_cannot_be_set(accounts: Accounts, audited: Scripts, changes: dict[str, str]) -> None:
    made = await accounts.create("acme")
    before = await accounts.get("acme")
    with pytest.raises(WalletError):
        await accounts.set("acme", changes)
    assert await accounts.get("acme") == before
    assert await codes(audited, made.id) == ["account", "grant"]


async def test_an_account_that_is_not_there(accounts: Accounts) -> None:
    for call in (
        accounts.get("acme"),
        accounts.set("acme", {"status": "active"}),
        accounts.set("acme", {}),
        accounts.issue_key("acme"),
        accounts.list_keys("acme"),
    ):
        with pytest.raises(UnknownAccount, match="'acme'"):
            await call


# keys


async def test_a_key_opens_its_account(accounts: Accounts, audited: Scripts) -> None:
    made = await accounts.create("acme")
    secret, key = await accounts.issue_key("acme", name="laptop")
    assert re.fullmatch(r"llmhub_sk_[A-Za-z0-9_-]{43}", secret)
    assert (key.account, key.kind, key.name, key.revoked_at) == (made.id, "sk", "laptop", None)
    assert key.hint == f"{secret[:13]}...{secret[-4:]}"
    assert keys.is_key_id(key.id)
    assert await accounts.find(secret) == key
    assert await Accounts(audited, signup_grant=0).find(secret) == key
    assert await codes(audited, made.id) == ["account", "grant", "key"]


async def test_limited_keys_say_so(accounts: Accounts) -> None:
    await accounts.create("acme")
    secret, key = await accounts.issue_key("acme", kind="pk")
    assert secret.startswith("llmhub_pk_")
    assert (key.kind, key.hint[:13]) == ("pk", secret[:13])
    assert (await accounts.find(secret)).kind == "pk"
    with pytest.raises(InvalidApiKey):
        await accounts.find(secret.replace("_pk_", "_sk_"))


async def test_keys_are_listed_oldest_first(accounts: Accounts) -> None:
    await accounts.create("acme")
    await accounts.create("other")
    await accounts.issue_key("other")
    made = []
    for name in "abc":
        made.append((await accounts.issue_key("acme", name=name))[1])
        await asyncio.sleep(0.002)
    assert await accounts.list_keys("acme") == made
    revoked = await accounts.revoke_key(made[1].id)
    assert await accounts.list_keys("acme") == [made[0], revoked, made[2]]
    assert len(await accounts.list_keys("other")) == 1


async def test_an_account_without_keys(accounts: Accounts) -> None:
    await accounts.create("acme")
    assert await accounts.list_keys("acme") == []


async def test_a_revoked_key_is_refused(accounts: Accounts, audited: Scripts) -> None:
    made = await accounts.create("acme")
    secret, key = await accounts.issue_key("acme")
    other, _ = await accounts.issue_key("acme")
    await accounts.find(secret)
    revoked = await accounts.revoke_key(key.id)
    assert revoked.revoked_at is not None
    with pytest.raises(InvalidApiKey, match="revoked"):
        await accounts.find(secret)
    await accounts.find(other)
    # A second time changes nothing, the time of the first stays.
    assert await accounts.revoke_key(key.id) == revoked
    assert await codes(audited, made.id) == ["account", "grant", "key", "key", "key"]


async def test_another_process_refuses_a_revoked_key_within_the_cache_time(
    accounts: Accounts, audited: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    await accounts.create("acme")
    secret, key = await accounts.issue_key("acme")
    another = Accounts(audited, signup_grant=0)
    await another.find(secret)
    await accounts.revoke_key(key.id)
    assert (await another.find(secret)).revoked_at is None
    now += CACHE_SECONDS
    with pytest.raises(InvalidApiKey, match="revoked"):
        await another.find(secret)
    assert CACHE_SECONDS <= 1


async def test_a_found_key_is_not_asked_for_again_at_once(accounts: Accounts, audited: Scripts) -> None:
    await accounts.create("acme")
    secret, _ = await accounts.issue_key("acme")
    await accounts.find(secret)
    await audited.command("CONFIG", "RESETSTAT")
    for _ in range(10):
        await accounts.find(secret)
    assert "cmdstat_hgetall" not in await audited.command("INFO", "commandstats")


async def test_the_cache_is_bounded(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_SIZE", 3)
    await accounts.create("acme")
    secrets = [(await accounts.issue_key("acme"))[0] for _ in range(8)]
    for secret in secrets:
        await accounts.find(secret)
    assert len(accounts._found) <= 3


MALFORMED = [
    "",
    "llmhub_sk_",
    f"llmhub_sk_{'a' * 42}",
    f"llmhub_sk_{'a' * 44}",
    f"llmhub_sk_{'a' * 43}\n",
    f" llmhub_sk_{'a' * 43}",
    f"LLMHUB_SK_{'a' * 43}",
    f"llmhub_xk_{'a' * 43}",
    f"llmhub_sk_{'ä' * 43}",
    f"llmhub_sk_{'a' * 42}*",
    f"sk-{'a' * 48}",
    "x" * 100_000,
]


@pytest.mark.parametrize("secret", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_key_is_refused_without_asking(
    accounts: Accounts, audited: Scripts, secret: str
) -> None:
    await audited.command("CONFIG", "RESETSTAT")
    with pytest.raises(InvalidApiKey, match="Incorrect API key"):
        await accounts.find(secret)
    assert not {"cmdstat_hgetall", "cmdstat_get"} & set(await audited.command("INFO", "commandstats"))


async def test_an_unknown_key_is_refused(accounts: Accounts) -> None:
    await accounts.create("acme")
    secret, key = await accounts.issue_key("acme")
    with pytest.raises(InvalidApiKey):
        await accounts.find(secret[:-1] + ("a" if secret[-1] != "a" else "b"))


async def test_the_whole_hash_is_compared(accounts: Accounts, audited: Scripts) -> None:
    """The id has 96 of the 256 bits; a key that shares them only is another key."""
    await accounts.create("acme")
    secret, key = await accounts.issue_key("acme")
    digest = hashlib.sha256(secret.encode()).hexdigest()
    await audited.command(
        "HSET", keys.api_key(key.id), "hash", digest[:-1] + ("0" if digest[-1] != "0" else "1")
    )
    with pytest.raises(InvalidApiKey, match="Incorrect"):
        await accounts.find(secret)


@pytest.mark.parametrize("id", ["", "key_", "key_xyz", f"key_{'0' * 24}", f"key_{'0' * 25}", "llmhub_sk_x"])
async def test_a_key_id_that_is_not_there(accounts: Accounts, id: str) -> None:
    with pytest.raises(UnknownKey):
        await accounts.revoke_key(id)


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "\x00"])
async def test_key_names_that_cannot_be(accounts: Accounts, name: str) -> None:
    await accounts.create("acme")
    with pytest.raises(WalletError, match="name"):
        await accounts.issue_key("acme", name=name)
    assert await accounts.list_keys("acme") == []


async def test_no_key_stands_in_redis_in_clear(accounts: Accounts, audited: Scripts) -> None:
    await accounts.create("acme")
    secrets = [(await accounts.issue_key("acme", kind=kind))[0] for kind in ("sk", "pk", "sk")]
    for secret in secrets:
        await accounts.find(secret)
    await accounts.revoke_key((await accounts.list_keys("acme"))[0].id)
    everything = repr([await dump(audited, key) for key in await audited.command("KEYS", "*")])
    assert "acme" in everything
    for secret in secrets:
        # Prefix and last four stand in the hint; no longer piece of the random part may.
        assert not any(secret[start : start + 8] in everything for start in range(10, len(secret) - 7))
        assert hashlib.sha256(secret.encode()).hexdigest() in everything
    assert KEY_PATTERN.search(everything) is None


async def dump(scripts: Scripts, key: str) -> Any:
    read = {"hash": "HGETALL", "set": "SMEMBERS", "string": "GET"}
    kind = await scripts.command("TYPE", key)
    if kind == "stream":
        return key, await scripts.command("XRANGE", key, "-", "+")
    return key, await scripts.command(read[kind], key)


async def test_keys_of_one_account_share_its_slot(accounts: Accounts) -> None:
    made = await accounts.create("acme")
    for _ in range(5):
        _, key = await accounts.issue_key("acme")
        assert keys.api_key(key.id).startswith(f"{{p{keys.partition(made.id)}}}:")
