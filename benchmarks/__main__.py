"""Measure our service and its rivals in one run: all of them up, the load going from one to the next.

    python -m benchmarks                                                # the standard set
    python -m benchmarks --full
    python -m benchmarks --parts resnet50 --only '3 MP' --servers 'convscope|mosec*' --rounds 3 --out out/bench/try

Run it with `.venv-bench/bin/python` (`make bench`), which has the rivals. A ratio compares within a round; a round in
which the hypervisor took more than 15 % of the processors is discarded and counted. A server that does not start, or
answers wrongly, is left out, and the report says why.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks import machine, models, report, stages, targets
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import CORES, SERVERS, Server
from benchmarks.workloads import FULL, STANDARD, Part, Workload

_FAULTS = (AssertionError, OSError, RuntimeError, subprocess.CalledProcessError, ValueError)


def main() -> int:
    """Measure what the command line names and write the results; fail if our own service is among what was left out."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Servers are stopped then too.
    complete = True
    for part in FULL if options.full else STANDARD:
        workloads = [
            one
            for one in part.workloads
            if any(fnmatch.fnmatch(one.name, f"*{some}*") for some in options.only.split("|"))
        ]
        if workloads and matches(part.name, options.parts):
            found = run(part, workloads, options)
            report.write(found, options.out / part.name)
            say(f"{part.name}: wrote {options.out / part.name}.md")
            complete = complete and "convscope" not in found["left_out"]
    print(targets.write(options.out))
    return 0 if complete else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every workload and server, not only the standard ones")
    parser.add_argument("--parts", default="*", metavar="A|B", help=f"of {', '.join(part.name for part in FULL)}")
    parser.add_argument("--only", default="*", metavar="A|B", help="workloads whose name holds A or B")
    parser.add_argument("--servers", default="*", metavar="A|B", help="servers of these names; * stands for anything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    return parser.parse_args()


def run(part: Part, workloads: list[Workload], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one network."""
    work = ROOT / "out/bench"
    say(f"{part.name}: making the archive and the graphs ready")
    model = models.prepare(part.network, work)
    workers = part.workers or CORES
    servers = [one for one in SERVERS if matches(one.name, part.servers) and matches(one.name, options.servers)]
    starts: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    takes: list[dict[str, Any]] = []
    running: dict[str, Running] = {}

    def leave_out(server: Server, error: BaseException) -> None:
        say(f"{server.name} is left out: {error}")
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        left_out[server.name] = " … ".join(dict.fromkeys((lines[0], lines[-1])))

    with contextlib.ExitStack() as stack:
        for server in servers:
            ours = running.get("convscope")
            try:
                settings = ours.worker_settings() if ours and server.kind == "floor" else None
                one = stack.enter_context(Running(server, model, work, workers, settings))
                one.warm_up(workloads)
            except _FAULTS as error:
                leave_out(server, error)
                continue
            running[server.name] = one
            starts[server.name] = {"kind": server.kind, "first_answer_s": one.first_answer_s}
            say(f"{server.name} answers, {one.first_answer_s:.1f} s after its start")
        order = deque(running.values())
        for number in range(options.rounds):
            began = time.monotonic()
            for workload in workloads:
                for one in order:
                    try:
                        if one.can(workload) and one.server.name not in left_out:
                            takes.append({"round": number, **one.take(workload, options.seconds * _longer(workload))})
                    except _FAULTS as error:
                        leave_out(one.server, error)
            order.rotate(-1)
            say(f"{part.name}: round {number + 1} of {options.rounds}: {time.monotonic() - began:.0f} s")
        for name, one in running.items():
            starts[name]["memory_mib"] = machine.memory_mib(one.process.pid)
        ours = None if "convscope" in left_out else running.get("convscope")
        of_stages, of_formats = (stages.measure(ours, workloads), stages.formats(ours)) if ours else ({}, {})
        for one in running.values():
            one.stop()
        return {
            "model": part.name,
            "circumstances": {
                **machine.circumstances(),
                "workers": f"{workers} worker{'s' * (workers > 1)} a server unless it says otherwise",
                "pictures": " and ".join(
                    f"pictures of {size or '32×32'} have {len(files[0]):,} bytes"
                    for size, files in model.pictures.items()
                ),
                "rounds": options.rounds,
                "seconds": options.seconds,
                "date": time.strftime("%Y-%m-%d"),
            },
            "servers": starts,
            "left_out": left_out,
            "takes": takes,
            "stages": of_stages,
            "formats": of_formats,
        }


def _longer(workload: Workload) -> float:
    """Return how many times as long to measure: 32 photographs take a worker as long as a measurement of others."""
    return 3.0 if workload.asked.photograph and workload.asked.pictures >= 32 else 1.0


def matches(name: str, patterns: str) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatch.fnmatch(name, one) for one in patterns.split("|"))


def say(text: str) -> None:
    """Print a line for the person at the terminal."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
