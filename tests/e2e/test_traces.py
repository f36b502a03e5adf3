"""A server with `--engine torch` whose workers send spans to a collector, which they do when it stops."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from convscope import Client, Prediction
from PIL import Image

from tests.collector import collecting
from tests.e2e.conftest import STORE
from tests.e2e.reference import by_hand
from tests.server.harness import ROOT, launched
from tests.tracing import CHECKS, PATIENT, Asked, ask

CAT = ROOT / "samples/cat.png"


class Stopped(NamedTuple):
    """What a server has done that has stopped.

    Attributes:
        asked: Its spans and its log.
        seen: What it said of the cat, by transport.
        engine: What its card named as the engine.
    """

    asked: Asked
    seen: dict[str, Prediction]
    engine: str


@pytest.fixture(scope="module")
def stopped(quick_starts: None) -> Iterator[Stopped]:
    work = Path(tempfile.mkdtemp(prefix="e2e-"))
    with collecting() as collector:
        own = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        own |= {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test", **PATIENT}
        options = ("--workers", "1", "--models", "cifar", "--engine", "torch", "--log-format", "json")
        with launched(STORE, work, *options, environment=own) as server:
            url, target = (f"127.0.0.1:{server.await_ready().port(what)}" for what in ("REST", "gRPC"))
            with Client(f"http://{url}") as rest, Client(f"grpc://{target}") as rpc:
                forward_s = ask(f"http://{url}", rest, rpc)
                seen = {
                    name: client.predict(CAT, model="cifar", layers="all", top_k=0)
                    for name, client in (("rest", rest), ("grpc", rpc))
                }
                engine = rest.model_card("cifar").engine
            assert not collector.spans
            server.signal(signal.SIGTERM)
            assert server.end() == 0
            yield Stopped(Asked(collector, server.err, forward_s), seen, engine)
    shutil.rmtree(work)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_spans(stopped: Stopped, check: Callable[[Asked], None]) -> None:
    check(stopped.asked)


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_torch_gives_the_maps_and_logits_of_the_network_run_by_hand_bit_for_bit(
    stopped: Stopped, transport: str
) -> None:
    seen = stopped.seen[transport]
    assert seen.engine.startswith("torch-")
    assert stopped.engine == seen.engine
    logits = {score.index: np.float32(score.logit) for score in seen.top}
    found = seen.maps | {"logits": np.array([logits[index] for index in range(10)])}
    for what, values in by_hand(np.asarray(Image.open(CAT).convert("RGB"))).items():
        assert np.array_equal(found[what], values), what
