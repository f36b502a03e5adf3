"""The gRPC seam: a request as `input["request"]` of TorchServe's `Predictions`.

The only module that knows grpc. One channel, shared between threads.
"""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ReplyTooLarge,
    ServerError,
)
from convscope._forking import renew_after_fork
from convscope._http_answers import refusal
from convscope._transport import (
    API_KEY_HEADER,
    MAX_MESSAGE_BYTES,
    REQUEST_ID_HEADER,
    USER_AGENT,
    parse_reply,
    torchserve_error,
)
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})$")  # gRPC's words for an answer that is not gRPC's.

# Which of ours stands for which status, where its words (below) do not say more; of any other ServerError.
TRANSLATIONS: dict[grpc.StatusCode, type[ConvscopeError]] = {
    grpc.StatusCode.OK: ProtocolError,
    grpc.StatusCode.CANCELLED: ImageTooLarge,  # We never cancel; TorchServe does so to a request over its limit.
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.UNAVAILABLE: ConnectError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationFailed,
}
_MESSAGES: dict[type[ConvscopeError], str] = {
    AuthenticationFailed: "the server refused the API key or the lack of one",
    DeadlineExceeded: "the deadline passed",
    ImageTooLarge: "the request is larger than the server's request limit",
    Overloaded: "the server takes no more work now",
    ProtocolError: "not a convscope reply: is this a convscope server?",
    ReplyTooLarge: f"the reply is over this client's limit of {MAX_MESSAGE_BYTES} bytes",
}


class _Grpc:
    """What both transports over gRPC are.

    Args:
        target: `host:port`.
        secure: Whether to speak TLS.
        api_key: Sent as `x-api-key` metadata, if given.
        ca_file: PEM file of the certificates to trust; None for gRPC's usual ones.
        use_proxies: Whether to use the proxies of the environment.
    """

    def __init__(
        self,
        target: str,
        *,
        secure: bool = False,
        api_key: str | None = None,
        ca_file: str | None = None,
        use_proxies: bool = True,
    ) -> None:
        self._target = target
        self._key = () if api_key is None else ((API_KEY_HEADER, api_key),)
        self._options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.primary_user_agent", USER_AGENT),
            # A connection of its own: gRPC would share one among all clients of an address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", int(use_proxies)),
            # After a refused connection gRPC answers from memory for a while; a caller that waits for a server to
            # come up must not wait the two minutes it may grow to.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._credentials = None
        if secure:
            roots = Path(ca_file).read_bytes() if ca_file is not None else None
            self._credentials = grpc.ssl_channel_credentials(roots)

    def _metadata(self, request: PredictRequest) -> tuple[tuple[str, str], ...]:
        """Return what goes out beside a request."""
        return (*self._key, (REQUEST_ID_HEADER, request.request_id))

    def _connect(self, kind: Any) -> tuple[Any, Any]:
        """Make a channel, of `grpc` or of `grpc.aio`, and its method."""
        target = f"dns:///{self._target}"  # gRPC would take a host named `unix` or `dns` for a scheme.
        if self._credentials is None:
            channel = kind.insecure_channel(target, options=self._options)
        else:
            channel = kind.secure_channel(target, self._credentials, options=self._options)
        method = channel.unary_unary(
            _METHOD,
            request_serializer=PredictionsRequest.SerializeToString,
            response_deserializer=PredictionResponse.FromString,
        )
        return channel, method


class GrpcTransport(_Grpc):
    """Sends requests over gRPC; see `_Grpc` for its arguments."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, **settings)
        self._channel, self._predictions = self._connect(grpc)
        self._inherited: list[Any] = []  # Closing what a fork left behind may wait for threads that are gone.
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin with a channel of its own."""
        self._inherited.append(self._channel)
        self._channel, self._predictions = self._connect(grpc)

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        try:
            response = self._predictions(
                _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
            )
        except grpc.RpcError as error:
            raise translate(error, self._target) from error
        return parse_reply(response.prediction)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcTransport(_Grpc):
    """Sends requests over gRPC from asyncio; see `_Grpc` for its arguments."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, **settings)
        self._channel: Any = None  # Made in the event loop, which it needs.

    async def send(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        if self._channel is None:
            self._channel, self._predictions = self._connect(grpc.aio)
        try:
            response = await self._predictions(
                _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
            )
        except grpc.RpcError as error:
            raise translate(error, self._target) from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise ConnectError(f"no connection to {self._target}: channel closed") from error  # By another task.
        return parse_reply(response.prediction)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()


def _wrap(request: PredictRequest, model: str, version: str | None) -> PredictionsRequest:
    """Put a request into TorchServe's."""
    return PredictionsRequest(
        model_name=model, model_version=version or "", input={"request": request.SerializeToString()}
    )


def translate(error: grpc.RpcError, target: str) -> ConvscopeError:
    """Make our exception for one of grpc's.

    Args:
        error: What grpc raised.
        target: Whom it was talking to, `host:port`.

    Returns:
        The exception, not raised.
    """
    status: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    known = torchserve_error(details)
    if known is not None:
        return known
    retry_after_s = _retry_after_s(error)
    if (found := _HTTP_STATUS.search(details)) is not None:
        return refusal(int(found[1]), b"", retry_after_s)
    kind = _kind_by_words(status, details) or TRANSLATIONS.get(status, ServerError)
    if kind is ConnectError and retry_after_s is not None:
        kind = Overloaded  # It answered.
    if kind is ConnectError:
        return ConnectError(f"no connection to {target}: {details.rpartition('last error: ')[2] or status.name}")
    said = f"{status.name}: {details.splitlines()[0]}" if details else status.name
    message = f"{_MESSAGES[kind]} ({said})" if kind in _MESSAGES else said
    if kind is Overloaded:
        return Overloaded(message, retry_after_s=retry_after_s)
    return kind(message)


def _kind_by_words(status: grpc.StatusCode, details: str) -> type[ConvscopeError] | None:
    """Tell apart what one status stands for, by the words that came with it."""
    if status is grpc.StatusCode.CANCELLED and "hannel closed" in details:
        return ConnectError  # Another thread closed this client.
    if status is grpc.StatusCode.INTERNAL and "deserializing" in details:
        return ProtocolError
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ReplyTooLarge if "CLIENT: Received" in details else ImageTooLarge
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "exceeds maximum size" in details:
        return ImageTooLarge
    if status is grpc.StatusCode.UNAVAILABLE and "org.pytorch.serve" in details:
        return ServerError  # TorchServe itself answered: its worker failed.
    if status is grpc.StatusCode.UNAVAILABLE and "Failed parsing HTTP/2" in details:
        return ProtocolError  # A REST port.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream request timeout" in details:
        return DeadlineExceeded  # The gateway's deadline.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream" in details:
        return Overloaded  # The gateway answered: no server behind it takes requests now.
    return None


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """Return the seconds a server asked to wait, if its trailing metadata say so; infinite if it said not to retry."""
    metadata = dict(error.trailing_metadata() or ())
    if "grpc-retry-pushback-ms" in metadata:
        pushback = str(metadata["grpc-retry-pushback-ms"])
        return int(pushback) / 1000 if pushback.isascii() and pushback.isdigit() else math.inf
    value = str(metadata.get("retry-after", ""))
    return float(value) if value.isascii() and value.isdigit() else None
