"""What sharing requests brings: callers of one client, each asking about one picture, by how the client coalesces.

Type: python -m benchmarks.coalescing [--rounds 7] [--seconds 3] [--callers 32] [--model cifar]

One worker of our service runs beside the callers, which are tasks of one `AsyncClient` or threads that share one
`Client`; each asks again once it is answered. Rivals are up in the same run and asked for the same: by tasks of one
aiohttp session, the fastest of the usual clients, who read the arrays as ours does, and by the bare sockets of
`benchmarks.load`, which cost next to nothing. Every round takes every way once per question, the order turning from
round to round; ratios are those within a round. Beside the rates stand latencies, the callers' processor time a
picture and the pictures a request, as the service's own metrics count them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
from convscope import AsyncClient, Client
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import machine, models
from benchmarks.load import ROOT
from benchmarks.rivals.network import pack
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.summaries import spread
from benchmarks.workloads import Asked, Workload

QUESTIONS: dict[str, dict[str, Any]] = {
    "scores": {"top_k": 0},
    "float16": {"top_k": 0, "layers": "all", "map_dtype": "float16"},
    "float32": {"top_k": 0, "layers": "all"},
}
MODES = ("off", "on", "auto")
KINDS = ("asyncio", "threads")
RIVALS = ("FastAPI", "mosec, batching", "uvicorn, tuned", "mosec, tuned, batching")


@dataclass
class Take:
    """What one measurement found: pictures a second, latencies in seconds, CPU seconds, requests sent."""

    rate: float
    latencies: list[float]
    cpu_s: float
    requests: float


Case = tuple[str, str, str]  # What the callers are, the wire, what is asked.
Way = Callable[[], Take]
Takes = dict[Case, dict[str, list[Take]]]


def main() -> int:
    """Measure, print the table, and write it with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar", choices=models.SAMPLES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--questions", default=",".join(QUESTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "coalescing.json")
    options = parser.parse_args()
    work = ROOT / "out/bench"
    model = models.prepare(options.model, work)
    with contextlib.ExitStack() as stack:
        running = {
            server.name: stack.enter_context(Running(server, model, work))
            for server in SERVERS
            if server.name in ("convscope", *RIVALS)
        }
        for one in running.values():
            one.warm_up([workload(want, options.callers) for want in options.questions.split(",")])
        gc.collect()
        gc.freeze()  # Applications need not have all that is imported here, nor a collector that looks through it.
        takes = run(options, running)
        gc.unfreeze()
    print(table(takes))
    circumstances = machine.circumstances()
    circumstances["versions"] |= {"aiohttp": metadata.version("aiohttp")}
    circumstances |= {
        "load": os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("model", "rounds", "seconds", "callers")},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measured = [
        {"case": case, "way": way, **vars(take)}
        for case, ways in takes.items()
        for way, rounds in ways.items()
        for take in rounds
    ]
    options.out.write_text(json.dumps({"circumstances": circumstances, "takes": measured}))
    print(f"\n{json.dumps(circumstances)}")
    return 0


def workload(want: str, callers: int) -> Workload:
    """Return single pictures in a closed loop."""
    return Workload(want, (Asked(want),), callers)


def run(options: argparse.Namespace, running: dict[str, Running]) -> Takes:
    """Measure every way in every round, and once before the first."""
    kinds, questions = options.kinds.split(","), options.questions.split(",")
    cases = [(kind, wire, want) for kind in kinds for wire in ("REST", "gRPC") for want in questions]
    ways = {case: list_ways(case, running, options).items() for case in cases}
    takes: Takes = {case: {name: [] for name, _ in ways[case]} for case in cases}
    for number in range(-1, options.rounds):
        for case in cases:
            order = list(ways[case])
            turn = number % len(order)
            for name, measure in order[turn:] + order[:turn]:
                take = measure()
                if number >= 0:
                    takes[case][name].append(take)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return takes


def list_ways(case: Case, running: dict[str, Running], options: argparse.Namespace) -> dict[str, Way]:
    """Return what is compared in a case, by name."""
    kind, wire, want = case
    how = partial(with_tasks if kind == "asyncio" else with_threads, running["convscope"], wire, want)
    ways: dict[str, Way] = {mode: partial(how, mode, options.callers, options.seconds) for mode in MODES}
    if kind == "asyncio" and wire == "REST":
        for rival in RIVALS:
            ways[f"{rival}; aiohttp"] = partial(with_aiohttp, running[rival], want, options.callers, options.seconds)
            ways[f"{rival}; sockets"] = partial(with_sockets, running[rival], want, options.callers, options.seconds)
    return ways


def with_tasks(server: Running, wire: str, want: str, mode: Any, callers: int, seconds: float) -> Take:
    """Ask from so many tasks that share an `AsyncClient`."""

    async def ask() -> Take:
        async with AsyncClient(locate(server, wire), coalesce=mode) as client:

            async def predict(picture: bytes) -> None:
                await client.predict(picture, model=server.place.model.name, **QUESTIONS[want])

            return await ask_all(predict, server.place.model.pictures, callers, seconds)

    before = count(server)
    take = asyncio.run(ask())
    take.requests = count(server) - before
    return take


def with_aiohttp(server: Running, want: str, callers: int, seconds: float) -> Take:
    """Ask a rival from so many tasks that share a session; all they do with a reply is to read its arrays."""
    model = server.place.model
    bodies = {picture: pack(want, [picture]) for picture in model.pictures}
    url = f"http://127.0.0.1:{server.place.rest}/predict"

    async def ask() -> Take:
        async with aiohttp.ClientSession(headers={"content-type": "application/octet-stream"}) as session:

            async def predict(picture: bytes) -> None:
                async with session.post(url, data=bodies[picture]) as reply:
                    reply.raise_for_status()
                    model.read(await reply.read(), want, 1)

            return await ask_all(predict, model.pictures, callers, seconds)

    return asyncio.run(ask())


async def ask_all(
    predict: Callable[[bytes], Awaitable[None]], pictures: tuple[bytes, ...], callers: int, seconds: float
) -> Take:
    """Ask from so many tasks for so long."""
    latencies: list[float] = []

    async def call(picture: bytes) -> None:
        while (began := time.perf_counter()) < ends:
            await predict(picture)
            latencies.append(time.perf_counter() - began)

    cpu_s, start = time.process_time(), time.perf_counter()
    ends = start + seconds
    await asyncio.gather(*(call(pictures[number % len(pictures)]) for number in range(callers)))
    rate = len(latencies) / (time.perf_counter() - start)
    return Take(rate, latencies, time.process_time() - cpu_s, len(latencies))


def with_threads(server: Running, wire: str, want: str, mode: Any, callers: int, seconds: float) -> Take:
    """Ask from so many threads that share a `Client`."""
    latencies: list[float] = []
    pictures, asked = server.place.model.pictures, {"model": server.place.model.name, **QUESTIONS[want]}

    def call(picture: bytes) -> None:
        while (began := time.perf_counter()) < ends:
            client.predict(picture, **asked)
            latencies.append(time.perf_counter() - began)

    before = count(server)
    with Client(locate(server, wire), coalesce=mode) as client:
        cpu_s, start = time.process_time(), time.perf_counter()
        ends = start + seconds
        threads = [threading.Thread(target=call, args=(pictures[number % len(pictures)],)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(latencies) / (time.perf_counter() - start)
        cpu_s = time.process_time() - cpu_s
    return Take(rate, latencies, cpu_s, count(server) - before)


def with_sockets(server: Running, want: str, callers: int, seconds: float) -> Take:
    """Ask a rival from so many bare sockets, without a look at the arrays."""
    outcome = server.load(workload(want, callers), seconds)
    assert not outcome.errors, outcome.errors
    pictures = len(outcome.latencies)
    return Take(pictures / outcome.wall_s, list(outcome.latencies), outcome.cpu_s, pictures)


def locate(server: Running, wire: str) -> str:
    """Return where our client finds a server."""
    return f"http://127.0.0.1:{server.place.rest}" if wire == "REST" else f"grpc://127.0.0.1:{server.place.grpc}"


def count(server: Running) -> float:
    """Return how many prediction requests our service has answered."""
    with urlopen(f"http://127.0.0.1:{server.place.others[0]}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "convscope_requests_total")


def table(takes: Takes) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        "| callers are | wire | asked | coalesce, or whom | pictures/s (least–most) | to `off`, by round "
        "| `auto` to it, by round | p50 ms | p99 ms | callers' CPU µs a picture | pictures a request |",
        "|" + "---|" * 11,
    ]
    for (kind, wire, want), ways in takes.items():
        for name, rounds in ways.items():
            latencies = sorted(1e3 * second for take in rounds for second in take.latencies)
            pictures = len(latencies)
            cells = [
                spread([take.rate for take in rounds], "{:,.0f}"),
                spread([take.rate / off.rate for take, off in zip(rounds, ways["off"], strict=True)]),
                spread([auto.rate / take.rate for take, auto in zip(rounds, ways["auto"], strict=True)]),
                f"{statistics.median(latencies):.1f}",
                f"{latencies[pictures * 99 // 100]:.1f}",
                f"{1e6 * sum(take.cpu_s for take in rounds) / pictures:,.0f}",
                f"{pictures / max(1.0, sum(take.requests for take in rounds)):.1f}",
            ]
            lines.append(f"| {kind} | {wire} | {want} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
