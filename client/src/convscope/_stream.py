"""Many pictures, several requests at a time: order kept, nothing read further ahead than a bound.

It does not know how work is done side by side; the clients bring a crew, of threads or of tasks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from operator import length_hint
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from convscope._pictures import Picture, PillowImage

LOOK_AHEAD = 2  # Requests begun for each that may be on its way: one slow answer does not idle the others.

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_END: Any = object()


class Job(Protocol[T_co]):
    """A piece of work that was begun."""

    def done(self) -> bool:
        """Say whether it has ended."""


class Crew(Protocol[T]):
    """Works on several coroutines side by side; as a context manager, ends them all at its end."""

    def begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Job[T]:
        """Begin a piece of work, as soon as there are hands for it."""

    async def result(self, job: Job[T]) -> T:
        """Wait for a job's end; return or raise what it did."""

    async def take(self, source: Source, job: Job[T] | None) -> list[Picture] | None:
        """Wait for a source's next group; None where a job ended before it came."""


class Source:
    """Pictures of an iterable, or an asynchronous one, in groups.

    Attributes:
        suspends: Whether it is asynchronous.
        error: What it raised in place of a picture, after which it has no more.
    """

    def __init__(self, pictures: Iterable[Picture] | AsyncIterable[Picture], size: int) -> None:
        self.suspends = isinstance(pictures, AsyncIterable)
        self.error: Exception | None = None
        self._next: Callable[[], Any]
        if isinstance(pictures, AsyncIterable):
            later = aiter(pictures)
            self._next = lambda: anext(later, _END)
        else:
            now = iter(pictures)

            async def take() -> Any:
                return next(now, _END)

            self._next = take
        self._size = size
        self._ended = False

    async def take(self) -> list[Picture]:
        """Return the next group; an empty one at the end."""
        group: list[Picture] = []
        while len(group) < self._size and not self._ended:
            try:
                picture = await self._next()
            except Exception as error:  # Those before it are asked about nevertheless.
                self.error, picture = error, _END
            if picture is _END:
                self._ended = True
            else:
                group.append(picture)
        return group


async def stream(
    pictures: Iterable[Picture] | AsyncIterable[Picture],
    work: Callable[[list[Picture]], Coroutine[Any, Any, list[T | Exception]]],
    *,
    crew: Callable[[int], AbstractAsyncContextManager[Crew[Any]]],
    concurrency: int,
    batch: int,
    bar: AbstractContextManager[Any],
) -> AsyncGenerator[T, None]:
    """Work on pictures in groups, side by side.

    Args:
        pictures: Any number of them, endless too.
        work: Makes the coroutine that turns a group into its results; an exception among them ends the stream there.
        crew: Opens a crew that works on so many groups at once.
        concurrency: How many.
        batch: Pictures in a group.
        bar: Progress bar, or a context of None.

    Yields:
        The results in the order of the pictures. At its end, however it comes, no work is left behind.

    Raises:
        Exception: What a piece of work raised, or the pictures did, in its place.
    """
    source = Source(pictures, batch)
    begun: deque[Job[list[T | Exception]]] = deque()
    with bar as shown:
        async with crew(concurrency) as hands:
            more = True
            while more or begun:
                if more:
                    group = await hands.take(source, begun[0] if begun else None)
                    if group:
                        begun.append(hands.begin(lambda group=group: work(group)))  # type: ignore[misc]
                    more = group is None or bool(group)
                while begun and (not more or len(begun) >= LOOK_AHEAD * concurrency or begun[0].done()):
                    for result in await hands.result(begun.popleft()):
                        if isinstance(result, Exception):
                            raise result
                        if shown is not None:
                            shown.update()
                        yield result
            if source.error is not None:
                raise source.error


def check_stream(pictures: object, *, concurrency: int, batch: int) -> None:
    """Refuse what cannot be streamed.

    Args:
        pictures: What should be an iterable of pictures.
        concurrency: Requests at a time.
        batch: Pictures a request.

    Raises:
        TypeError: It is one picture, or no iterable; a number is none.
        ValueError: A number is below 1.
    """
    one = isinstance(pictures, str | bytes | bytearray | memoryview | os.PathLike | PillowImage)
    one = one or (isinstance(pictures, np.ndarray) and pictures.ndim < 4)
    if one or not isinstance(pictures, Iterable | AsyncIterable):
        raise TypeError("predict_many takes an iterable of pictures; a single one goes to predict")
    for name, number in (("concurrency", concurrency), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be a whole number, not {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")


def open_progress(pictures: object, progress: bool) -> AbstractContextManager[Any]:
    """Make a progress bar.

    Args:
        pictures: Its total is their number, where they tell.
        progress: Whether one is wanted.

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
