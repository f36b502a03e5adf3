"""Questions in flight together share a request, and each keeps its own picture, options, deadline, error and end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client, _sharing
from convscope._blocking import SharedThreads
from convscope._coalescing import AT_ONCE, FIRST_MOST
from convscope._tasks import SharedTasks
from prometheus_client import CollectorRegistry

from tests.client.stand_in import LAYERS, NARROW, StandIn, fetch_maps
from tests.client.test_metrics import SECONDS, samples

BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
LONG_S = 30.0


class Crowd:
    """Callers of one client, blocking ones in threads or awaiting ones in a loop, asking the model `slow`."""

    def __init__(self, client: Any, begin: Callable[[Any], Future[Any]], stand_in: StandIn, model: str) -> None:
        self.client, self.stand_in, self.model = client, stand_in, model
        self._begin = begin

    def ask(self, picture: Any, **options: Any) -> Future[Any]:
        """Begin a question; its future can be cancelled where the client is one for asyncio."""
        return self._begin(lambda: self.client.predict(picture, model=self.model, **options))

    def stream(self, pictures: Any, **options: Any) -> Future[Any]:
        """Begin a blocking stream; its future holds the predictions."""
        return self._begin(lambda: list(self.client.predict_many(pictures, model=self.model, **options)))

    def hold(self, **options: Any) -> list[Future[Any]]:
        """Put as many requests on their way as go at once; they stay there until `release`."""
        held = [self.ask(b"held", **options) for _ in range(AT_ONCE)]
        self.until(lambda: len(self.stand_in.requests) == AT_ONCE)
        return held

    def gather(self, *pictures: Any, **options: Any) -> list[Future[Any]]:
        """Ask about pictures, one after another, until all of them wait for company."""
        found = []
        for picture in pictures:
            before = self.gathered()
            found.append(self.ask(picture, **options))
            self.until(lambda before=before: self.gathered() == before + 1)
        return found

    def gathered(self) -> int:
        return sum(len(lane._gathered) for lane in self.client._sharing._lanes._lanes.values())

    def release(self) -> None:
        self.stand_in.release.set()

    def sent(self) -> list[list[bytes]]:
        """The pictures of each request after those held."""
        return [list(request.pictures) for *_, request in self.stand_in.requests[AT_ONCE:]]

    def until(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + LONG_S
        while not condition():
            assert time.monotonic() < ends, "it never came about"
            time.sleep(0.002)


@contextmanager
def crowd(kind: type, url: str, stand_in: StandIn, model: str = "slow", **settings: Any) -> Iterator[Crowd]:
    """Open a client and callers; the model holds its answers back until `release`."""

    async def at_once(_: float) -> None:
        pass

    stand_in.release.clear()
    try:
        if kind is Client:
            with ThreadPoolExecutor(50) as threads, Client(url, **settings) as client:
                client._pause = at_once  # type: ignore[method-assign]
                yield Crowd(client, threads.submit, stand_in, model)
                stand_in.release.set()
        else:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            client_async = AsyncClient(url, **settings)
            client_async._pause = at_once  # type: ignore[method-assign]
            try:
                yield Crowd(client_async, lambda work: asyncio.run_coroutine_threadsafe(work(), loop), stand_in, model)
            finally:
                stand_in.release.set()
                asyncio.run_coroutine_threadsafe(client_async.close(), loop).result(LONG_S)
                loop.call_soon_threadsafe(loop.stop)
                thread.join(LONG_S)
                loop.close()
    finally:
        stand_in.release.set()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets tired of waiting for company."""
    monkeypatch.setattr(_sharing, "DELAY_S", LONG_S)


def threads() -> list[str]:
    """The names of the client's threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("convscope")]


def best(picture: bytes) -> float:
    return float(fetch_maps(picture, (10,)).max())


@BOTH
def test_those_that_wait_go_in_one_request_and_each_gets_its_own_answer(
    kind: type, url: str, stand_in: StandIn, patient: None
):
    pictures = [b"%d" % number for number in range(6)]
    with crowd(kind, url, stand_in) as callers:
        held = callers.hold()
        waiting = callers.gather(*pictures)
        callers.release()
        seen = [one.result(LONG_S) for one in waiting]
        assert [one.top[0].logit for one in seen] == [best(picture) for picture in pictures]
        assert callers.sent() == [pictures]
        assert all(one.result(LONG_S).top[0].logit == best(b"held") for one in held)
        assert {one.request_id for one in seen} == {stand_in.requests[-1][2].request_id}


@BOTH
def test_lists_travel_along_and_come_back_as_lists_in_order(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather([b"one", b"two"], b"three", [b"four", b"five"])
        callers.release()
        first, one, last = [question.result(LONG_S) for question in waiting]
        assert [seen.top[0].logit for seen in first] == [best(b"one"), best(b"two")]
        assert one.top[0].logit == best(b"three")
        assert [seen.top[0].logit for seen in last] == [best(b"four"), best(b"five")]
        assert callers.sent() == [[b"one", b"two", b"three", b"four", b"five"]]


@BOTH
def test_other_options_never_share_a_request(kind: type, url: str, stand_in: StandIn, patient: None):
    others: list[dict[str, Any]] = [
        *({"layers": "conv1"}, {"layers": ["conv1", "conv2"]}, {"layers": "all", "map_dtype": "uint8"}),
        *({"layers": "all", "pool": 1}, {"layers": "all", "channels": [0]}, {"layers": "all", "channels": 1}),
        *({"top_k": 3}, {"timing": True}, {"version": "2"}),
    ]
    with crowd(kind, url, stand_in) as callers:
        held = callers.hold()
        waiting = callers.gather(b"one", b"two")
        asked = [callers.ask(b"cat", **options) for options in others]
        callers.release()
        for question in (*held, *waiting, *asked):
            question.result(LONG_S)
        assert sorted(map(len, callers.sent())) == [1] * len(others) + [2]
        for options, question in zip(others, asked, strict=True):
            seen = question.result()
            layers = list(LAYERS) if options.get("layers") == "all" else options.get("layers", [])
            assert set(seen.maps) == {layers} if isinstance(layers, str) else set(seen.maps) == set(layers)
            assert len(seen.top) == options.get("top_k", 5)
            assert (seen.timing is not None) == options.get("timing", False)
            assert seen.version == options.get("version", "1.0")


@BOTH
def test_a_picture_that_fails_fails_alone(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        one, bad, two = callers.gather(b"one", b"bad", b"two")
        callers.release()
        assert one.result(LONG_S).top[0].logit == best(b"one")
        assert two.result(LONG_S).top[0].logit == best(b"two")
        with pytest.raises(convscope.BadImage, match="bad") as caught:
            bad.result(LONG_S)
        assert len(callers.sent()) == 1
        assert caught.value.request_id == one.result().request_id


@BOTH
def test_a_request_that_fails_for_one_of_them_is_asked_again_by_each_alone(
    kind: type, url: str, stand_in: StandIn, patient: None
):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        one, poison, two = callers.gather(b"one", b"poison", b"two")
        callers.release()
        assert one.result(LONG_S).top[0].logit == best(b"one")
        assert two.result(LONG_S).top[0].logit == best(b"two")
        with pytest.raises(convscope.ServerError, match="too much") as caught:
            poison.result(LONG_S)
        sent = callers.sent()
        assert sent[0] == [b"one", b"poison", b"two"]
        assert sorted(sent[1:]) == [[b"one"], [b"poison"], [b"two"]]
        asked = [request for *_, request in stand_in.requests if list(request.pictures) == [b"poison"]]
        assert [request.request_id for request in asked] == [caught.value.request_id]


@BOTH
def test_a_worker_that_dies_of_a_shared_request_is_not_sent_it_again(
    kind: type, url: str, stand_in: StandIn, patient: None
):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather(b"one", b"two")
        stand_in.mishaps[:] = ["died"]
        callers.release()
        assert [one.result(LONG_S).top[0].logit for one in waiting] == [best(b"one"), best(b"two")]
        assert sorted(callers.sent()) == [[b"one"], [b"two"]]
        assert callers.client.retries_made == 0


@BOTH
def test_a_limit_of_pictures_is_learnt(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in, "slow-narrow") as callers:
        callers.hold()
        waiting = callers.gather(*(b"%d" % number for number in range(2 * NARROW)))
        callers.release()
        assert [one.result(LONG_S).top[0].logit for one in waiting] == [best(b"%d" % n) for n in range(2 * NARROW)]
        [lane] = callers.client._sharing._lanes._lanes.values()
        assert lane.most == NARROW


@BOTH
@pytest.mark.parametrize("mishap", ["full", "reset"])
def test_a_shared_request_is_sent_again_where_a_single_one_would_be(
    kind: type, url: str, stand_in: StandIn, patient: None, mishap: str
):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather(b"one", b"two", b"three")
        stand_in.mishaps[:] = [mishap]
        callers.release()
        assert [one.result(LONG_S).top[0].logit for one in waiting] == [best(b"one"), best(b"two"), best(b"three")]
        assert callers.client.retries_made == 1
        assert callers.sent() == [[b"one", b"two", b"three"]]
        assert stand_in.request_ids[AT_ONCE] == stand_in.request_ids[AT_ONCE + 1] == waiting[0].result().request_id


@BOTH
def test_where_trying_again_does_not_help_each_gets_an_error_of_its_own(
    kind: type, url: str, stand_in: StandIn, patient: None
):
    with crowd(kind, url, stand_in, retries=0) as callers:
        callers.hold()
        waiting = callers.gather(b"one", b"two")
        stand_in.mishaps[:] = ["full 7"]
        callers.release()
        errors = [one.exception(LONG_S) for one in waiting]
        assert [type(error) for error in errors] == [convscope.Overloaded] * 2
        assert [error.retry_after_s for error in errors] == [7.0] * 2
        assert errors[0] is not errors[1]
        assert {error.request_id for error in errors} == {stand_in.request_ids[AT_ONCE]}
        assert all(error.__cause__ is None or isinstance(error.__cause__, Exception) for error in errors)
        assert callers.sent() == []


@BOTH
def test_a_deadline_ends_the_waiting_of_one_caller_only(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        [one] = callers.gather(b"one")
        [hasty] = callers.gather(b"hasty", deadline_s=0.3)
        [two] = callers.gather(b"two")
        with pytest.raises(convscope.DeadlineExceeded):
            hasty.result(LONG_S)
        callers.release()
        assert [question.result(LONG_S).top[0].logit for question in (one, two)] == [best(b"one"), best(b"two")]
        assert callers.sent() == [[b"one", b"two"]]


@BOTH
def test_a_deadline_ends_one_callers_part_of_a_request_on_its_way(kind: type, url: str, stand_in: StandIn):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        hasty, patient = callers.ask(b"hasty", deadline_s=0.5), callers.ask(b"patient")
        callers.until(lambda: sum(map(len, callers.sent())) == 2)
        with pytest.raises(convscope.DeadlineExceeded) as caught:
            hasty.result(LONG_S)
        assert caught.value.request_id in stand_in.request_ids
        callers.release()
        assert patient.result(LONG_S).top[0].logit == best(b"patient")


@BOTH
def test_a_deadline_too_short_for_waiting_goes_alone(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        hasty = callers.ask(b"hasty", deadline_s=_sharing.SHORTEST_S * 0.9)
        with pytest.raises(convscope.DeadlineExceeded):
            hasty.result(LONG_S)
        assert callers.sent() in ([[b"hasty"]], [])  # Sent at once; a busy machine may have been too slow for it.
        assert callers.gathered() == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_task_cancelled_while_it_waits_leaves_the_others_unharmed(
    url: str, stand_in: StandIn, patient: None, place: int
):
    pictures = [b"one", b"two", b"three"]
    with crowd(AsyncClient, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather(*pictures)
        waiting.pop(place).cancel()
        gone = pictures.pop(place)
        callers.until(lambda: callers.gathered() == (0 if place == 0 else 2))  # With the first goes who kept the time.
        callers.release()
        assert [one.result(LONG_S).top[0].logit for one in waiting] == [best(picture) for picture in pictures]
        assert callers.sent() == [pictures]
        assert gone not in pictures


@pytest.mark.parametrize("place", [0, 1])
def test_a_task_cancelled_on_its_way_leaves_the_others_unharmed(url: str, stand_in: StandIn, place: int):
    pictures = [b"one", b"two"]
    with crowd(AsyncClient, url, stand_in) as callers:
        callers.hold()
        asked = [callers.ask(picture) for picture in pictures]
        callers.until(lambda: sum(map(len, callers.sent())) == 2)
        asked.pop(place).cancel()
        callers.release()
        assert asked[0].result(LONG_S).top[0].logit == best(pictures[1 - place])


@BOTH
def test_nothing_stays_counted_as_on_its_way(kind: type, url: str, stand_in: StandIn):
    with crowd(kind, url, stand_in) as callers:
        held = callers.hold()
        asked = [callers.ask(b"%d" % number, deadline_s=0.3 if number % 3 else 30) for number in range(12)]
        asked.append(callers.ask(b"poison"))
        if kind is AsyncClient:
            asked[0].cancel()
        callers.until(lambda: sum(one.done() for one in asked) >= 8)
        callers.release()
        for question in (*held, *asked):
            callers.until(question.done)
        lanes = callers.client._sharing._lanes._lanes.values()
        callers.until(lambda: all(lane.idle for lane in lanes))


@BOTH
def test_a_client_that_is_closed_ends_the_waiting(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather(b"one", b"two")
        if kind is Client:
            callers.client.close()
        else:
            callers._begin(callers.client.close).result(LONG_S)
        callers.release()
        for question in waiting:
            assert isinstance(question.exception(LONG_S), RuntimeError | convscope.ConnectError)


def test_a_closed_client_ends_shared_requests_on_their_way(url: str, stand_in: StandIn):
    with crowd(AsyncClient, url, stand_in) as callers:
        callers.hold()
        asked = [callers.ask(b"one"), callers.ask(b"two")]
        callers.until(lambda: sum(map(len, callers.sent())) == 2)
        callers._begin(callers.client.close).result(LONG_S)
        for question in asked:
            assert isinstance(question.exception(LONG_S), convscope.ConnectError)


@BOTH
def test_waiting_ends_after_the_bounded_delay(kind: type, url: str, stand_in: StandIn):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        asked = callers.ask(b"one")
        callers.until(lambda: callers.sent() == [[b"one"]])  # Though none of those on their way has come back.
        callers.release()
        assert asked.result(LONG_S).top


@BOTH
def test_few_callers_never_wait(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()  # Would never get there: nobody lets them go.
        assert callers.gathered() == 0
        callers.release()


@BOTH
def test_off_sends_every_question_at_once(kind: type, url: str, stand_in: StandIn):
    with crowd(kind, url, stand_in, coalesce="off") as callers:
        asked = [callers.ask(b"%d" % number) for number in range(4)]
        callers.until(lambda: len(stand_in.requests) == 4)
        callers.release()
        for question in asked:
            question.result(LONG_S)
        assert [len(request.pictures) for *_, request in stand_in.requests] == [1] * 4


@BOTH
def test_on_lets_even_the_first_wait(kind: type, url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_sharing, "DELAY_S", 0.5)
    with crowd(kind, url, stand_in, coalesce="on") as callers:
        asked = callers.gather(b"one", b"two")
        callers.release()
        assert [one.result(LONG_S).top[0].logit for one in asked] == [best(b"one"), best(b"two")]
        assert [list(request.pictures) for *_, request in stand_in.requests] == [[b"one", b"two"]]


@BOTH
def test_who_names_a_request_has_it_alone(kind: type, url: str, stand_in: StandIn, patient: None):
    with crowd(kind, url, stand_in) as callers:
        callers.hold()
        waiting = callers.gather(b"one", b"two")
        named = callers.ask(b"three", request_id="order-7")
        callers.until(lambda: callers.sent() == [[b"three"]])
        callers.release()
        assert named.result(LONG_S).request_id == "order-7"
        assert all(question.result(LONG_S).top for question in waiting)


@BOTH
def test_metrics_count_every_question_once_and_a_retry_of_their_request_once(
    kind: type, url: str, stand_in: StandIn, patient: None
):
    registry = CollectorRegistry()
    transport = "rest" if url.startswith("http") else "grpc"
    with crowd(kind, url, stand_in, metrics=registry) as callers:
        held = callers.hold()
        waiting = callers.gather(b"one", b"bad", b"two")
        stand_in.mishaps[:] = ["full"]
        callers.release()
        for question in (*held, *waiting):
            question.exception(LONG_S)
    labels = ("slow", transport)
    assert samples(registry, SECONDS) == {("ok", *labels): AT_ONCE + 2, ("bad_image", *labels): 1}
    assert samples(registry, "convscope_client_retries_total") == {labels: 1}
    assert samples(registry, "convscope_client_server_seconds_count") == {labels: AT_ONCE + 3}


@BOTH
@pytest.mark.parametrize("form", ["bytes", "path"])
def test_a_stream_shares_requests_and_keeps_its_order(
    kind: type, form: str, url: str, stand_in: StandIn, tmp_path: Path
):
    contents = [b"bad" if number == 5 else b"%d" % number for number in range(60)]
    pictures: list[Any] = contents
    if form == "path":
        pictures = [tmp_path / f"{number}.png" for number in range(60)]
        for path, content in zip(pictures, contents, strict=True):
            path.write_bytes(content)

    async def ask() -> list[convscope.Prediction]:
        async with AsyncClient(url, coalesce="on") as client:
            return [seen async for seen in client.predict_many(pictures, model="cifar", concurrency=16)]

    if kind is AsyncClient:
        seen = asyncio.run(ask())
    else:
        with Client(url, coalesce="on") as client:
            seen = list(client.predict_many(pictures, model="cifar", concurrency=16))
    found = [one.error.code if one.error else one.top[0].logit for one in seen]
    assert found == ["bad_image" if content == b"bad" else best(content) for content in contents]
    assert len(stand_in.requests) < len(pictures)
    assert sum(len(request.pictures) for *_, request in stand_in.requests) == len(pictures)


def test_a_blocking_stream_has_threads_for_its_requests_and_none_for_its_pictures(
    url: str, stand_in: StandIn, patient: None
):
    pictures = [b"%d" % number for number in range(AT_ONCE + 2 * FIRST_MOST)]
    with crowd(Client, url, stand_in) as callers:
        asking = callers.stream(pictures, concurrency=len(pictures))
        callers.until(lambda: len(stand_in.requests) == AT_ONCE + 2)
        assert sorted(len(request.pictures) for *_, request in stand_in.requests) == [1] * AT_ONCE + [FIRST_MOST] * 2
        assert len(threads()) == len(stand_in.requests)
        callers.release()
        assert [one.top[0].logit for one in asking.result(LONG_S)] == [best(picture) for picture in pictures]
        assert all(name.startswith("convscope-shared") for name in threads())


@pytest.mark.parametrize("sent", [False, True], ids=["while it gathers", "on its way"])
def test_a_deadline_ends_a_picture_of_a_blocking_stream_only(
    sent: bool, url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_sharing, "DELAY_S", 0.2 if sent else LONG_S)
    with crowd(Client, url, stand_in) as callers:
        callers.hold()
        calm = callers.ask(b"calm")
        callers.until(lambda: callers.gathered() == 1)
        [hasty] = callers.stream([b"hasty"], deadline_s=0.5).result(LONG_S)
        assert isinstance(hasty.error, convscope.DeadlineExceeded)
        assert not calm.done()
        callers.release()
        assert calm.result(LONG_S).top[0].logit == best(b"calm")
        assert callers.sent() == [[b"calm", b"hasty"] if sent else [b"calm"]]


def test_a_blocking_stream_that_is_left_leaves_nothing_on_its_way(url: str, stand_in: StandIn):
    with Client(url) as client:
        found = client.predict_many(itertools.repeat(b"cat"), model="cifar", concurrency=16)
        next(found)
        found.close()
        assert not [name for name in threads() if not name.startswith("convscope-shared")]
        assert all(lane.idle for lane in client._sharing._lanes._lanes.values())
        assert client.predict(b"cat", model="cifar").top[0].logit == best(b"cat")


@BOTH
def test_what_came_is_not_kept_until_it_is_collected(kind: type, url: str, monkeypatch: pytest.MonkeyPatch):
    mailboxes: list[weakref.ref[Any]] = []
    hands = SharedThreads if kind is Client else SharedTasks
    make = hands.mailbox

    def mailbox(self: Any) -> Any:
        made = make(self)
        mailboxes.append(weakref.ref(made))
        return made

    async def ask() -> None:
        async with AsyncClient(url) as client:
            async for _ in client.predict_many([b"cat"] * 60, model="cifar", concurrency=16):
                pass

    monkeypatch.setattr(hands, "mailbox", mailbox)
    gc.disable()
    try:
        if kind is AsyncClient:
            asyncio.run(ask())
        else:
            with Client(url) as client:
                for _ in client.predict_many([b"cat"] * 60, model="cifar", concurrency=16):
                    pass
        assert mailboxes
        assert not [one for one in mailboxes if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_another_word_for_it_is_refused(kind: type):
    with pytest.raises(ValueError, match="coalesce must be one of auto, on, off"):
        kind("http://localhost:1", coalesce="maybe")


def test_closing_a_client_leaves_nobody_waiting_for_a_request_that_was_not_begun(url: str, stand_in: StandIn):
    async def close_at_once() -> list[Any]:
        client = AsyncClient(url, coalesce="on", deadline_s=LONG_S)
        asking = [asyncio.create_task(client.predict(b"%d" % number, model="cifar")) for number in range(FIRST_MOST)]
        await asyncio.sleep(0)  # All have asked, which fills a request.
        assert client._shared._tasks
        await client.close()
        done, waiting = await asyncio.wait(asking, timeout=LONG_S / 2)
        assert not waiting
        return [task.exception() for task in done]

    errors = asyncio.run(close_at_once())
    assert all(isinstance(error, RuntimeError) and "closed" in str(error) for error in errors)
    assert stand_in.requests == []
