"""What serving costs: pictures a second through the service, as a share of the same handler called in this process.

Type: make bench, or python -m benchmarks.overhead --rounds 5 --seconds 1.5

Every round runs the floor and each way of asking once, for each workload, so that a machine whose speed drifts drifts
for all of them; a ratio compares within its round. The client is ours, in Python, on the same machine and cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from convscope import Client, ConvscopeError
from PIL import Image

from handlers.service import Service
from handlers.wire import convscope_pb2 as wire

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_S = 10.0  # A cold JVM is two to three times slower.
WORKLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "scores": (1, {}),
    "scores, maps float32": (1, {"layers": ["all"]}),
    "scores, maps uint8": (1, {"layers": ["all"], "map_dtype": "uint8"}),
    "32 pictures, maps float16": (32, {"layers": ["all"], "map_dtype": "float16"}),
}
CONCURRENCIES = (1, 8)


def main() -> int:
    """Measure, print the table, and write it with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "overhead.json")
    options = parser.parse_args()
    picture = (ROOT / "samples/cat.png").read_bytes()
    with floor() as ask_floor, served() as (rest, grpc):
        ways: dict[str, tuple[int, Callable[[int, dict[str, Any]], Any]]] = {"floor": (1, ask_floor(picture))}
        for name, client in (("REST", rest), ("gRPC", grpc)):
            for concurrency in CONCURRENCIES:
                ways[f"{name} c={concurrency}"] = (concurrency, through(client, picture))
        for concurrency, ask in ways.values():
            rate(lambda ask=ask: ask(1, {"layers": ["all"]}), concurrency, WARM_UP_S / len(ways))
        rates: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in WORKLOADS}
        for number in range(options.rounds):
            for name, (count, asked) in WORKLOADS.items():
                for way, (concurrency, ask) in ways.items():
                    found = rate(lambda ask=ask, c=count, a=asked: ask(c, a), concurrency, options.seconds)
                    rates[name][way].append(found * count)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    print(table(rates))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"circumstances": circumstances(options), "pictures_per_s": rates}, indent=2))
    print(f"\n{json.dumps(circumstances(options))}")
    return 0


def rate(ask: Callable[[], Any], concurrency: int, seconds: float) -> float:
    """Return completed calls a second of `concurrency` threads, each asking again once it is answered."""
    counts = [0] * concurrency
    ends = time.perf_counter() + seconds

    def loop(index: int) -> None:
        while time.perf_counter() < ends:
            ask()
            counts[index] += 1

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(concurrency)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


@contextlib.contextmanager
def floor() -> Iterator[Callable[[bytes], Callable[[int, dict[str, Any]], Any]]]:
    """Load the archive's handler into this process, on one thread, as a worker has it."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ROOT / "model_store/cifar.mar") as archive:
        archive.extractall(folder)
        config = yaml.safe_load((Path(folder) / "model-config.yaml").read_text())
        environment = {"CONVSCOPE_THREADS": "1", "CONVSCOPE_MAX_RESPONSE_BYTES": str(2**28)}
        service = Service.load(
            Path(folder),
            model="cifar",
            version="1.0",
            config=config,
            batch_size=1,
            gpu=None,
            environment=environment,
        )

        def make(picture: bytes) -> Callable[[int, dict[str, Any]], Any]:
            def ask(count: int, asked: dict[str, Any]) -> Any:
                fields = dict(asked)
                if "map_dtype" in fields:
                    fields["map_dtype"] = wire.Dtype.Value(fields["map_dtype"].upper())
                message = wire.PredictRequest(pictures=[picture] * count, **fields)
                return service.answer([{"request": message.SerializeToString()}], [{}])

            return ask

        yield make


@contextlib.contextmanager
def served() -> Iterator[tuple[Client, Client]]:
    """Start the service with one worker and yield a client on each transport."""
    rest, grpc, metrics = (free_port() for _ in range(3))
    command = [sys.executable, "-m", "server", "--models", "cifar", "--workers", "1", "--device", "cpu"]
    command += ["--rest-port", str(rest), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    environment = {**os.environ, "CONVSCOPE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            with Client(f"http://127.0.0.1:{rest}") as one, Client(f"grpc://127.0.0.1:{grpc}") as other:
                wait_until_ready(server, one)
                yield one, other
        finally:
            server.terminate()


def through(client: Client, picture: bytes) -> Callable[[int, dict[str, Any]], Any]:
    """Return a way of asking through a client."""
    return lambda count, asked: client.predict([picture] * count, model="cifar", **asked)


def wait_until_ready(server: subprocess.Popen[bytes], client: Client) -> None:
    """Wait until the model answers.

    Raises:
        SystemExit: The server ended first.
    """
    while server.poll() is None:
        with contextlib.suppress(ConvscopeError):
            if client.ready("cifar"):
                return
        time.sleep(0.2)
    raise SystemExit("benchmarks: the server did not start")


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    """Lay out medians: the floor in pictures a second, the rest as ratios to it with their least and largest."""
    ways = [way for way in next(iter(rates.values())) if way != "floor"]
    out = io.StringIO()
    print("| workload | floor, pictures/s | " + " | ".join(ways) + " |", file=out)
    print("|---|" + "---|" * (len(ways) + 1), file=out)
    for name, found in rates.items():
        cells = [f"{statistics.median(found['floor']):,.0f}"]
        for way in ways:
            ratios = [one / base for one, base in zip(found[way], found["floor"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", file=out)
    return out.getvalue().rstrip()


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a figure means nothing without."""
    with Image.open(ROOT / "samples/cat.png") as image:
        size = f"{image.width}×{image.height} PNG"
    return {
        "picture": size,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
