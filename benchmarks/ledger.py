"""The measured account: opened with more than any run can spend, and its ledger read back."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TypeVar

from llmhub_meter import keys
from llmhub_meter.accounts import Accounts
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.wallet import Wallet

BALANCE_TICKS = 8_000_000_000_000_000
_BATCH = 2_000

Result = TypeVar("Result")


def open_account(redis_url: str) -> tuple[str, str]:
    """A new account with a balance: its id and a key."""

    async def work(scripts: Scripts) -> tuple[str, str]:
        accounts = Accounts(scripts, signup_grant=0)
        account = await accounts.create("bench")
        await Wallet(scripts).credit(account.id, BALANCE_TICKS, "adjust", id="bench")
        return account.id, (await accounts.issue_key(account.id))[0]

    return _run(redis_url, work)


def count_charges(redis_url: str, account: str) -> int:
    """How many charges the account's ledger has."""

    async def work(scripts: Scripts) -> int:
        ledger = keys.ledger(keys.partition(account))
        position, charges = "-", 0
        while batch := await scripts.command("XRANGE", ledger, position, "+", "COUNT", _BATCH):
            charges += sum(dict(fields)["code"] == "charge" for _, fields in batch)
            position = f"({batch[-1][0]}"
        return charges

    return _run(redis_url, work)


def differences(redis_url: str) -> int | None:
    """What the ledger's audit finds wrong; None where there is no audit to ask."""
    if find_spec("llmhub_meter.archive") is None or find_spec("llmhub_meter.archive.audit") is None:
        return None
    from llmhub_meter.archive.audit import audit

    async def work(scripts: Scripts) -> int:
        return int((await audit(scripts)).differences)

    return _run(redis_url, work)


def _run(redis_url: str, work: Callable[[Scripts], Awaitable[Result]]) -> Result:
    async def with_redis() -> Result:
        scripts = Scripts(connect(redis_url))
        try:
            return await work(scripts)
        finally:
            await scripts.aclose()

    return asyncio.run(with_redis())
