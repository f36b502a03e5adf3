"""The floor: decoding, forward pass and encoding in a loop of each process, without a server.

    python -m benchmarks.floor convscope|tuned ARCHIVE WORKERS    # answers lines: {"body": a file, "seconds"}

`convscope` is our handler's own code, from a request's bytes to a reply's, with the settings that our launcher gives
its workers; `tuned` is the network of the tuned rivals. All processes begin at the same moment.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rivals.network import unpack

Respond = Callable[[bytes], object]

_respond: Respond
_barrier: Any
_warm: set[int] = set()


def _ours(archive: Path) -> Respond:
    import yaml

    from handlers.loading import load

    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    pipeline = load(folder, model=archive.stem, version="1.0", config=config, batch_size=1, gpu=None)
    return lambda body: pipeline.respond([{"request": body}], [{}])


def _tuned(archive: Path) -> Respond:
    from benchmarks.rivals.network import Tuned, encode

    network = Tuned()

    def respond(body: bytes) -> object:
        want, files = unpack(body)
        return encode(network.answer(files, want))

    return respond


_NETWORKS = {"convscope": _ours, "tuned": _tuned}


def _begin(network: str, archive: Path, barrier: Any) -> None:
    global _respond, _barrier
    _respond, _barrier = _NETWORKS[network](archive), barrier


def _ready(_: int) -> None:
    _barrier.wait()


def _loop(body: bytes, seconds: float) -> tuple[list[float], float]:
    if hash(body) not in _warm:
        _respond(body)
        _warm.add(hash(body))
    _barrier.wait()
    latencies = []
    began = now = time.perf_counter()
    while now < began + seconds:
        _respond(body)
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    return latencies, now - began


def main() -> None:
    """Answer one line for each line read: all processes' latencies, and their number over the sum of the rates."""
    network, archive, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, _begin, (network, archive, barrier)) as pool:
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
