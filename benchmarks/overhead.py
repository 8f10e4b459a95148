"""What metering costs: our proxy with metering against our proxy without, on one machine in one run."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version

from llmhub_meter.embedded import find_binary

from . import ledger, load, stub
from .load import Load
from .processes import Processes, cpu_seconds, free_port, pinned, rss_mib
from .proxies import KINDS, MODEL
from .report import FIGURES, Case, Run, figure_table, ratio_table, ratios

_PACKAGES = ("llmhub-meter", "uvicorn", "uvloop", "httptools", "httpx", "aiohttp", "redis", "hiredis")


@dataclass
class Bench:
    """Everything that runs during a measurement."""

    processes: Processes
    driver: load.DriverName
    proxy_cpus: str | None
    other_cpus: str | None
    redis_url: str
    redis_id: int
    account: str
    key: str
    ports: dict[str, int]
    proxies: dict[str, int]
    """Process ids by kind."""
    answers: int = 0
    """2xx answers of the metered proxy that the load generator saw whole."""
    cut_at_most: int = 0
    """How many requests it may have left unanswered at the ends of its runs."""
    results: dict[Case, dict[str, list[Run]]] = field(default_factory=dict)

    def measure(self, kind: str, case: Case, seconds: float) -> Run:
        """One proxy under one load."""
        proxy = self.proxies[kind]
        task = Load(self.ports[kind], self.key, request_body(case), case.connections, seconds)
        command = pinned(load.command(self.driver, task), self.other_cpus)
        before, redis_before = cpu_seconds(proxy), cpu_seconds(self.redis_id)
        output = self.processes.output_of(command, timeout_seconds=seconds + 2 * load.ANSWER_SECONDS)
        used, redis_used = cpu_seconds(proxy) - before, cpu_seconds(self.redis_id) - redis_before
        seen = json.loads(output.strip().splitlines()[-1])
        count = seen["requests"] or 1
        if kind == "metered":
            self.answers += seen["requests"] - seen["bad"]
            self.cut_at_most += case.connections if self.driver == "wrk" else 0
        return Run(
            requests=seen["requests"],
            bad=seen["bad"],
            rps=seen["requests"] / seen["seconds"],
            p50_ms=seen["p50_ms"],
            p99_ms=seen["p99_ms"],
            cpu_ms=used * 1e3 / count,
            redis_cpu_ms=redis_used * 1e3 / count,
            cores=used / seen["seconds"],
        )

    def check(self) -> "Checks":
        """Compares the ledger with what the clients saw, over the whole run and over an undisturbed end."""
        charges = ledger.count_charges(self.redis_url, self.account)
        answers, cut = self.answers, self.cut_at_most
        self.answers = 0
        # wrk leaves its last requests unanswered; our own generator waits for them, so here all must agree.
        drained = replace(self, driver="built-in")
        for stream in (False, True):
            drained.measure("metered", Case(8, stream), 0.5)
        after = ledger.count_charges(self.redis_url, self.account)
        bad = sum(run.bad for both in self.results.values() for runs in both.values() for run in runs)
        differences = ledger.differences(self.redis_url)
        return Checks(bad, charges, answers, cut, after - charges, drained.answers, differences)


@dataclass(frozen=True)
class Checks:
    """Whether what was measured did its work."""

    bad: int
    charges: int
    answers: int
    cut_at_most: int
    drained_charges: int
    drained_answers: int
    audit_differences: int | None
    """None where there was no audit to ask."""

    @property
    def passed(self) -> bool:
        return (
            self.bad == 0
            and 0 <= self.charges - self.answers <= self.cut_at_most
            and self.drained_charges == self.drained_answers > 0
            and not self.audit_differences
        )

    def lines(self) -> list[str]:
        audit = "not available" if self.audit_differences is None else f"{self.audit_differences} differences"
        return [
            f"bad answers: {self.bad}",
            f"charges in the ledger: {self.charges}, 2xx answers seen: {self.answers} "
            f"(cut off at the ends of runs: {self.charges - self.answers}, at most {self.cut_at_most})",
            f"last runs, waited for: {self.drained_charges} charges, {self.drained_answers} 2xx answers",
            f"audit of the ledger: {audit}",
            f"checks: {'passed' if self.passed else 'FAILED'}",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 when a check failed."""
    options = _options(arguments)
    cases = [Case(count, False) for count in options.connections]
    cases += [Case(count, True) for count in options.streams]
    with started(options) as bench:
        about = facts(options, bench)
        _say(f"load by {bench.driver}, proxy on CPU {bench.proxy_cpus or 'any'}")
        for kind in KINDS:
            for stream in (False, True):
                bench.measure(kind, Case(8, stream), min(1.0, options.seconds))
        for number in range(options.rounds):
            run_round(bench, cases, number, options.seconds)
            _say(f"round {number + 1} of {options.rounds} done, load average {os.getloadavg()[0]:.1f}")
        rss = {kind: rss_mib(process) for kind, process in bench.proxies.items()}
        checks = bench.check()
    about["load average at the end"] = f"{os.getloadavg()[0]:.1f}"
    print(as_json(bench, about, rss, checks) if options.json else as_markdown(bench, about, rss, checks))
    return 0 if checks.passed else 1


def run_round(bench: Bench, cases: Sequence[Case], number: int, seconds: float) -> None:
    """Every case once for both proxies, one right after the other; who is first alternates."""
    for case in cases:
        both = bench.results.setdefault(case, {kind: [] for kind in KINDS})
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            both[kind].append(bench.measure(kind, case, seconds))


@contextmanager
def started(options: argparse.Namespace) -> Iterator[Bench]:
    """Valkey, the stub, an account and both proxies, on loopback; all of it is ended afterwards."""
    proxy_cpus, other_cpus = _cpus()
    with Processes() as processes:
        stub_port, redis_port = free_port(), free_port()
        processes.start("stub", pinned(stub.command(processes.folder, stub_port), other_cpus), port=stub_port)
        redis = processes.start(
            "redis",
            pinned(_redis_command(redis_port, processes, options.appendfsync), other_cpus),
            port=redis_port,
        )
        redis_url, upstream_url = f"redis://127.0.0.1:{redis_port}/0", f"http://127.0.0.1:{stub_port}/v1"
        account, key = ledger.open_account(redis_url)
        ports, proxies = {}, {}
        for kind in KINDS:
            ports[kind] = free_port()
            command = [sys.executable, "-m", "benchmarks.proxies", kind, "--port", str(ports[kind])]
            command += ["--upstream", upstream_url, "--redis", redis_url]
            proxies[kind] = processes.start(kind, pinned(command, proxy_cpus), port=ports[kind]).pid
        driver = load.choose(options.driver)
        yield Bench(
            processes, driver, proxy_cpus, other_cpus, redis_url, redis.pid, account, key, ports, proxies
        )


def request_body(case: Case) -> str:
    """A short chat request; a stream is asked for as most clients do, without its usage."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say hello to the whole world, please."}],
        "max_tokens": 128,
    }
    return json.dumps({**body, "stream": True} if case.stream else body)


def facts(options: argparse.Namespace, bench: Bench) -> dict[str, str]:
    """Under which circumstances it was measured."""
    server = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    pins = "proxies on one CPU, everything else on the others" if bench.proxy_cpus else "nothing is pinned"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}; {pins}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        "redis": f"{' '.join(server.split()[:3])}, TCP, appendonly, appendfsync {options.appendfsync}",
        "load by": bench.driver,
        "rounds": f"{options.rounds} of {options.seconds:g} s a case and proxy",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def as_markdown(bench: Bench, about: dict[str, str], rss: dict[str, float], checks: Checks) -> str:
    """The whole report for people."""
    return "\n\n".join(
        (
            "\n".join(f"- {name}: {value}" for name, value in about.items()),
            ratio_table(bench.results),
            figure_table(bench.results, rss),
            "\n".join(f"- {line}" for line in checks.lines()),
        )
    )


def as_json(bench: Bench, about: dict[str, str], rss: dict[str, float], checks: Checks) -> str:
    """The whole report for programs, each single run included."""
    cases = []
    for case, both in bench.results.items():
        found = {name: asdict(ratios(both["metered"], both["unmetered"], name)) for name in FIGURES}
        runs = {kind: [asdict(run) for run in each] for kind, each in both.items()}
        cases.append({"case": case.name, **asdict(case), "ratios": found, "runs": runs})
    whole = {"about": about, "cases": cases, "rss_mib": rss}
    return json.dumps({**whole, "checks": {**asdict(checks), "passed": checks.passed}})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of one run (whole ones with wrk)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=_counts, default=[1, 16, 64], help="of the JSON cases")
    parser.add_argument("--streams", type=_counts, default=[16], help="connections of the SSE cases")
    parser.add_argument("--driver", choices=("auto", "wrk", "built-in"), default="auto")
    parser.add_argument("--appendfsync", choices=("always", "everysec", "no"), default="always")
    parser.add_argument("--json", action="store_true", help="one JSON object with each single run")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.rounds < 1 or not options.connections + options.streams:
        parser.error("nothing to measure")
    return options


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part]
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError("connections are 1 or more")
    return counts


def _cpus() -> tuple[str | None, str | None]:
    """The CPU of the proxies and those of all else, where there are enough to part them."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2 or shutil.which("taskset") is None:
        return None, None
    return str(usable[-1]), ",".join(map(str, usable[:-1]))


def _redis_command(port: int, processes: Processes, appendfsync: str) -> list[str]:
    # As the embedded server runs, but on TCP, as a server of its own would be reached.
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(processes.folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "maxmemory-policy": "noeviction",
    }
    return [str(find_binary()), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
