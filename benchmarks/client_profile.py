"""Where the client's processor time goes, by what it does: samples of its stacks while a server answers it.

Type: python -m benchmarks.client_profile [--seconds 10] [--rate 500] [--only 32]

The ways of asking and the server are those of `client_share`. py-spy notes, so many times a second, in which Python
function the thread is that holds Python's lock, without stopping it; C code counts for the function that called it. The
shares, times the processor time in user mode that the client itself reports, give microseconds a picture; those in the
system's calls stand beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.capacity import await_answer
from benchmarks.client_share import QUESTIONS, WAYS
from benchmarks.load import ROOT

GROUPS: dict[str, tuple[str, ...]] = {  # By the file of the innermost function; the first that fits.
    "sockets": (
        "selectors.py",
        "asyncio/selector_events.py",
        "socket.py",
        "httpcore/",
        "_network.py",
        "_socket_stream.py",
    ),
    "event loop, locks": ("asyncio/", "threading.py", "concurrent/", "queue.py"),
    "HTTP": ("convscope/_http.py", "convscope/_rest.py", "convscope/_http_answers.py"),
    "gRPC": ("grpc/", "convscope/_grpc.py"),
    "parsing the reply": ("convscope/_transport.py",),
    "reading it": ("convscope/_reply.py", "convscope/_prediction.py"),
    "sharing": (
        *("convscope/_sharing.py", "convscope/_coalescing.py", "convscope/_tasks.py"),
        *("convscope/_blocking.py", "convscope/_stream.py"),
    ),
    "the question": ("convscope/",),
}
REST = "the rest"
TOLD = "µs of processor time a picture:"
FIRST_S = 1.0  # Not looked at: the server compiles, the client imports.


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each profile")
    parser.add_argument("--rate", type=int, default=500, help="samples a second")
    parser.add_argument("--only", default="32", help="ways of asking whose name holds this")
    parser.add_argument("--ask", nargs=4, metavar=("WAY", "URL", "QUESTION", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.model, *options.ask)
        return 0
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {"REST": one.getsockname()[1], "gRPC": other.getsockname()[1]}
    command = [sys.executable, "-m", "server", "--models", options.model, "--workers", "1", "--metrics-port", "0"]
    command += ["--rest-port", str(ports["REST"]), "--grpc-port", str(ports["gRPC"])]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            await_answer(server, f"http://127.0.0.1:{ports['REST']}/predictions/{options.model}")
            report(options, {"REST": f"http://127.0.0.1:{ports['REST']}", "gRPC": f"grpc://127.0.0.1:{ports['gRPC']}"})
        finally:
            server.terminate()
            server.wait()
    print(f"\n{json.dumps({**machine.circumstances(), 'load': os.getloadavg()[0], 'seconds': options.seconds})}")
    return 0


def report(options: argparse.Namespace, urls: dict[str, str]) -> None:
    """Profile every way with every question, and print its row."""
    columns = (*GROUPS, REST)
    print(f"| asked by | wire | asked | samples | µs a picture | system | {' | '.join(columns)} |")
    print("|" + "---|" * (6 + len(columns)))
    ways = [way for way in WAYS if options.only in way]
    for way, wire, question in itertools.product(ways, urls, QUESTIONS):
        with tempfile.TemporaryDirectory() as folder:
            stacks = Path(folder, "stacks")
            command = [str(Path(sys.executable).parent / "py-spy"), "record", "--gil", "--nonblocking"]
            command += ["--rate", str(options.rate), "--format", "raw", "--full-filenames", "--output", str(stacks)]
            command += ["--", sys.executable, "-m", "benchmarks.client_profile", "--model", options.model]
            command += ["--ask", way, urls[wire], question, str(options.seconds)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found = group(stacks.read_text())
        user_us, system_us = map(float, done.stdout.partition(TOLD)[2].split()[:2])
        parts = [user_us + system_us, system_us, *(user_us * found[name] / found.total() for name in columns)]
        cells = " | ".join(f"{part:,.0f}" for part in parts)
        print(f"| {way} | {wire} | {question} | {found.total():,} | {cells} |", flush=True)


def ask(model: str, way: str, url: str, question: str, seconds: str) -> None:
    """Be the client, and print the processor time that a picture took, in user mode and in the system's."""
    asked = {"model": model, **QUESTIONS[question]}
    WAYS[way](url, FIRST_S, asked)
    before = os.times()
    pictures = WAYS[way](url, float(seconds), asked)
    after = os.times()
    print(TOLD, *(1e6 * (now - then) / pictures for now, then in zip(after[:2], before[:2], strict=True)))


def group(stacks: str) -> Counter[str]:
    """Count the samples of py-spy's `raw` format by what was done."""
    found: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and "importlib" not in stack:  # None where the thread was read while it changed.
            innermost: Any = stack.rpartition(";")[2]
            name = next((name for name, files in GROUPS.items() if any(file in innermost for file in files)), REST)
            found[name] += int(count)
    return found


if __name__ == "__main__":
    sys.exit(main())
