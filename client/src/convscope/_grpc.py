"""gRPC on grpcio: a request as `input["request"]` of TorchServe's `Predictions`.

The only module that knows grpc, whose exceptions `map_grpc_exceptions` turns into ours. A client has one channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Iterator
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
from convscope._protocol import (
    API_KEY_HEADER,
    MAX_MESSAGE_BYTES,
    REQUEST_ID_HEADER,
    USER_AGENT,
    http_error,
    parse_reply,
    torchserve_error,
)
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})$")  # gRPC's message for a response that is not gRPC's.

# What each status becomes, unless its message says more (`_kind_by_words`); any other becomes a ServerError.
TRANSLATIONS: dict[grpc.StatusCode, type[ConvscopeError]] = {
    grpc.StatusCode.OK: ProtocolError,
    grpc.StatusCode.CANCELLED: ImageTooLarge,  # TorchServe cancels a request over its limit.
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
    """What both transports share.

    Args:
        target: `host:port`.
        secure: Whether to use TLS.
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
            # Without this, gRPC shares one connection among all clients of an address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", int(use_proxies)),
            # After a refused connection, gRPC fails calls for a while without trying: up to two minutes unless told
            # otherwise, which is too long for a caller that waits for a server to start.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._credentials = None
        if secure:
            roots = Path(ca_file).read_bytes() if ca_file is not None else None
            self._credentials = grpc.ssl_channel_credentials(roots)

    def _metadata(self, request: PredictRequest) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a request."""
        return (*self._key, (REQUEST_ID_HEADER, request.request_id))

    def _connect(self, kind: Any) -> tuple[Any, Any]:
        """Make a channel, of `grpc` or of `grpc.aio`, and its method."""
        target = f"dns:///{self._target}"  # Without a scheme, gRPC takes a host named `unix` or `dns` for one.
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

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        with map_grpc_exceptions(self._target):
            response = self._predictions(
                _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
            )
        return parse_reply(response.prediction)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcTransport(_Grpc):
    """Sends requests over gRPC from asyncio; see `_Grpc` for its arguments."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, **settings)
        self._channel: Any = None  # Made in the event loop, which it needs.

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        if self._channel is None:
            self._channel, self._predictions = self._connect(grpc.aio)
        try:
            with map_grpc_exceptions(self._target):
                response = await self._predictions(
                    _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
                )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _closed(self._target) from error  # Closing a channel cancels its calls.
        return parse_reply(response.prediction)

    async def aclose(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()


def _wrap(request: PredictRequest, model: str, version: str | None) -> PredictionsRequest:
    """Wrap a request in TorchServe's."""
    return PredictionsRequest(
        model_name=model, model_version=version or "", input={"request": request.SerializeToString()}
    )


@contextlib.contextmanager
def map_grpc_exceptions(target: str) -> Iterator[None]:
    """Raise our exception in place of one of grpc's, which becomes its cause.

    Args:
        target: The service's `host:port`, for the message.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise translate(error, target) from error
    except (grpc.aio.UsageError, ValueError) as error:
        if "closed" not in str(error):
            raise
        raise _closed(target) from error


def _closed(target: str) -> ConnectError:
    return ConnectError(f"no connection to {target}: channel closed")


def translate(error: grpc.RpcError, target: str) -> ConvscopeError:
    """Make our exception for one of grpc's.

    Args:
        error: What grpc raised.
        target: The service's `host:port`, for the message.

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
        return http_error(int(found[1]), b"", retry_after_s)
    kind = _kind_by_words(status, details) or TRANSLATIONS.get(status, ServerError)
    if kind is ConnectError and retry_after_s is not None:
        kind = Overloaded  # It was a server that answered.
    if kind is ConnectError:
        return ConnectError(f"no connection to {target}: {details.rpartition('last error: ')[2] or status.name}")
    said = f"{status.name}: {details.splitlines()[0]}" if details else status.name
    message = f"{_MESSAGES[kind]} ({said})" if kind in _MESSAGES else said
    if kind is Overloaded:
        return Overloaded(message, retry_after_s=retry_after_s)
    return kind(message)


def _kind_by_words(status: grpc.StatusCode, details: str) -> type[ConvscopeError] | None:
    """Tell errors of one status apart by their messages."""
    if status is grpc.StatusCode.CANCELLED and "hannel closed" in details:
        return ConnectError  # Another thread closed the client.
    if status is grpc.StatusCode.INTERNAL and "deserializing" in details:
        return ProtocolError
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ReplyTooLarge if "CLIENT: Received" in details else ImageTooLarge
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "exceeds maximum size" in details:
        return ImageTooLarge
    if status is grpc.StatusCode.UNAVAILABLE and "org.pytorch.serve" in details:
        return ServerError  # From TorchServe itself: its worker failed.
    if status is grpc.StatusCode.UNAVAILABLE and "Failed parsing HTTP/2" in details:
        return ProtocolError  # A REST port.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream request timeout" in details:
        return DeadlineExceeded  # The gateway's deadline.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream" in details:
        return Overloaded  # From the gateway: no server behind it takes requests now.
    return None


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """Return the seconds that the trailing metadata ask to wait, if any; infinite if they say not to retry."""
    metadata = dict(error.trailing_metadata() or ())
    if "grpc-retry-pushback-ms" in metadata:
        pushback = str(metadata["grpc-retry-pushback-ms"])
        return int(pushback) / 1000 if pushback.isascii() and pushback.isdigit() else math.inf
    value = str(metadata.get("retry-after", ""))
    return float(value) if value.isascii() and value.isdigit() else None
