"""The exception tree, and that everything httpx and grpc can raise is in it."""

from __future__ import annotations

import inspect
import json
import pickle
import socket
import ssl
import threading
from typing import Any, NamedTuple

import convscope
import grpc
import httpx
import pytest
from convscope import AsyncClient, Client, ConvscopeError
from convscope._wire.convscope_pb2 import PredictReply

from tests.client.stand_in import MISHAPS, StandIn
from tests.client.wire import listening, outcomes, take

PUBLIC = [getattr(convscope, name) for name in convscope.__all__]
EXCEPTIONS = [value for value in PUBLIC if inspect.isclass(value) and issubclass(value, ConvscopeError)]


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_every_exception_has_a_code_of_its_own_and_survives_pickling(kind):
    assert sum(other.code == kind.code for other in EXCEPTIONS) == 1
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(error) is kind
    assert str(error) == "what happened"
    assert kind.__module__ == "convscope"


def test_pickling_keeps_what_an_exception_holds():
    error = pickle.loads(pickle.dumps(convscope.Overloaded("full", retry_after_s=2.0)))
    assert error.retry_after_s == 2.0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("bad_image", convscope.BadImage),
        ("bad_request", convscope.BadRequest),
        ("image_too_large", convscope.ImageTooLarge),
        ("reply_too_large", convscope.ReplyTooLarge),
        ("too_many_images", convscope.TooManyImages),
        ("unauthorized", convscope.AuthenticationFailed),
        ("unknown_layer", convscope.UnknownLayer),
        ("wrong_channels", convscope.WrongChannels),
        ("internal", convscope.ServerError),
        ("draining", convscope.Overloaded),
        ("not_yet_invented", convscope.RequestRejected),
    ],
)
def test_each_code_has_its_exception(url: str, code: str, kind: type[ConvscopeError]):
    with Client(url, retries=0) as client, pytest.raises(ConvscopeError, match="as asked for") as caught:
        client.predict(b"cat", model=f"error-{code}")
    assert type(caught.value) is kind
    assert pickle.loads(pickle.dumps(caught.value)).code == code


HTTPX_EXCEPTIONS = [value for value in vars(httpx).values() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        *((kind.__new__(kind), convscope.TransportError) for kind in [*HTTPX_EXCEPTIONS, OSError]),
        (httpx.ConnectError("refused"), convscope.ConnectError),
        (httpx.ConnectTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.ReadTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.WriteTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.PoolTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.ReadError("reset"), convscope.ConnectError),
        (httpx.WriteError("reset"), convscope.ConnectError),
        (httpx.ProxyError("407"), convscope.ConnectError),
        (httpx.UnsupportedProtocol("gopher"), convscope.ProtocolError),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), convscope.ConnectError),
        (TimeoutError(), convscope.DeadlineExceeded),
        (ssl.SSLError("bad record"), convscope.ConnectError),
    ],
    ids=repr,
)
def test_what_httpx_raises_becomes_ours(raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def send(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(httpx.Client, "send", send)
    with Client("http://stand.in", retries=0) as client, pytest.raises(expected) as caught:
        client.predict(b"cat", model="cifar")
    assert expected is convscope.TransportError or type(caught.value) is expected
    assert caught.value.__cause__ is raised


PROTOBUF = {"content_type": "application/x-protobuf"}
UNKNOWN_LAYER = PredictReply(error={"code": "unknown_layer", "message": "no layer"}).SerializeToString()


class Answer(NamedTuple):
    """What a server says over HTTP."""

    status: int
    body: bytes
    headers: dict[str, str]

    def written(self) -> bytes:
        lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in self.headers.items()]
        head = f"HTTP/1.1 {self.status} as it is\r\n{''.join(lines)}content-length: {len(self.body)}\r\n\r\n"
        return head.encode() + self.body


def answer(status: int, body: str | bytes = b"", **headers: str) -> Answer:
    return Answer(status, body.encode() if isinstance(body, str) else body, headers)


def torchserve_says(status: int, kind: str, message: str) -> Answer:
    return answer(status, json.dumps({"code": status, "type": kind, "message": message}))


def ask(response: Answer) -> list[Any]:
    """Ask one question over REST that is answered so, with both clients; return what they found."""

    def serve(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(response.written())

    with listening(serve) as where:
        return [result for kind in (Client, AsyncClient) for result in outcomes(kind, f"http://{where}", 1)]


@pytest.mark.parametrize(
    ("response", "expected", "words"),
    [
        (answer(200, "<html>"), convscope.ProtocolError, "not from a convscope service; check the URL"),
        (answer(200, b"\xff", **PROTOBUF), convscope.ProtocolError, "not from a convscope service; check the URL"),
        (answer(302, location="http://elsewhere/"), convscope.ProtocolError, "302"),
        (answer(400, "no"), convscope.BadRequest, "no"),
        (answer(400, UNKNOWN_LAYER, **PROTOBUF), convscope.UnknownLayer, "no layer"),
        (answer(401, "Client authentication failed."), convscope.AuthenticationFailed, "API key"),
        (answer(403), convscope.AuthenticationFailed, "API key"),
        (answer(404, "no route"), convscope.ProtocolError, "404: no route"),
        (torchserve_says(404, "ModelNotFoundException", "Model not found: cifar"), convscope.ModelNotFound, "cifar"),
        (torchserve_says(404, "ResourceNotFoundException", "Not here"), convscope.ProtocolError, "Not here"),
        (answer(405), convscope.ProtocolError, "405"),
        (answer(408), convscope.DeadlineExceeded, "408"),
        (answer(413), convscope.ImageTooLarge, "larger than the server's request limit"),
        (answer(429, retry_after="7"), convscope.Overloaded, "429"),
        (torchserve_says(500, "InternalServerException", "Worker died."), convscope.ServerError, "Worker died"),
        (answer(500, '["odd"]'), convscope.ServerError, "500"),
        (answer(500, "[" * 100_000), convscope.ServerError, "HTTP 500"),
        (answer(502), convscope.Overloaded, "bad gateway: no response from the server"),
        (answer(503, "no healthy upstream"), convscope.Overloaded, "no healthy upstream"),
        (torchserve_says(503, "InternalServerException", "Prediction failed"), convscope.ServerError, "failed"),
        (answer(504), convscope.DeadlineExceeded, "504"),
        (answer(507), convscope.ServerError, "507"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Answer) else None,
)  # fmt: skip
def test_responses_of_torchserve_and_gateways_are_mapped(response, expected, words: str):
    for error in ask(response):
        assert type(error) is expected
        assert words in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"), [({"retry_after": "7"}, 7.0), ({"Retry_After": "soon"}, None), ({}, None)]
)
@pytest.mark.parametrize("status", [429, 502, 503])
def test_an_overloaded_server_says_when_to_come_back(status: int, header: dict[str, str], seconds: float | None):
    assert [error.retry_after_s for error in ask(answer(status, **header))] == [seconds] * 2


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        ("ABORTED", "", convscope.ServerError),
        ("ALREADY_EXISTS", "", convscope.ServerError),
        ("DATA_LOSS", "", convscope.ServerError),
        ("FAILED_PRECONDITION", "", convscope.ServerError),
        ("INVALID_ARGUMENT", "", convscope.BadRequest),
        ("OUT_OF_RANGE", "", convscope.ServerError),
        ("UNKNOWN", "", convscope.ServerError),
        ("CANCELLED", "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))", convscope.ImageTooLarge),
        ("CANCELLED", "Channel closed!", convscope.ConnectError),
        ("INTERNAL", "Model not found: x\norg.pytorch.serve.ModelNotFoundException", convscope.ModelNotFound),
        ("INTERNAL", "Exception deserializing response!", convscope.ProtocolError),
        ("INTERNAL", "", convscope.ServerError),
        ("NOT_FOUND", "Model version: 9 does not exist for model: x", convscope.ModelNotFound),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (9 vs. 5)", convscope.ImageTooLarge),
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (9 vs. 5)", convscope.ImageTooLarge),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 5)", convscope.ReplyTooLarge),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 5: 9", convscope.ImageTooLarge),
        ("RESOURCE_EXHAUSTED", "rate limit", convscope.Overloaded),
        ("UNAUTHENTICATED", "Client authentication failed.", convscope.AuthenticationFailed),
        ("PERMISSION_DENIED", "", convscope.AuthenticationFailed),
        ("UNAVAILABLE", "failed to connect to all addresses; last error: refused", convscope.ConnectError),
        ("UNAVAILABLE", "Socket closed", convscope.ConnectError),
        ("UNAVAILABLE", "no healthy upstream", convscope.Overloaded),
        ("UNAVAILABLE", "upstream request timeout", convscope.DeadlineExceeded),
        ("UNAVAILABLE", "Prediction failed\norg.pytorch.serve.InternalServerException", convscope.ServerError),
        ("UNAVAILABLE", "Backend gone\norg.pytorch.serve.InternalServerException", convscope.ServerError),
        (
            "UNAVAILABLE",
            "last error: UNAVAILABLE: Failed parsing HTTP/2 (Expected SETTINGS frame)",
            convscope.ProtocolError,
        ),
        ("UNIMPLEMENTED", "Method not found!", convscope.ProtocolError),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", convscope.DeadlineExceeded),
    ],
)
def test_what_grpc_raises_becomes_ours(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, status: str, details: str, expected: type[Exception]
):
    monkeypatch.setitem(MISHAPS, "failing", (500, "", "", grpc.StatusCode[status], details))
    with Client(stand_in.grpc_url, retries=0) as client, pytest.raises(ConvscopeError) as caught:
        client.predict(b"cat", model="failing")
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_a_connect_error_that_names_it(scheme: str):
    with socket.socket() as taken:  # Bound and not listening: nobody else gets the port.
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(f"{scheme}://{where}") as client, pytest.raises(convscope.ConnectError, match=where):
            client.predict(b"cat", model="cifar")


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_connection_that_breaks_is_a_connect_error(scheme: str):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(100)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with Client(f"{scheme}://127.0.0.1:{server.getsockname()[1]}") as client, pytest.raises(convscope.ConnectError):
            client.predict(b"cat", model="cifar")
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_the_wrong_kind_of_port_is_a_protocol_error(stand_in: StandIn):
    crossed = stand_in.rest_url.replace("http", "grpc"), stand_in.grpc_url.replace("grpc", "http")
    for url in crossed:
        with Client(url) as client, pytest.raises(convscope.ProtocolError):
            client.predict(b"cat", model="cifar")


def test_a_service_that_drains_says_when_to_come_back():
    reply = PredictReply(error={"code": "draining", "message": "it is stopping"}).SerializeToString()
    for error in ask(answer(503, reply, retry_after="7", **PROTOBUF)):
        assert isinstance(error, convscope.Overloaded)
        assert (error.code, error.message, error.retry_after_s) == ("draining", "it is stopping", 7)
