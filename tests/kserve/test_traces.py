"""Spans of this host's workers, in a collector: those of the contract, and of the Open Inference Protocol."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from convscope import Client
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from handlers.wire import convscope_pb2 as wire
from server.wire import inference_pb2
from tests.collector import collecting
from tests.kserve.conftest import Host, serving, web
from tests.tracing import CHECKS, PATIENT, PICTURE, Asked, ask, traceparent


@pytest.fixture(scope="module")
def asked(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    with collecting() as collector:
        own = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        own |= {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test", **PATIENT}
        options = ("--models", "cifar", "--device", "cpu", "--workers", "1")
        with serving(store, tmp_path_factory.mktemp("work"), *options, environment=own) as host:
            with Client(f"http://{host.http}") as rest, Client(f"grpc://{host.grpc}") as rpc:
                forward_s = ask(f"http://{host.http}", rest, rpc)
            ask_by_other_ways(host)
            assert not collector.spans
            host.process.terminate()
            assert host.process.wait(60) == 0
            yield Asked(collector, host.log.read_text(), forward_s)


def ask_by_other_ways(host: Host) -> None:
    """Send a request over each way in whose trace context is in a header or in metadata alone."""
    tensor = {"name": "pictures", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PICTURE).decode()]}
    headers = {"traceparent": traceparent("v2 rest")}
    url = f"http://{host.http}/v2/models/cifar/infer"
    assert web.post(url, json={"inputs": [tensor]}, headers=headers, timeout=30).status_code == 200
    with grpc.insecure_channel(host.grpc) as channel:
        request = pb.ModelInferRequest(model_name="cifar")
        request.inputs.add(name="pictures", datatype="BYTES", shape=[1]).contents.bytes_contents.append(PICTURE)
        metadata = [("traceparent", traceparent("v2 grpc"))]
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=metadata, timeout=30)
        predict = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        own = wire.PredictRequest(pictures=[PICTURE], traceparent=traceparent("not the gateway's"))
        for name, given in (("message", {"request": own.SerializeToString()}), ("plain keys", {"data": PICTURE})):
            message = inference_pb2.PredictionsRequest(model_name="cifar", input=given).SerializeToString()
            predict(message, metadata=[("traceparent", traceparent(name))], timeout=30)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_spans(asked: Asked, check: Callable[[Asked], None]) -> None:
    check(asked)


@pytest.mark.parametrize("name", ["v2 rest", "v2 grpc", "message", "plain keys"])
def test_metadata_and_headers_carry_a_trace_over_every_way_in(asked: Asked, name: str) -> None:
    request, _ = asked.request(name)
    assert request.name == "predict cifar"
    assert request.attributes["convscope.transport"] == ("rest" if name == "v2 rest" else "grpc")
