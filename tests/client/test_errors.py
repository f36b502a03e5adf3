"""The exception tree, and that all which httpx and grpc can raise is in it."""

from __future__ import annotations

import inspect
import pickle
import re
import socket
import threading
from collections.abc import Callable

import convscope
import grpc
import httpx
import pytest
from convscope import Client, _exceptions, _grpc, _rest
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


HTTPX_EXCEPTIONS = [value for value in vars(httpx).values() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", [kind for kind in HTTPX_EXCEPTIONS if kind is not httpx.CookieConflict])
def test_every_exception_of_httpx_is_translated(kind):
    mapped = [ancestor for ancestor in kind.__mro__ if ancestor in _rest.TRANSLATIONS]
    assert mapped, f"httpx.{kind.__name__} would reach users: add it to _rest.TRANSLATIONS"
    assert mapped[0] is not httpx.HTTPError or kind in (
        httpx.HTTPError,
        httpx.HTTPStatusError,  # Raised by raise_for_status() only, which is not called.
        httpx.RequestError,
        httpx.TransportError,
    ), f"httpx.{kind.__name__} is new: say in _rest.TRANSLATIONS what it stands for"


@pytest.mark.parametrize("status", list(grpc.StatusCode))
def test_every_status_of_grpc_is_translated(status: grpc.StatusCode):
    assert issubclass(_grpc.TRANSLATIONS[status], convscope.ConvscopeError)


PROTOBUF = {"content-type": "application/x-protobuf"}


def torchserve_says(status: int, kind: str, message: str) -> httpx.Response:
    return httpx.Response(status, json={"code": status, "type": kind, "message": message})


def rest_answering(handle: Callable[[httpx.Request], httpx.Response]) -> _rest.RestTransport:
    return _rest.RestTransport("http://stand.in", mount=httpx.MockTransport(handle))


def ask(transport: _rest.RestTransport) -> PredictReply:
    try:
        return transport.send(PredictRequest(pictures=[b"cat"]), model="cifar", version=None, deadline_s=5)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), convscope.ConnectError),
        (httpx.ConnectTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.ReadTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.WriteTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.PoolTimeout("slow"), convscope.DeadlineExceeded),
        (httpx.ReadError("reset"), convscope.ConnectError),
        (httpx.WriteError("reset"), convscope.ConnectError),
        (httpx.ProxyError("407"), convscope.ConnectError),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), convscope.ConnectError),
        (httpx.RemoteProtocolError("illegal request line"), convscope.ProtocolError),
        (httpx.DecodingError("gzip"), convscope.ProtocolError),
        (httpx.RequestError("novel"), convscope.TransportError),
        (httpx.StreamClosed(), convscope.ConnectError),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_what_httpx_raises_becomes_ours_and_is_kept_as_the_cause(raised, expected):
    def fail(_: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(convscope.TransportError) as caught:
        ask(rest_answering(fail))
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    ("response", "expected", "words"),
    [
        (httpx.Response(200, text="<html>"), convscope.ProtocolError, "is this a convscope server"),
        (httpx.Response(200, headers=PROTOBUF, content=b"\xff"), convscope.ProtocolError, "not a convscope reply"),
        (httpx.Response(302, headers={"location": "http://elsewhere/"}), convscope.ProtocolError, "302"),
        (httpx.Response(400, text="no"), convscope.BadRequest, "no"),
        (httpx.Response(401, text="Client authentication failed."), convscope.AuthenticationFailed, "API key"),
        (httpx.Response(403), convscope.AuthenticationFailed, "API key"),
        (httpx.Response(404, text="no route"), convscope.ProtocolError, "404: no route"),
        (torchserve_says(404, "ModelNotFoundException", "Model not found: cifar"), convscope.ModelNotFound, "cifar"),
        (torchserve_says(404, "ResourceNotFoundException", "Not here"), convscope.ProtocolError, "Not here"),
        (httpx.Response(405), convscope.ProtocolError, "405"),
        (httpx.Response(408), convscope.DeadlineExceeded, "408"),
        (httpx.Response(413), convscope.ImageTooLarge, "larger than the server's request limit"),
        (httpx.Response(429, headers={"retry-after": "7"}), convscope.Overloaded, "429"),
        (torchserve_says(500, "InternalServerException", "Worker died."), convscope.ServerError, "Worker died"),
        (httpx.Response(500, json=["odd"]), convscope.ServerError, "500"),
        (httpx.Response(502), convscope.ServerError, "502"),
        (httpx.Response(503, text="no healthy upstream"), convscope.Overloaded, "no healthy upstream"),
        (torchserve_says(503, "InternalServerException", "Prediction failed"), convscope.ServerError, "failed"),
        (httpx.Response(504), convscope.DeadlineExceeded, "504"),
        (httpx.Response(507), convscope.ServerError, "507"),
    ],
    ids=lambda value: str(value.status_code) if isinstance(value, httpx.Response) else None,
)  # fmt: skip
def test_answers_that_are_not_our_handlers_are_understood(response, expected, words: str):
    with pytest.raises(convscope.ConvscopeError, match=words) as caught:
        ask(rest_answering(lambda _: response))
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("header", "seconds"), [({"retry-after": "7"}, 7.0), ({"retry-after": "soon"}, None), ({}, None)]
)
def test_an_overloaded_server_says_when_to_come_back(header: dict[str, str], seconds: float | None):
    with pytest.raises(convscope.Overloaded) as caught:
        ask(rest_answering(lambda _: httpx.Response(503, headers=header)))
    assert caught.value.retry_after_s == seconds


def test_a_reply_with_an_error_and_a_bad_status_is_a_reply():
    reply = PredictReply(model="cifar")
    reply.error.code = "unknown_layer"
    headers = {"content-type": "application/x-protobuf"}
    response = httpx.Response(400, headers=headers, content=reply.SerializeToString())
    assert ask(rest_answering(lambda _: response)) == reply


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
    assert not isinstance(caught.value, httpx.HTTPError | grpc.RpcError)


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


def test_a_reply_that_trickles_in_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                while not stop.wait(0.02):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with Client(url) as client, pytest.raises(convscope.DeadlineExceeded):
            client.predict(b"cat", model="cifar", deadline_s=0.3)
        stop.set()
        thread.join(10)


def test_each_step_of_a_rest_request_gets_what_is_left_of_the_deadline(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(_rest.time, "monotonic", lambda: now[0])
    left = []

    def connect_slowly(request: httpx.Request) -> httpx.Response:
        left.append(request.extensions["timeout"].get("connect"))
        now[0] += 3
        left.append(request.extensions["timeout"].get("read"))
        return httpx.Response(200, headers=PROTOBUF, content=b"")

    ask(rest_answering(connect_slowly))  # Asks with a deadline of 5 s.
    assert left == [5, 2]


def test_httpx_asks_before_each_of_its_steps_how_long_it_may_take(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
    steps = []

    class Listening(_rest._TimeLeft):
        def get(self, step: str, default: float | None = None) -> float:
            steps.append(step)
            return super().get(step, default)

    monkeypatch.setattr(_rest, "_TimeLeft", Listening)
    with Client(stand_in.rest_url) as client:
        client.predict(b"cat", model="cifar")
    assert [step for step in steps if step != "pool"] == ["connect", "write", "write", "read", "read"]


def test_a_reply_over_the_clients_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_rest, "MAX_MESSAGE_BYTES", 1000)

    def endless():
        while True:
            yield b"x" * 100

    with pytest.raises(convscope.ReplyTooLarge, match="limit of 1000 bytes"):
        ask(rest_answering(lambda _: httpx.Response(200, headers=PROTOBUF, content=endless())))
