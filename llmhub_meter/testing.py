"""A real meter for the tests of apps behind MeterMiddleware: a server of its own, an account and a key."""

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from .config import CreditsConfig, MeteringConfig, ModelConfig, ReserveConfig
from .meter import Meter, running
from .money import credits as in_credits
from .types import Account


@dataclass(frozen=True, slots=True)
class TemporaryMeter:
    """A started meter, an account with a balance, and the account's key."""

    meter: Meter
    account: Account
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """What a client sends to be this account."""
        return {"authorization": f"Bearer {self.key}"}

    async def balance(self) -> str:
        """The account's balance in credits, as the API prints it."""
        return in_credits((await self.meter.accounts.get(self.account.id)).figures.balance)

    async def held(self) -> str:
        """What running requests hold, in credits; `0` once all have ended."""
        return in_credits((await self.meter.accounts.get(self.account.id)).figures.held)


@asynccontextmanager
async def temporary_meter(
    models: Mapping[str, ModelConfig | Mapping[str, object]],
    *,
    credits: Decimal | int | str = 100_000,
    reserve: ReserveConfig | None = None,
    metering: MeteringConfig | None = None,
) -> AsyncIterator[TemporaryMeter]:
    """A meter on a throw-away server, which ends with the block; prices as in the config file.

    Raises ConfigError, also where no Redis-compatible server is installed.
    """
    from .embedded import EmbeddedServer

    with (
        tempfile.TemporaryDirectory(prefix="llmhub-meter-") as folder,
        EmbeddedServer.start(Path(folder)) as server,
    ):
        meter = Meter(
            redis=server.url,
            prices=models,
            credits=CreditsConfig.model_validate({"signup_grant": credits}),
            reserve=reserve,
            metering=metering,
        )
        async with running(meter):
            account = await meter.accounts.create("tester")
            key, _ = await meter.accounts.issue_key(account.id)
            yield TemporaryMeter(meter, account, key)
