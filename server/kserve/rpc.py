"""gRPC: the Open Inference Protocol v2, the contract's `InferenceAPIsService`, health and reflection, on one port.

An error of v2 is a status whose details begin with the error's code, which is also in the trailing metadata
`convscope-code`. The contract's errors are in its replies.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc

from server.kserve import rest, tensors
from server.kserve.errors import Rejected
from server.kserve.models import Models, in_time
from server.wire import inference_pb2

STATUSES = {
    400: StatusCode.INVALID_ARGUMENT,
    413: StatusCode.INVALID_ARGUMENT,
    404: StatusCode.NOT_FOUND,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
MOST_CALLS = 256  # Concurrent calls; further ones are RESOURCE_EXHAUSTED.
HEALTH_PAUSE_S = 0.5

logger = logging.getLogger(__name__)
Method = Callable[[Any, Any, Any], Awaitable[Any]]


def _rejecting(details: str) -> Callable[[Method], Method]:
    """Turn the errors of a method into statuses, with `details` made of `code` and `message`."""

    def decorate(method: Method) -> Method:
        async def call(self: Any, request: Any, context: Any) -> Any:
            try:
                return await in_time(self.timeout_s, method(self, request, context))
            except Rejected as error:
                rejected = error
            except Exception:
                logger.exception("a call failed")
                rejected = Rejected("internal", "the server has a fault; its log has the reason")
            said = details.format(code=rejected.code, message=rejected.message)
            status = STATUSES.get(rejected.status, StatusCode.INTERNAL)
            return await context.abort(status, said, (("convscope-code", rejected.code),))

        return call

    return decorate


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The Open Inference Protocol v2 without loading and unloading of models.

    Args:
        models: The models served.
        timeout_s: Seconds for a call.
    """

    def __init__(self, models: Models, timeout_s: float) -> None:
        self._models, self.timeout_s = models, timeout_s

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Respond that the server runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return whether every model responds with its card."""
        return pb.ServerReadyResponse(ready=await self._is_ready())

    @_rejecting("{code}: {message}")
    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return whether a model responds with its card."""
        return pb.ModelReadyResponse(ready=await self._is_ready([self._models.get(request.name, request.version)]))

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the metadata of this server."""
        return pb.ServerMetadataResponse(name=rest.NAME, version=rest.VERSION, extensions=[])

    @_rejecting("{code}: {message}")
    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the inputs and outputs of a model."""
        return pb.ModelMetadataResponse(**self._models.describe(request.name, request.version))

    @_rejecting("{code}: {message}")
    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return scores and maps of pictures."""
        with self._models.use(request.model_name, request.model_version) as model:
            ask = await asyncio.to_thread(tensors.from_grpc, request, model.card)
            reply = await model.ask(ask.parameters | _trace_context(context), {})
        return await asyncio.to_thread(lambda: tensors.to_grpc(tensors.respond(ask, reply.body, reply.status)))

    async def _is_ready(self, models: Any = None) -> bool:
        try:
            await self._models.check(models)
        except Rejected:
            return False
        return True

    @_rejecting("{message}")
    async def Predictions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Respond according to the contract: errors of the handlers are data."""
        model = self._models.get(request.model_name, request.model_version)
        reply = await model.ask(dict(request.input) | _trace_context(context), {})
        return inference_pb2.PredictionResponse(prediction=reply.body)

    async def Ping(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return whether every model responds with its card."""
        state = "Healthy" if await self._is_ready() else "Unhealthy"
        return inference_pb2.TorchServeHealthResponse(health=f'{{"status": "{state}"}}')


class Server:
    """The gRPC server.

    Args:
        models: The models served.
        address: `host:port` to listen on.
        max_request_bytes: Largest request.
        max_reply_bytes: Largest reply.
        timeout_s: Seconds for a call.
    """

    def __init__(
        self, models: Models, address: str, *, max_request_bytes: int, max_reply_bytes: int, timeout_s: float
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", max_reply_bytes),
            ("grpc.so_reuseport", 0),
        ]
        self._models, self._health = models, health.aio.HealthServicer()
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=MOST_CALLS)
        service = InferenceService(models, timeout_s)
        contract = inference_pb2.DESCRIPTOR.services_by_name["InferenceAPIsService"]
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers([_handlers(contract, service)])
        v2 = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
        names = (v2, contract.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._server.add_insecure_port(address)
        self._services = ("", v2, contract.full_name)

    async def start(self) -> None:
        """Start serving."""
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, and give those in flight some time."""
        self._watching.cancel()
        await self._server.stop(grace_s)

    async def _watch(self) -> None:
        """Update `grpc.health.v1`: serving if every model has a worker and the server does not drain."""
        states = health_pb2.HealthCheckResponse
        while True:
            is_up = self._models.is_up and not self._models.is_draining
            for service in self._services:
                await self._health.set(service, states.SERVING if is_up else states.NOT_SERVING)
            await asyncio.sleep(HEALTH_PAUSE_S)


def _trace_context(context: Any) -> dict[str, bytes]:
    """Return the W3C Trace Context in a call's metadata as plain keys; repeated values are joined, as in headers."""
    found: dict[str, bytes] = {}
    for name, value in context.invocation_metadata() or ():
        if name in tensors.TRACE_CONTEXT:
            found[name] = b",".join((found[name], value.encode())) if name in found else value.encode()
    return found


def _handlers(service: Any, methods: Any) -> Any:
    """Return the handlers of a service by its descriptor, without generated code for its methods."""
    handlers = {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(methods, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
