"""Callers in processes of their own, and what became of their requests."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

from tests import foreign
from tests.campaign.cases import GOOD, Generator, send_foreign
from tests.campaign.watch import Watch
from tests.campaign.wire import Grpc, GrpcRequest, Outcome, Rest, RestRequest

MODELS = tuple(GOOD)
SAMPLE_S = 5.0
REPORT_EVERY = 200  # Requests, from a caller to the campaign.
MOST_FAILURES = 100


@dataclass(frozen=True)
class Target:
    """Where the service is.

    Attributes:
        rest: `http://host:port` or `https://host:port`.
        grpc: `host:port`.
        ca_file: PEM file of the certificate to trust; None for plain text.
        api_key: Sent with every request, if there is one.
        metrics: URL of a launcher's `/metrics`; empty behind a gateway.
        gateway: Whether a gateway is in front, which answers some requests itself.
    """

    rest: str
    grpc: str
    ca_file: str | None = None
    api_key: str | None = None
    metrics: str = ""
    gateway: bool = False


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        outcomes: By kind of request and outcome.
        slowest: The slowest answer of each kind, in seconds.
        failures: Kind, reason, and the request that failed.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    failures: list[tuple[str, str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.outcomes += other.outcomes
        for kind, seconds in other.slowest.items():
            self.slowest[kind] = max(seconds, self.slowest.get(kind, 0.0))
        self.failures += other.failures

    @property
    def requests(self) -> int:
        """How many there were."""
        return self.outcomes.total()


def call(target: Target, seed: int, requests: int, reports: Any, gate: Any) -> None:
    """Send requests one after the other, in a process of its own.

    Args:
        target: Where to.
        seed: Of this caller's requests.
        requests: How many.
        reports: A queue that takes tallies.
        gate: An event; while it is set the caller goes on.
    """
    key = (("x-api-key", target.api_key),) if target.api_key else ()
    rest, grpc = Rest(target.rest, target.ca_file, key), Grpc(target.grpc, target.ca_file, key)
    generator = Generator(seed, reference(rest), foreign_targets(target))
    tally = Tally()
    for number in range(requests):
        if not gate.is_set():
            break
        case = generator.next()
        if isinstance(case.request, GrpcRequest):
            outcome = grpc.send(case.request)
        elif isinstance(case.request, RestRequest):
            outcome = rest.send(case.request)
        else:
            outcome = send_foreign(case.request)
        tally.outcomes[case.kind, outcome_name(outcome)] += 1
        tally.slowest[case.kind] = max(outcome.seconds, tally.slowest.get(case.kind, 0.0))
        if reason := case.judge(outcome):
            tally.failures.append((case.kind, reason, case.request))
        if (number + 1) % REPORT_EVERY == 0:
            reports.put(tally)
            tally = Tally()
    reports.put(tally)
    rest.close()
    grpc.close()


def reference(rest: Rest) -> dict[str, list[int]]:
    """Return the most probable class of every good picture, by model: each asked alone, as JSON."""
    found: dict[str, list[int]] = {}
    for model, files in GOOD.items():
        for file in files:
            outcome = rest.send(RestRequest("POST", f"/predictions/{model}", body=file))
            [top] = outcome.top
            assert top is not None, outcome
            found.setdefault(model, []).append(top)
    return found


def foreign_targets(target: Target) -> dict[str, foreign.Target]:
    """Return where requests outside the contract go: nowhere behind a gateway, which lets none through."""
    if target.gateway:
        return {}
    ports = [int(address.rpartition(":")[2]) for address in (target.rest, target.grpc)]
    return {model: foreign.Target("127.0.0.1", *ports, model, "1.0") for model in MODELS}


def outcome_name(outcome: Outcome) -> str:
    """Return the status, and the contract's code where there is one."""
    return outcome.status if outcome.code in (outcome.status, "ok") else f"{outcome.status} {outcome.code}"


def run(target: Target, watch: Watch | None, *, requests: int, callers: int, seed: int) -> tuple[Tally, float]:
    """Send all requests and return what became of them, and the seconds it took."""
    context = multiprocessing.get_context("spawn")
    reports, gate = context.Queue(), context.Event()
    gate.set()
    share = -(-requests // callers)
    processes = [
        context.Process(target=call, args=(target, seed * 1000 + number, share, reports, gate), daemon=True)
        for number in range(callers)
    ]
    started = last_sample = last_word = time.monotonic()
    for process in processes:
        process.start()
    total = Tally()
    try:
        while any(process.is_alive() for process in processes) or not reports.empty():
            with contextlib.suppress(Empty):
                total.add(reports.get(timeout=0.5))
            now = time.monotonic()
            if watch is not None and now - last_sample >= SAMPLE_S:
                watch.look(total.requests)
                last_sample = now
            if now - last_word >= 30:
                rate = total.requests / (now - started)
                print(f"{total.requests:,} requests, {rate:.0f}/s, {len(total.failures)} failures", flush=True)
                last_word = now
            if len(total.failures) >= MOST_FAILURES:
                gate.clear()
    finally:
        gate.clear()
    for process in processes:
        process.join(30)
    return total, time.monotonic() - started
