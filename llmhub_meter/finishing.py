"""Endings that must happen: settles and releases run shielded from their request, until Redis answers."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .errors import MeteringUnavailable
from .types import Ending

logger = logging.getLogger("llmhub_meter.finishing")

End = Callable[[], Awaitable[Ending]]
Result = TypeVar("Result")

RETRY_SECONDS = 600
"""How long an ending is repeated. Below the 20 minutes for which Redis remembers what has ended."""
MAX_WAITING = 100_000


class Finisher:
    """Owns the ends of requests: a request that is cancelled, or whose Redis is away, still ends once."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._waiting: deque[tuple[float, End]] = deque()
        self._retrying: asyncio.Task[None] | None = None

    async def finish(self, end: End) -> Ending | None:
        """Runs an ending now, whatever becomes of the caller; None where it has to be repeated later."""
        return await asyncio.shield(self.spawn(self._attempt(end)))

    def owe(self, end: End) -> None:
        """An ending that nobody waits for."""
        self.spawn(self._attempt(end))

    def spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """A task that outlives its maker and is awaited at shutdown."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def drain(self, seconds: float) -> None:
        """Waits for what runs and what has to be repeated, at most so long."""
        deadline = time.monotonic() + seconds
        while (pending := self._pending()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(pending, timeout=min(left, 0.1))
        retries = self._retrying is not None and not self._retrying.done()
        if self._retrying is not None:
            self._retrying.cancel()
        # The one that is being repeated at this moment may be the last, and no longer among the waiting.
        if lost := len(self._running) + max(len(self._waiting), retries):
            logger.error("%d endings could not reach Redis; their holds return with their leases", lost)
        for task in set(self._running):
            task.cancel()

    def _pending(self) -> set[asyncio.Task[Any]]:
        """What still runs; the retrying task runs for as long as anything waits."""
        retrying = {self._retrying} if self._retrying is not None and not self._retrying.done() else set()
        return self._running | retrying

    async def _attempt(self, end: End) -> Ending | None:
        try:
            return await end()
        except MeteringUnavailable:
            self._wait(end)
            return None

    def _wait(self, end: End) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            logger.error("more than %d endings wait for Redis; the oldest is dropped", MAX_WAITING)
        self._waiting.append((time.monotonic() + RETRY_SECONDS, end))
        if self._retrying is None or self._retrying.done():
            self._retrying = asyncio.get_running_loop().create_task(self._retry())

    async def _retry(self) -> None:
        pause = 0.1
        while self._waiting:
            await asyncio.sleep(pause)
            deadline, end = self._waiting.popleft()
            try:
                await end()
                pause = 0.0
            except MeteringUnavailable:
                pause = min(1.0, pause * 2 or 0.1)
                if time.monotonic() < deadline:
                    # One that can't end (its account is gone, its server is away) must not stop the others.
                    self._waiting.append((deadline, end))
                    continue
                logger.error("an ending could not reach Redis in %d s and is given up", RETRY_SECONDS)
