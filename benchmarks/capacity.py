"""What one worker carries, beside what the capacity formula of docs/operations.md makes of its metrics.

Type: python -m benchmarks.capacity --rounds 5

For each kind of request callers ask one worker in a closed loop, so that it is never idle for want of a request. The
formula's `seconds` comes from the metrics of the same time: the mean of `convscope_handler_seconds` over the mean of
`convscope_batch_requests`. Rate times seconds is the share of its time that the worker spends in its handler, the
largest `utilisation` there can be; the rest goes into TorchServe's own handing over.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import ROOT, Load, Request, measure
from handlers.wire import convscope_pb2 as wire

ASKED = {
    "scores": wire.PredictRequest(),
    "maps float32": wire.PredictRequest(layers=["all"]),
    "32 pictures, maps float16": wire.PredictRequest(layers=["all"], map_dtype=wire.FLOAT16),
}
CALLERS = {"32 pictures, maps float16": 2}
WARM_UP_S, START_S = 15.0, 120.0


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        rest, metrics = one.getsockname()[1], other.getsockname()[1]
    ports = ["--rest-port", str(rest), "--grpc-port", "0", "--metrics-port", str(metrics)]
    command = [sys.executable, "-m", "server", "--models", options.model, "--workers", "1", *ports]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            await_answer(server, f"http://127.0.0.1:{rest}/predictions/{options.model}")
            report(options, rest, metrics)
        finally:
            server.terminate()
            server.wait()
    return 0


def report(options: argparse.Namespace, rest: int, metrics: int) -> None:
    """Measure every kind of request in turns and print its row."""
    loads = {name: build(name, options.model, rest) for name in ASKED}
    for load in loads.values():
        measure(load(WARM_UP_S / len(loads)))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ASKED}
    for _ in range(options.rounds):
        for name, load in loads.items():
            before = read(metrics)
            outcome = measure(load(options.seconds))
            assert not outcome.errors, outcome.errors
            spent, handed, batches = (now - then for now, then in zip(read(metrics), before, strict=True))
            requests = len(outcome.latencies)
            assert handed == requests, "somebody else asks"
            found[name].append((requests / outcome.wall_s, spent / handed / (handed / batches)))
    print("| asked | requests/s | seconds | rate × seconds |")
    print("|---|---|---|---|")
    for name, rounds in found.items():
        rates, seconds = zip(*rounds, strict=True)
        shares = [rate * time_s for rate, time_s in rounds]
        print(
            f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
            f"| {statistics.median(seconds):.5f} "
            f"| {statistics.median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f}) |"
        )
    print(f"\n{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def build(name: str, model: str, port: int, *, callers: int | None = None) -> Callable[[float], Load]:
    """Return a function that makes the load of a kind of request from its seconds."""
    request = wire.PredictRequest()
    request.CopyFrom(ASKED[name])
    picture = (ROOT / "samples/cat.png").read_bytes()
    request.pictures.extend([picture] * (32 if name.startswith("32") else 1))
    body = request.SerializeToString()
    media = "application/x-protobuf"
    head = (
        f"POST /predictions/{model} HTTP/1.1\r\nhost: localhost\r\naccept: {media}\r\ncontent-type: {media}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    asked = (Request(head.encode() + body),)
    return lambda seconds: Load(("127.0.0.1", port), "REST", asked, callers or CALLERS.get(name, 8), seconds)


def read(port: int) -> tuple[float, float, float]:
    """Return seconds in the handler and requests handed over, both added up, and the number of batches."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        totals: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    cards = totals["convscope_cards_total"]
    return (
        totals["convscope_handler_seconds_sum"],
        totals["convscope_handler_seconds_count"],
        totals["convscope_batch_requests_count"] - cards,
    )


def await_answer(server: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the server is ready."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urlopen(url, timeout=10):  # noqa: S310 (our own)
                return
        except (URLError, OSError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
