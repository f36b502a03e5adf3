"""What the client costs beside what the server costs: processor time a picture of both, taken in the same run.

Type: python -m benchmarks.client_share [--rounds 7] [--seconds 2]

A server of one worker, as `python -m server` starts it, answers this process. Every round takes every way of asking
once for each question and transport. This process's time is the client's, all threads, user and system; the server's is
that of the launcher and all it started: TorchServe's JVM, the worker and the exporter. Ratios are those within a round.
A JVM that is still compiling costs more, which would flatter the client, so a first round is thrown away. torch is not
imported here: Python's collector looks through all that is, and applications need not have it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from convscope import AsyncClient, Client

from benchmarks import machine
from benchmarks.capacity import await_answer
from benchmarks.load import ROOT
from benchmarks.summaries import spread

QUESTIONS: dict[str, dict[str, Any]] = {"scores": {}, "maps float32": {"layers": "all"}}
SAMPLES = ("cat", "airplane", "frog", "horse", "ship", "truck")
PICTURES = [(ROOT / f"samples/{name}.png").read_bytes() for name in SAMPLES]
TARGET = 0.5  # The most that the client may cost, of what the server does.
CALLERS = 32


@dataclass
class Take:
    """What one measurement found.

    Attributes:
        pictures: How many were asked about.
        client_s: Processor seconds of this process.
        server_s: Those of the server's processes, by program.
    """

    pictures: int
    client_s: float
    server_s: dict[str, float]

    @property
    def client_us(self) -> float:
        """The client's microseconds a picture."""
        return 1e6 * self.client_s / self.pictures

    @property
    def server_us(self) -> float:
        """The server's microseconds a picture."""
        return 1e6 * sum(self.server_s.values()) / self.pictures


Takes = dict[tuple[str, str, str], list[Take]]


def main() -> int:
    """Measure, print the table, and write it with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "client_share.json")
    options = parser.parse_args()
    with contextlib.ExitStack() as held:
        rest, rpc, metrics = (
            held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)
        )
    ports = ["--rest-port", str(rest), "--grpc-port", str(rpc), "--metrics-port", str(metrics)]
    command = [sys.executable, "-m", "server", "--models", options.model, "--workers", "1", *ports]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            await_answer(server, f"http://127.0.0.1:{rest}/predictions/{options.model}")
            urls = {"REST": f"http://127.0.0.1:{rest}", "gRPC": f"grpc://127.0.0.1:{rpc}"}
            takes = run(options, urls, server.pid)
        finally:
            server.terminate()
            server.wait()
    print(table(takes))
    circumstances = machine.circumstances()
    circumstances["versions"] |= {name: metadata.version(name) for name in ("httpcore", "httptools", "grpcio")}
    circumstances |= {"load": os.getloadavg()[0]}
    circumstances |= {name: getattr(options, name) for name in ("model", "rounds", "seconds")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measured = {" · ".join(case): [vars(take) for take in rounds] for case, rounds in takes.items()}
    options.out.write_text(json.dumps({"circumstances": circumstances, "takes": measured}))
    print(f"\n{json.dumps(circumstances)}")
    return 0


def run(options: argparse.Namespace, urls: dict[str, str], server: int) -> Takes:
    """Measure every way in every round but the first, in which the JVM compiles."""
    cases = list(itertools.product(WAYS, urls, QUESTIONS))
    takes: Takes = {case: [] for case in cases}
    for number in range(-1, options.rounds):
        for case in cases:
            way, wire, question = case
            asked = {"model": options.model, **QUESTIONS[question]}
            before, began_s = machine.cpu_s(server), time.process_time()
            pictures = WAYS[way](urls[wire], options.seconds, asked)
            client_s, after = time.process_time() - began_s, machine.cpu_s(server)
            if number >= 0:
                used = {program: spent - before.get(program, 0.0) for program, spent in after.items()}
                takes[case].append(Take(pictures, client_s, used))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return takes


def one_caller(url: str, seconds: float, asked: dict[str, Any]) -> int:
    """Ask with `Client`, one picture after the other; return how many."""
    with Client(url) as client:
        count = 0
        for picture in pictures_for(seconds):
            client.predict(picture, **asked)
            count += 1
        return count


def one_task(url: str, seconds: float, asked: dict[str, Any]) -> int:
    """Ask with `AsyncClient`, one picture after the other; return how many."""

    async def ask() -> int:
        async with AsyncClient(url) as client:
            count = 0
            for picture in pictures_for(seconds):
                await client.predict(picture, **asked)
                count += 1
            return count

    return asyncio.run(ask())


def many_tasks(url: str, seconds: float, asked: dict[str, Any]) -> int:
    """Ask from tasks that share an `AsyncClient`, whose questions travel together where that pays."""

    async def call(client: AsyncClient) -> int:
        count = 0
        for picture in pictures_for(seconds):
            await client.predict(picture, **asked)
            count += 1
        return count

    async def ask() -> int:
        async with AsyncClient(url) as client:
            return sum(await asyncio.gather(*(call(client) for _ in range(CALLERS))))

    return asyncio.run(ask())


def many(url: str, seconds: float, asked: dict[str, Any], **how: int) -> int:
    """Ask with `Client.predict_many`; return how many."""
    with Client(url) as client:
        return sum(1 for _ in client.predict_many(pictures_for(seconds), **how, **asked))


def pictures_for(seconds: float) -> Iterator[bytes]:
    """Yield pictures for so long."""
    ends = time.perf_counter() + seconds
    for picture in itertools.cycle(PICTURES):
        yield picture
        if time.perf_counter() > ends:
            return


WAYS: dict[str, Callable[[str, float, dict[str, Any]], int]] = {
    "Client": one_caller,
    "AsyncClient": one_task,
    f"AsyncClient, {CALLERS} callers": many_tasks,
    f"predict_many, concurrency {CALLERS}": partial(many, concurrency=CALLERS),
    "predict_many, concurrency 4, batch 8": partial(many, concurrency=4, batch=8),
}


def table(takes: Takes) -> str:
    """Lay out medians with the least and the largest of the rounds."""
    lines = [
        "| asked by | wire | asked | client µs a picture | server µs | of it JVM | client to server, by round | met |",
        "|" + "---|" * 8,
    ]
    for (way, wire, question), rounds in takes.items():
        ratios = [take.client_us / take.server_us for take in rounds]
        jvm = statistics.median(1e6 * take.server_s.get("java", 0.0) / take.pictures for take in rounds)
        cells = [
            spread([take.client_us for take in rounds], "{:,.0f}"),
            spread([take.server_us for take in rounds], "{:,.0f}"),
            f"{jvm:,.0f}",
            spread(ratios),
            "yes" if statistics.median(ratios) <= TARGET else "no",
        ]
        lines.append(f"| {way} | {wire} | {question} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
