"""Sends one request as bytes and returns what came back, over REST and gRPC, with nothing between it and the socket.

A client library would correct or refuse most of what the campaign has to send.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import grpc
from convscope._wire.convscope_pb2 import PredictReply
from google.protobuf.message import DecodeError

PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
TIMEOUT_S = 60.0
_LARGEST_REPLY = 512 * 1024 * 1024


@dataclass(frozen=True)
class RestRequest:
    """One HTTP/1.1 request.

    Attributes:
        method: `GET`, `POST`, ...
        path: What stands in the first line, query included.
        headers: In order; names may repeat.
        body: Sent with a `Content-Length` unless `headers` bring their own framing.
        raw: Sent as it is instead of all the above.
        hang_up_after: Bytes after which the caller closes the connection, None to wait for the response.
    """

    method: str = "POST"
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    raw: bytes | None = None
    hang_up_after: int | None = None


@dataclass(frozen=True)
class GrpcRequest:
    """One gRPC call.

    Attributes:
        message: The serialized request, or several for a method that takes a stream.
        method: `/package.Service/Method`.
        metadata: Sent along.
        takes_stream: Whether the method takes a stream of requests.
        gives_stream: Whether it answers a stream of responses.
        cancel_after_s: Seconds after which the caller cancels, None to wait for the response.
    """

    message: bytes | tuple[bytes, ...] = b""
    method: str = PREDICTIONS
    metadata: tuple[tuple[str, str], ...] = ()
    takes_stream: bool = False
    gives_stream: bool = False
    cancel_after_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came back.

    Attributes:
        status: The HTTP status or the name of the gRPC status; `hung up` or `cancelled` where the caller left; else
            what broke.
        body: Of the response; of a gRPC response, its prediction.
        media_type: Of the body, empty where unknown.
        seconds: From the first byte sent to the last received.
    """

    status: str
    body: bytes = field(default=b"", repr=False)
    media_type: str = ""
    seconds: float = 0.0

    @property
    def is_answer(self) -> bool:
        """Whether the service answered in words of its protocol, good or bad."""
        return bool(re.fullmatch(r"\d{3}|[A-Z_]+", self.status))

    @property
    def code(self) -> str:
        """`ok`, the contract's error code, or the status where the body is not of the contract."""
        if self.status not in ("200", "OK") and not self.body:
            return self.status
        for read in (_json_code, _protobuf_code):
            code = read(self)
            if code:
                return code
        return "ok" if self.status in ("200", "OK") else self.status

    @property
    def top(self) -> list[int | None]:
        """The most probable class of each picture; None for one with an error. Empty for other formats."""
        if self.media_type == "application/json":
            results = json.loads(self.body).get("results", [])
            return [result["top"][0]["index"] if result.get("top") else None for result in results]
        if self.media_type == "application/x-protobuf":
            results = PredictReply.FromString(self.body).results
            return [result.top[0].index if result.top else None for result in results]
        return []


def _json_code(outcome: Outcome) -> str:
    if outcome.body[:1] != b"{":
        return ""
    try:
        error = json.loads(outcome.body).get("error")
    except ValueError:
        return ""
    return str(error.get("code", "")) if isinstance(error, dict) else ""


def _protobuf_code(outcome: Outcome) -> str:
    if outcome.media_type != "application/x-protobuf":
        return ""
    try:
        return PredictReply.FromString(outcome.body).error.code
    except DecodeError:
        return "undecodable"


class Rest:
    """A caller over HTTP/1.1 that keeps its connection while the service does.

    Args:
        url: `http://host:port` or `https://host:port`.
        ca_file: PEM file of the certificate to trust.
        headers: Sent with every request, the API key for example.
    """

    def __init__(self, url: str, ca_file: str | None = None, headers: tuple[tuple[str, str], ...] = ()) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._headers = headers
        self._socket: socket.socket | None = None

    def send(self, request: RestRequest) -> Outcome:
        """Send a request and return its outcome; nothing is raised."""
        started = time.monotonic()
        try:
            reused = self._socket is not None
            outcome = self._exchange(request)
            if outcome is None and reused:  # The service had closed the idle connection: not this request's doing.
                outcome = self._exchange(request)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            outcome = Outcome(f"broken: {type(error).__name__}: {error}")
        if outcome is None:
            outcome = Outcome("broken: closed without a response")
        return Outcome(outcome.status, outcome.body, outcome.media_type, time.monotonic() - started)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(self, request: RestRequest) -> Outcome | None:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                self._socket = self._context.wrap_socket(self._socket, server_hostname=self._address[0])
        data = request.raw if request.raw is not None else self._write(request)
        if request.hang_up_after is not None:
            self._socket.sendall(data[: request.hang_up_after])
            self.close()
            return Outcome("hung up")
        sent = True
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            sent = False  # There may be a response that came before the end.
        response = http.client.HTTPResponse(self._socket, method=request.method)
        try:
            response.begin()
            body = response.read()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            self.close()
            return None
        finally:
            response.close()
        media_type = (response.getheader("content-type") or "").partition(";")[0].strip().lower()
        if response.will_close or not sent or request.raw is not None:
            self.close()
        return Outcome(str(response.status), body, media_type)

    def _write(self, request: RestRequest) -> bytes:
        headers = [("Host", "convscope"), *self._headers, *request.headers]
        names = {name.lower() for name, _ in headers}
        bodiless = request.method in ("GET", "HEAD", "DELETE", "OPTIONS") and not request.body
        if not bodiless and not names & {"content-length", "transfer-encoding"}:
            headers.append(("Content-Length", str(len(request.body))))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return (
            f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + request.body
        )


class Grpc:
    """A caller over gRPC that sends and takes bytes.

    Args:
        target: `host:port`.
        ca_file: PEM file of the certificate to trust; None for plain text.
        metadata: Sent with every call.
    """

    def __init__(self, target: str, ca_file: str | None = None, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        options = [("grpc.max_receive_message_length", _LARGEST_REPLY), ("grpc.max_send_message_length", -1)]
        if ca_file is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            with open(ca_file, "rb") as file:  # noqa: PTH123
                self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(file.read()), options)
        self._metadata = metadata
        self._calls: dict[tuple[str, bool, bool], grpc.UnaryUnaryMultiCallable] = {}

    def send(self, request: GrpcRequest) -> Outcome:
        """Make a call and return its outcome; nothing is raised."""
        started = time.monotonic()
        try:
            prediction = self._exchange(request)
        except grpc.RpcError as error:
            status = error.code()
            name = status.name if status is not None else "cancelled"
            gone = request.cancel_after_s is not None and name in ("CANCELLED", "DEADLINE_EXCEEDED")
            details = (error.details() or "").encode()
            return Outcome("cancelled" if gone else name, details, "", time.monotonic() - started)
        except grpc.FutureCancelledError:
            return Outcome("cancelled", b"", "", time.monotonic() - started)
        media_type = "application/json" if prediction[:1] == b"{" else _sniff(prediction)
        return Outcome("OK", prediction, media_type, time.monotonic() - started)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _exchange(self, request: GrpcRequest) -> bytes:
        key = (request.method, request.takes_stream, request.gives_stream)
        if key not in self._calls:
            kind = (
                ("stream" if request.takes_stream else "unary") + "_" + ("stream" if request.gives_stream else "unary")
            )
            self._calls[key] = getattr(self._channel, kind)(request.method)
        call = self._calls[key]
        messages = request.message if isinstance(request.message, tuple) else (request.message,)
        argument = iter(messages) if request.takes_stream else messages[0]
        metadata = self._metadata + request.metadata
        timeout_s = TIMEOUT_S if request.cancel_after_s is None else request.cancel_after_s
        answer = call(argument, timeout=timeout_s, metadata=metadata)
        return read_prediction(b"".join(answer) if request.gives_stream else answer)


def _sniff(body: bytes) -> str:
    if body.startswith(b"\x89PNG"):
        return "image/png"
    return "application/x-npz" if body.startswith(b"PK") else "application/x-protobuf"


def read_prediction(message: bytes) -> bytes:
    """Return field 1 of a serialized PredictionResponse; empty where there is none."""
    if not message or message[0] != 0x0A:
        return b""
    length = shift = 0
    at = 1
    while True:
        byte = message[at]
        length |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return message[at : at + length]
