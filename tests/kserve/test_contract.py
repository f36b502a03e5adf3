"""The contract of `proto/` on this host: the Python client, and the carriers that only a host can tell apart."""

from __future__ import annotations

import contextlib
import http.client

import grpc
import pytest
from convscope import BadImage, Client, ModelNotFound, UnknownLayer
from google.protobuf.message import DecodeError

from handlers.wire import convscope_pb2 as wire
from server.wire import inference_pb2
from tests.contract.requests import CARRIERS, Ask, Sent, generate, twist, write
from tests.kserve.conftest import Handle, Host, web
from tests.pictures import colours, npy, png
from tests.thorough import tries

SEEDS = range(tries(10, 20))
PICTURE = png(colours(0))
FORM = "multipart/form-data; boundary=b"


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, host: Host):
    with Client(f"{request.param}://{getattr(host, request.param)}") as client:
        yield client


def test_the_client_works_as_with_torchserve(client: Client) -> None:
    assert client.ready("cifar")
    assert [layer.name for layer in client.model_card("cifar").layers] == ["conv1", "conv2"]
    assert client.predict(npy(colours(0, 8, 8)[:, :, :1]), model="digits", top_k=2).top[1].probability >= 0
    seen = client.predict([PICTURE, b"no picture"], model="cifar", layers=["conv2"], top_k=3)
    assert seen[0].maps["conv2"].shape == (32, 16, 16)
    assert len(seen[0].top) == 3
    assert seen[1].error.code == "bad_image"
    for error, options in ((ModelNotFound, {"model": "none"}), (UnknownLayer, {"model": "cifar", "layers": ["zzz"]})):
        with pytest.raises(error):
            client.predict(PICTURE, **options)
    with pytest.raises(ModelNotFound, match="does not exist for model: cifar") as caught:
        client.predict(PICTURE, model="cifar", version="9")
    assert caught.value.models == client.models()
    assert {"cifar", "digits"} <= {model.name for model in client.models()}
    with pytest.raises(BadImage):
        _ = client.predict(b"no picture", model="cifar").top


def test_both_transports_give_the_same(host: Host) -> None:
    with Client(f"http://{host.http}") as rest, Client(f"grpc://{host.grpc}") as rpc:
        first, second = (
            client.predict(PICTURE, model="cifar", layers=["conv1", "conv2"], top_k=0) for client in (rest, rpc)
        )
    assert first.top == second.top
    for name, cells in first.maps.items():
        assert cells.tobytes() == second.maps[name].tobytes()


def send(host: Host, sent: Sent) -> tuple[int, bytes]:
    """Send a request as it is; the status is 200 over gRPC."""
    if sent.inputs is not None:
        asked = inference_pb2.PredictionsRequest(model_name="cifar", input=sent.inputs).SerializeToString()
        with grpc.insecure_channel(host.grpc, [("grpc.max_receive_message_length", -1)]) as channel:
            call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
            return 200, inference_pb2.PredictionResponse.FromString(call(asked, timeout=60)).prediction
    connection = http.client.HTTPConnection(host.http, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(sent.method, sent.target("cifar"))
        for name, value in (*sent.headers, ("Content-Length", str(len(sent.body)))):
            connection.putheader(name, value)
        connection.endheaders(sent.body)
        response = connection.getresponse()
        return response.status, response.read()


def in_order(body: bytes) -> bytes:
    """Return a body, a card in protobuf written anew: the map in it has no order."""
    with contextlib.suppress(DecodeError):
        reply = wire.PredictReply.FromString(body)
        return reply.SerializeToString(deterministic=True) if reply.HasField("card") else body
    return body


@pytest.mark.parametrize("carrier", CARRIERS)
def test_generated_requests_get_the_very_responses_that_torchserve_would_send(
    host: Host, handle: Handle, carrier: str
) -> None:
    compared = 0
    for seed in SEEDS:
        asked = generate(seed)
        fields = {name: value for name, value in asked.fields.items() if name != "timing"}
        sent = write(Ask(asked.pictures, fields | {"request_id": "the-same"}, asked.path), carrier)
        if sent is None or len(sent.body) > 2 * 2**20:
            continue
        compared += 1
        expected, got = handle(*sent.row()), send(host, sent)
        assert got[0] == (200 if sent.inputs is not None else expected[0])
        assert in_order(got[1]) == in_order(expected[1]), (seed, asked.fields)
        status, body = send(host, twist(sent, seed))
        assert status < 500, (seed, body[:200])
    assert compared


def part(name: str, data: bytes, filename: str = "") -> bytes:
    named = f'; filename="{filename}"' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"


def test_every_kind_of_body(host: Host) -> None:
    url = f"http://{host.http}/predictions/cifar"
    expected = web.put(url, content=PICTURE, headers={"x-convscope-layers": "conv1"}).json()["results"]
    assert list(expected[0]["maps"]) == ["conv1"]
    pictures = part("data", PICTURE, "a.png") + part("data", PICTURE)  # Without a name of a file, it is bytes too.
    form = web.post(url, content=pictures + part("layers", b"conv1") + b"--b--\r\n", headers={"content-type": FORM})
    assert form.json()["results"] == expected * 2
    png = web.post(f"{url}/1.0", content=PICTURE, headers={"x-convscope-layers": "conv1", "accept": "image/png"})
    assert png.content.startswith(b"\x89PNG")
    explained = web.post(f"http://{host.http}/explanations/cifar", content=PICTURE, timeout=60).json()
    assert explained["results"][0]["explanation"]["method"] == "grad_cam"
    assert web.get(url).json()["model"] == "cifar"
    assert web.get(f"http://{host.http}/ping").json() == {"ready": True}


@pytest.mark.parametrize(
    ("path", "method", "body", "content_type", "status", "code"),
    [
        ("cifar", "POST", b"", None, 400, "bad_request"),  # Without a gateway too, a forgotten body is no GET.
        ("cifar?layers=conv1", "POST", PICTURE, None, 400, "bad_request"),
        ("cifar/1.0/conv1", "POST", PICTURE, None, 400, "bad_request"),
        ("none", "POST", PICTURE, None, 404, "model_not_found"),
        ("cifar", "DELETE", b"", None, 405, "method_not_allowed"),
        ("cifar", "POST", b"\0" * (2 * 2**20 + 1), None, 413, "request_too_large"),
        ("cifar", "POST", part("data", PICTURE), FORM, 400, "bad_request"),  # Breaks off.
        ("cifar", "POST", part("data", PICTURE) + b"--b--\r\n", "multipart/form-data", 400, "bad_request"),
        ("cifar", "POST", b"--b\r\n\r\nx\r\n--b--\r\n", FORM, 400, "bad_request"),
        ("cifar", "POST", part("x", b"") * 20_000 + b"--b--\r\n", FORM, 400, "bad_request"),
    ],
)
def test_what_the_host_itself_rejects(
    host: Host, path: str, method: str, body: bytes, content_type: str | None, status: int, code: str
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = web.request(method, f"http://{host.http}/predictions/{path}", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_callers_own_headers_of_torchserves_names_mean_nothing(host: Host) -> None:
    headers = {"explain": "True", "url_path": "/x", "x-convscope-method": "GET"}
    response = web.post(f"http://{host.http}/predictions/cifar", content=PICTURE, headers=headers).json()
    assert "explanation" not in response["results"][0]
    assert web.post(f"http://{host.http}/predictions/cifar", headers=headers).status_code == 400


def test_a_request_beyond_the_limit_is_rejected_over_grpc(host: Host) -> None:
    with grpc.insecure_channel(host.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\0" * (2 * 2**20 + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
