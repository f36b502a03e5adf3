"""What must not work gets its code on both transports, and costs nothing: the same worker answers the next request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from convscope import Client, ConvscopeError, ModelNotFound
from convscope._wire import convscope_pb2 as wire
from convscope._wire import inference_pb2

from tests.containers import chunk, png_header
from tests.pictures import colours, npy, png
from tests.server.harness import ROOT, Launched

SAMPLES = ROOT / "samples"
METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
CAT = (SAMPLES / "cat.png").read_bytes()


def header_of_a_bomb() -> bytes:
    return png_header(50_000, 50_000) + chunk(b"IDAT") + chunk(b"IEND")


def truncated_jpeg() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "JPEG")
    return buffer.getvalue()[:500]


@pytest.fixture(autouse=True)
def still_answering(same_workers: None, rest: Client, grpc: Client) -> Iterator[None]:
    """Hold that the same workers still answer afterwards."""
    yield
    for client in (rest, grpc):
        assert client.predict(CAT, model="cifar", top_k=1).top


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "truncated JPEG": ({"pictures": truncated_jpeg()}, "bad_image"),
    "header of a 50,000×50,000 PNG": ({"pictures": header_of_a_bomb()}, "image_too_large"),
    "empty picture": ({"pictures": b""}, "bad_image"),
    "text file": ({"pictures": b"once upon a time\n" * 50}, "bad_image"),
    "wrong layer": ({"pictures": CAT, "layers": ["conv9"]}, "unknown_layer"),
    "wrong model": ({"pictures": CAT, "model": "unheard-of"}, "model_not_found"),
    "one channel for a colour network": ({"pictures": np.zeros((32, 32), np.uint8)}, "wrong_channels"),
    "1,000 pictures": ({"pictures": [CAT] * 1000}, "too_many_images"),
    "1,000 pictures in an array": ({"pictures": np.zeros((1000, 8, 8, 3), np.uint8)}, "too_many_images"),
    "pool larger than the map": ({"pictures": CAT, "layers": ["conv2"], "pool": 17}, "bad_request"),
    "channel that is not there": ({"pictures": CAT, "layers": ["conv2"], "channels": [32]}, "bad_request"),
    "17 MiB picture": ({"pictures": bytes(17 * 2**20)}, "image_too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_client_gets_the_code(client: Client, name: str) -> None:
    asked, code = BAD[name]
    with pytest.raises(ConvscopeError) as caught:
        client.predict(**{"model": "cifar", **asked})
    assert caught.value.code == code
    assert str(caught.value)
    assert str(ROOT) not in str(caught.value)


def test_a_request_beyond_torchserves_own_limit_is_too_large_on_both(client: Client) -> None:
    with pytest.raises(ConvscopeError) as caught:
        client.predict([bytes(7 * 2**20)] * 3, model="cifar")
    assert caught.value.code == "image_too_large"


def ask_grpc(server: Launched, **fields: bytes) -> wire.PredictReply:
    with grpc.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
        call = channel.unary_unary(
            METHOD,
            request_serializer=inference_pb2.PredictionsRequest.SerializeToString,
            response_deserializer=inference_pb2.PredictionResponse.FromString,
        )
        reply = call(inference_pb2.PredictionsRequest(model_name="cifar", input=fields), timeout=30)
    return wire.PredictReply.FromString(reply.prediction)


RAW: dict[str, tuple[bytes, str]] = {
    "malformed protobuf": (b"\xff\xff\xff\xff", "bad_request"),
    "no picture": (b"", "bad_request"),
    "a picture that is no request": (CAT, "bad_request"),
}


@pytest.mark.parametrize("name", RAW)
def test_malformed_requests_get_their_code_on_grpc(server: Launched, name: str) -> None:
    body, code = RAW[name]
    assert ask_grpc(server, request=body).error.code == code


@pytest.mark.parametrize("name", RAW)
def test_malformed_requests_get_their_code_on_rest(http: httpx.Client, name: str) -> None:
    body, code = RAW[name]
    reply = http.post("/predictions/cifar", content=body, headers={"Content-Type": "application/x-protobuf"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == code


def test_unknown_plain_keys_are_refused_on_grpc(server: Launched) -> None:
    assert ask_grpc(server, picture=CAT).error.code == "bad_request"
    assert ask_grpc(server).error.code == "bad_request"


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {"X-Convscope-Method": "POST"}, 400, "bad_request"),
        (b"{", {"Content-Type": "application/json"}, 400, "bad_request"),
        (b"\xff\xfe", {"Content-Type": "text/plain"}, 400, "bad_image"),
        (header_of_a_bomb(), {}, 413, "image_too_large"),
        (npy(np.zeros((32, 32), np.uint8)), {"Content-Type": "application/x-npy"}, 400, "wrong_channels"),
        (CAT, {"X-Convscope-Layers": "conv9"}, 400, "unknown_layer"),
        (CAT, {"X-Convscope-Top-K": "many"}, 400, "bad_request"),
        (CAT, {"Accept": "image/png"}, 400, "bad_request"),
        (CAT, {"Accept": "text/csv"}, 400, "bad_request"),
        (CAT, {"X-Convscope-Layers": "\u00e9".encode()}, 400, "unknown_layer"),
    ],
)
def test_rest_answers_status_and_code(
    http: httpx.Client, body: bytes, headers: dict[str, Any], status: int, code: str
) -> None:
    reply = http.post("/predictions/cifar", content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/json"


def test_a_reply_too_large_to_send_is_refused_before_it_kills_the_worker(grpc: Client) -> None:
    black = png(np.zeros((3900, 3900), np.uint8))  # A small file whose map has 61 MB.
    with pytest.raises(ConvscopeError) as caught:
        grpc.predict([black] * 5, model="edges", layers=["conv1"])
    assert caught.value.code == "reply_too_large"
    assert grpc.predict(black, model="edges", layers=["conv1"], pool=8).maps["conv1"].shape == (1, 8, 8)


@pytest.mark.patched
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name=""\r\n\r\nx\r\n--b--\r\n'),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name"data"\r\n\r\nx\r\n--b--\r\n'),
        ("application/x-www-form-urlencoded", b"data=%ff%%"),
    ],
    ids=["no name", "empty name", "mixed without a name", "no equals sign", "bad escape"],
)
def test_a_form_that_torchserve_cannot_read_is_the_callers_mistake(
    http: httpx.Client, content_type: str, body: bytes
) -> None:
    answer = http.post("/predictions/cifar", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 400
    assert answer.json()["code"] == 400


@pytest.mark.parametrize(("model", "version"), [("unheard-of", None), ("cifar", "9.9")])
def test_a_model_that_is_not_there_is_told_which_are(
    client: Client, patches: str, server: Launched, model: str, version: str | None
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        client.predict(CAT, model=model, version=version)
    if patches == "unpatched":
        assert caught.value.models is None
        with pytest.raises(ConvscopeError, match="does not list its models"):
            client.models()
        return
    assert caught.value.models == client.models()
    served = {(path.stem, "1.0") for path in (ROOT / "model_store").glob("*.mar")}
    assert {tuple(served_model) for served_model in client.models()} == served
    assert all(client.model_card(*served_model).model == served_model.name for served_model in client.models())
