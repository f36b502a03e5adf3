"""Runs a function on batches of an iterable, several batches at a time, and yields the results in order.

Reads ahead at most 2 × `concurrency` batches. One version uses threads, the other asyncio tasks.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

READ_AHEAD_FACTOR = 2  # Batches started per concurrent one, so that one slow response does not leave workers idle.

_own = threading.local()

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_batches(
    items: Iterable[Item],
    work: Callable[[list[Item]], list[Result | Exception]],
    *,
    concurrency: int,
    batch: int,
    bar: AbstractContextManager[Any],
) -> Generator[Result, None, None]:
    """Run a function on batches of items in threads.

    Args:
        items: Any number of items; may be endless.
        work: Returns the results of a batch; an exception among them is raised at its position.
        concurrency: Number of concurrent batches.
        batch: Items per batch.
        bar: A progress bar, or a null context.

    Yields:
        The results in the order of the items. When the generator ends or is closed, no work is in progress.

    Raises:
        Exception: An exception of `work` or `items`, after the results of the preceding items.
    """
    source = _batches(items, batch)
    pending: deque[Future[list[Result | Exception]]] = deque()
    failure: Exception | None = None
    exhausted = False
    pool = ThreadPoolExecutor(concurrency, "convscope-many", initializer=setattr, initargs=(_own, "pool", pending))
    with bar as progress:
        try:
            while not exhausted or pending:
                if not exhausted:
                    try:
                        pending.append(pool.submit(work, next(source)))
                    except StopIteration:
                        exhausted = True
                    except Exception as error:
                        exhausted, failure = True, error
                while pending and (exhausted or len(pending) >= READ_AHEAD_FACTOR * concurrency or pending[0].done()):
                    for result in pending.popleft().result():
                        if isinstance(result, Exception):
                            raise result
                        if progress is not None:
                            progress.update()
                        yield result
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()
            # A forsaken generator may be closed by one of its own threads, which cannot wait for itself.
            pool.shutdown(wait=getattr(_own, "pool", None) is not pending)


async def map_batches_async(
    items: Iterable[Item] | AsyncIterable[Item],
    work: Callable[[list[Item]], Awaitable[list[Result | Exception]]],
    *,
    concurrency: int,
    batch: int,
    bar: AbstractContextManager[Any],
) -> AsyncGenerator[Result, None]:
    """Run a function on batches of items in tasks; see `map_batches`. One task reads all items."""
    read_ahead_slots = asyncio.Semaphore(READ_AHEAD_FACTOR * concurrency)
    request_slots = asyncio.Semaphore(concurrency)
    started: asyncio.Queue[asyncio.Task[list[Result | Exception]] | BaseException | None] = asyncio.Queue()
    tasks: set[asyncio.Task[Any]] = set()

    async def run(group: list[Item]) -> list[Result | Exception]:
        async with request_slots:
            return await work(group)

    async def read() -> None:
        source = _batches_async(items, batch)
        try:
            while True:
                await read_ahead_slots.acquire()
                task = asyncio.create_task(run(await anext(source)), name="convscope")
                tasks.add(task)
                started.put_nowait(task)
        except StopAsyncIteration:
            started.put_nowait(None)
        except BaseException as error:
            started.put_nowait(error)
            raise

    with bar as progress:
        reader = asyncio.create_task(read(), name="convscope")
        tasks.add(reader)
        try:
            while (task := await started.get()) is not None:
                if isinstance(task, BaseException):
                    raise task
                for result in await task:
                    if isinstance(result, Exception):
                        raise result
                    if progress is not None:
                        progress.update()
                    yield result
                tasks.discard(task)
                read_ahead_slots.release()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items. If the iterable raises, yield the preceding items first."""
    group: list[Item] = []
    try:
        for item in items:
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


async def _batches_async(items: Iterable[Item] | AsyncIterable[Item], size: int) -> AsyncIterator[list[Item]]:
    """Yield lists of `size` items; see `_batches`."""
    if not isinstance(items, AsyncIterable):
        for group in _batches(items, size):
            yield group
        return
    group = []
    try:
        async for item in items:
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group
