"""Decides whether a request is sent again: which errors may pass, how long to wait, and a budget for all retries.

A prediction is a pure function, so a request may be sent twice. No library (tenacity, stamina) is used: they bring the
loop, which is eight lines, but neither the budget nor a Retry-After that is held against the deadline.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from convscope._exceptions import ConnectError, ConvscopeError, DeadlineExceeded, Overloaded, ServerError
from convscope._protocol import WORKER_DIED

FIRST_WAIT_S = 0.2  # The longest wait before the first retry; it doubles for each further one.
LONGEST_WAIT_S = 5.0
# As gRPC's retry throttling: a failure takes one token, a success gives a tenth back, and nothing is sent again while
# half of the tokens or fewer are left. In an outage at most every tenth request is a retry.
BUDGET = 100.0
REFUND = 0.1


class RetryBudget:
    """The retries that all calls of one client share. Safe to use from several threads.

    Attributes:
        retries: How many requests have been sent again.
    """

    def __init__(self) -> None:
        self.retries = 0
        self._tokens = BUDGET
        self._lock = threading.Lock()

    def record_success(self) -> None:
        """Give back a part of a token."""
        with self._lock:
            self._tokens = min(self._tokens + REFUND, BUDGET)

    def record_failure(self) -> bool:
        """Take a token; return whether the budget allows a retry."""
        with self._lock:
            self._tokens = max(self._tokens - 1, 0.0)
            return self._tokens > BUDGET / 2

    def count_retry(self) -> None:
        """Count a retry."""
        with self._lock:
            self.retries += 1

    def replace_lock(self) -> None:
        """Use a new lock: in a forked child, a thread of the parent may hold the old one for ever."""
        self._lock = threading.Lock()


class Attempts:
    """The attempts at one call.

    Args:
        retries: How many retries there may be.
        deadline_s: Seconds from now in which all attempts, and the waits between them, must end.
        budget: The client's.
        clock: Returns seconds that only go forward.
        uniform: Returns a random number between two.
    """

    def __init__(
        self,
        retries: int,
        *,
        deadline_s: float,
        budget: RetryBudget,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._left = retries
        self._ends = clock() + deadline_s
        self._budget = budget
        self._clock = clock
        self._uniform = uniform
        self._longest_s = FIRST_WAIT_S
        self._once: set[type[ConvscopeError]] = set()  # Errors after which one retry has been made.

    def left_s(self) -> float:
        """Return the seconds left until the deadline, at least one millisecond."""
        return max(self._ends - self._clock(), 0.001)

    def wait_s(self, error: ConvscopeError) -> float | None:
        """Decide what follows a failed attempt.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before the next attempt. None if the error is final: it cannot pass, no retries or no budget
            are left, or the deadline comes before the end of the wait.
        """
        late = self._clock() >= self._ends
        if late or not self._may_pass(error) or self._left <= 0 or not self._budget.record_failure():
            return None
        wait_s = self._uniform(0.0, self._longest_s)  # Full jitter: callers that failed together come back apart.
        if isinstance(error, Overloaded) and error.retry_after_s is not None:
            wait_s += error.retry_after_s
        if wait_s >= self._ends - self._clock():
            return None
        self._left -= 1
        self._longest_s = min(2 * self._longest_s, LONGEST_WAIT_S)
        return wait_s

    def _may_pass(self, error: ConvscopeError) -> bool:
        """Return whether the same request, sent again, might succeed."""
        worker_died = isinstance(error, ServerError) and str(error).startswith(WORKER_DIED)
        if worker_died or isinstance(error, DeadlineExceeded):  # A gateway's: at this call's own, no time is left.
            # Only once: if this request kills workers, or takes too long, it does so no more than twice.
            first = type(error) not in self._once
            self._once.add(type(error))
            return first
        if isinstance(error, ConnectError) and "certificate" in str(error).lower():
            return False  # A certificate does not become valid; and gRPC's second error no longer says why.
        return isinstance(error, ConnectError | Overloaded)
