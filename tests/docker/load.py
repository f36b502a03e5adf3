"""A constant load through the gateway, on both transports, every request counted."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from convscope import ConvscopeError

from tests.docker.stack import ROOT, Stack

PICTURE = (ROOT / "samples/cat.png").read_bytes()


@dataclass(frozen=True)
class Call:
    """One request of a caller.

    Attributes:
        transport: `rest` or `grpc`.
        sent_at: Unix time.
        seconds: Until the answer or the error.
        error: What the client raised, or how the answer was wrong; None for the right answer.
        version: Version of the model that answered; empty after an error.
    """

    transport: str
    sent_at: float
    seconds: float
    error: str | None = None
    version: str = ""

    @property
    def ended_at(self) -> float:
        """Unix time of the answer or the error."""
        return self.sent_at + self.seconds


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        calls: In the order in which they ended.
        under_way: When the callers sent the requests that have not ended yet, as unix time by the caller's number.
    """

    calls: list[Call] = field(default_factory=list)
    under_way: dict[int, float] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Number of requests."""
        return len(self.calls)

    @property
    def failed(self) -> list[str]:
        """Errors of the requests without the right answer."""
        return [call.error for call in self.calls if call.error is not None]

    @property
    def answered(self) -> int:
        """Number of requests with the right answer."""
        return self.sent - len(self.failed)

    @property
    def gap_s(self) -> float:
        """Longest time between two right answers, whoever asked."""
        times = [call.ended_at for call in self.calls if call.error is None]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    @property
    def slowest_s(self) -> float:
        """Longest time until an answer or an error."""
        return max((call.seconds for call in self.calls), default=0.0)

    @property
    def versions(self) -> list[str]:
        """Versions of the model that answered, in the order of their first answer."""
        return list(dict.fromkeys(call.version for call in self.calls if call.error is None))

    def between(self, start: float, end: float) -> Tally:
        """Return the requests that were sent between two unix times and have ended."""
        return Tally([call for call in self.calls.copy() if start <= call.sent_at < end])

    def complete(self, moment: float) -> bool:
        """Tell whether every request that was sent before a unix time has ended."""
        return all(sent_at >= moment for sent_at in self.under_way.copy().values())


class _Load:
    def __init__(self, stack: Stack, callers: int, period_s: float) -> None:
        self.tally = Tally()
        self._stack, self._stop, self._lock = stack, threading.Event(), threading.Lock()
        self._callers, self._period_s = callers, period_s
        with stack.client("rest") as client:
            self._expected = client.predict(PICTURE, model="cifar").top[0].label
        self._threads = [threading.Thread(target=self._call, args=(i,), daemon=True) for i in range(callers)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _call(self, number: int) -> None:
        transport = "rest" if number % 2 else "grpc"
        self._stop.wait(self._period_s * number / self._callers)  # Evenly spread over the period.
        with self._stack.client(transport) as client:
            while not self._stop.is_set():
                sent_at, started = time.time(), time.monotonic()
                with self._lock:
                    self.tally.under_way[number] = sent_at
                error, version = None, ""
                try:
                    seen = client.predict(PICTURE, model="cifar", layers="conv1", pool=4)
                except ConvscopeError as raised:
                    error = f"{type(raised).__name__}: {raised}"
                else:
                    version = seen.version
                    if seen.top[0].label != self._expected:
                        error = f"wrong answer: {seen.top[0].label}"
                call = Call(transport, sent_at, time.monotonic() - started, error, version)
                with self._lock:
                    self.tally.calls.append(call)
                    del self.tally.under_way[number]
                self._stop.wait(max(0.0, started + self._period_s - time.monotonic()))


@contextmanager
def load(stack: Stack, callers: int = 4, period_s: float = 0.1) -> Iterator[Tally]:
    """Keep asking while the block runs; the tally is complete after it.

    Args:
        stack: Where to ask.
        callers: Every second one asks over REST, the others over gRPC. Each has one request under way at most.
        period_s: Time between two requests of a caller.
    """
    running = _Load(stack, callers, period_s)
    running.start()
    try:
        yield running.tally
    finally:
        running.stop()
