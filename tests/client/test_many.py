"""predict_many: order, bounds, errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import AsyncClient, Client, Prediction
from convscope.testing import FakeTransport, Request, prediction

from tests.client.stand_in import StandIn, fetch_maps
from tests.client.wire import BOTH


def collect(
    kind: type, url: str, pictures: Iterable[Any], count: int | None = None, **options: Any
) -> list[Prediction]:
    """Take so many predictions, then leave; check that no thread or task is left."""

    async def collect_async() -> list[Prediction]:
        async with AsyncClient(url, retries=0) as client:
            result: list[Prediction] = []
            async with contextlib.aclosing(client.predict_many(pictures, model="cifar", **options)) as results:
                async for prediction in results:
                    result.append(prediction)
                    if len(result) == count:
                        break
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "convscope"]
            return result

    if kind is AsyncClient:
        return asyncio.run(collect_async())
    with Client(url, retries=0) as client:
        result = list(itertools.islice(results := client.predict_many(pictures, model="cifar", **options), count))
        results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("convscope-many")]
    return result


@BOTH
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_come_in_order(kind: type, url: str, stand_in: StandIn, batch: int):
    pictures = [b"%d" % number for number in range(20)]
    result = collect(kind, url, pictures, concurrency=3, batch=batch)
    assert [prediction.top[0].logit for prediction in result] == [fetch_maps(one, (10,)).max() for one in pictures]
    assert len(stand_in.requests) == -(-20 // batch)


@BOTH
def test_an_endless_iterable_is_read_no_further_than_the_bound(kind: type, url: str):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield b"%d" % number

    assert len(collect(kind, url, endless(), 5, concurrency=2, batch=2)) == 5
    assert len(read) <= 5 + 2 * 2 * 2 + 2


@BOTH
def test_one_failure_does_not_end_the_stream(kind: type, url: str, stand_in: StandIn):
    stand_in.mishaps[:] = ["reset"]
    result = collect(kind, url, [b"one", b"bad", b"two"], concurrency=1)
    assert [type(prediction.error) for prediction in result] == [convscope.ConnectError, convscope.BadImage, type(None)]


@BOTH
def test_an_array_of_several_gives_several(kind: type, url: str):
    assert len(collect(kind, url, [np.zeros((2, 4, 4, 3), np.uint8), b"cat"], batch=2)) == 3


@BOTH
@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_that_cannot_be_read_is_the_error_of_its_item_alone(kind: type, url: str, batch: int):
    one, absent, two = collect(kind, url, [b"one", "absent.png", b"two"], batch=batch)
    assert isinstance(absent.error, convscope.BadImage)
    assert "No such file or directory: 'absent.png'" in absent.error.message
    assert isinstance(absent.error.__cause__, FileNotFoundError)
    assert [one.top[0].logit, two.top[0].logit] == [fetch_maps(name, (10,)).max() for name in (b"one", b"two")]


def failing() -> Iterator[bytes]:
    yield from [b"one", b"two", b"three"]
    raise OSError("the camera is gone")


async def failing_async() -> AsyncIterator[bytes]:
    for picture in failing():
        yield picture


@pytest.mark.parametrize(
    ("kind", "pictures"), [(Client, failing), (AsyncClient, failing), (AsyncClient, failing_async)], ids=repr
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_pictures_raise_comes_after_those_before_it(
    kind: type, pictures: Callable[[], Any], url: str, batch: int
):
    result: list[Prediction] = []

    async def collect_async() -> None:
        async with AsyncClient(url) as client:
            async for prediction in client.predict_many(pictures(), model="cifar", batch=batch):
                result.append(prediction)

    def collect_blocking() -> None:
        with Client(url) as client:
            for prediction in client.predict_many(pictures(), model="cifar", batch=batch):
                result.append(prediction)

    with pytest.raises(OSError, match="the camera is gone"):
        collect_blocking() if kind is Client else asyncio.run(collect_async())
    assert [one.top[0].logit for one in result] == [fetch_maps(one, (10,)).max() for one in (b"one", b"two", b"three")]


def test_a_prediction_is_yielded_before_the_next_picture_which_may_depend_on_it(url: str):
    async def ask() -> list[float]:
        answered: asyncio.Queue[float] = asyncio.Queue()
        result = []

        async def pictures():
            yield b"first"
            for _ in range(3):
                yield b"%f" % await answered.get()

        async with AsyncClient(url) as client:
            async for prediction in client.predict_many(pictures(), model="cifar", concurrency=4):
                result.append(prediction.top[0].logit)
                answered.put_nowait(prediction.top[0].logit)
        return result

    first = float(fetch_maps(b"first", (10,)).max())
    result = asyncio.run(asyncio.wait_for(ask(), 30))
    assert result[0] == first
    assert result[1:] == [float(fetch_maps(b"%f" % one, (10,)).max()) for one in result[:-1]]


def test_all_pictures_of_an_asynchronous_iterable_are_read_by_one_task(url: str):
    readers = []

    async def pictures():
        for number in range(5):
            readers.append(asyncio.current_task())
            await asyncio.sleep(0)
            yield b"%d" % number

    async def ask() -> list[Prediction]:
        async with AsyncClient(url) as client:
            return [result async for result in client.predict_many(pictures(), model="cifar", concurrency=1)]

    assert len(asyncio.run(ask())) == len(readers) == 5
    assert len(set(readers)) == 1


def test_leaving_a_stream_that_waits_for_a_picture_ends_the_waiting(url: str):
    ended = []

    async def pictures():
        yield b"cat"
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def ask() -> None:
        async with (
            AsyncClient(url) as client,
            contextlib.aclosing(client.predict_many(pictures(), model="cifar")) as result,
        ):
            assert (await anext(result)).top
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "convscope"]

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert ended == [True]


@pytest.mark.parametrize(
    ("pictures", "options", "error"),
    [
        (b"cat", {}, TypeError),
        ("cat.png", {}, TypeError),
        (np.zeros((4, 4, 3), np.uint8), {}, TypeError),
        ([], {"concurrency": 0}, ValueError),
        ([], {"batch": 0}, ValueError),
        ([], {"batch": 1.5}, TypeError),
        ([], {"top_k": -1}, ValueError),
        ([], {"deadline_s": 0}, ValueError),
    ],
)
@BOTH
def test_what_cannot_be_streamed_is_rejected_at_the_call(kind: type, pictures: Any, options: dict[str, Any], error):
    with pytest.raises(error):
        kind("http://localhost:1").predict_many(pictures, model="cifar", **options)


@BOTH
def test_a_bar_counts_the_predictions(kind: type, url: str, capsys: pytest.CaptureFixture[str]):
    collect(kind, url, [b"one", b"two"], progress=True)
    assert "2/2" in capsys.readouterr().err


@BOTH
def test_without_tqdm_a_bar_names_the_extra(kind: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"convscope\[progress\]"):
        kind("http://localhost:1").predict_many([], model="cifar", progress=True)


def test_a_stream_forsaken_without_closing_it_leaves_no_task(url: str, stand_in: StandIn):
    async def ask() -> None:
        async with AsyncClient(url) as client:
            async for _ in client.predict_many(itertools.repeat(b"cat"), model="cifar"):
                break
            while [task for task in asyncio.all_tasks() if task.get_name() == "convscope"]:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_blocking_stream_may_be_forsaken_in_one_of_its_own_threads(monkeypatch: pytest.MonkeyPatch):
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    numbers, (came, leave, left) = itertools.count(), (threading.Event() for _ in range(3))

    def respond(request: Request) -> Prediction:
        if next(numbers):
            came.set()
            leave.wait(20)
            streams.clear()  # The last reference to the stream: it is closed here.
            left.set()
        else:
            came.wait(20)
        return prediction({"cat": 1.0})

    with Client("http://unused", transport=FakeTransport(respond), retries=0) as client:
        streams = [client.predict_many([b"one", b"two"], model="cifar", concurrency=2)]
        next(streams[0])
        leave.set()
        assert left.wait(20)
    while [thread for thread in threading.enumerate() if thread.name.startswith("convscope-many")]:
        time.sleep(0.01)
    assert not errors


def test_requests_on_their_way_are_cancelled_with_their_stream(url: str, stand_in: StandIn):
    def came() -> int:  # A cancelled request of the test before may come late: it asks another model.
        return sum(model == "slow" for model, *_ in stand_in.requests)

    async def ask() -> None:
        async with AsyncClient(url) as client:
            result = client.predict_many(itertools.repeat(b"cat"), model="slow", concurrency=2)
            first = asyncio.create_task(anext(result))
            while came() < 2:
                await asyncio.sleep(0.01)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "convscope"]
        assert came() == 2

    stand_in.release.clear()
    try:
        asyncio.run(asyncio.wait_for(ask(), 20))
    finally:
        stand_in.release.set()


def test_requests_go_side_by_side_up_to_the_concurrency(url: str, stand_in: StandIn):
    stand_in.release.clear()
    result: list[Prediction] = []

    def ask() -> None:
        with Client(url) as client:
            result.extend(client.predict_many([b"cat"] * 6, model="slow", concurrency=3))

    thread = threading.Thread(target=ask)
    thread.start()
    while len(stand_in.requests) < 3:
        thread.join(0.01)
    assert len(stand_in.requests) == 3  # None of them is answered yet.
    stand_in.release.set()
    thread.join(20)
    assert len(result) == 6


def test_the_blocking_stream_works_inside_a_running_event_loop(client: Client):
    async def ask() -> int:
        return len(list(client.predict_many([b"one", b"two"], model="cifar")))

    assert asyncio.run(ask()) == 2
