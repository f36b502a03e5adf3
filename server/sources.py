"""A source of metrics that is queried at every scrape and may hang: one query at a time, and a limited wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

SLOW_S, REST = 0.25, 20  # After an answer that took longer than SLOW_S, the next query waits REST times as long.


class Source(Generic[T]):
    """A query and its last answer.

    Args:
        ask: Returns the answer, or raises. Called in a thread of its own.
        keep_s: Seconds for which an answer is used while there is no newer one; 0 if every scrape needs its own.
    """

    def __init__(self, ask: Callable[[], T], *, keep_s: float = 0.0) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._answered.set()
        self._answer: T | None = None
        self._answered_at = self._due = float("-inf")

    def start(self) -> None:
        """Start a query, unless the last one is still running or was slow a moment ago."""
        with self._lock:
            if not self._answered.is_set() or time.monotonic() < self._due:
                return
            self._answered.clear()
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, deadline: float) -> T | None:
        """Return the last query's answer, or the one before it while it can be used; None if there is neither.

        Args:
            deadline: When to stop waiting (`time.monotonic()`).
        """
        self._answered.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            holds = self._answered.is_set() or time.monotonic() - self._answered_at < self._keep_s
            return self._answer if holds else None

    def _run(self) -> None:
        started = time.monotonic()
        try:
            answer = self._ask()
        except Exception:  # A failure of any kind must not affect the other sources.
            answer = None
        with self._lock:
            self._answer, self._answered_at = answer, time.monotonic()
            took_s = self._answered_at - started
            if self._keep_s and took_s > SLOW_S:
                self._due = self._answered_at + min(took_s * REST, self._keep_s / 2)
            self._answered.set()
