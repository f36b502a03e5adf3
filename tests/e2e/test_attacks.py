"""Requests made for known vulnerabilities of TorchServe's libraries (SECURITY.md): each ends alone."""

from __future__ import annotations

import grpc as rpc
import httpx
import pytest
from convscope import Client

from tests.foreign import INFERENCE
from tests.server.harness import ROOT, Launched

CAT = ROOT / "samples/cat.png"
NAME = b"\x0a\x05cifar"  # PredictionsRequest{model_name: "cifar"}
INPUT = b"\x1a\x06\x0a\x04data"  # input {key: "data"}
START_GROUP = b"\x3b"  # Of field 7, which no message has.


@pytest.mark.parametrize("depth", [1_000, 1_000_000])
@pytest.mark.parametrize("where", ["message", "map entry"])
def test_nested_groups_end_their_own_call_alone(server: Launched, grpc: Client, depth: int, where: str) -> None:
    """CVE-2024-7254: protobuf-java before 3.25.5 follows them until its stack is full."""
    nested = START_GROUP * depth
    if where == "map entry":
        size, entry = len(nested) + 6, b"\x0a\x04data" + nested
        length = b""
        while size:
            length += bytes([size & 127 | (128 if size > 127 else 0)])
            size >>= 7
        request = NAME + b"\x1a" + length + entry
    else:
        request = NAME + INPUT + nested
    with rpc.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
        call = channel.unary_unary(f"/{INFERENCE}.InferenceAPIsService/Predictions")
        with pytest.raises(rpc.RpcError) as caught:
            call(request, timeout=60)
    assert caught.value.code() is not rpc.StatusCode.DEADLINE_EXCEEDED
    assert grpc.predict(CAT, model="cifar").top[0].label == "cat"


def test_a_form_of_very_many_fields_is_rejected_and_holds_nobody_up(http: httpx.Client, rest: Client) -> None:
    """CVE-2024-29025: Netty before 4.1.108 keeps every field of a form in memory."""
    field = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
    answer = http.post(
        "/predictions/cifar",
        content=field * 10_000 + b"--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x", "Accept": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_request"
    assert rest.predict(CAT, model="cifar").top[0].label == "cat"
