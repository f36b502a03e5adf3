"""Decides on retries: which errors are retryable, how long to wait, and the retry budget of a client.

Predictions have no side effects, so a request may be sent twice. Libraries such as tenacity offer neither a shared
budget nor a Retry-After limited by a deadline.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from convscope._exceptions import ConnectError, ConvscopeError, DeadlineExceeded, Overloaded, ServerError
from convscope._server_errors import WORKER_DIED

FIRST_MAX_WAIT_S = 0.2  # Upper bound of the wait before the first retry; it doubles with each further one.
MAX_WAIT_S = 5.0
# Like gRPC's retry throttling: a failure takes one token, a success returns 0.1, and retries stop while 50 tokens or
# fewer are left. A complete outage gets about 50 retries in all; with some calls succeeding, at most one retry per ten
# successes.
MAX_TOKENS = 100.0
TOKENS_PER_SUCCESS = 0.1


class RetryBudget:
    """The retry budget that all calls of one client share. Thread-safe.

    Attributes:
        retries_made: Number of retries so far.
    """

    def __init__(self) -> None:
        self.retries_made = 0
        self._tokens = MAX_TOKENS
        self._lock = threading.Lock()

    def record_success(self) -> None:
        """Return a part of a token to the budget."""
        with self._lock:
            self._tokens = min(self._tokens + TOKENS_PER_SUCCESS, MAX_TOKENS)

    def take_token(self) -> bool:
        """Take a token for a failure; return whether the budget allows a retry."""
        with self._lock:
            self._tokens = max(self._tokens - 1, 0.0)
            return self._tokens > MAX_TOKENS / 2

    def count_retry(self) -> None:
        """Count a retry."""
        with self._lock:
            self.retries_made += 1

    def replace_lock(self) -> None:
        """Use a new lock: in a forked child, a thread of the parent may hold the old one forever."""
        self._lock = threading.Lock()


class Attempts:
    """The attempts of one call.

    Args:
        max_retries: Maximum number of retries.
        deadline_s: Seconds from now in which all attempts, and the waits between them, must end.
        budget: The client's budget.
        clock: Monotonic clock, in seconds.
        uniform: Returns a random number between its arguments.
    """

    def __init__(
        self,
        max_retries: int,
        *,
        deadline_s: float,
        budget: RetryBudget,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._retries_left = max_retries
        self._expires_at = clock() + deadline_s
        self._budget = budget
        self._clock = clock
        self._uniform = uniform
        self._max_wait_s = FIRST_MAX_WAIT_S
        self._retried_once: set[type[ConvscopeError]] = set()  # Errors that are retried only once.

    def remaining_s(self) -> float:
        """Return the seconds until the deadline, at least one millisecond."""
        return max(self._expires_at - self._clock(), 0.001)

    def next_wait_s(self, error: ConvscopeError) -> float | None:
        """Decide what follows a failed attempt; takes a token of the budget if the error is retryable.

        Args:
            error: Error of the attempt.

        Returns:
            Seconds to wait before the next attempt. None if the error is final: it is not retryable, no retries or no
            budget are left, or the wait would exceed the deadline.
        """
        expired = self._clock() >= self._expires_at
        if expired or not self._is_retryable(error) or self._retries_left <= 0 or not self._budget.take_token():
            return None
        wait_s = self._uniform(0.0, self._max_wait_s)  # Full jitter, so that callers do not retry in step.
        if isinstance(error, Overloaded) and error.retry_after_s is not None:
            wait_s += error.retry_after_s
        if wait_s >= self._expires_at - self._clock():
            return None
        self._retries_left -= 1
        self._max_wait_s = min(2 * self._max_wait_s, MAX_WAIT_S)
        return wait_s

    def _is_retryable(self, error: ConvscopeError) -> bool:
        """Return whether the same request, sent again, might succeed."""
        worker_died = isinstance(error, ServerError) and str(error).startswith(WORKER_DIED)
        is_timeout = isinstance(error, DeadlineExceeded)  # Of a gateway: at our own deadline no time is left.
        if worker_died or is_timeout:
            # Only once: a request that kills workers, or takes too long, does so no more than twice.
            first = type(error) not in self._retried_once
            self._retried_once.add(type(error))
            return first
        if isinstance(error, ConnectError) and "certificate" in str(error).lower():
            return False  # Retrying an invalid certificate is pointless, and grpcio's next error would hide the cause.
        return isinstance(error, ConnectError | Overloaded)
