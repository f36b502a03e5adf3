"""A constant load through the gateway, on both transports, every request counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from convscope import ConvscopeError

from tests.docker.stack import ROOT, Stack

CALLERS, PERIOD_S = 4, 0.1  # Four callers, two a transport, each asking ten times a second at most.


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        sent: Requests sent.
        answered: Those with the right answer.
        wrong: Those with another answer.
        failed: What the others raised.
        gap_s: Longest time without an answer to anybody.
        slowest_s: Longest time until an answer.
        versions: Versions of the model that answered, in order of their first answer.
    """

    sent: int = 0
    answered: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    gap_s: float = 0.0
    slowest_s: float = 0.0
    versions: list[str] = field(default_factory=list)


class _Load:
    def __init__(self, stack: Stack) -> None:
        self.tally = Tally()
        self._stack, self._stop, self._lock = stack, threading.Event(), threading.Lock()
        self._picture = (ROOT / "samples/cat.png").read_bytes()
        with stack.client("rest") as client:
            self._expected = client.predict(self._picture, model="cifar").top[0].label
        self._last = time.monotonic()
        self._threads = [threading.Thread(target=self._call, args=(i,), daemon=True) for i in range(CALLERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _call(self, number: int) -> None:
        with self._stack.client("rest" if number % 2 else "grpc") as client:
            while not self._stop.is_set():
                started = time.monotonic()
                with self._lock:
                    self.tally.sent += 1
                try:
                    seen = client.predict(self._picture, model="cifar", layers="conv1", pool=4)
                except ConvscopeError as error:
                    with self._lock:
                        self.tally.failed.append(f"{type(error).__name__}: {error}")
                else:
                    self._note(seen.top[0].label, seen.version, started)
                self._stop.wait(max(0.0, started + PERIOD_S - time.monotonic()))

    def _note(self, label: str, version: str, started: float) -> None:
        now = time.monotonic()
        with self._lock:
            tally = self.tally
            tally.answered += label == self._expected
            tally.wrong += label != self._expected
            tally.slowest_s = max(tally.slowest_s, now - started)
            tally.gap_s, self._last = max(tally.gap_s, now - self._last), now
            if version not in tally.versions:
                tally.versions.append(version)


@contextmanager
def load(stack: Stack) -> Iterator[Tally]:
    """Keep asking while the block runs; the tally is complete after it."""
    running = _Load(stack)
    running.start()
    try:
        yield running.tally
    finally:
        running.stop()
