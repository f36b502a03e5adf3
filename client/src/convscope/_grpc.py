"""gRPC transports, using grpcio. They call TorchServe's `Predictions` with the request in `input["request"]`.

Only this module imports grpc; `map_grpc_exceptions` translates its exceptions. A client has one channel.
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
from convscope._reply import parse_reply
from convscope._request import API_KEY_HEADER, MAX_MESSAGE_BYTES, REQUEST_ID_HEADER, USER_AGENT, trace_headers
from convscope._server_errors import (
    MESSAGES,
    closed_error,
    connection_error,
    deadline_error,
    http_error,
    parse_retry_after,
    torchserve_error,
)
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})$")  # grpcio's message when the response is plain HTTP.

# Default exception per status; `_exception_from_details` refines it. Any other becomes a ServerError.
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


class _BaseGrpcTransport:
    """Channel options and metadata of the sync and async gRPC transports.

    Args:
        target: `host:port`.
        secure: Whether to use TLS.
        api_key: Sent as `x-api-key` metadata, if given.
        ca_file: PEM file of CA certificates; None for the default ones.
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
            # Without this, gRPC shares one connection between all clients of an address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", int(use_proxies)),
            # The default backoff of up to two minutes is too long while a server starts.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # A machine that is gone sends no reset, and a call's deadline leaves its connection open for the next call.
            # With these the kernel closes one on which nothing has been acknowledged for 20 s (TCP_USER_TIMEOUT, gRFC
            # A18). A gRPC server takes a ping every 5 min, not more.
            ("grpc.keepalive_time_ms", 330_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
        self._credentials = None
        if secure:
            roots = Path(ca_file).read_bytes() if ca_file is not None else None
            self._credentials = grpc.ssl_channel_credentials(roots)

    def _metadata(self, request: PredictRequest) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a request."""
        return (*self._key, (REQUEST_ID_HEADER, request.request_id), *trace_headers(request).items())

    def _connect(self, grpc_module: Any) -> tuple[Any, Any]:
        """Create a channel of `grpc` or of `grpc.aio`, and its method `Predictions`."""
        # Force the DNS scheme: gRPC would read a host named `unix` or `dns` as a scheme.
        target = f"dns:///{self._target}"
        if self._credentials is None:
            channel = grpc_module.insecure_channel(target, options=self._options)
        else:
            channel = grpc_module.secure_channel(target, self._credentials, options=self._options)
        method = channel.unary_unary(
            _METHOD,
            request_serializer=PredictionsRequest.SerializeToString,
            response_deserializer=PredictionResponse.FromString,
        )
        return channel, method


class GrpcTransport(_BaseGrpcTransport):
    """gRPC transport; see `_BaseGrpcTransport` for its arguments."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, **settings)
        self._channel, self._predictions = self._connect(grpc)

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        with map_grpc_exceptions(self._target, deadline_s):
            response = self._predictions(
                _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
            )
        return parse_reply(response.prediction)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcTransport(_BaseGrpcTransport):
    """gRPC transport for asyncio; see `_BaseGrpcTransport` for its arguments."""

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target, **settings)
        self._channel: Any = None  # Created in the event loop, as it must be.

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        if self._channel is None:
            self._channel, self._predictions = self._connect(grpc.aio)
        try:
            with map_grpc_exceptions(self._target, deadline_s):
                response = await self._predictions(
                    _wrap(request, model, version), timeout=deadline_s, metadata=self._metadata(request)
                )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise closed_error(self._target) from error  # Closing a channel cancels its calls.
        return parse_reply(response.prediction)

    async def aclose(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()


def _wrap(request: PredictRequest, model: str, version: str | None) -> PredictionsRequest:
    """Wrap a request in TorchServe's message."""
    return PredictionsRequest(
        model_name=model, model_version=version or "", input={"request": request.SerializeToString()}
    )


@contextlib.contextmanager
def map_grpc_exceptions(target: str, deadline_s: float) -> Iterator[None]:
    """Replace exceptions of grpc by ours, with the original as the cause.

    Args:
        target: `host:port` of the service, for the message.
        deadline_s: Deadline of the request, for the message.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise translate(error, target, deadline_s) from error
    except (grpc.aio.UsageError, ValueError) as error:
        if "closed" not in str(error):
            raise
        raise closed_error(target) from error


def translate(error: grpc.RpcError, target: str, deadline_s: float) -> ConvscopeError:
    """Map an exception of grpc to one of ours; see `map_grpc_exceptions`."""
    status: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    server_error = torchserve_error(details)
    if server_error is not None:
        return server_error
    retry_after_s = _retry_after_s(error)
    if (match := _HTTP_STATUS.search(details)) is not None:
        return http_error(int(match[1]), b"", retry_after_s)
    ours = _exception_from_details(status, details)
    if ours is None and status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_error(deadline_s)
    ours = ours or TRANSLATIONS.get(status, ServerError)
    if ours is ConnectError and status is grpc.StatusCode.CANCELLED:
        return closed_error(target)
    if ours is ConnectError and retry_after_s is not None:
        ours = Overloaded  # Pushback metadata comes from a server, so this is overload, not a connection failure.
    if ours is ConnectError:
        return connection_error(target, details.rpartition("last error: ")[2] or status.name)
    detail = f"{status.name}: {details.splitlines()[0]}" if details else status.name
    message = f"{MESSAGES[ours]} ({detail})" if ours in MESSAGES else detail
    if ours is Overloaded:
        return Overloaded(message, retry_after_s=retry_after_s)
    return ours(message)


def _exception_from_details(status: grpc.StatusCode, details: str) -> type[ConvscopeError] | None:
    """Distinguish errors of one status by their messages; None for the default exception of the status."""
    if status is grpc.StatusCode.CANCELLED and "hannel closed" in details:
        return ConnectError  # Another thread closed the client.
    if status is grpc.StatusCode.INTERNAL and "deserializing" in details:
        return ProtocolError
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ReplyTooLarge if "CLIENT: Received" in details else ImageTooLarge
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "exceeds maximum size" in details:
        return ImageTooLarge
    if status is grpc.StatusCode.UNAVAILABLE and "org.pytorch.serve" in details:
        return ServerError  # From TorchServe: its worker failed.
    if status is grpc.StatusCode.UNAVAILABLE and "Failed parsing HTTP/2" in details:
        return ProtocolError  # A REST port.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream request timeout" in details:
        return DeadlineExceeded  # The gateway's timeout.
    if status is grpc.StatusCode.UNAVAILABLE and "upstream" in details:
        return Overloaded  # From the gateway: no server behind it accepts requests.
    return None


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """Return the retry delay from trailing metadata; None if absent, infinite if the server forbids retries."""
    metadata = dict(error.trailing_metadata() or ())
    if "grpc-retry-pushback-ms" in metadata:
        pushback = str(metadata["grpc-retry-pushback-ms"])
        return int(pushback) / 1000 if pushback.isascii() and pushback.isdigit() else math.inf
    return parse_retry_after(str(metadata.get("retry-after", "")))
