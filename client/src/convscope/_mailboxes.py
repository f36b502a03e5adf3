"""Where a shared request leaves what came for one of its askers, who waits for it: in a thread, or a task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any


class Mailbox:
    """What came, once something has; a single one waits for it, or says what is to be done then.

    A `concurrent.futures.Future` does the same for any number, and takes three times as long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._full = False
        self._found: Any = None
        self._then: Callable[[], object] | None = None

    def set_result(self, found: Any) -> None:
        """Put something there; once only."""
        with self._lock:
            self._found, self._full = found, True
            then, self._then = self._then, None
        if then is not None:
            then()

    def done(self) -> bool:
        """Say whether something has come."""
        return self._full

    def result(self) -> Any:
        """Return what came."""
        return self._found

    def tell(self, then: Callable[[], object]) -> None:
        """Have something done once something has come, at once if it has."""
        with self._lock:
            if not self._full:
                self._then = then
                return
        then()

    def wait(self, seconds: float) -> bool:
        """Wait that long until something comes; say whether it has."""
        if not self._full:
            come = threading.Lock()
            come.acquire()
            self.tell(come.release)
            come.acquire(timeout=max(seconds, 0.0))
        return self._full


class AsyncMailbox:
    """The same for a task."""

    def __init__(self) -> None:
        self._found: Any = None
        self._full = False
        self._waiting: asyncio.Future[None] | None = None

    def set_result(self, found: Any) -> None:
        """Put something there; once only."""
        self._found, self._full = found, True
        self._wake()

    def result(self) -> Any:
        """Return what came."""
        return self._found

    async def wait(self, seconds: float) -> bool:
        """Wait that long until something comes; say whether it has."""
        if not self._full:
            loop = asyncio.get_running_loop()
            self._waiting = loop.create_future()
            clock = loop.call_later(seconds, self._wake)
            try:
                await self._waiting
            finally:
                clock.cancel()
        return self._full

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
