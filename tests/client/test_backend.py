"""AsyncClient(backend="aiohttp"), beside the `test_wire_*` modules: what is its own."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
from pathlib import Path
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, _rest

from tests.client.wire import OverAiohttp, listening, outcomes, reply, self_signed, send, serve_tls, take, take_request


def ask(url: str, **settings: Any) -> list[Any]:
    """Make a prediction over aiohttp; return the result or the error."""
    return outcomes(OverAiohttp, url, 1, **settings)


def test_a_request_is_whole_and_asks_for_no_compression():
    heads, requests = [], []

    def serve(connection: socket.socket) -> None:
        heads.append(connection.recv(65536, socket.MSG_PEEK).lower())
        requests.append(take_request(connection))
        send(connection, reply())

    with listening(serve) as where:
        [result] = ask(f"http://{where}", api_key="secret")
    assert result.top
    assert b"accept-encoding: identity\r\n" in heads[0]
    assert b"x-api-key: secret\r\n" in heads[0]
    assert requests[0] is not None
    assert requests[0].pictures == [b"cat"]


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    [error] = ask(f"http://127.0.0.1:{port}")
    assert type(error) is convscope.ConnectError


def test_a_certificate_is_trusted_only_if_it_is_named():
    certificate, context = self_signed("IP:127.0.0.1")

    def serve(connection: Any) -> None:
        if take(connection):
            send(connection, reply())

    with listening(serve_tls(context, serve)) as where:
        [result] = ask(f"https://{where}", ca_file=str(certificate))
        [error] = ask(f"https://{where}")
    assert result.top
    assert type(error) is convscope.ConnectError


def test_an_unknown_backend_is_rejected(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="backend must be one of httpx, aiohttp"):
        AsyncClient("http://localhost:1", backend="curl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend applies only to http:// and https:// URLs"):
        AsyncClient("grpc://localhost:1", backend="aiohttp")
    monkeypatch.setitem(sys.modules, "httpx_aiohttp", None)
    with pytest.raises(ImportError, match=r"convscope\[aiohttp\]"):
        AsyncClient("http://localhost:1", backend="aiohttp")


@pytest.mark.parametrize("package", _rest.WRITTEN_FOR)
def test_the_transport_is_tested_with_the_versions_that_it_was_written_for(package: str):
    """`_rest` goes beyond the documented interface of these packages: read its docstring before changing a version."""
    pins = (Path(__file__).parents[2] / "requirements/dev.txt").read_text("utf-8")
    assert importlib.metadata.version(package) == _rest.WRITTEN_FOR[package]
    assert f"\n{package}=={_rest.WRITTEN_FOR[package]} " in f"\n{pins}"
