"""What sharing requests brings: callers of one client, each asking about one picture, by how the client coalesces.

Type: python -m benchmarks.coalescing [--rounds 7] [--seconds 3] [--callers 32] [--model cifar]

A server of one worker, as `python -m server` starts it, runs beside the callers, which are tasks of one `AsyncClient`
or threads that share one `Client`; each asks again once it is answered. Every round takes every way once per question
and transport, the order turning from round to round; ratios are those within a round. Beside the rates stand
latencies, the client's processor time a picture and the pictures a request, as the service's own metrics count them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from convscope import AsyncClient, Client
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import machine
from benchmarks.capacity import await_answer
from benchmarks.load import ROOT
from benchmarks.running import free_port

QUESTIONS: dict[str, dict[str, Any]] = {
    "scores": {},
    "maps float16": {"layers": "all", "map_dtype": "float16"},
    "maps float32": {"layers": "all"},
}
MODES = ("off", "on", "auto")
KINDS = ("asyncio", "threads")
SAMPLES = ("cat", "airplane", "frog", "horse", "ship", "truck")
PICTURES = [(ROOT / f"samples/{name}.png").read_bytes() for name in SAMPLES]


@dataclass
class Take:
    """What one measurement found: pictures a second, latencies in seconds, CPU seconds, requests sent."""

    rate: float
    latencies: list[float]
    cpu_s: float
    requests: float


def main() -> int:
    """Measure, print the table, and write it with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--questions", default=",".join(QUESTIONS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "coalescing.json")
    options = parser.parse_args()
    rest, rpc, metrics = (free_port() for _ in range(3))
    ports = ["--rest-port", str(rest), "--grpc-port", str(rpc), "--metrics-port", str(metrics)]
    command = [sys.executable, "-m", "server", "--models", options.model, "--workers", str(options.workers), *ports]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            await_answer(server, f"http://127.0.0.1:{rest}/predictions/{options.model}")
            takes = run(options, {"REST": f"http://127.0.0.1:{rest}", "gRPC": f"grpc://127.0.0.1:{rpc}"}, metrics)
        finally:
            server.terminate()
            server.wait()
    print(table(takes))
    circumstances = {
        **machine.circumstances(),
        "load": os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("model", "rounds", "seconds", "callers", "workers")},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"circumstances": circumstances, "takes": [vars(one) for one in flat(takes)]}))
    print(f"\n{json.dumps(circumstances)}")
    return 0


Takes = dict[tuple[str, str, str], dict[str, list[Take]]]


def run(options: argparse.Namespace, urls: dict[str, str], metrics: int) -> Takes:
    """Measure every way in every round, after as many seconds of each as a cold JVM needs."""
    kinds, questions = options.kinds.split(","), options.questions.split(",")
    cases = [(kind, wire, question) for kind in kinds for wire in urls for question in questions]
    takes: Takes = {case: {mode: [] for mode in MODES} for case in cases}
    for number in range(-1, options.rounds):
        for kind, wire, question in cases:
            turn = number % len(MODES)
            for mode in MODES[turn:] + MODES[:turn]:
                measure = with_tasks if kind == "asyncio" else with_threads
                asked = {"model": options.model, **QUESTIONS[question]}
                before, cpu_s, began = count(metrics), time.process_time(), time.perf_counter()
                latencies = measure(urls[wire], mode, options.callers, options.seconds, asked)
                rate = len(latencies) / (time.perf_counter() - began)
                take = Take(rate, latencies, time.process_time() - cpu_s, count(metrics) - before)
                if number >= 0:
                    takes[kind, wire, question][mode].append(take)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return takes


def with_tasks(url: str, mode: Any, callers: int, seconds: float, asked: dict[str, Any]) -> list[float]:
    """Ask from so many tasks for so long; return the seconds that each answer took."""
    latencies: list[float] = []

    async def call(client: AsyncClient, number: int, ends: float) -> None:
        while (began := time.perf_counter()) < ends:
            await client.predict(PICTURES[number % len(PICTURES)], **asked)
            latencies.append(time.perf_counter() - began)

    async def ask() -> None:
        async with AsyncClient(url, coalesce=mode) as client:
            ends = time.perf_counter() + seconds
            await asyncio.gather(*(call(client, number, ends) for number in range(callers)))

    asyncio.run(ask())
    return latencies


def with_threads(url: str, mode: Any, callers: int, seconds: float, asked: dict[str, Any]) -> list[float]:
    """Ask from so many threads for so long; return the seconds that each answer took."""
    latencies: list[float] = []

    def call(client: Client, number: int, ends: float) -> None:
        while (began := time.perf_counter()) < ends:
            client.predict(PICTURES[number % len(PICTURES)], **asked)
            latencies.append(time.perf_counter() - began)

    with Client(url, coalesce=mode) as client:
        ends = time.perf_counter() + seconds
        threads = [threading.Thread(target=call, args=(client, number, ends)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return latencies


def count(port: int) -> float:
    """Return how many prediction requests the service has answered."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "convscope_requests_total")


def flat(takes: Takes) -> list[Take]:
    """Return all measurements."""
    return [take for ways in takes.values() for rounds in ways.values() for take in rounds]


def table(takes: Takes) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        "| callers are | wire | asked | coalesce | pictures/s (least–most) | to `off`, by round | p50 ms | p99 ms "
        "| client CPU µs a picture | pictures a request |",
        "|" + "---|" * 10,
    ]
    middle: Callable[[Any], float] = statistics.median
    for (kind, wire, question), ways in takes.items():
        for mode, rounds in ways.items():
            rates = [take.rate for take in rounds]
            ratios = [take.rate / off.rate for take, off in zip(rounds, ways["off"], strict=True)]
            latencies = sorted(1e3 * second for take in rounds for second in take.latencies)
            pictures = len(latencies)
            lines.append(
                f"| {kind} | {wire} | {question} | {mode} | {middle(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
                f"| {middle(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
                f"| {latencies[pictures // 2]:.1f} | {latencies[pictures * 99 // 100]:.1f} "
                f"| {1e6 * sum(take.cpu_s for take in rounds) / pictures:,.0f} "
                f"| {pictures / max(1.0, sum(take.requests for take in rounds)):.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
