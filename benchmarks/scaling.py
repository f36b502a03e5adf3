"""What the second core brings: one process or worker and as many as there are cores, in turns.

    python -m benchmarks.scaling [--network resnet50] [--rounds 9]

Measured are a forward pass alone, our handler in a loop and the service, with one thread a process; then the service
with the threads that its launcher gives two workers. Photographs of 640×480, eight callers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.asking import Place
from benchmarks.load import ROOT
from benchmarks.report import table
from benchmarks.running import Running
from benchmarks.servers import CORES, SERVERS
from benchmarks.summaries import spread
from benchmarks.workloads import closed

_FORWARD, _LOOP, _SERVICE, _LAUNCHED = (
    "floor, forward",
    "floor, convscope",
    "convscope, one thread a worker",
    "convscope",
)
_ROWS = {  # With one process or worker, and with one a core.
    "forward pass alone": (_FORWARD, _FORWARD),
    "handler in a loop": (_LOOP, _LOOP),
    "service": (_SERVICE, _SERVICE),
    "service, threads as launched": (_SERVICE, _LAUNCHED),
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet50", choices=sorted(models.NETWORKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    options = parser.parse_args()
    work, workload = ROOT / "out/bench", closed("scores", 8, photograph="0.3 MP")
    model = models.prepare(options.network, work)
    servers = {server.name: server for server in SERVERS}
    servers[_FORWARD] = replace(servers[_LOOP], name=_FORWARD, command=_start_forward)
    with contextlib.ExitStack() as stack:
        running: dict[tuple[str, int], Running] = {}
        for name, workers in dict.fromkeys(
            (name, count) for pair in _ROWS.values() for name, count in zip(pair, (1, CORES), strict=True)
        ):
            one = stack.enter_context(Running(servers[name], model, work / f"scaling-{workers}", workers))
            one.warm_up([workload])
            running[name, workers] = one
        found: dict[tuple[str, int], list[dict[str, Any]]] = {place: [] for place in running}
        for number in range(options.rounds):
            for place in list(running)[:: 1 if number % 2 else -1]:
                found[place].append(running[place].take(workload, options.seconds))
    lines = []
    for name, (single, several) in _ROWS.items():
        ones, twos = found[single, 1], found[several, CORES]
        ratios = [_rate(two) / _rate(one) for one, two in zip(ones, twos, strict=True)]
        lines.append([name, *(spread([_rate(take) for take in takes], "{:.1f}") for takes in (ones, twos))])
        lines[-1] += [spread(ratios), *(f"{_ms(takes, 'python')} + {_ms(takes, 'java')}" for takes in (ones, twos))]
    head = ("", "one, pictures/s", f"{CORES}, pictures/s", "ratio", "one, ms a picture: Python + Java", f"{CORES}, ms")
    print("\n".join(table(head, lines)))
    print(f"{options.rounds} rounds of {options.seconds:g} s, {CORES} cores, load {os.getloadavg()[0]:.1f}")


def _start_forward(place: Place) -> list[str]:
    return [models.PYTHON, "-m", "benchmarks.floor", "forward", str(place.model.archive), str(place.workers)]


def _rate(take: dict[str, Any]) -> float:
    return len(take["latencies"]) / float(take["wall_s"])


def _ms(takes: list[dict[str, Any]], program: str) -> str:
    """Return ms of processor time a picture."""
    return spread([take["cpu_s"].get(program, 0.0) / len(take["latencies"]) * 1e3 for take in takes], "{:.1f}")


if __name__ == "__main__":
    main()
