"""Which errors are retried, when, and how often; the clock and the waits are not real."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client, Prediction
from convscope._wire.convscope_pb2 import PredictReply, PredictRequest
from convscope.testing import FakeTransport, Request, prediction

from tests.client.stand_in import StandIn, answer
from tests.client.test_errors import EXCEPTIONS

PASSING = ("ConnectError", "DeadlineExceeded", "Overloaded")


def ask(kind: type, url: str, **settings: Any) -> tuple[Any, int]:
    """Ask one question; return the answer or the error, and the retries made."""

    async def ask_async() -> tuple[Any, int]:
        async with AsyncClient(url, **settings) as client:
            try:
                return await client.predict(b"cat", model="cifar"), client.retries_made
            except convscope.ConvscopeError as error:
                return error, client.retries_made

    if kind is AsyncClient:
        return asyncio.run(ask_async())
    with Client(url, **settings) as client:
        try:
            return client.predict(b"cat", model="cifar"), client.retries_made
        except convscope.ConvscopeError as error:
            return error, client.retries_made


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("mishaps", [["full"], ["died"], ["reset"], ["cut"], ["full", "reset", "died"]], ids=str)
def test_temporary_errors_are_retried(kind: type, url: str, stand_in: StandIn, mishaps: list[str], waits: list[float]):
    stand_in.mishaps[:] = mishaps
    result, retries = ask(kind, url)
    assert result.top
    assert retries == len(waits) == len(mishaps)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.usefixtures("waits")
def test_a_service_that_drains_is_retried(kind: type, url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
    first = iter(["error-draining"])

    def take(model: str, version: str, data: bytes, _: str | None) -> PredictReply:
        return answer(next(first, model), version, PredictRequest.FromString(data))

    monkeypatch.setattr(stand_in, "take", take)
    result, retries = ask(kind, url)
    assert result.top
    assert retries == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_without_retries_the_first_failure_is_final(kind: type, url: str, stand_in: StandIn):
    stand_in.mishaps[:] = ["full", "full"]
    error, retries = ask(kind, url, retries=0)
    assert isinstance(error, convscope.Overloaded)
    assert (retries, stand_in.mishaps) == (0, ["full"])


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_retry_after_is_respected_within_the_deadline(kind: type, url: str, stand_in: StandIn, waits: list[float]):
    stand_in.mishaps[:] = ["full 7"]
    assert ask(kind, url, deadline_s=30)[0].top
    assert 7 <= waits[0] <= 7.2
    stand_in.mishaps[:] = ["full 31"]
    error, retries = ask(kind, url, deadline_s=30)
    assert error.retry_after_s == 31
    assert retries == 0


def test_the_pushback_of_grpc_is_respected(stand_in: StandIn, waits: list[float]):
    stand_in.mishaps[:] = ["pushback 2500"]
    assert ask(Client, stand_in.grpc_url)[0].top
    assert 2.5 <= waits[0] <= 2.7
    stand_in.mishaps[:] = ["pushback -1"]
    error, retries = ask(Client, stand_in.grpc_url)
    assert isinstance(error, convscope.Overloaded)
    assert retries == 0


def test_readiness_does_not_retry(url: str, stand_in: StandIn):
    stand_in.mishaps[:] = ["full", "full"]
    with Client(url) as client:
        assert client.ready("cifar") is False
        assert client.retries_made == 0
    assert stand_in.mishaps == ["full"]


def test_waiting_for_readiness_leaves_the_budget_to_others(stand_in: StandIn):
    stand_in.mishaps[:] = ["full"] * 100
    with Client(stand_in.rest_url) as client:
        while stand_in.mishaps:
            assert client.ready("cifar") is False
        stand_in.mishaps[:] = ["reset"]
        assert client.predict(b"cat", model="cifar").top
        assert client.retries_made == 1


def fail(response: Any, **settings: Any) -> int:
    """Make one call that fails with an error, or as a function says; return the retries made."""
    with Client("http://fake", transport=FakeTransport(response), **settings) as client:
        with pytest.raises(convscope.ConvscopeError):
            client.predict(b"cat", model="cifar")
        return client.retries_made


@pytest.mark.parametrize("kind", [kind for kind in EXCEPTIONS if kind.__name__ not in PASSING])
@pytest.mark.usefixtures("waits")
def test_permanent_errors_are_final(kind: type[convscope.ConvscopeError]):
    assert fail(kind("internal")) == 0


def test_waits_double_at_most_and_end(waits: list[float]):
    for _ in range(100):
        assert fail(convscope.ConnectError(), retries=3) == 3
    longest = [max(waits[turn::3]) for turn in range(3)]
    assert all(most / 2 < wait <= most for wait, most in zip(longest, (0.2, 0.4, 0.8), strict=True))


@pytest.mark.usefixtures("waits")
def test_a_request_that_kills_two_workers_kills_no_third():
    assert fail(convscope.ServerError("Worker died.")) == 1


@pytest.mark.usefixtures("waits")
def test_a_deadline_of_our_own_is_final_and_costs_no_budget():
    slow = [True] * 100

    def respond(request: Request) -> Any:
        if not slow:
            raise convscope.ConnectError
        slow.pop()
        threading.Event().wait(request.deadline_s)
        raise convscope.DeadlineExceeded(f"no complete response within {request.deadline_s} s")

    with Client("http://fake", transport=FakeTransport(respond), retries=1) as client:
        while slow:
            with pytest.raises(convscope.DeadlineExceeded):
                client.predict(b"cat", model="cifar", deadline_s=0.001)
        assert client.retries_made == 0
        with pytest.raises(convscope.ConnectError):
            client.predict(b"cat", model="cifar")
        assert client.retries_made == 1


@pytest.mark.usefixtures("waits")
def test_an_outage_empties_the_budget_and_successes_fill_it_slowly():
    is_up = False

    def respond(_: Request) -> Prediction:
        if not is_up:
            raise convscope.ConnectError
        return prediction()

    def call(client: Client, times: int) -> int:
        for _ in range(times):
            with suppress(convscope.ConnectError):
                client.predict(b"cat", model="cifar")
        return client.retries_made

    with Client("http://fake", transport=FakeTransport(respond), retries=1) as client:
        assert call(client, 100) == 49
        is_up = True
        assert call(client, 9) == 49
        is_up = False
        assert call(client, 1) == 49
        is_up = True
        call(client, 1000)
        is_up = False
        assert call(client, 1) == 50


@pytest.mark.parametrize(("retries", "error"), [(-1, ValueError), (True, TypeError), (1.5, TypeError)])
def test_retries_that_are_not_a_number_are_rejected(retries: Any, error: type[Exception]):
    with pytest.raises(error, match="retries must be"):
        Client("http://localhost:1", retries=retries)
