"""The load generator: one process that sends requests in a closed or an open loop and records latencies.

In a closed loop every connection asks again once it is answered. In an open loop requests are due at a constant rate or
at random (Poisson), whatever the server does, and a latency counts from when its request was due: a server that
stalls cannot make the load wait with it (coordinated omission). Every reply's status and size are checked; some are
kept for their content.
"""

from __future__ import annotations

import gc
import pickle
import random
import resource
import select
import socket
import subprocess
import sys
import time
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.wires import Address, Grpc, Http, Reply

Wire = Literal["REST", "gRPC"]
ROOT = Path(__file__).resolve().parents[1]

_WIRES: dict[str, type[Http] | type[Grpc]] = {"REST": Http, "gRPC": Grpc}
_KEPT = 8  # Replies whose body is kept.
_LAST_CALL_S = 20.0  # Longest wait for late replies at the end.


@dataclass(frozen=True)
class Load:
    """A load: requests, server and rate.

    Attributes:
        address: The server's address.
        wire: The protocol, a key of `_WIRES`.
        message: Bytes of a request: a whole HTTP request, or a serialized gRPC message.
        connections: Callers; in an open loop, the most requests in flight.
        seconds: How long new requests are sent.
        size: Bytes a reply's body must have; None for any.
        slack: Allowed difference from `size`: numbers in JSON differ in length.
        rate: Requests a second of an open loop; None for a closed one.
        poisson: In an open loop, draw the times between requests, the same every time, instead of a constant.
    """

    address: Address
    wire: Wire
    message: bytes
    connections: int
    seconds: float
    size: int | None = None
    slack: int = 0
    rate: float | None = None
    poisson: bool = False


@dataclass
class Outcome:
    """Outcome of a load.

    Attributes:
        latencies: Seconds of each good reply, in the order of arrival.
        wall_s: Seconds from the first request to the last reply.
        cpu_s: Processor time of the load generator itself.
        body_bytes: Bytes of all good replies together.
        errors: Number of each kind of error.
        kept: Bodies of replies spread over the run.
    """

    latencies: array[float] = field(default_factory=lambda: array("d"))
    wall_s: float = 0.0
    cpu_s: float = 0.0
    body_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    kept: list[bytes] = field(default_factory=list)


def measure(load: Load) -> Outcome:
    """Run a load in a process of its own."""
    command = [sys.executable, "-c", "from benchmarks.load import answer; answer()"]
    done = subprocess.run(command, input=pickle.dumps(load), stdout=subprocess.PIPE, cwd=ROOT, check=True)
    outcome = pickle.loads(done.stdout)  # noqa: S301 (from our own process)
    assert isinstance(outcome, Outcome)
    return outcome


def run(load: Load) -> Outcome:
    """Run a load in this process."""
    outcome = Outcome()
    gaps = random.Random(0)  # noqa: S311 (times, no secret)
    wire = _WIRES[load.wire]
    free = [wire(load.address) for _ in range(load.connections)]
    busy: dict[socket.socket, tuple[Http | Grpc, float]] = {}  # The connection, and when its request was due.
    clock = time.perf_counter
    cpu_before = _cpu_s()
    asked = 0
    began = now = due = clock()
    end = began + load.seconds
    waiting: deque[float] = deque()  # When requests without a free connection were due.
    while busy or due < end:
        now = clock()
        if load.rate is None:
            due = now
            waiting.extend([now] * len(free) if now < end else ())
        else:
            while due <= min(now, end):
                waiting.append(due)
                due += gaps.expovariate(load.rate) if load.poisson else 1 / load.rate
        while waiting and free:
            caller, since = free.pop(), waiting.popleft()
            asked += 1
            caller.send(load.message)
            busy[caller.socket] = (caller, since)
        if now > end + _LAST_CALL_S:
            outcome.errors["no answer"] += len(busy) + len(waiting)
            break
        if load.rate is None and not busy:
            continue
        wait = max(0.0, min(due, end) - clock()) if load.rate and now < end else 1.0
        sending = [one for one, (caller, _) in busy.items() if caller.unsent]
        readable, writable, _ = select.select(list(busy), sending, (), wait)
        for ready in {*readable, *writable}:
            caller, since = busy[ready]
            try:
                if ready in writable:
                    caller.push()
                reply = caller.receive() if ready in readable else None
                if reply is None:
                    continue
                _note(outcome, load, reply, clock() - since, asked)
                broken = reply.status != 200
            except OSError as error:
                outcome.errors[type(error).__name__] += 1
                broken = True
            del busy[ready]
            if broken:
                ready.close()
            free.append(wire(load.address) if broken else caller)
    outcome.wall_s = clock() - began
    outcome.cpu_s = _cpu_s() - cpu_before
    for caller in (*free, *(caller for caller, _ in busy.values())):
        caller.socket.close()
    return outcome


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _note(outcome: Outcome, load: Load, reply: Reply, latency: float, asked: int) -> None:
    if reply.status != 200:
        outcome.errors[f"status {reply.status}"] += 1
    elif load.size is not None and abs(len(reply.body) - load.size) > load.slack:
        outcome.errors[f"{len(reply.body)} bytes instead of {load.size}"] += 1
    else:
        outcome.latencies.append(latency)
        outcome.body_bytes += len(reply.body)
        if len(outcome.kept) < _KEPT and asked >= 25 * 4 ** len(outcome.kept):
            outcome.kept.append(bytes(reply.body))


def answer() -> None:
    """Run the pickled load on standard input; write the outcome likewise."""
    load = pickle.load(sys.stdin.buffer)  # noqa: S301 (from our own process)
    gc.disable()
    sys.stdout.buffer.write(pickle.dumps(run(load)))
