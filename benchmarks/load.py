"""Closed-loop load over kept connections: by wrk, or by the generator of this module.

Both print one JSON line: requests, seconds, bad, p50_ms, p99_ms.
"""

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

DriverName = Literal["wrk", "built-in"]
PATH = "/v1/chat/completions"
ANSWER_SECONDS = 30
_SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True)
class Load:
    """What is sent, and how much of it at a time."""

    port: int
    key: str
    body: str
    connections: int
    seconds: float


def choose(wanted: str) -> DriverName:
    """`auto` takes wrk where it is installed."""
    if wanted == "built-in" or (wanted == "auto" and shutil.which("wrk") is None):
        return "built-in"
    return "wrk"


def command(driver: DriverName, load: Load) -> list[str]:
    """How to apply a load."""
    if driver == "built-in":
        options = ["--port", load.port, "--key", load.key, "--body", load.body]
        options += ["--connections", load.connections, "--seconds", load.seconds]
        return [sys.executable, "-m", "benchmarks.load", *map(str, options)]
    seconds = max(1, round(load.seconds))
    wrk = ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--timeout", f"{ANSWER_SECONDS}s"]
    environment = [f"KEY={load.key}", f"BODY={load.body}"]
    return ["env", *environment, *wrk, "-s", str(_SCRIPT), f"http://127.0.0.1:{load.port}{PATH}"]


class Generator:
    """N connections, each with one request under way until the time is over; the last answers are awaited."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.latencies: list[float] = []
        self.bad = 0
        self._request = _request(load)

    async def run(self) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        self._end = began + self.load.seconds
        clients = [
            (await loop.create_connection(lambda: _Client(self), "127.0.0.1", self.load.port))[1]
            for _ in range(self.load.connections)
        ]
        waits = [client.finished for client in clients]
        _, unanswered = await asyncio.wait(waits, timeout=self.load.seconds + ANSWER_SECONDS)
        self.bad += len(unanswered)
        return summary(self.latencies, time.perf_counter() - began, self.bad)

    def next_request(self) -> bytes | None:
        return self._request if time.perf_counter() < self._end else None


class _Client(asyncio.Protocol):
    """One connection. It finds the end of an answer and reads nothing else of it."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = b""
        self._left: int | None = None
        """Bytes to come; -1 for a chunked answer, None before the head was read."""
        self._good = False
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's by descent.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._received += data
            if not self._read_head():
                return
        elif self._left >= 0:
            self._left -= len(data)
        else:
            self._received = (self._received + data)[-len(_LAST_CHUNK) :]
        if self._left == 0 or (self._left == -1 and self._received.endswith(_LAST_CHUNK)):
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.finished.done():
            self._generator.bad += 1
            self.finished.set_result(None)

    def _read_head(self) -> bool:
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return False
        self._good = head[9:10] == b"2"
        lines = head.lower().split(b"\r\n")
        length = next((line[15:] for line in lines if line.startswith(b"content-length:")), None)
        self._left = -1 if length is None else int(length) - len(rest)
        self._received = rest
        return True

    def _answered(self) -> None:
        self._generator.latencies.append(time.perf_counter() - self._sent)
        self._generator.bad += not self._good
        self._send()

    def _send(self) -> None:
        request = self._generator.next_request()
        if request is None:
            self.finished.set_result(None)
            self._transport.close()
            return
        self._received = b""
        self._left = None
        self._sent = time.perf_counter()
        self._transport.write(request)


_LAST_CHUNK = b"\r\n0\r\n\r\n"


def _request(load: Load) -> bytes:
    body = load.body.encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {load.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def summary(latencies: Sequence[float], seconds: float, bad: int) -> dict[str, float]:
    """What a run is reported as."""
    ordered = sorted(latencies) or [0.0]
    return {
        "requests": len(latencies),
        "seconds": seconds,
        "bad": bad,
        "p50_ms": ordered[len(ordered) // 2] * 1e3,
        "p99_ms": ordered[len(ordered) * 99 // 100] * 1e3,
    }


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(prog="benchmarks.load", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--body", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    load = Load(**vars(parser.parse_args()))
    print(json.dumps(uvloop.run(Generator(load).run())))


if __name__ == "__main__":
    main()
