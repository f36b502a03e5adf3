"""Explanations through a real TorchServe, on both transports, by its own path and by a field."""

from __future__ import annotations

import io
import json
from pathlib import Path

import grpc as grpcio
import httpx
import numpy as np
import pytest
from convscope import BadRequest, Client, Explanation, UnknownLayer
from convscope._wire import convscope_pb2 as wire
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest
from PIL import Image

from tests.e2e.reference import archived
from tests.pictures import FIVE_BY_FIVE
from tests.server.harness import ROOT, Launched

SAMPLES = ROOT / "samples"
CAT = SAMPLES / "cat.png"
METHODS = ("grad_cam", "occlusion", "input_gradient", "integrated_gradients")
SHAPES = {
    "grad_cam": (1, 16, 16),
    "occlusion": (1, 32, 32),
    "input_gradient": (3, 32, 32),
    "integrated_gradients": (3, 32, 32),
}


@pytest.mark.parametrize("method", METHODS)
def test_both_transports_explain_alike(rest: Client, grpc: Client, method: str) -> None:
    one, two = (client.explain(CAT, model="cifar", method=method, target=3) for client in (rest, grpc))
    assert one == two
    assert one.heat.shape == SHAPES[method]
    assert (one.target, one.label) == (3, "cat")
    assert np.abs(one.heat).max() > 0


def test_a_list_keeps_its_order_and_its_errors(client: Client) -> None:
    cat, bad, ship = client.explain([CAT, b"text", SAMPLES / "ship.png"], model="cifar")
    assert bad.error is not None
    assert cat == client.explain(CAT, model="cifar")
    assert ship == client.explain(SAMPLES / "ship.png", model="cifar")
    assert not np.array_equal(cat.heat, ship.heat)


def test_integrated_gradients_add_up_to_the_change_of_the_logit(client: Client) -> None:
    found = client.explain(CAT, model="cifar", method="integrated_gradients", steps=100)
    _, card = archived("cifar")
    mean = np.array(card["preprocessing"]["mean"], np.float32)
    grey = np.broadcast_to(mean, (32, 32, 3)).copy()
    score, base = (
        {entry.index: entry.logit for entry in client.predict(picture, model="cifar", top_k=0).top}[found.target]
        for picture in (CAT, grey)
    )
    assert found.delta is not None
    assert found.heat.astype(np.float64).sum() == pytest.approx(score - base + found.delta, abs=1e-3)
    assert abs(found.delta) < 0.01 * abs(score - base)


def test_what_does_not_suit_the_network_is_refused(client: Client) -> None:
    with pytest.raises(BadRequest, match="grad_cam does without"):
        client.explain(CAT, model="cifar", method="cam")
    with pytest.raises(BadRequest, match="no classes"):
        client.explain(FIVE_BY_FIVE, model="edges")
    with pytest.raises(UnknownLayer, match="conv1, conv2"):
        client.explain(CAT, model="cifar", layer="nose")


def test_explanations_are_told_from_predictions_by_their_path(http: httpx.Client, rest: Client) -> None:
    reply = http.post("/explanations/cifar/1.0", content=CAT.read_bytes())
    assert reply.status_code == 200
    [result] = reply.json()["results"]
    expected = rest.explain(CAT, model="cifar")
    assert result["explanation"]["method"] == "grad_cam"
    assert result["explanation"]["label"] == expected.label == result["top"][0]["label"]
    assert "explanation" not in http.post("/predictions/cifar", content=CAT.read_bytes()).json()["results"][0]


def test_the_path_takes_every_kind_of_body(http: httpx.Client) -> None:
    message = wire.PredictRequest(pictures=[CAT.read_bytes()], explain=wire.Explain(method="occlusion"))
    protobuf = {"Content-Type": "application/x-protobuf"}
    bodies = [
        http.post("/explanations/cifar", content=CAT.read_bytes(), headers={"X-Convscope-Explain": "occlusion"}),
        http.post("/explanations/cifar", files={"data": CAT.read_bytes()}, data={"explain": "occlusion"}),
        http.post("/predictions/cifar", files={"data": CAT.read_bytes()}, data={"explain": '{"method": "occlusion"}'}),
        http.post("/explanations/cifar", content=message.SerializeToString(), headers=protobuf),
        http.post("/predictions/cifar", content=message.SerializeToString(), headers=protobuf),
    ]
    [said] = {json.dumps(body.json()["results"]) for body in bodies}
    assert json.loads(said)[0]["explanation"]["method"] == "occlusion"


def test_a_plain_key_asks_over_grpc(server: Launched, grpc: Client) -> None:
    with grpcio.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
        predict = channel.unary_unary(
            "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
            request_serializer=PredictionsRequest.SerializeToString,
            response_deserializer=PredictionResponse.FromString,
        )
        keys = {"data": CAT.read_bytes(), "explain": b"occlusion,window=8,step=8"}
        answer = predict(PredictionsRequest(model_name="cifar", input=keys), timeout=30)
    [result] = wire.PredictReply.FromString(answer.prediction).results
    expected = grpc.explain(CAT, model="cifar", method="occlusion", window=8, step=8)
    assert np.array_equal(np.frombuffer(result.explanation.heat.data, "<f4"), expected.heat.ravel())


@pytest.mark.parametrize("view", ["overlay", "heat"])
def test_a_picture_of_the_explanation_can_be_looked_at(http: httpx.Client, view: str) -> None:
    headers = {"Accept": "image/png", "X-Convscope-Explain": f"integrated_gradients,view={view}"}
    reply = http.post("/explanations/cifar", content=CAT.read_bytes(), headers=headers)
    assert reply.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(reply.content)).size == (256, 256)


def test_what_the_client_paints_is_what_the_service_paints(http: httpx.Client, rest: Client) -> None:
    found = rest.explain(CAT, model="cifar", method="occlusion")
    for view, painted in (("overlay", found.overlay()), ("heat", found.heatmap())):
        headers = {"Accept": "image/png", "X-Convscope-Explain": f"occlusion,view={view}"}
        reply = http.post("/explanations/cifar", content=CAT.read_bytes(), headers=headers)
        served = np.asarray(Image.open(io.BytesIO(reply.content)))
        assert np.abs(served.astype(int) - painted).max() <= 1


def test_requests_for_explanations_are_counted_as_requests(
    server: Launched, http: httpx.Client, rest: Client, grpc: Client
) -> None:
    def count() -> float:
        text = http.get(f"http://127.0.0.1:{server.port('metrics')}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("convscope_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'model="digits"' in line and 'code="ok"' in line)

    before = count()
    for client in (rest, grpc):
        client.explain(SAMPLES / "digit-3.png", model="digits", method="occlusion")  # Which needs no torch.
    assert count() == before + 2


def test_an_explanation_is_saved_as_files(client: Client, tmp_path: Path) -> None:
    found = client.explain(CAT, model="cifar", method="occlusion")
    assert isinstance(found, Explanation)
    folder = found.save(tmp_path / "why")
    arrays = np.load(folder / "explanation.npz", allow_pickle=False)
    assert np.array_equal(arrays["heat"], found.heat)
    assert np.array_equal(np.asarray(Image.open(folder / "overlay.png")), found.overlay())
    assert json.loads((folder / "manifest.json").read_text())["method"] == "occlusion"
