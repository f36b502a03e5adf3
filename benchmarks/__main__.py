"""Measure our service and its rivals in one run: all of them up, the load going from one to the next.

    python -m benchmarks                                                # the standard set, on cifar
    python -m benchmarks --full --models cifar,digits,resnet18
    python -m benchmarks --only 'c=8' --servers convscope,mosec --rounds 3 --out out/bench/try

Run it with `.venv-bench/bin/python` (`make bench`), which has the rivals. A ratio compares within a round; a round in
which the hypervisor took more than 15 % of the processors is discarded and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, models, report, stages
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.workloads import FULL, STANDARD, Workload


def main() -> int:
    """Measure what the command line names and write the results."""
    options = parse()
    workloads = [one for one in (FULL if options.full else STANDARD) if matches(one.name, options.only)]
    for name in options.models.split(","):
        found = run(name, workloads, options)
        out = options.out / name
        report.write(found, out)
        print(f"\n{out.with_suffix('.md').read_text()}")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every workload, not only the standard ones")
    parser.add_argument("--only", default="*", metavar="A|B", help="workloads whose name holds A or B")
    parser.add_argument("--servers", default="*", metavar="A|B", help="servers of these names; * stands for anything")
    parser.add_argument("--models", default="cifar", metavar="A,B", help=f"of {', '.join(models.SAMPLES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    return parser.parse_args()


def run(name: str, workloads: list[Workload], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one network."""
    work = ROOT / "out/bench"
    say(f"{name}: making the graphs ready")
    model = models.prepare(name, work)
    servers = [one for one in SERVERS if any(fnmatch.fnmatch(one.name, part) for part in options.servers.split("|"))]
    if not options.full and options.servers == "*":
        servers = [one for one in servers if one.name != "convscope, 2 workers"]
    starts: dict[str, Any] = {}
    takes: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        running = []
        for server in servers:
            try:
                one = stack.enter_context(Running(server, model, work))
            except RuntimeError as error:
                say(f"{error}\nIt is left out.")
                continue
            one.warm_up(workloads)
            running.append(one)
            starts[server.name] = {"kind": server.kind, "first_answer_s": one.first_answer_s, "coldest": one.coldest}
            say(f"{server.name} answers, {one.first_answer_s:.1f} s after its start")
        for number in range(options.rounds):
            began = time.monotonic()
            for workload in workloads:
                for one in running[number % len(running) :] + running[: number % len(running)]:
                    if one.can(workload):
                        takes.append({"round": number, **one.take(workload, options.seconds)})
            say(f"round {number + 1} of {options.rounds}: {time.monotonic() - began:.0f} s")
        for one in running:
            starts[one.server.name]["memory_mib"] = machine.memory_mib(one.process.pid)
        ours = next((one for one in running if one.server.name == "convscope"), None)
        return {
            "model": name,
            "circumstances": {
                **machine.circumstances(),
                "picture": f"{len(model.pictures[0]):,} bytes",
                "rounds": options.rounds,
                "seconds": options.seconds,
                "date": time.strftime("%Y-%m-%d"),
            },
            "servers": starts,
            "takes": takes,
            "stages": stages.measure(ours) if ours else {},
            "formats": stages.formats(ours) if ours else {},
        }


def matches(name: str, patterns: str) -> bool:
    """Tell whether a name holds any of the patterns."""
    return any(fnmatch.fnmatch(name, f"*{part}*") for part in patterns.split("|"))


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
