"""The campaign: generated requests, valid and hostile, on both transports, against a service that must not notice.

    make campaign                                                      # 10^6 requests, about half an hour
    .venv/bin/python -m tests.campaign --requests 20000 --seed 3
    .venv/bin/python -m tests.campaign --docker --requests 50000       # the same through the gateway

It starts the service itself, two models with a worker each, and looks at every process while the requests run.
Exit status 1 if a worker was restarted, an answer was wrong, a request was not answered, or `internal` was answered.
Results go to `out/campaign/`: `summary.md`, `samples.csv`, `chart.png`, and `failures/`, a file for each failure
(the first hundred), which holds the request.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
from pathlib import Path

from tests.campaign.load import MOST_FAILURES, Tally, run
from tests.campaign.services import docker_service, own_service
from tests.docker.stack import JAVA, WORKER
from tests.server.harness import ROOT


def write(folder: Path, total: Tally, seconds: float, facts: list[str]) -> str:
    """Write the summary and the failures; return the summary."""
    failures = folder / "failures"
    shutil.rmtree(failures, ignore_errors=True)
    failures.mkdir(parents=True)
    for number, (kind, reason, request) in enumerate(total.failures[:MOST_FAILURES]):
        name = f"{number:03}-{kind.replace('/', '-').replace(' ', '_')}"
        (failures / f"{name}.pickle").write_bytes(pickle.dumps(request))
        (failures / f"{name}.json").write_text(
            json.dumps({"kind": kind, "reason": reason, "request": repr(request)[:4000]}, indent=1)
        )
    kinds = sorted({kind for kind, _ in total.outcomes})
    lines = [
        f"{total.requests:,} requests in {seconds:.0f} s, {total.requests / seconds:.0f}/s, "
        f"{len(total.failures)} failures",
        *facts,
        "",
    ]
    lines += ["| kind of request | n | outcomes | slowest s |", "|---|---|---|---|"]
    for kind in kinds:
        found = {name: count for (of, name), count in total.outcomes.items() if of == kind}
        told = ", ".join(f"{name}: {count:,}" for name, count in sorted(found.items(), key=lambda item: -item[1]))
        lines.append(f"| {kind} | {sum(found.values()):,} | {told} | {total.slowest.get(kind, 0):.2f} |")
    text = "\n".join(lines) + "\n"
    (folder / "summary.md").write_text(text)
    return text


def main() -> int:
    """Run the campaign and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--callers", type=int, default=4, help="processes that send requests")
    parser.add_argument("--workers", type=int, default=1, help="workers of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docker", action="store_true", help="through the gateway, in Docker")
    parser.add_argument("--out", type=Path, default=ROOT / "out/campaign")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"requests": given.requests, "callers": given.callers, "seed": given.seed}
    problems: list[str] = []
    if given.docker:
        with docker_service() as (target, stack):
            [replica] = stack.replicas()
            before = [stack.processes(replica, kind) for kind in (WORKER, JAVA)]
            total, seconds = run(target, None, **settings)
            after = [stack.processes(replica, kind) for kind in (WORKER, JAVA)]
            memory = stack.docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}").splitlines()
        facts = [f"workers and Java before {before}, after {after}", *memory]
    else:
        with own_service(given.workers) as (target, watch, server):
            before = [watch.worker_ids(), server.java()]
            total, seconds = run(target, watch, **settings)
            after = [watch.worker_ids(), server.java()]
            lines = [line for line in server.err.splitlines() if '"error"' in line or "error" in line[:40]]
        watch.write(given.out / "samples.csv")
        watch.draw(given.out / "chart.png", f"{total.requests:,} generated requests")
        facts = [f"workers and Java before {before}, after {after}"]
        for role, (memory, memory_late, descriptors, descriptors_late) in watch.growth().items():
            facts.append(
                f"{role}: {memory:.0f} MiB in the second quarter, {memory_late:.0f} in the last; "
                f"descriptors {descriptors:.0f}, {descriptors_late:.0f}"
            )
        (given.out / "launcher.log").write_text(server.err)
        facts.append(f"{len(lines)} error lines of the launcher")
    if before != after:
        problems.append("a process was restarted")
    if total.requests < given.requests and not total.failures:
        problems.append(f"only {total.requests:,} requests were sent")
    problems += [f"{kind}: {reason}" for kind, reason, _ in total.failures[:20]]
    print(write(given.out, total, seconds, facts))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
