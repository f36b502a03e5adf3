"""Several requests at a time in asyncio: what `_blocking` does with threads, done with tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from convscope._prediction import Prediction
    from convscope._stream import Job


class Tasks:
    """A crew of tasks."""

    def __init__(self, concurrency: int) -> None:
        self._hands = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[list[Prediction]]] = set()

    def begin(self, work: Callable[[], Coroutine[Any, Any, list[Prediction]]]) -> Job[list[Prediction]]:
        task = asyncio.create_task(self._run(work), name="convscope")
        self._tasks.add(task)
        return task

    async def result(self, job: Job[list[Prediction]]) -> list[Prediction]:
        task = cast("asyncio.Task[list[Prediction]]", job)
        try:
            return await task
        finally:
            if task.done():
                self._tasks.discard(task)

    async def end(self) -> None:
        """Cancel what is left, and wait until it is gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, list[Prediction]]]) -> list[Prediction]:
        async with self._hands:
            return await work()


class SharedTasks:
    """Works on shared requests, in tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def mailbox(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def wait(self, mailbox: asyncio.Future[Any], seconds: float) -> bool:
        """Wait that long for the mailbox, and leave it open when the time is up."""
        done, _ = await asyncio.wait((mailbox,), timeout=seconds)
        return bool(done)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        if self._ended:
            raise RuntimeError("this client is closed")
        task = asyncio.create_task(work, name="convscope-shared")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Begin nothing more; cancel what is left, and wait until it is gone."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
