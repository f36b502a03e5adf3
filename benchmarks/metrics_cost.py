"""What keeping metrics costs: the same request answered with and without a recorder, in turns, in this process.

Type: python -m benchmarks.metrics_cost --pairs 3000

A pair is one call of each, the order turning from pair to pair, so that a machine whose speed drifts drifts for both.
Times are the thread's own on the CPU, so that what else runs on the machine is not counted. The cost is the median of
the pairs' differences, with their quartiles. Beside it stands its share of a handler call, and of the processor time
that the service spends on such a request with eight callers, front end included, as `make bench` last measured it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path
from time import thread_time
from typing import Any

import torch
import yaml

from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/cifar.json"
ASKED: dict[str, dict[str, Any]] = {  # By the names of `benchmarks.workloads`.
    "scores, c=8": {},
    "float32, c=8": {"layers": ["all"]},
    "uint8, c=8": {"layers": ["all"], "map_dtype": wire.UINT8},
}
WARM_UP = 200  # Calls.


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3000, help="of each workload")
    options = parser.parse_args()
    measured = json.loads(RESULTS.read_text())["summaries"]
    print("| workload | handler call, µs | recording, µs | of the call | of the request, front end included |")
    print("|---|---|---|---|---|")
    picture = (ROOT / "samples/cat.png").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        service = load(Path(folder))
        for name, asked in ASKED.items():
            quiet, costs = measure(service, wire.PredictRequest(pictures=[picture], **asked), options.pairs)
            call, cost = statistics.median(quiet), statistics.median(costs)
            low, _, high = statistics.quantiles(costs, n=4)
            whole = sum(measured[name]["convscope"]["cpu_us"].values()) / 1e6
            cells = [name, f"{call * 1e6:,.0f}", f"{cost * 1e6:.0f} ({low * 1e6:.0f}–{high * 1e6:.0f})"]
            print("| " + " | ".join([*cells, f"{cost / call:.1%}", f"{cost / whole:.1%}"]) + " |")
    circumstances = {
        "pairs": options.pairs,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(f"\n{json.dumps(circumstances)}")
    return 0


def load(folder: Path) -> Pipeline:
    """Load the archive's handler as a worker has it, on one thread, its metrics in `folder`."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # prometheus_client reads it too.
    unpacked = folder / "archive"
    with zipfile.ZipFile(ROOT / "model_store/cifar.mar") as archive:
        archive.extractall(unpacked)
    config = yaml.safe_load((unpacked / "model-config.yaml").read_text())
    service = Pipeline.load(
        unpacked,
        model="cifar",
        version="1.0",
        config=config,
        batch_size=1,
        gpu=None,
        settings=Settings(max_response_bytes=2**28, metrics_dir=folder),
    )
    if service.telemetry._metrics is None:
        raise SystemExit("benchmarks: the handler keeps no metrics here")
    return service


def measure(service: Pipeline, message: wire.PredictRequest, pairs: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each pair's call without metrics, and how much longer the one with them took."""
    rows = [{"request": message.SerializeToString()}]
    kept = service.telemetry._metrics
    recorders = (None, kept)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            service.telemetry._metrics = recorders[which]
            began = thread_time()
            service.respond(rows, [{}], ["0af7651916cd43dd8448eb211c80319c"])
            seconds[which].append(thread_time() - began)
    service.telemetry._metrics = kept
    quiet, counted = (taken[WARM_UP:] for taken in seconds)
    return quiet, [more - less for less, more in zip(quiet, counted, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
