"""AsyncClient in uvloop, an event loop with its own implementation of connections and TLS."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import AsyncClient, Client

from tests.client.stand_in import StandIn
from tests.client.test_congruence import QUESTIONS
from tests.client.test_transport import secure as secure  # A fixture.

if sys.platform == "win32":
    pytest.skip("there is no uvloop", allow_module_level=True)
import uvloop


def run(url: str, question: Callable[[AsyncClient], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, retries=0, **settings) as client:
            return await question(client)

    return uvloop.run(ask())


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_responses_are_those_of_the_blocking_client(url: str, question: Any):
    with Client(url) as client:
        assert question(client) == run(url, question)


def test_a_name_of_this_machine_is_connected_with(stand_in: StandIn):
    url = stand_in.rest_url.replace("127.0.0.1", "localhost")
    assert run(url, lambda client: client.predict(b"cat", model="cifar")).top


def test_a_name_that_is_none_is_a_connect_error():
    with pytest.raises(convscope.ConnectError, match=r"elsewhere\.invalid"):
        run("http://elsewhere.invalid:80", lambda client: client.predict(b"cat", model="cifar"))


@pytest.mark.parametrize("tls", [False, True])
def test_pictures_of_megabytes_arrive_whole_over_one_connection(
    tls: bool, stand_in: StandIn, secure: tuple[StandIn, Path]
):
    running, certificate = secure if tls else (stand_in, None)
    running.requests.clear()
    picture = np.random.default_rng(0).bytes(9_000_000)

    async def twice(client: AsyncClient) -> None:
        for _ in range(2):
            assert (await client.predict(picture, model="cifar")).top

    run(running.rest_url, twice, ca_file=certificate)
    assert [list(request.pictures) for *_, request in running.requests] == [[picture]] * 2


def test_a_certificate_that_is_not_trusted_is_a_connect_error(secure: tuple[StandIn, Path]):
    with pytest.raises(convscope.ConnectError, match=r"(?i)certificate"):
        run(secure[0].rest_url, lambda client: client.predict(b"cat", model="cifar"))


def test_many_callers_are_answered(stand_in: StandIn):
    async def many(client: AsyncClient) -> list[Any]:
        return await asyncio.gather(*(client.predict(b"%d" % number, model="cifar") for number in range(40)))

    assert len(run(stand_in.rest_url, many)) == 40
    assert len(stand_in.requests) == 40


def test_a_deadline_and_a_cancelled_caller_end_their_requests_alone(stand_in: StandIn):
    async def ask(client: AsyncClient) -> None:
        with pytest.raises(convscope.DeadlineExceeded):
            await client.predict(b"cat", model="slow", deadline_s=0.2)
        task = asyncio.create_task(client.predict(b"cat", model="slow"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.predict(b"cat", model="cifar")).top

    stand_in.release.clear()
    try:
        run(stand_in.rest_url, ask)
    finally:
        stand_in.release.set()


def test_closing_a_client_ends_the_waiting_of_its_tasks(stand_in: StandIn):
    async def ask() -> None:
        client = AsyncClient(stand_in.rest_url)
        tasks = [asyncio.create_task(client.predict(b"cat", model="slow")) for _ in range(3)]
        while len(stand_in.requests) < 3:
            await asyncio.sleep(0.01)
        await client.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, convscope.ConnectError | RuntimeError)

    stand_in.release.clear()
    try:
        uvloop.run(asyncio.wait_for(ask(), 20))
    finally:
        stand_in.release.set()
