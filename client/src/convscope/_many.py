"""Many batches of items, several at a time: results in order, and no more read ahead than a bound.

Written twice, with threads and with tasks. It does not know what is done with a batch.
"""

from __future__ import annotations

import asyncio
import os
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
from contextlib import AbstractContextManager, nullcontext
from operator import length_hint
from typing import Any, TypeVar, cast

import numpy as np

from convscope._pictures import PillowImage

AHEAD = 2  # Batches begun for each that may be under way, so that one slow response does not idle the others.

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
    """Work on batches of items in threads.

    Args:
        items: Any number of them; may be endless.
        work: Turns a batch into its results; an exception among them is raised at its place.
        concurrency: Batches under way at a time.
        batch: Items in a batch.
        bar: A progress bar, or a context of None.

    Yields:
        The results in the order of the items. When the generator ends or is closed, no work is under way.

    Raises:
        Exception: Whatever `work` or `items` raised, after the results of the items before.
    """
    source = _batches(items, batch)
    pending: deque[Future[list[Result | Exception]]] = deque()
    failure: Exception | None = None
    more = True
    with bar as shown, ThreadPoolExecutor(concurrency, thread_name_prefix="convscope-many") as pool:
        try:
            while more or pending:
                if more:
                    try:
                        pending.append(pool.submit(work, next(source)))
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more, failure = False, error
                while pending and (not more or len(pending) >= AHEAD * concurrency or pending[0].done()):
                    for result in pending.popleft().result():
                        if isinstance(result, Exception):
                            raise result
                        if shown is not None:
                            shown.update()
                        yield result
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()


async def map_batches_async(
    items: Iterable[Item] | AsyncIterable[Item],
    work: Callable[[list[Item]], Awaitable[list[Result | Exception]]],
    *,
    concurrency: int,
    batch: int,
    bar: AbstractContextManager[Any],
) -> AsyncGenerator[Result, None]:
    """Work on batches of items in tasks; see `map_batches`. One task reads all items."""
    ahead = asyncio.Semaphore(AHEAD * concurrency)
    free = asyncio.Semaphore(concurrency)
    begun: asyncio.Queue[asyncio.Task[list[Result | Exception]] | BaseException | None] = asyncio.Queue()
    tasks: set[asyncio.Task[Any]] = set()

    async def run(group: list[Item]) -> list[Result | Exception]:
        async with free:
            return await work(group)

    async def read() -> None:
        source = _batches_async(items, batch)
        try:
            while True:
                await ahead.acquire()
                task = asyncio.create_task(run(await anext(source)), name="convscope")
                tasks.add(task)
                begun.put_nowait(task)
        except StopAsyncIteration:
            begun.put_nowait(None)
        except BaseException as error:
            begun.put_nowait(error)
            raise

    with bar as shown:
        reader = asyncio.create_task(read(), name="convscope")
        tasks.add(reader)
        try:
            while (task := await begun.get()) is not None:
                if isinstance(task, BaseException):
                    raise task
                for result in await task:
                    if isinstance(result, Exception):
                        raise result
                    if shown is not None:
                        shown.update()
                    yield result
                tasks.discard(task)
                ahead.release()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items. If the iterable raises, yield the items before that first."""
    group: list[Item] = []
    failure: Exception | None = None
    iterator = iter(items)
    while failure is None:
        try:
            group.append(next(iterator))
        except StopIteration:
            break
        except Exception as error:
            failure = error
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
    if failure is not None:
        raise failure


async def _batches_async(items: Iterable[Item] | AsyncIterable[Item], size: int) -> AsyncIterator[list[Item]]:
    """Yield lists of `size` items; see `_batches`."""
    if not isinstance(items, AsyncIterable):
        for group in _batches(items, size):
            yield group
        return
    group = []
    failure: Exception | None = None
    iterator = aiter(items)
    while failure is None:
        try:
            group.append(await anext(iterator))
        except StopAsyncIteration:
            break
        except Exception as error:
            failure = error
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
    if failure is not None:
        raise failure


def check_stream(pictures: object, *, concurrency: int, batch: int) -> None:
    """Check the arguments of `predict_many`.

    Args:
        pictures: What should be an iterable of pictures.
        concurrency: Requests at a time.
        batch: Items in a request.

    Raises:
        TypeError: `pictures` is a single picture or no iterable, or a number is no whole number.
        ValueError: A number is below 1.
    """
    single = isinstance(pictures, str | bytes | bytearray | memoryview | os.PathLike | PillowImage)
    single = single or (isinstance(pictures, np.ndarray) and pictures.ndim < 4)
    if single or not isinstance(pictures, Iterable | AsyncIterable):
        raise TypeError("predict_many takes an iterable of pictures; a single one goes to predict")
    for name, number in (("concurrency", concurrency), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be a whole number, not {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")


def open_progress(pictures: object, progress: bool) -> AbstractContextManager[Any]:
    """Make a progress bar.

    Args:
        pictures: Their number is the bar's total, where it is known.
        progress: Whether a bar is wanted.

    Returns:
        A context manager of a tqdm bar, or of None.

    Raises:
        ImportError: tqdm is not installed; says how to get it.
    """
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True draws with tqdm, which cannot be imported: pip install 'convscope[progress]'"
        ) from error
    bar = tqdm(total=length_hint(pictures) or None, unit="picture")
    return cast("AbstractContextManager[Any]", bar)
