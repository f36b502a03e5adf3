"""Coroutines without an event loop: run to their end at once, because all that they await blocks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from convscope._stream import Crew, Job

SHARED_AT_ONCE = 32  # Threads for shared requests; more wait for one of them.

T = TypeVar("T")


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends.

    Args:
        coroutine: Of which everything awaited blocks instead.

    Returns:
        What it returns.

    Raises:
        RuntimeError: It did suspend.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a blocking client's coroutine suspended")


def drain(found: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Turn an asynchronous generator that never suspends into a plain one.

    Args:
        found: It; closed with the plain one.

    Yields:
        What it yields.
    """
    try:
        while True:
            try:
                thing = finish(found.asend(None))
            except StopAsyncIteration:
                return
            yield thing
    finally:
        finish(found.aclose())


@asynccontextmanager
async def open_threads(concurrency: int) -> AsyncGenerator[Crew[Any], None]:
    """Open a crew of threads; at its end nothing more is begun, and what was begun is waited for.

    Args:
        concurrency: How many.

    Yields:
        The crew.
    """
    executor = ThreadPoolExecutor(concurrency, thread_name_prefix="convscope")
    try:
        yield _Threads(executor)
    finally:
        executor.shutdown(cancel_futures=True)


class SharedThreads:
    """Works on shared requests, in threads that are begun when the first one needs them."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(SHARED_AT_ONCE, thread_name_prefix="convscope-shared")

    def mailbox(self) -> Future[Any]:
        """Make a future."""
        return Future()

    async def wait(self, mailbox: Future[Any], seconds: float) -> bool:
        """Wait for a future for so long; say whether it is done."""
        with contextlib.suppress(TimeoutError):
            mailbox.result(seconds)
        return mailbox.done()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a piece of work; RuntimeError once closed."""
        self._executor.submit(finish, work)

    def close(self) -> None:
        """Begin nothing more; what was begun goes on to its end."""
        self._executor.shutdown(wait=False)


class _Threads:
    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor

    def begin(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Job[Any]:
        return self._executor.submit(lambda: finish(work()))

    async def result(self, job: Job[Any]) -> Any:
        return cast("Future[Any]", job).result()
