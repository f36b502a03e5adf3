"""Which errors are retried, when, and how often; the clock and the waits are not real."""

from __future__ import annotations

import asyncio
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client
from convscope._retries import MAX_TOKENS, Attempts, RetryBudget
from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

from tests.client.stand_in import StandIn, answer


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


def attempts(retries: int = 3, deadline_s: float = 30, budget: RetryBudget | None = None) -> Attempts:
    return Attempts(
        retries, deadline_s=deadline_s, budget=budget or RetryBudget(), clock=lambda: 0.0, uniform=lambda _, most: most
    )


PASSING = ("ConnectError", "DeadlineExceeded", "Overloaded")
FINAL = [getattr(convscope, name) for name in convscope._exceptions.__all__ if name not in PASSING]


@pytest.mark.parametrize("kind", FINAL)
def test_permanent_errors_are_final(kind):
    assert attempts().next_wait_s(kind("internal")) is None


def test_waits_double_and_end():
    tries = attempts(3)
    assert [tries.next_wait_s(convscope.ConnectError()) for _ in range(4)] == [0.2, 0.4, 0.8, None]
    assert [attempts(9).next_wait_s(convscope.ConnectError())] == [0.2]


def test_a_wait_beyond_the_deadline_is_not_waited():
    assert attempts(deadline_s=0.1).next_wait_s(convscope.ConnectError()) is None


def test_a_request_that_kills_two_workers_kills_no_third():
    tries = attempts()
    assert tries.next_wait_s(convscope.ServerError("Worker died.")) == 0.2
    assert tries.next_wait_s(convscope.ServerError("Worker died.")) is None


def test_a_request_that_a_gateway_gave_up_on_twice_is_not_sent_a_third_time():
    tries = attempts()
    assert tries.next_wait_s(convscope.DeadlineExceeded("HTTP 504")) == 0.2
    assert tries.next_wait_s(convscope.DeadlineExceeded("HTTP 504")) is None


def test_a_deadline_of_our_own_is_final_and_costs_no_budget():
    now = [0.0]
    budget = RetryBudget()
    for _ in range(int(MAX_TOKENS)):
        tries = Attempts(3, deadline_s=1, budget=budget, clock=lambda: now[0], uniform=lambda least, _: least)
        now[0] += 1
        assert tries.next_wait_s(convscope.DeadlineExceeded("no complete response within 1 s")) is None
    assert attempts(budget=budget).next_wait_s(convscope.ConnectError()) is not None


def test_an_outage_empties_the_budget_and_successes_fill_it_slowly():
    budget = RetryBudget()
    failures = [attempts(budget=budget).next_wait_s(convscope.ConnectError()) for _ in range(int(MAX_TOKENS))]
    assert sum(wait is not None for wait in failures) == MAX_TOKENS / 2 - 1
    for _ in range(1000):
        budget.record_success()
    assert attempts(budget=budget).next_wait_s(convscope.ConnectError()) is not None


@pytest.mark.parametrize(("retries", "error"), [(-1, ValueError), (True, TypeError), (1.5, TypeError)])
def test_retries_that_are_not_a_number_are_rejected(retries: Any, error: type[Exception]):
    with pytest.raises(error, match="retries must be"):
        Client("http://localhost:1", retries=retries)
