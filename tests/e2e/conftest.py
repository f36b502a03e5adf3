"""The committed archives behind a real TorchServe, and a client on each transport."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from convscope import Client

from tests.server.harness import ROOT, Launched, launched

STORE = ROOT / "model_store"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Launched]:
    work = Path(tempfile.mkdtemp(prefix="e2e-"))
    options = ["--no-patches"] if request.config.getoption("no_patches") else []
    with launched(STORE, work, "--workers", "1", *options) as running:
        yield running.await_ready()
    shutil.rmtree(work)


@pytest.fixture(scope="session")
def rest(server: Launched) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{server.port('REST')}") as client:
        yield client


@pytest.fixture(scope="session")
def grpc(server: Launched) -> Iterator[Client]:
    with Client(f"grpc://127.0.0.1:{server.port('gRPC')}") as client:
        yield client


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, rest: Client, grpc: Client) -> Client:
    return rest if request.param == "rest" else grpc
