"""Compares the services of two checkouts under the same load, in turns.

Type: python -m benchmarks.against ../before [--network resnet50] [--rounds 7] [--only '*3 MP*|float32*']

Each is started as its own launcher starts it, on an archive that its own archiver made, with this checkout's
environment; this checkout's code asks both and checks the replies. Ratios are those within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import CORES, OURS, Place, Server
from benchmarks.summaries import spread
from benchmarks.workloads import SMALL, closed

WORKLOADS = (
    *(closed("scores", callers, photograph="0.3 MP") for callers in (1, 8)),
    *(closed("scores", 8, photograph=size) for size in ("3 MP", "12 MP")),
    closed("pool", 4, 32, "0.3 MP"),
    closed("float32", 8, 8, "0.3 MP"),  # Large maps: ResNet-50's two have 1.2 MB a picture.
)
FIGURES = ("pictures/s", "Java, µs", "Python, µs")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout; the ratio is this one's to its")
    parser.add_argument("--network", default="resnet50", choices=sorted(models.NETWORKS))
    parser.add_argument("--workers", type=int, help="of each service (default: one a core; 1 for cifar)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--only", default="*", help="workloads, patterns with | between")
    options = parser.parse_args()
    offered = SMALL if options.network == "cifar" else WORKLOADS
    workloads = [one for one in offered if any(fnmatch(one.name, some) for some in options.only.split("|"))]
    workers = options.workers or (1 if options.network == "cifar" else CORES)
    work = ROOT / "out/bench"
    model = models.prepare(options.network, work)
    checkouts = {"before": options.before, "now": ROOT}
    print("| asked | " + " | ".join(f"{one}: {' · '.join(FIGURES)}" for one in checkouts) + " | now to before |")
    print("|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(Running(service(name, checkout, model), model, work, workers))
            for name, checkout in checkouts.items()
        }
        for one in running.values():
            one.warm_up(workloads)
        for workload in workloads:
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in running}
            for number in range(options.rounds):
                for name in list(running)[:: 1 if number % 2 else -1]:
                    found[name].append(_figures(running[name].take(workload, options.seconds)))
            cells = [
                " · ".join(f"{statistics.median(one):,.0f}" for one in zip(*rows, strict=True))
                for rows in found.values()
            ]
            pairs = zip(zip(*found["now"], strict=True), zip(*found["before"], strict=True), strict=True)
            ratios = [[now / then for now, then in zip(*pair, strict=True)] for pair in pairs]
            shown = " · ".join(spread(one, "{:.2f}") for one in ratios)
            print(f"| {workload.name} | {' | '.join(cells)} | {shown} |", flush=True)
    print(f"\n{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def service(name: str, checkout: Path, model: models.Model) -> Server:
    """Return the row of the table for a checkout's service, with an archive by its own archiver."""
    checkout = checkout.resolve()
    store = model.folder / "-".join(checkout.parts[1:])
    models.archive(model, checkout, store)

    def start(place: Place) -> list[str]:
        words = OURS.command(place)
        words[words.index("--model-store") + 1] = str(store)
        return ["sh", "-c", f"cd {shlex.quote(str(checkout))} && exec {shlex.join(words)}"]

    return replace(OURS, name=name, command=start)


def _figures(take: dict[str, Any]) -> tuple[float, ...]:
    """Return pictures a second, and processor time a request of Java and of Python."""
    count, cpu_s = len(take["latencies"]), take["cpu_s"]
    return count * take["pictures"] / take["wall_s"], *(cpu_s[name] / count * 1e6 for name in ("java", "python"))


if __name__ == "__main__":
    main()
