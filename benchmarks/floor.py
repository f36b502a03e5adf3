"""The floor: our handler's own code in a loop of each process, from a request's bytes to a reply's, without a server.

    python -m benchmarks.floor ARCHIVE WORKERS    # answers lines: {"body": a file, "seconds"}

Its settings are those that our launcher gives its workers. All processes begin at the same moment.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from handlers.loading import load

_pipeline: Any
_barrier: Any
_warm: set[int] = set()


def _begin(archive: Path, barrier: Any) -> None:
    global _pipeline, _barrier
    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    _pipeline = load(folder, model=archive.stem, version="1.0", config=config, batch_size=1, gpu=None)
    _barrier = barrier


def _ready(_: int) -> None:
    _barrier.wait()


def _loop(body: bytes, seconds: float) -> tuple[list[float], float]:
    if hash(body) not in _warm:
        _pipeline.respond([{"request": body}], [{}])
        _warm.add(hash(body))
    _barrier.wait()
    latencies = []
    began = now = time.perf_counter()
    while now < began + seconds:
        _pipeline.respond([{"request": body}], [{}])
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    return latencies, now - began


def main() -> None:
    """Print one line for each line read: all processes' latencies, and their number over the sum of the rates."""
    archive, workers = Path(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, _begin, (archive, barrier)) as pool:
        list(pool.map(_ready, range(workers)))
        print("ready", flush=True)
        for line in sys.stdin:
            said = json.loads(line)
            body = Path(said["body"]).read_bytes()
            found = list(pool.map(_loop, [body] * workers, [said["seconds"]] * workers))
            latencies = [one for loop, _ in found for one in loop]
            rate = sum(len(loop) / wall_s for loop, wall_s in found)
            print(json.dumps({"latencies": latencies, "wall_s": len(latencies) / rate}), flush=True)


if __name__ == "__main__":
    main()
