"""Probes and filters of the committed archives, through the command line and a real TorchServe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from convscope import Client

from tests.e2e.reference import archived
from tests.e2e.test_command_line import convscope
from tests.server.harness import Launched


@pytest.fixture(params=["rest", "grpc"])
def url(request: pytest.FixtureRequest, server: Launched) -> str:
    if request.param == "rest":
        return f"http://127.0.0.1:{server.port('REST')}"
    return f"grpc://127.0.0.1:{server.port('gRPC')}"


def test_cifar_follows_shifts_as_its_strides_say(url: str, tmp_path: Path) -> None:
    pictures = ["samples/cat.png", "samples/ship.png"]
    done = convscope("probe", "shift", *pictures, "--model", "cifar", "--url", url, "--json", "--save", str(tmp_path))
    assert done.returncode == 0, done.stderr
    interior = json.loads(done.stdout)["measures"]["interior"]
    assert max(interior["conv1"]) < 1e-5
    assert max(interior["conv2"][1::2]) < 1e-5
    assert min(interior["conv2"][::2]) > 0.05
    assert {path.name for path in tmp_path.iterdir()} == {"shift-cifar.json", "shift-cifar.png"}


def test_edges_of_any_size_follow_every_shift(url: str) -> None:
    done = convscope("probe", "shift", "samples/square.png", "--model", "edges", "--steps", "1", "--url", url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measures"]["interior"]["conv1"] == [pytest.approx(0, abs=1e-5)]


def test_filters_are_the_archives_weights(client: Client) -> None:
    weights, _ = archived("cifar")
    for layer in ("conv1", "conv2"):
        assert np.array_equal(client.filters("cifar", layer), weights[f"{layer}.weight"].numpy())
