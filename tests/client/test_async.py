"""AsyncClient: the surface of Client, over both transports, equal answers and errors."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client

from tests.client.stand_in import StandIn, serve
from tests.client.test_congruence import FAILURES, QUESTIONS
from tests.client.wire import certificate_files


def in_async(url: str, question: Any, **settings: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, retries=0, **settings) as client:
            return await question(client)

    return asyncio.run(ask())


def test_the_two_surfaces_are_equal():
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    def parameters(callable: Any) -> list[inspect.Parameter]:
        return list(inspect.signature(callable).parameters.values())

    assert names(Client) == names(AsyncClient)
    assert parameters(AsyncClient)[-1].name == "backend"  # Of asyncio alone.
    for ours, theirs in zip(parameters(Client), parameters(AsyncClient)[:-1], strict=True):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)
    for name in ("predict", "model_card", "ready", "close"):
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))
    for ours, theirs in zip(parameters(Client.predict_many), parameters(AsyncClient.predict_many), strict=True):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_both_clients_give_equal_results(url: str, question):
    with Client(url) as client:
        assert question(client) == in_async(url, question)


@pytest.mark.parametrize("question", FAILURES.values(), ids=FAILURES)
def test_both_clients_raise_equal_errors(url: str, question):
    with Client(url, retries=0) as client, pytest.raises(convscope.ConvscopeError) as blocking:
        question(client)
    with pytest.raises(convscope.ConvscopeError) as awaited:
        in_async(url, question)
    assert type(blocking.value) is type(awaited.value)
    assert (blocking.value.code, blocking.value.message) == (awaited.value.code, awaited.value.message)


def test_the_deadline_ends_a_request(url: str, stand_in: StandIn):
    stand_in.release.clear()
    with pytest.raises(convscope.DeadlineExceeded):
        in_async(url, lambda client: client.predict(b"cat", model="slow", deadline_s=0.2))
    stand_in.release.set()


def test_a_client_closed_meanwhile_is_a_connect_error_and_no_cancellation(stand_in: StandIn):
    async def close_meanwhile() -> None:
        client = AsyncClient(stand_in.grpc_url)
        question = asyncio.create_task(client.predict(b"cat", model="slow"))
        while not stand_in.requests:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(convscope.ConnectError):
            await question
        with pytest.raises(RuntimeError, match="closed"):
            await client.ready("cifar")

    stand_in.release.clear()
    try:
        asyncio.run(close_meanwhile())
    finally:
        stand_in.release.set()


def test_a_client_belongs_to_the_loop_that_it_was_first_used_in(url: str):
    client = AsyncClient(url)

    async def first() -> None:
        assert (await client.predict(b"cat", model="cifar")).top

    async def second() -> None:
        for question in (client.predict(b"cat", model="cifar"), client.ready("cifar"), client.close()):
            with pytest.raises(RuntimeError, match="first used in another event loop"):
                await question

    with asyncio.Runner() as one:
        one.run(first())
        with asyncio.Runner() as other:
            other.run(second())
        one.run(first())
        one.run(client.close())


@pytest.mark.parametrize("transport", ["rest_url", "grpc_url"])
def test_tls_and_the_key_work(transport: str):
    certificate, key = certificate_files("DNS:localhost")

    async def ask(**settings: Any) -> Any:
        async with AsyncClient(getattr(secure, transport), **settings) as client:
            return await client.predict(b"cat", model="cifar")

    with serve((str(certificate), str(key))) as secure:
        assert asyncio.run(ask(ca_file=certificate, api_key="open-sesame")).top
        assert secure.keys == ["open-sesame"]
        with pytest.raises(convscope.ConnectError, match=r"(?i)certificate"):
            asyncio.run(ask(retries=0))
