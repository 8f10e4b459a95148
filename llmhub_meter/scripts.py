"""The seam to Redis: calls the scripts of `lua/` and turns failures into errors.

Nobody above knows which client serves. The client's own retries are off: a lost reply would run a script
many times. A call is repeated here once, since every script is idempotent by the id it is given.
"""

import hashlib
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoScriptError, RedisError, TimeoutError

from . import keys
from .errors import ConfigError, MeteringUnavailable

logger = logging.getLogger("llmhub_meter.redis")

SCRIPTS = ("change", "credit", "extend", "release", "reserve", "settle", "sweep")
REDIS_TIMEOUT_SECONDS = 3.0
MAX_CONNECTIONS = 64

_INCLUDE = re.compile(r"^--@include (\w+)$", re.MULTILINE)


def script_source(name: str) -> str:
    """The text of a script with its includes in place."""
    folder = resources.files("llmhub_meter") / "lua"

    def include(match: re.Match[str]) -> str:
        return (folder / "includes" / f"{match[1]}.lua").read_text()

    return _INCLUDE.sub(include, (folder / f"{name}.lua").read_text())


def connect(url: str) -> Redis:
    """A client for money: no retries of its own, bounded connections, answers as text."""
    try:
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=REDIS_TIMEOUT_SECONDS,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            protocol=2,
        )
    except ValueError as error:
        raise ConfigError([f"[redis] url: {error}"]) from None
    return Redis.from_pool(pool)


class Scripts:
    """The scripts on one Redis."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._sources = {name: script_source(name) for name in SCRIPTS}
        self._epoch: str | None = None
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._sources.items()}

    async def call(self, name: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """One script call, whole or not at all.

        Raises MeteringUnavailable when Redis gave no answer: the call may have happened all the same.
        """
        return await _once_more(lambda: self._evaluate(name, keys, args))

    async def command(self, *parts: str | int) -> Any:
        """One plain command that may be repeated safely: a read, or a write that changes nothing twice."""
        return await _once_more(lambda: self._execute(*parts))

    async def commands(self, batch: Sequence[Sequence[str | int]], *, atomic: bool = False) -> list[Any]:
        """Several such commands in one round trip: each on its own, or (in one slot) as of one moment."""

        async def run() -> list[Any]:
            async with self.redis.pipeline(transaction=atomic) as pipeline:
                for parts in batch:
                    pipeline.execute_command(*parts)
                return list(await pipeline.execute())

        found: list[Any] = await _once_more(run)
        return found

    async def check_server(self) -> None:
        """Refuses a Redis that may drop keys under memory pressure.

        Raises ConfigError when it evicts, MeteringUnavailable when it can't be reached.
        """
        info = await self.command("INFO", "memory")
        policy = info.get("maxmemory_policy") if isinstance(info, dict) else None
        if policy != "noeviction":
            raise ConfigError(
                [
                    f"[redis] url: this Redis evicts keys (maxmemory-policy {policy}); "
                    "balances could vanish: set maxmemory-policy noeviction"
                ]
            )

    async def open_epoch(self) -> None:
        """Learns which data this Redis holds, or begins it on an empty one."""
        await self.command("SET", keys.EPOCH, secrets.token_hex(8), "NX")
        self._epoch = await self.command("GET", keys.EPOCH)

    async def check_epoch(self) -> None:
        """Raises MeteringUnavailable when Redis has lost the data that was there at the start.

        Asked before "there is no such key or account" is believed: a wiped Redis knows nobody.
        """
        if await self.command("GET", keys.EPOCH) != self._epoch:
            logger.error("Redis has lost its data: the epoch key is gone or changed")
            raise MeteringUnavailable()

    async def aclose(self) -> None:
        await self.redis.aclose()

    async def _execute(self, *parts: str | int) -> Any:
        return await self.redis.execute_command(*parts)  # type: ignore[no-untyped-call]

    async def _evaluate(self, name: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        try:
            return await self.redis.evalsha(self._shas[name], len(keys), *keys, *args)
        except NoScriptError:
            # A restart or failover empties the script cache. EVAL fills it again, in the same call.
            return await self.redis.eval(self._sources[name], len(keys), *keys, *args)


async def _once_more(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats once after a lost connection or reply; every caller's action is the same when done twice."""
    try:
        return await attempt()
    except (ConnectionError, TimeoutError):
        pass
    except RedisError as error:
        logger.error("Redis refused a call: %s", error)
        raise MeteringUnavailable() from error
    try:
        return await attempt()
    except RedisError as error:
        logger.error("Redis gave no answer: %s", error)
        raise MeteringUnavailable() from error
