"""Summarises the rounds of each workload and server, and lays out tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

MOST_STEAL = 0.15

Summary = dict[str, Any]
Summaries = dict[str, dict[str, Summary]]


def keep(takes: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Drop the rounds of a workload in which the hypervisor took too much; return the rest, and the number dropped."""
    bad = {(take["workload"], take["round"]) for take in takes if take["steal"] > MOST_STEAL}
    return [take for take in takes if (take["workload"], take["round"]) not in bad], len(bad)


def summarise(takes: Iterable[dict[str, Any]]) -> Summaries:
    """Group the rounds by workload and server, and summarise them."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for take in takes:
        grouped.setdefault(take["workload"], {}).setdefault(take["server"], []).append(take)
    return {
        workload: {server: _summary(rounds) for server, rounds in servers.items()}
        for workload, servers in grouped.items()
    }


def _summary(rounds: list[dict[str, Any]]) -> Summary:
    latencies = [second for take in rounds for second in take["latencies"]]
    count = len(latencies)
    pictures = rounds[0]["pictures"]
    errors: dict[str, int] = {}
    for take in rounds:
        for error, times in take["errors"].items():
            errors[error] = errors.get(error, 0) + times
    programs = sorted({name for take in rounds for name in take["cpu_s"]})
    per = 1e6 / max(1, count)
    return {
        "n": count,
        "rates": {take["round"]: len(take["latencies"]) * pictures / take["wall_s"] for take in rounds},
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "max_ms": max(latencies, default=math.nan) * 1e3,
        "cpu_us": {name: sum(take["cpu_s"].get(name, 0.0) for take in rounds) * per for name in programs},
        "load_cpu_us": sum(take["load_cpu_s"] for take in rounds) * per,
        "reply_bytes": sum(take["body_bytes"] for take in rounds) / max(1, count),
        "steal": max(take["steal"] for take in rounds),
        "foreign": statistics.median(take["foreign"] for take in rounds),
        "errors": errors,
    }


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which a share of all lies; nan without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def ratios(one: Summary, other: Summary) -> list[float]:
    """Return one's rate over the other's, round by round."""
    return [rate / other["rates"][number] for number, rate in one["rates"].items() if other["rates"].get(number)]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Write the median with the least and the largest."""
    if not values:
        return "–"
    return f"{form} ({form}–{form})".format(statistics.median(values), min(values), max(values))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lay out a table, with an empty line behind it."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]
