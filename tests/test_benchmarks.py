"""The benchmark runs, measures every case of both proxies, and leaves nothing behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import stub
from benchmarks.load import Generator, Load
from benchmarks.report import Case, Run, figure_table, ratio_table

ROOT = Path(__file__).resolve().parent.parent
OVERHEAD = [sys.executable, "-m", "benchmarks.overhead", "--driver", "built-in", "--rounds", "1"]
OVERHEAD += ["--connections", "1,4", "--streams", "2"]
CASES = ["JSON, 1 conn.", "JSON, 4 conn.", "SSE, 2 conn."]


def run(rps: float, cpu_ms: float) -> Run:
    return Run(100, 0, rps, p50_ms=1, p99_ms=2, cpu_ms=cpu_ms, redis_cpu_ms=0.01, cores=0.9)


@pytest.mark.slow
def test_every_case_is_measured_and_nothing_is_bad() -> None:
    command = [*OVERHEAD, "--seconds", "0.2", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    assert [case["case"] for case in report["cases"]] == CASES
    for case in report["cases"]:
        assert {kind: len(runs) for kind, runs in case["runs"].items()} == {"unmetered": 1, "metered": 1}
        assert all(run["requests"] > 0 for runs in case["runs"].values() for run in runs)
    checks = report["checks"]
    assert checks["bad"] == 0
    assert checks["charges"] == checks["answers"] > 0
    assert checks["audit_differences"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everything_is_ended_on_a_signal(number: signal.Signals) -> None:
    bench = subprocess.Popen([*OVERHEAD, "--seconds", "30"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert bench.stderr is not None
    assert bench.stderr.readline().startswith("load by built-in")
    children = children_of(bench.pid)
    assert len(children) >= 4, "stub, Redis and two proxies"
    bench.send_signal(number)
    assert bench.wait(30) == 128 + number
    bench.stderr.close()
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_the_table_has_the_ratio_of_each_round() -> None:
    case = Case(16, stream=False)
    results = {
        case: {
            "unmetered": [run(1000, 0.5), run(500, 1.0), run(800, 0.5)],
            "metered": [run(500, 1.0), run(400, 1.5), run(200, 1.5)],
        }
    }
    assert ratio_table(results).splitlines() == [
        "| metered / unmetered | requests/s | p50 | p99 | CPU/request |",
        "| --- | --: | --: | --: | --: |",
        "| JSON, 16 conn. | 0.50 (0.25-0.80) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) | 2.00 (1.50-3.00) |",
    ]
    rows = figure_table(results, {"unmetered": 60.0, "metered": 70.0}).splitlines()[2:]
    assert rows == [
        "| JSON, 16 conn. | unmetered | 800 | 1.00 | 2.00 | 0.500 | - | 0.90 | 60 | 0 |",
        "| JSON, 16 conn. | metered | 400 | 1.00 | 2.00 | 1.500 | 0.0100 | 0.90 | 70 | 0 |",
    ]


@pytest.mark.parametrize("body", ['{"model": "m"}', '{"model": "m", "stream": true}'])
async def test_the_generator_reads_whole_answers(body: str) -> None:
    server = await asyncio.get_running_loop().create_server(stub.StubProtocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        seen = await Generator(Load(port, "k", body, connections=3, seconds=0.2)).run()
    assert seen["requests"] >= 3
    assert seen["bad"] == 0
    assert 0 < seen["p50_ms"] <= seen["p99_ms"]


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 402 Payment Required\r\ncontent-length: 2\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n"]
)
async def test_the_generator_counts_refusals_and_cuts_as_bad(answer: bytes) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        seen = await Generator(Load(port, "k", "{}", connections=2, seconds=0.1)).run()
    assert seen["bad"] >= 2


def children_of(parent: int) -> list[int]:
    """The processes that this one started, once there are enough of them or time is up."""
    found: list[int] = []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len(found) < 4:
        found = [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == parent]
    return found


def _parent(process: str) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return None
