"""The exception tree, and that all which httpcore and grpc can raise is in it."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import convscope
import grpc
import httpcore
import pytest
from convscope import Client, _exceptions, _grpc, _http, _network, _rest
from convscope._exceptions import error_from_code
from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

from tests.client.stand_in import StandIn

EXCEPTIONS = [getattr(convscope, name) for name in _exceptions.__all__]


def test_the_tree_drawn_is_the_tree_there_is():
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+)", _exceptions.__doc__ or "", re.MULTILINE)
    stack: list[str] = []
    parents = {}
    for indent, name in drawn:
        del stack[len(indent) // 4 :]
        parents[name] = stack[-1] if stack else "Exception"
        stack.append(name)
    assert parents == {kind.__name__: kind.__base__.__name__ for kind in EXCEPTIONS}


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
    assert pickle.loads(pickle.dumps(error_from_code("novel", "?"))).code == "novel"


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
def test_each_code_has_its_exception(code: str, kind: type[convscope.ConvscopeError]):
    error = error_from_code(code, "why")
    assert type(error) is kind
    assert error.code == code
    assert str(error) == "why"


HTTPCORE_EXCEPTIONS = [
    value for value in vars(httpcore).values() if inspect.isclass(value) and issubclass(value, Exception)
]


@pytest.mark.parametrize("kind", HTTPCORE_EXCEPTIONS)
def test_every_exception_of_httpcore_is_translated(kind):
    mapped = [ancestor for ancestor in kind.__mro__ if ancestor in _rest.TRANSLATIONS]
    assert mapped, f"httpcore.{kind.__name__} would reach users: add it to _rest.TRANSLATIONS"


@pytest.mark.parametrize("status", list(grpc.StatusCode))
def test_every_status_of_grpc_is_translated_and_those_of_no_other_meaning_are_the_servers(status: grpc.StatusCode):
    error = _grpc.translate(FailedCall(status, "why"), "stand.in:7070")
    assert type(error) is _grpc.TRANSLATIONS.get(status, convscope.ServerError)
    assert convscope.ServerError not in _grpc.TRANSLATIONS.values()


PROTOBUF = {"content_type": "application/x-protobuf"}


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


class Stream(httpcore.NetworkStream):
    """A stream from nowhere, on which pieces come."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return next(self._pieces, b"")

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    def get_extra_info(self, info: str) -> Any:
        return SimpleNamespace(shutdown=lambda _: None) if info == "socket" else None


def rest_answering(pieces: Iterable[bytes] | Answer) -> _rest.RestTransport:
    """Make a transport to which the next request is answered so."""
    transport = _rest.RestTransport("http://stand.in")
    connect = transport._connect

    def connected() -> _network.Connection:
        connection = connect()
        come = [pieces.written()] if isinstance(pieces, Answer) else pieces
        connection._stream = _network._Stream(Stream(come))
        return connection

    transport._connect = connected
    return transport


def ask(transport: _rest.RestTransport) -> PredictReply:
    try:
        return transport.send(PredictRequest(pictures=[b"cat"]), model="cifar", version=None, deadline_s=5)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpcore.ConnectError("refused"), convscope.ConnectError),
        (httpcore.ConnectTimeout("slow"), convscope.DeadlineExceeded),
        (httpcore.ReadTimeout("slow"), convscope.DeadlineExceeded),
        (httpcore.WriteTimeout("slow"), convscope.DeadlineExceeded),
        (httpcore.PoolTimeout("slow"), convscope.DeadlineExceeded),
        (httpcore.ReadError("reset"), convscope.ConnectError),
        (httpcore.WriteError("reset"), convscope.ConnectError),
        (httpcore.ConnectionNotAvailable(), convscope.ConnectError),
        (httpcore.ProxyError("407"), convscope.ConnectError),
        (httpcore.UnsupportedProtocol("gopher"), convscope.ProtocolError),
        (httpcore.RemoteProtocolError("illegal request line"), convscope.ProtocolError),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_what_httpcore_raises_becomes_ours_and_is_kept_as_the_cause(raised, expected):
    def fail() -> Iterator[bytes]:
        yield b"HTTP/1.1 "
        raise raised

    with pytest.raises(convscope.TransportError) as caught:
        ask(rest_answering(fail()))
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    ("response", "expected", "words"),
    [
        (answer(200, "<html>"), convscope.ProtocolError, "is this a convscope server"),
        (answer(200, b"\xff", **PROTOBUF), convscope.ProtocolError, "not a convscope reply"),
        (answer(302, location="http://elsewhere/"), convscope.ProtocolError, "302"),
        (answer(400, "no"), convscope.BadRequest, "no"),
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
        (answer(502), convscope.Overloaded, "a gateway got no answer .*502"),
        (answer(503, "no healthy upstream"), convscope.Overloaded, "no healthy upstream"),
        (torchserve_says(503, "InternalServerException", "Prediction failed"), convscope.ServerError, "failed"),
        (answer(504), convscope.DeadlineExceeded, "504"),
        (answer(507), convscope.ServerError, "507"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Answer) else None,
)  # fmt: skip
def test_answers_that_are_not_our_handlers_are_understood(response, expected, words: str):
    with pytest.raises(convscope.ConvscopeError, match=words) as caught:
        ask(rest_answering(response))
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("header", "seconds"), [({"retry_after": "7"}, 7.0), ({"Retry_After": "soon"}, None), ({}, None)]
)
@pytest.mark.parametrize("status", [429, 502, 503])
def test_an_overloaded_server_says_when_to_come_back(status: int, header: dict[str, str], seconds: float | None):
    with pytest.raises(convscope.Overloaded) as caught:
        ask(rest_answering(answer(status, **header)))
    assert caught.value.retry_after_s == seconds


def test_an_answer_to_a_request_that_did_not_go_out_whole_ends_its_connection():
    class Deaf(Stream):
        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            raise httpcore.WriteError("broken pipe")

    transport = rest_answering(answer(413))
    connected = transport._connect()
    connected._stream = _network._Stream(Deaf([answer(413).written()]))
    transport._connect = lambda: connected
    with pytest.raises(convscope.ImageTooLarge):
        transport.send(PredictRequest(), model="cifar", version=None, deadline_s=5)
    assert connected.closed
    assert not transport._idle


def test_a_reply_with_an_error_and_a_bad_status_is_a_reply():
    reply = PredictReply(model="cifar")
    reply.error.code = "unknown_layer"
    response = answer(400, reply.SerializeToString(), **PROTOBUF)
    assert ask(rest_answering(response)) == reply


class FailedCall(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, status: grpc.StatusCode, details: str | None, trailing: tuple[tuple[str, str], ...] = ()):
        self._answer = status, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str | None:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._answer[2]


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        ("CANCELLED", "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))", convscope.ImageTooLarge),
        ("CANCELLED", "Channel closed!", convscope.ConnectError),
        ("INTERNAL", "Model not found: x\norg.pytorch.serve.ModelNotFoundException", convscope.ModelNotFound),
        ("INTERNAL", "Exception deserializing response!", convscope.ProtocolError),
        ("INTERNAL", None, convscope.ServerError),
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
def test_what_grpc_raises_becomes_ours(status: str, details: str | None, expected):
    error = _grpc.translate(FailedCall(grpc.StatusCode[status], details), "stand.in:7070")
    assert type(error) is expected
    assert "\n" not in str(error)


def test_an_overloaded_grpc_server_says_when_to_come_back():
    failed = FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "rate limit", (("retry-after", "3"),))
    error = _grpc.translate(failed, "stand.in:7070")
    assert isinstance(error, convscope.Overloaded)
    assert error.retry_after_s == 3.0


def test_a_caller_never_meets_the_exceptions_underneath(client: Client):
    with pytest.raises(convscope.ModelNotFound) as caught:
        client.predict(b"cat", model="missing")
    assert not isinstance(caught.value, (*_rest.TRANSLATIONS, grpc.RpcError))


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


@pytest.mark.parametrize(
    ("outcomes", "error", "shares"),
    [
        ([httpcore.ConnectTimeout] * 3, convscope.DeadlineExceeded, [2, 2, 2]),
        ([httpcore.ConnectError] * 3, convscope.ConnectError, [2, 3, 6]),
        ([httpcore.ConnectTimeout, httpcore.ConnectError, httpcore.ConnectError], convscope.ConnectError, [2, 2, 4]),
    ],
    ids=["nobody answers", "all refuse", "the first does not answer"],
)
def test_the_addresses_of_a_host_share_the_deadline(outcomes, error, shares, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(_rest, "time", clock)
    monkeypatch.setattr(_network, "time", clock)
    addresses = [f"192.0.2.{number}" for number in range(3)]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    tried: list[tuple[str, float | None]] = []

    class Below:
        def connect_tcp(self, host: str, port: int, timeout: float, *_: object) -> None:
            outcome = outcomes[len(tried)]
            tried.append((host, timeout))
            now[0] += timeout if outcome is httpcore.ConnectTimeout else 0
            raise outcome("why")

    monkeypatch.setattr(httpcore, "SyncBackend", Below)
    with pytest.raises(error):
        _rest.RestTransport("http://several.example").send(PredictRequest(), model="m", version=None, deadline_s=6)
    assert tried == list(zip(addresses, shares, strict=True))


def test_what_cannot_be_put_into_http_is_not_sent():
    transport = rest_answering(answer(200))
    with pytest.raises(convscope.ProtocolError, match="cannot be put into HTTP"):
        transport.send(PredictRequest(request_id="a\r\nb: c"), model="m", version=None, deadline_s=5)
    assert not transport._connections


def test_json_nested_too_deeply_is_an_answer_like_any_other():
    with pytest.raises(convscope.ServerError, match="HTTP 500"):
        ask(rest_answering(answer(500, "[" * 100_000)))


def test_the_case_of_a_content_type_does_not_matter():
    reply = PredictReply(model="cifar")
    kind = {"content_type": "Application/X-Protobuf"}
    assert ask(rest_answering(answer(200, reply.SerializeToString(), **kind))) == reply


def test_a_service_that_drains_says_when_to_come_back():
    reply = PredictReply(error={"code": "draining", "message": "it is stopping"}).SerializeToString()
    with pytest.raises(convscope.Overloaded, match="it is stopping") as caught:
        ask(rest_answering(answer(503, reply, retry_after="7", **PROTOBUF)))
    assert (caught.value.code, caught.value.retry_after_s) == ("draining", 7)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_reply_over_the_clients_limit_is_not_read_to_its_end(chunked: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_http, "MAX_MESSAGE_BYTES", 1000)
    read = []

    def endless() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n" + (
            b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: 1001\r\n\r\n"
        )
        while True:
            read.append(100)
            yield b"64\r\n" + b"x" * 100 + b"\r\n" if chunked else b"x" * 100

    with pytest.raises(convscope.ReplyTooLarge, match="limit of 1000 bytes"):
        ask(rest_answering(endless()))
    assert len(read) == (11 if chunked else 0)
