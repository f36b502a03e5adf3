"""AsyncClient(backend="aiohttp"), with a stand-in for httpx-aiohttp, which is not among the developers' packages."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import convscope
import httpx
import pytest
from convscope import AsyncClient

from tests.client.wire import reply


def aiohttp_error(name: str) -> Exception:
    """Make an exception as aiohttp would."""
    error: Exception = type(name, (Exception,), {"__module__": "aiohttp.client_exceptions"})("why")
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def ask(monkeypatch: pytest.MonkeyPatch, respond: Any) -> list[httpx.Request]:
    """Make a prediction with a client of httpx-aiohttp that is answered by a function; return what it was asked."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        response: httpx.Response = respond(request)
        return response

    class HttpxAiohttpClient(httpx.AsyncClient):
        def __init__(self, **settings: Any) -> None:
            super().__init__(transport=httpx.MockTransport(handle), **settings)

    module = ModuleType("httpx_aiohttp")
    module.HttpxAiohttpClient = HttpxAiohttpClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "httpx_aiohttp", module)

    async def run() -> None:
        async with AsyncClient("http://elsewhere.invalid", backend="aiohttp", retries=0) as client:
            assert (await client.predict(b"cat", model="cifar")).top

    asyncio.run(run())
    return asked


def test_aiohttps_client_is_used_and_told_not_to_ask_for_compression(monkeypatch: pytest.MonkeyPatch):
    headers = {"content-type": "application/x-protobuf"}
    [request] = ask(monkeypatch, lambda _: httpx.Response(200, headers=headers, stream=httpx.ByteStream(reply())))
    assert request.url == "http://elsewhere.invalid/predictions/cifar"
    assert request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (aiohttp_error("ClientResponseError"), convscope.ProtocolError),
        (caused(httpx.ConnectTimeout("broke"), aiohttp_error("ServerDisconnectedError")), convscope.ConnectError),
        (httpx.RemoteProtocolError("illegal"), convscope.ProtocolError),
        (ConnectionResetError("reset"), convscope.ConnectError),
    ],
    ids=repr,
)
def test_no_exception_of_aiohttp_reaches_users(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    def fail(_: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(convscope.TransportError) as caught:
        ask(monkeypatch, fail)
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised


def test_what_is_no_backend_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="backend must be one of httpx, aiohttp"):
        AsyncClient("http://localhost:1", backend="curl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend has no meaning for grpc://"):
        AsyncClient("grpc://localhost:1", backend="aiohttp")
    monkeypatch.setitem(sys.modules, "httpx_aiohttp", None)
    with pytest.raises(ImportError, match=r"convscope\[aiohttp\]"):
        AsyncClient("http://localhost:1", backend="aiohttp")
