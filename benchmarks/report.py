"""From single runs to medians, ratios and Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIGURES = {
    "rps": "requests/s",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "cpu_ms": "CPU/request",
}
"""What is compared as a ratio, and its heading."""


@dataclass(frozen=True)
class Case:
    """One kind of load."""

    connections: int
    stream: bool

    @property
    def name(self) -> str:
        return f"{'SSE' if self.stream else 'JSON'}, {self.connections} conn."


@dataclass(frozen=True)
class Run:
    """One proxy under one load in one round."""

    requests: int
    bad: int
    rps: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """The proxy process, per request."""
    redis_cpu_ms: float
    cores: float
    """How much of its CPU the proxy used: well under 1, something else was the limit."""


@dataclass(frozen=True)
class Spread:
    """A median over rounds, with the smallest and the largest."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(metered: Sequence[Run], unmetered: Sequence[Run], figure: str) -> Spread:
    """Metered over unmetered, each round by itself: its two runs were neighbours in time."""
    pairs = zip(metered, unmetered, strict=True)
    return spread([_ratio(getattr(one, figure), getattr(other, figure)) for one, other in pairs])


def ratio_table(results: Mapping[Case, Mapping[str, Sequence[Run]]]) -> str:
    rows = []
    for case, runs in results.items():
        found = [ratios(runs["metered"], runs["unmetered"], figure) for figure in FIGURES]
        rows.append([case.name, *(f"{each.median:.2f} ({each.least:.2f}-{each.most:.2f})" for each in found)])
    return markdown(["metered / unmetered", *FIGURES.values()], rows)


def figure_table(results: Mapping[Case, Mapping[str, Sequence[Run]]], rss: Mapping[str, float]) -> str:
    """Medians behind the ratios; they hold for this machine and hour only."""
    head = ["case", "proxy", "requests/s", "p50 ms", "p99 ms", "CPU ms/request"]
    head += ["Redis CPU ms/request", "cores used", "RSS MiB", "bad"]
    rows = []
    for case, both in results.items():
        for kind, runs in both.items():
            rps, p50, p99, cpu, redis, cores = (
                statistics.median(getattr(run, figure) for run in runs)
                for figure in (*FIGURES, "redis_cpu_ms", "cores")
            )
            row = [case.name, kind, f"{rps:.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{cpu:.3f}"]
            row += [f"{redis:.4f}" if kind == "metered" else "-", f"{cores:.2f}", f"{rss[kind]:.0f}"]
            rows.append([*row, str(sum(run.bad for run in runs))])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ratio(one: float, other: float) -> float:
    return one / other if other else float("nan")
