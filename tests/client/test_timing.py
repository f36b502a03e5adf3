"""Timings: those of the service, and those that the client measures."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import time
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client, Timing

from tests.client.stand_in import HANDLER_S, STAGES_S, StandIn
from tests.client.test_async import in_async


def test_what_the_service_tells_and_what_the_client_measures_stand_together(url: str, stand_in: StandIn):
    def question(client: Any) -> Any:
        return client.predict(b"cat", model="cifar", timing=True)

    began = time.perf_counter()
    with Client(url) as client:
        both = question(client).timing, in_async(url, question).timing
    took_s = time.perf_counter() - began
    for timing in both:
        assert isinstance(timing, Timing)
        assert {name: getattr(timing, name) for name in STAGES_S} == STAGES_S
        assert (timing.handler_s, timing.batch_requests) == (HANDLER_S, 2)
        assert timing.outside_s == timing.total_s - HANDLER_S
        assert 0 < timing.total_s < took_s
    assert [request.timing for *_, request in stand_in.requests] == [True, True]


def test_who_does_not_ask_is_not_told(client: Client, stand_in: StandIn):
    assert client.predict(b"cat", model="cifar").timing is None
    assert stand_in.requests[-1][2].timing is False


def test_a_service_that_cannot_tell_tells_nothing(client: Client):
    assert client.predict(b"cat", model="older", timing=True).timing is None


def test_all_pictures_of_a_request_share_its_timing(client: Client):
    one, bad, two = client.predict([b"one", b"bad", b"two"], model="cifar", timing=True)
    assert one.timing is not None
    assert one.timing == bad.timing == two.timing


def test_a_stream_can_be_timed(url: str):
    async def ask() -> list[convscope.Prediction]:
        async with AsyncClient(url) as client:
            return [result async for result in client.predict_many([b"one", b"two"], model="cifar", timing=True)]

    with Client(url) as client:
        result = list(client.predict_many([b"one", b"two"], model="cifar", timing=True))
    assert [prediction.timing.handler_s for prediction in (*result, *asyncio.run(ask()))] == [HANDLER_S] * 4


def test_attempts_that_failed_and_waits_between_them_do_not_count(url: str, stand_in: StandIn):
    stand_in.mishaps[:] = ["full 1"]
    began = time.perf_counter()
    with Client(url) as client:
        timing = client.predict(b"cat", model="cifar", timing=True).timing
        assert client.retries_made == 1
    assert timing.total_s <= time.perf_counter() - began - 1


def test_timing_is_yes_or_no(client: Client, stand_in: StandIn):
    with pytest.raises(TypeError, match="timing must be True or False"):
        client.predict(b"cat", model="cifar", timing="yes")  # type: ignore[call-overload]
    assert stand_in.requests == []


def test_a_timing_cannot_be_changed_and_can_be_sent_between_processes():
    timing = Timing(**STAGES_S, handler_s=HANDLER_S, batch_requests=1, total_s=0.02)
    with pytest.raises(dataclasses.FrozenInstanceError):
        timing.total_s = 0.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(timing)) == timing
