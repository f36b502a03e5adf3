"""Where a request's time goes around the handler: processor time by thread, and time without a core to run on.

Type: python -m benchmarks.wall --rounds 5

Our service and TorchServe with a handler that does nothing take turns under the same load. Linux tells how long each
thread ran and how long it could have run and had no core (`/proc/<pid>/task/<tid>/schedstat`); the service's metrics
tell how long the handler took. What is left is TorchServe's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks import models
from benchmarks.capacity import read
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.workloads import STANDARD

ASKED = ("scores, c=1", "scores, c=8", "float32, c=1", "float32, c=8", "float16, 32 pictures, c=1")
GROUPS = {"epollEventLoop": "Netty", "W-": "hand-over", "C1 ": "compiler", "C2 ": "compiler"}  # By name.
JAVA, WORKER = "Java's rest", "worker's rest"
COLUMNS = ("Netty", "hand-over", "compiler", JAVA, "handler", WORKER, "no core, Java", "no core, worker")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar", choices=models.SAMPLES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    work = ROOT / "out/bench"
    model = models.prepare(options.model, work)
    workloads = [workload for workload in STANDARD if workload.name in ASKED]
    servers = [server for server in SERVERS if server.name in ("convscope", "TorchServe, null")]
    print(f"| asked | server | requests/s | p50, µs | {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---|" * (2 + len(COLUMNS)))
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Running(server, model, work)) for server in servers]
        for one in running:
            one.warm_up(workloads)
        for workload in workloads:
            rounds: dict[str, list[dict[str, float]]] = {one.server.name: [] for one in running}
            for number in range(options.rounds):
                for one in running[:: 1 if number % 2 else -1]:
                    before, told = threads(one.process.pid), handled(one)
                    outcome = one.load(workload, options.seconds)
                    count, after = len(outcome.latencies), threads(one.process.pid)
                    spent, requests, batches = (now - then for now, then in zip(handled(one), told, strict=True))
                    # Each request of a batch counts the whole batch's time.
                    after["handler"] = spent / requests * batches * 1e6 if requests else 0.0
                    after[WORKER] -= after["handler"]
                    row = {name: (after[name] - before[name]) / count for name in COLUMNS}
                    row["rate"] = count / outcome.wall_s
                    row["p50"] = statistics.median(outcome.latencies) * 1e6
                    rounds[one.server.name].append(row)
            for name, rows in rounds.items():
                cells = [f"{statistics.median(row[key] for row in rows):,.0f}" for key in ("rate", "p50", *COLUMNS)]
                print(f"| {workload.name} | {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def threads(pid: int) -> dict[str, float]:
    """Return, in µs, how long the threads of a server ran so far, and had no core, by group."""
    found: dict[str, float] = defaultdict(float)
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        is_java = process.name() == "java"
        if not is_java and not any("model_service_worker" in part for part in process.cmdline()):
            continue
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                name = (task / "comm").read_text()
                ran, waited, _ = map(int, (task / "schedstat").read_text().split())
                group = next((GROUPS[start] for start in GROUPS if name.startswith(start)), JAVA)
                found[group if is_java else WORKER] += ran / 1e3
                found["no core, Java" if is_java else "no core, worker"] += waited / 1e3
    return found


def handled(running: Running) -> tuple[float, float, float]:
    """Return what our workers tell of their handlers, as `capacity.read` does; zeros of another's."""
    return read(running.place.others[0]) if running.server.kind == "ours" else (0.0, 0.0, 0.0)


if __name__ == "__main__":
    main()
