"""When a question is asked again: what may pass, how long to wait, and a budget that an outage cannot multiply.

A prediction is a pure function, so a request may be sent twice. Deliberately no library (tenacity, stamina): they
bring the loop, which is eight lines, but neither the budget nor Retry-After within a deadline, which are the rest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from convscope._exceptions import ConnectError, ConvscopeError, DeadlineExceeded, Overloaded, ServerError
from convscope._forking import renew_after_fork
from convscope._transport import WORKER_DIED

FIRST_WAIT_S = 0.2  # The longest wait before the first retry; it doubles from one to the next.
LONGEST_WAIT_S = 5.0
BUDGET = 100.0  # As gRPC's retry throttling: a failure takes one, an answer gives some back,
GIVEN_BACK = 0.1  # and nothing is sent again while no more than half is left: at most every tenth request, in the end.


class RetryBudget:
    """What all questions of one client may spend on retries together. Safe to use from several threads."""

    def __init__(self) -> None:
        self.retries = 0
        self._tokens = BUDGET
        self._lock = threading.Lock()
        renew_after_fork(self)

    def renew(self) -> None:
        """Go on with a lock that nobody holds."""
        self._lock = threading.Lock()

    def put(self) -> None:
        """Note that an answer came."""
        with self._lock:
            self._tokens = min(self._tokens + GIVEN_BACK, BUDGET)

    def take(self) -> bool:
        """Note a failure that may pass; say whether there is enough left to try again."""
        with self._lock:
            self._tokens = max(self._tokens - 1, 0.0)
            return self._tokens > BUDGET / 2

    def count(self) -> None:
        """Note a retry."""
        with self._lock:
            self.retries += 1


class Attempts:
    """The attempts at one question.

    Args:
        retries: How often it may be asked again.
        deadline_s: Seconds from now in which all attempts, and the waits between them, must end.
        budget: The client's.
        clock: Seconds that only go forward.
        uniform: A random number between two.
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
        self._longest = FIRST_WAIT_S
        self._once: set[type[ConvscopeError]] = set()  # Failures after which a request is sent again once only.

    def left_s(self) -> float:
        """Return the seconds left until the deadline; a little where none are."""
        return max(self._ends - self._clock(), 0.001)

    def wait_s(self, error: ConvscopeError) -> float | None:
        """Judge a failed attempt.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before asking again; None if the error is final: it will not pass, the attempts or the
            budget are used up, or the deadline is before the time to come back.
        """
        if self._clock() >= self._ends or not self._may_pass(error) or self._left <= 0 or not self._budget.take():
            return None
        wait_s = self._uniform(0.0, self._longest)  # Full jitter: callers who failed together come back apart.
        if isinstance(error, Overloaded) and error.retry_after_s is not None:
            wait_s += error.retry_after_s
        if wait_s >= self._ends - self._clock():
            return None
        self._left -= 1
        self._longest = min(2 * self._longest, LONGEST_WAIT_S)
        return wait_s

    def _may_pass(self, error: ConvscopeError) -> bool:
        """Say whether the same request, sent again, might be answered."""
        worker_died = isinstance(error, ServerError) and str(error).startswith(WORKER_DIED)
        if worker_died or isinstance(error, DeadlineExceeded):  # A gateway's: at our own there is no time left.
            # If it is this request that kills workers, or takes too long, it does so no more than twice.
            first = type(error) not in self._once
            self._once.add(type(error))
            return first
        if isinstance(error, ConnectError) and "certificate" in str(error).lower():
            return False  # Not trusted now, not trusted later; and gRPC's second answer no longer says why.
        return isinstance(error, ConnectError | Overloaded)
