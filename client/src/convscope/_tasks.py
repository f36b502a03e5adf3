"""Several requests at a time in asyncio: what `_blocking` does with threads, done with tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from convscope._mailboxes import AsyncMailbox

if TYPE_CHECKING:
    from convscope._pictures import Picture
    from convscope._prediction import Prediction
    from convscope._stream import Job, Source


class Tasks:
    """A crew of tasks."""

    def __init__(self, concurrency: int) -> None:
        self._hands = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._wanted: asyncio.Queue[asyncio.Future[list[Picture]]] = asyncio.Queue()
        self._group: asyncio.Future[list[Picture]] | None = None  # Being read.

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

    async def take(self, source: Source, job: Job[list[Prediction]] | None) -> list[Picture] | None:
        if not source.suspends:
            return await source.take()
        if self._reader is None:
            self._reader = asyncio.create_task(self._read(source), name="convscope")
            self._tasks.add(self._reader)
        if self._group is None:
            self._group = asyncio.get_running_loop().create_future()
            self._wanted.put_nowait(self._group)
        others = () if job is None else (cast("asyncio.Task[list[Prediction]]", job),)
        await asyncio.wait((self._reader, self._group, *others), return_when=asyncio.FIRST_COMPLETED)
        if self._reader.done():
            await self._reader  # It ends only by being cancelled, or as the interpreter does.
        if not self._group.done():
            return None
        group, self._group = self._group.result(), None
        return group

    async def _read(self, source: Source) -> None:
        """Read all groups in one task, on which whoever wrote the source may rely."""
        while True:
            wanted = await self._wanted.get()
            wanted.set_result(await source.take())

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

    def mailbox(self) -> AsyncMailbox:
        return AsyncMailbox()

    async def wait(self, mailbox: AsyncMailbox, seconds: float) -> bool:
        return await mailbox.wait(seconds)

    def begin(self, work: Coroutine[Any, Any, None], *, last: bool = False) -> None:
        if self._ended:
            raise RuntimeError("this client is closed")
        task = asyncio.create_task(work, name="convscope-shared")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Begin nothing more; cancel what is left, and wait until it is gone."""
        self._ended = True
        await asyncio.sleep(0)  # A task that is cancelled before its first step could tell nobody.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
