from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from convscope import Client

from tests.client.stand_in import StandIn, serve

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *map(str.upper, PROXIES), "CONVSCOPE_API_KEY", "CONVSCOPE_URL", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Makes the clients' waits between attempts take no time; lists them."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def sleep_async(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(asyncio, "sleep", sleep_async)
    return waits


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """A server of this test's own: what the test before left under way would take its mishaps and be counted here."""
    with serve() as stand_in:
        yield stand_in


@pytest.fixture(params=["rest", "grpc"])
def url(request: pytest.FixtureRequest, stand_in: StandIn) -> str:
    return stand_in.rest_url if request.param == "rest" else stand_in.grpc_url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client
