"""Coroutines without an event loop: run to their end at once, because all that they await blocks.

Of the pictures of a stream that is many threads, of which most only wait for requests that others send. So where a
thread is about to block, the coroutine says so (`Blocking`), and who runs it may do it elsewhere, or come back later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from convscope._forking import renew_after_fork
from convscope._mailboxes import Mailbox
from convscope._stream import Crew, Job, Source

SHARED_AT_ONCE = 32  # Threads for shared requests; more wait for one of them.
SHORT_S = 0.05  # A wait that is shorter is waited for; a thread is cheaper than a clock that ends it.

T = TypeVar("T")


class Blocking:
    """Awaited by a blocking client's coroutine whose thread is about to block."""

    def __await__(self) -> Generator[Blocking, Any, Any]:
        return (yield self)

    def block(self) -> Any:
        """Do what blocks; return what the coroutine awaits. Here it does that itself."""


class _Clock:
    """When a wait ends."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._ends - time.monotonic()


class _Mail(Blocking):
    """A mailbox that is waited for, but not forever; what is awaited is whether something has come."""

    def __init__(self, mailbox: Mailbox, seconds: float) -> None:
        self.mailbox = mailbox
        self.clock = _Clock(seconds)

    def block(self) -> bool:
        return self.mailbox.wait(self.clock.left_s())


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in this thread.

    Args:
        coroutine: Of which everything awaited blocks instead of suspending.

    Returns:
        What it returns.

    Raises:
        RuntimeError: It did suspend.
    """
    resume: Callable[[Any], Any] = coroutine.send
    told: Any = None
    while True:
        try:
            asked = resume(told)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if not isinstance(asked, Blocking):
            coroutine.close()
            raise RuntimeError("a blocking client's coroutine suspended")
        try:
            resume, told = coroutine.send, asked.block()
        except BaseException as error:  # Ctrl-C.
            resume, told = coroutine.throw, error


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
        concurrency: How many pieces of work it does at a time.

    Yields:
        The crew.
    """
    threads = _Threads(concurrency)
    try:
        yield threads
    finally:
        threads.end()


class SharedThreads:
    """Works on shared requests, in threads that are begun when the first one needs them."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without threads."""
        self._executor = ThreadPoolExecutor(SHARED_AT_ONCE, thread_name_prefix="convscope-shared")

    def mailbox(self) -> Mailbox:
        """Make a mailbox."""
        return Mailbox()

    async def wait(self, mailbox: Mailbox, seconds: float) -> bool:
        """Wait for something to come for so long; say whether it has."""
        return cast("bool", await _Mail(mailbox, seconds))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a piece of work; RuntimeError once closed."""
        self._executor.submit(finish, work)

    def close(self) -> None:
        """Begin nothing more; what was begun goes on to its end."""
        self._executor.shutdown(wait=False)


class _Job:
    """A piece of work: its coroutine, once begun, and what came of it.

    Attributes:
        clock: When its wait for mail, without a thread, ends; None while it does not wait so.
        ended: Whether `found` or `error` holds.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.work = work
        self.coroutine: Coroutine[Any, Any, Any]
        self.clock: _Clock | None = None
        self.found: Any = None
        self.error: BaseException | None = None
        self.ended = False

    def done(self) -> bool:
        return self.ended


class _Threads:
    """A crew. A piece of work has a thread only while it needs one: it begins in its giver's, which must not block.

    Where it would, it goes on in a thread of ours. Where it waits for mail, which may take long, it is left alone and
    goes on in the thread of whoever brings it.
    """

    def __init__(self, concurrency: int) -> None:
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="convscope")
        self._queue: deque[_Job] = deque()
        self._begun = 0
        self._most = concurrency
        self._changed = threading.Condition(threading.Lock())
        self._awaited: _Job | None = None  # What becomes of it wakes the one who takes the results,
        self._ending = False  # who is now waiting for all.

    def begin(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Job[Any]:
        job = _Job(work)
        with self._changed:
            self._queue.append(job)
        self._begin_next()
        return job

    async def result(self, job: Job[Any]) -> Any:
        job = cast("_Job", job)
        while (late := self._await(job)) is not None:
            self._deliver(job, late, came=False)
        if job.error is not None:
            raise job.error
        return job.found

    async def take(self, source: Source, job: Job[Any] | None) -> Any:
        return await source.take()  # Which blocks.

    def end(self) -> None:
        """Begin nothing more, and wait for what was begun."""
        with self._changed:
            self._queue.clear()
            self._ending = True
            self._changed.wait_for(lambda: not self._begun)
        self._executor.shutdown()

    def _await(self, job: _Job) -> _Clock | None:
        """Wait until a job has ended; return the clock of its wait if that ended before."""
        with self._changed:
            self._awaited = job
            while not job.ended:
                left_s = None if job.clock is None else job.clock.left_s()
                if left_s is not None and left_s <= 0:
                    return job.clock
                self._changed.wait(left_s)
        return None

    def _begin_next(self, *, may_block: bool = False) -> None:
        """Begin what there is room for."""
        while True:
            with self._changed:
                if not self._queue or self._begun >= self._most:
                    return
                self._begun += 1
                job = self._queue.popleft()
            job.coroutine = job.work()
            self._go_on(job, None, may_block=may_block)

    def _go_on(self, job: _Job, told: Any, *, may_block: bool) -> None:
        """Carry a job on until it ends, waits for mail, or is about to block a thread that must not."""
        try:
            while True:
                asked = job.coroutine.send(told)
                if isinstance(asked, _Mail) and asked.clock.left_s() > SHORT_S and not asked.mailbox.done():
                    self._leave(job, asked)
                    return
                if not may_block:
                    self._executor.submit(self._go_on_here, job, asked)
                    return
                told = asked.block()
        except StopIteration as stop:
            self._end(job, stop.value, None)
        except BaseException as error:
            self._end(job, None, error)
            if not isinstance(error, Exception):  # Ctrl-C.
                raise

    def _go_on_here(self, job: _Job, asked: Blocking) -> None:
        """Carry a job on in a thread of ours."""
        self._go_on(job, asked.block(), may_block=True)
        self._begin_next(may_block=True)

    def _leave(self, job: _Job, mail: _Mail) -> None:
        """Leave a job until its mail comes, or until who waits for the job finds that it came too late."""
        clock = mail.clock
        with self._changed:
            job.clock = clock
            if job is self._awaited:
                self._changed.notify()
        # What is kept to be done must not hold the mailbox: the reply would stay until Python looks for circles.
        mail.mailbox.tell(lambda: self._deliver(job, clock, came=True))

    def _deliver(self, job: _Job, clock: _Clock, *, came: bool) -> None:
        with self._changed:
            if job.clock is not clock:  # Delivered already.
                return
            job.clock = None
        self._go_on(job, came, may_block=False)
        self._begin_next()

    def _end(self, job: _Job, found: Any, error: BaseException | None) -> None:
        with self._changed:
            job.found, job.error, job.ended = found, error, True
            self._begun -= 1
            if job is self._awaited or self._ending:
                self._changed.notify()
