"""Where a 32×32 picture's processor time goes, by thread, and in the worker by stage; of one checkout or two in turns.

    python -m benchmarks.profile [--before ../before] [--only 'scores*|float32*'] [--rounds 7]

Threads are read from /proc; stages are sampled by processor time (`sampler`). Both may be measured beside other work.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import psutil

from benchmarks import models
from benchmarks.against import SMALL, archived, service
from benchmarks.load import ROOT
from benchmarks.report import table
from benchmarks.running import Running
from benchmarks.summaries import spread
from benchmarks.workloads import Workload
from server.trust import DIGESTS

THREADS = {  # By program and the thread's name; the first that fits.
    "Java, event loops": "java/epollEventLoop",
    "Java, the worker's thread": "java/W-",
    "Java, compiler and collector": "java/",
    "worker": "worker/main",
    "worker, other threads": "worker/",
    "launcher and exporter": "",
}
STAGES = {  # By source file, of today's handlers and of those of 2026-11-22; the first that fits.
    "forward pass": "engines/",
    "TorchServe's messages": "^ts/|entry|messages|connection|patches",
    "parsing the request": "request|fields|options|edits|media",
    "pictures: decoding, stacking": "images|files|plain|resizing",
    "scores and maps": "inference|predictor|maps",
    "encoding the reply": "formats|assembly|reply|response|protobuf",
    "metrics and log": "metrics|slots|telemetry|journal|ops/",
    "pipeline, ids, limits": "",
}
_SECONDS = 3.0


def main() -> None:
    """Measure, and print a table for each workload."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--only", default="scores*|float32*", help="workloads, patterns with | between")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    workloads = [one for one in SMALL if any(fnmatch(one.name, some) for some in options.only.split("|"))]
    model = models.prepare("cifar", ROOT / "out/bench")
    checkouts = archived(model, ({"before": options.before} if options.before else {}) | {"now": ROOT})
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(_start(name, model, *one)) for name, one in checkouts.items()}
        for one in running.values():
            one.warm_up(workloads)
        for workload in workloads:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in running}
            for number in range(options.rounds):
                for name in list(running)[:: 1 if number % 2 else -1]:
                    found[name].append(_take(running[name], workload))
            rows = (
                [kind, *(spread([take[kind] for take in takes], "{:.0f}") for takes in found.values())]
                for kind in (*THREADS, *STAGES)
            )
            print("\n".join(table((f"{workload.name}; µs a request", *running), rows)), flush=True)
    print(f"{options.rounds} rounds of {_SECONDS:g} s")


def _start(name: str, model: models.Model, checkout: Path, store: Path) -> Running:
    """Make a service whose worker samples itself."""
    sampled = store.with_name(f"{store.name}-sampled")
    sampled.mkdir(exist_ok=True)
    archive = f"{model.name}.mar"
    with zipfile.ZipFile(store / archive) as file, zipfile.ZipFile(sampled / archive, "w") as copy:
        for member in set(file.namelist()) - {DIGESTS}:
            more = Path(__file__).with_name("sampler.py").read_bytes() if member == "convscope_entry.py" else b""
            copy.writestr(member, file.read(member) + more)
    server = replace(service(name, checkout, sampled), environment={"BENCH_SAMPLES": str(sampled / "samples")})
    return Running(server, model, ROOT / "out/bench", workers=1)


def _take(running: Running, workload: Workload) -> dict[str, float]:
    """Return µs of processor time a request, by thread and by stage."""
    samples = Path(running.server.environment["BENCH_SAMPLES"])
    samples.write_text("")
    before = _thread_ns(running.process.pid)
    count = len(running.load(workload, _SECONDS).latencies)
    spent = _thread_ns(running.process.pid)
    threads = {kind: (spent[kind] - before[kind]) / count / 1e3 for kind in THREADS}
    files = samples.read_text().split()
    stages = Counter(next(stage for stage, some in STAGES.items() if re.search(some, file)) for file in files)
    return threads | {stage: stages[stage] / len(files) * threads["worker"] for stage in STAGES}


def _thread_ns(pid: int) -> Counter[str]:
    """Return the processor time of all threads so far, in ns, by `THREADS`."""
    found: Counter[str] = Counter()
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError):
            is_worker = any("model_service_worker" in word for word in process.cmdline())
            program = "worker" if is_worker else process.name()
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                name = "main" if task.name == str(process.pid) else (task / "comm").read_text()
                kind = next(kind for kind, start in THREADS.items() if f"{program}/{name}".startswith(start))
                found[kind] += int((task / "schedstat").read_text().split()[0])
    return found


if __name__ == "__main__":
    main()
