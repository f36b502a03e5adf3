"""`--engine`: what runs the networks, behind a real TorchServe."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from convscope import Client
from PIL import Image

from tests.e2e.conftest import STORE
from tests.e2e.reference import by_hand
from tests.server.harness import ROOT, Launched, launched

CAT = ROOT / "samples/cat.png"


@pytest.fixture(scope="module")
def eager() -> Iterator[Launched]:
    work = Path(tempfile.mkdtemp(prefix="engine-"))
    with launched(STORE, work, "--workers", "1", "--models", "cifar", "--engine", "torch") as running:
        yield running.await_ready()
    shutil.rmtree(work)


@pytest.mark.parametrize("address", ["http://127.0.0.1:{REST}", "grpc://127.0.0.1:{gRPC}"])
def test_torch_gives_the_maps_and_logits_of_the_network_run_by_hand_bit_for_bit(eager: Launched, address: str) -> None:
    ports = {name: eager.port(name) for name in ("REST", "gRPC")}
    with Client(address.format(**ports)) as client:
        seen = client.predict(CAT, model="cifar", layers="all", top_k=0)
    assert seen.engine.startswith("torch-")
    expected = by_hand(np.asarray(Image.open(CAT).convert("RGB")))
    logits = {score.index: np.float32(score.logit) for score in seen.top}
    found = seen.maps | {"logits": np.array([logits[index] for index in range(10)])}
    for what, values in expected.items():
        assert np.array_equal(found[what], values), what


def test_the_card_says_which_engine_runs(eager: Launched) -> None:
    with Client(f"http://127.0.0.1:{eager.port('REST')}") as client:
        assert client.model_card("cifar").engine.startswith("torch-")


def test_16_bits_are_near_float32_and_the_card_says_so() -> None:
    work = Path(tempfile.mkdtemp(prefix="precision-"))
    with launched(STORE, work, "--workers", "1", "--models", "cifar", "--precision", "bfloat16") as running:
        running.await_ready()
        with Client(f"http://127.0.0.1:{running.port('REST')}") as client:
            seen = client.predict(CAT, model="cifar", layers="all")
            assert client.model_card("cifar").engine.endswith("-bfloat16")
    shutil.rmtree(work)
    expected = by_hand(np.asarray(Image.open(CAT).convert("RGB")))
    assert seen.engine.endswith("-bfloat16")
    for name, values in seen.maps.items():
        off = np.abs(values - expected[name]).max() / np.abs(expected[name]).max()
        assert 1e-5 < off < 5e-2, name
