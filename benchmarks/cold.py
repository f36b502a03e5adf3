"""The first seconds of a server: when it is ready, and how slow its first requests are beside its later ones.

Type: python -m benchmarks.cold --warm-up-s 0,2 --rounds 5

Each round starts a server afresh for each length of the warm-up, asks it as soon as it says that it is ready, and tells
the slowest request and the 99th percentile in terms of their median, and the same of the first hundred's mean. The
environment goes to the server: JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 before it, for one, sets Java's options.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.capacity import build
from benchmarks.load import ROOT, Outcome, measure
from benchmarks.running import free_port

KINDS = ("scores", "maps float32")
FIGURES = ("slowest / median", "p99 / median", "first 100 / median", "median, ms")


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--warm-up-s", default="0,2", help="lengths to compare")
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of requests of a kind after it is ready")
    options = parser.parse_args()
    lengths = options.warm_up_s.split(",")
    found: dict[str, list[list[float]]] = {length: [] for length in lengths}
    for turn in range(options.rounds):
        for length in lengths[turn % len(lengths) :] + lengths[: turn % len(lengths)]:
            found[length].append(start(options, length))
    names = [f"{kind}: {what}" for kind in KINDS for what in FIGURES]
    print("| warm-up, s | ready after, s | " + " | ".join(names) + " |")
    print("|" + "---|" * (2 + len(names)))
    for length, rounds in found.items():
        columns = zip(*rounds, strict=True)
        cells = [f"{statistics.median(column):.1f} ({min(column):.1f}–{max(column):.1f})" for column in columns]
        print(f"| {length} | " + " | ".join(cells) + " |")
    print(f"\n{options.rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def start(options: argparse.Namespace, length: str) -> list[float]:
    """Start a server, ask it, and return its row."""
    rest = free_port()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        command = [sys.executable, "-m", "server", "--models", options.model, "--workers", "1", "--work-dir", folder]
        command += ["--rest-port", str(rest), "--grpc-port", "0", "--metrics-port", "0", "--warm-up-s", length]
        began = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            row = [time.perf_counter() - began]
            assert said.startswith("Ready"), Path(folder, "log").read_text()
            for kind in KINDS:
                row += describe(measure(build(kind, options.model, rest, callers=1)(options.seconds)))
        finally:
            server.terminate()
            server.communicate()
    return row


def describe(outcome: Outcome) -> list[float]:
    """Return `FIGURES` of a load's latencies."""
    assert not outcome.errors, outcome.errors
    median = statistics.median(outcome.latencies)
    late = statistics.quantiles(outcome.latencies, n=100)[-1]
    first = statistics.mean(outcome.latencies[:100])
    return [max(outcome.latencies) / median, late / median, first / median, median * 1e3]


if __name__ == "__main__":
    sys.exit(main())
