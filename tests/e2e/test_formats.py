"""REST as curl speaks it: every body in, every format out, on a real TorchServe."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from convscope import Client
from PIL import Image

from tests.pictures import npy
from tests.server.harness import ROOT, Launched

CAT = (ROOT / "samples/cat.png").read_bytes()
SHIP = (ROOT / "samples/ship.png").read_bytes()


@pytest.fixture
def expected(http: httpx.Client) -> Any:
    reply = http.post("/predictions/cifar", content=CAT, headers={"X-Convscope-Layers": "conv2"})
    assert reply.status_code == 200
    return reply.json()


def test_a_picture_can_be_put_as_curl_does(http: httpx.Client, expected: Any) -> None:
    reply = http.put("/predictions/cifar/1.0", content=CAT, headers={"x-convscope-layers": "conv2"})
    assert reply.json() == expected


def test_a_form_gives_the_same(http: httpx.Client, expected: Any) -> None:
    reply = http.post("/predictions/cifar", files={"data": ("cat.png", CAT)}, data={"layers": "conv2", "top_k": "5"})
    assert reply.json() == expected


@pytest.mark.patched
def test_repeated_parts_of_a_form_are_pictures_in_order(http: httpx.Client, expected: Any) -> None:
    files = [("data", ("cat.png", CAT)), ("data", ("ship.png", SHIP)), ("data", ("cat.png", CAT))]
    results = http.post("/predictions/cifar", files=files, data={"top_k": "1"}).json()["results"]
    labels = [result["top"][0]["index"] for result in results]
    assert labels[0] == labels[2] == expected["results"][0]["top"][0]["index"]
    assert len(results) == 3
    assert results[0] != results[1]


def test_json_gives_the_same(http: httpx.Client, expected: Any) -> None:
    body = {"data": [base64.b64encode(CAT).decode()], "layers": ["conv2"]}
    assert http.post("/predictions/cifar", json=body).json() == expected


def test_an_array_gives_the_same(http: httpx.Client, expected: Any) -> None:
    array = np.asarray(Image.open(io.BytesIO(CAT)).convert("RGB"))
    headers = {"Content-Type": "application/x-npy", "X-Convscope-Layers": "conv2"}
    assert http.post("/predictions/cifar", content=npy(array), headers=headers).json() == expected


def test_npz_opens_with_numpy_and_holds_the_same_cells(http: httpx.Client, expected: Any) -> None:
    headers = {"Accept": "application/x-npz", "X-Convscope-Layers": "conv2"}
    reply = http.post("/predictions/cifar", content=CAT, headers=headers)
    arrays = np.load(io.BytesIO(reply.content), allow_pickle=False)
    tensor = expected["results"][0]["maps"]["conv2"]
    cells = np.frombuffer(base64.b64decode(tensor["data"]), np.float32).reshape(tensor["shape"])
    assert reply.headers["content-type"] == "application/x-npz"
    assert np.array_equal(arrays["conv2"], cells)
    assert json.loads(str(arrays["reply"]))["results"][0]["top"] == expected["results"][0]["top"]


def test_png_is_a_grid_of_tiles(http: httpx.Client) -> None:
    headers = {"Accept": "image/png", "X-Convscope-Layers": "conv1"}
    reply = http.post("/predictions/cifar", content=CAT, headers=headers)
    assert reply.headers["content-type"] == "image/png"
    grid = Image.open(io.BytesIO(reply.content))
    assert (grid.mode, grid.size) == ("L", (8 * 64 + 7, 2 * 64 + 1))


def test_an_empty_get_is_the_card_and_readiness(http: httpx.Client) -> None:
    reply = http.get("/predictions/cifar")
    card = reply.json()
    assert reply.status_code == 200
    assert [layer["name"] for layer in card["layers"]] == ["conv1", "conv2"]
    assert len(card["classes"]) == 10
    assert card["training"]["test_accuracy"] >= 0.65


def test_the_metrics_count_both_transports(server: Launched, http: httpx.Client, rest: Client, grpc: Client) -> None:
    def count() -> float:
        text = http.get(f"http://127.0.0.1:{server.port('metrics')}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("convscope_torchserve_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'model="digits"' in line)

    before = count()
    rest.predict(ROOT / "samples/digit-3.png", model="digits")
    grpc.predict(ROOT / "samples/digit-3.png", model="digits")
    assert count() == before + 2
