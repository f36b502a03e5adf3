"""The targets, and what was found of each."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.summaries import ratios, spread


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures to the targets; a target whose workloads were not run is left out."""
    summaries, servers = found["summaries"], found["servers"]
    rows: list[dict[str, Any]] = []

    def best(workload: str, kind: str) -> str | None:
        rates = {
            name: statistics.median(one["rates"].values())
            for name, one in summaries.get(workload, {}).items()
            if servers[name]["kind"] == kind
        }
        return max(rates, key=rates.__getitem__) if rates else None

    def compare(
        what: str, least: float, workload: str, rival: str | None, other: str | None = None, named: str = ""
    ) -> None:
        ours = summaries.get(workload, {}).get("convscope")
        theirs = summaries.get(other or workload, {}).get(rival)
        if ours and theirs and (found_ratios := ratios(ours, theirs)):
            met = statistics.median(found_ratios) >= least
            rows.append(
                {
                    "target": f"{what} ({named or rival})",
                    "asked": f"≥ {least:g}",
                    "found": spread(found_ratios),
                    "met": met,
                }
            )

    def limit(what: str, most: float, value: float) -> None:
        if value == value:
            rows.append({"target": what, "asked": f"≤ {most:g}", "found": f"{value:.2f}", "met": value <= most})

    for workload in ("float16, 32 pictures, c=1", "float16, 32 pictures, c=4"):
        for network in ("tuned", "convscope"):
            compare(f"1. {workload}: share of the floor", 0.6, workload, f"floor, {network}", named=f"{network} floor")
        rival = best(single := "float16, c=32", "documented")
        compare(f"1. {workload}: times the best rival, one picture a request", 3, workload, rival, single)
    for want, least in (("float32", 1.0), ("uint8", 1.5), ("scores", 1.3)):
        for callers in (1, 8, 32):
            workload = f"{want}, c={callers}"
            compare(f"2. {workload}: times the best rival as documented", least, workload, best(workload, "documented"))
    compare("2. float32, c=8: times nested lists", 100, "float32, c=8", "TorchServe", "lists, c=8")
    for workload in summaries:
        if "open" not in workload and "lists" not in workload:
            compare(f"3. {workload}: share of TorchServe's wall", 0.85, workload, "TorchServe, null")
    for workload, one in summaries.items():
        if "open" in workload and "convscope" in one:
            limit(f"4. {workload}: p99 / p50", 5, one["convscope"]["p99_ms"] / one["convscope"]["p50_ms"])
    if "convscope" in servers:
        limit("4. seconds to the first answer", 10, servers["convscope"]["first_answer_s"])
        limit("4. slowest request after readiness / median", 10, servers["convscope"]["coldest"])
    for want in ("uint8", "float16"):
        if sizes := found["formats"].get(want):
            limit(f"5. {want} reply / its tensors' bytes", 1.02, sizes["protobuf"] / sizes["tensors"])
    return rows
