"""Measure what one worker carries, beside what the capacity formula of docs/operations.md makes of its metrics.

Type: python -m benchmarks.capacity --rounds 5

For each kind of request, callers ask one worker in a closed loop, so that the worker always has a request to work on.
The formula's `seconds` comes from the metrics of the same time: the mean of `convscope_handler_seconds` over the mean
of `convscope_batch_requests`. Rate times seconds is the share of its time that the worker spends in its handler, which
is the largest `utilisation` there can be. TorchServe spends the rest on passing requests and replies on.
"""

from __future__ import annotations

import argparse
import os
import statistics
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import models
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import OURS
from benchmarks.summaries import spread
from benchmarks.workloads import closed

WORKLOADS = (closed("scores", 8), closed("float32", 8), closed("float16", 2, 32))


def main() -> None:
    """Measure every kind of request in turns, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    work = ROOT / "out/bench"
    found: dict[str, list[tuple[float, float]]] = {one.name: [] for one in WORKLOADS}
    with Running(OURS, models.prepare("cifar", work), work, 1) as running:
        running.warm_up(WORKLOADS)
        for _ in range(options.rounds):
            for workload in WORKLOADS:
                before = read(running.place.others[0])
                outcome = running.load(workload, options.seconds)
                assert not outcome.errors, outcome.errors
                spent, handled, batches = (
                    now - then for now, then in zip(read(running.place.others[0]), before, strict=True)
                )
                requests = len(outcome.latencies)
                assert handled == requests, "the metrics count requests of another caller"
                found[workload.name].append((requests / outcome.wall_s, spent / handled / (handled / batches)))
    print("| workload | requests/s | seconds | rate × seconds |")
    print("|---|---|---|---|")
    for name, rounds in found.items():
        rates, seconds = zip(*rounds, strict=True)
        shares = [rate * time_s for rate, time_s in rounds]
        print(f"| {name} | {spread(rates, '{:,.0f}')} | {statistics.median(seconds):.5f} | {spread(shares)} |")
    print(f"\n{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def read(port: int) -> tuple[float, float, float]:
    """Return the seconds spent in the handler, the requests handled, and the number of batches without model cards."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    cards = totals["convscope_cards_total"]
    return (
        totals["convscope_handler_seconds_sum"],
        totals["convscope_handler_seconds_count"],
        totals["convscope_batch_requests_count"] - cards,
    )


if __name__ == "__main__":
    main()
