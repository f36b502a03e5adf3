"""The committed archives behind a real TorchServe, and a client on each transport."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from convscope import Client

from tests.server.harness import ROOT, Launched

STORE = ROOT / "model_store"
# The contract holds, but for what the patches are for, in a TorchServe without them too (`server.patches`).
CONTRACT = frozenset(f"test_{part}.py" for part in ("predictions", "carriers", "formats", "refusals", "attacks"))
UNPATCHED = ("cifar", "digits", "edges")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of the contract on both TorchServes, and any other on the one that it is marked for."""
    if "patches" in metafunc.fixturenames:
        marked = [name for name in ("patched", "unpatched") if metafunc.definition.get_closest_marker(name)]
        both = ["patched", "unpatched"] if metafunc.definition.path.name in CONTRACT else ["patched"]
        metafunc.parametrize("patches", marked or both, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what asks the unpatched TorchServe for a model that it does not serve."""
    left_out = [
        item
        for item in items
        if (params := getattr(getattr(item, "callspec", None), "params", {})).get("patches") == "unpatched"
        and params.get("model", "cifar") not in UNPATCHED
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def patches(request: pytest.FixtureRequest) -> str:
    """Either "patched" or "unpatched": what the server is."""
    return str(request.param)


@pytest.fixture(scope="session")
def server(patches: str, quick_python: Path) -> Iterator[Launched]:
    """Its workers import torch when a request needs it; tests/archiver has a stock one, whose worker does at once."""
    work = Path(tempfile.mkdtemp(prefix="e2e-"))
    options = ["--no-patches", "--models", ",".join(UNPATCHED)] if patches == "unpatched" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launched, "python", str(quick_python))
        running = Launched(STORE, work, "--max-request-mb", "20", *options)  # Beyond it every byte costs time.
    with contextlib.closing(running):
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


@pytest.fixture(scope="session")
def http(server: Launched) -> Iterator[httpx.Client]:
    """HTTP as it is, a connection for each request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    same = {"X-Request-Id": "the-same"}  # Or each reply would have an id of its own.
    url = f"http://127.0.0.1:{server.port('REST')}"
    with httpx.Client(base_url=url, timeout=60, headers=same, limits=limits) as client:
        yield client


@pytest.fixture
def same_workers(server: Launched) -> Iterator[None]:
    """Hold that the workers are the same processes before and after."""
    before = server.workers()
    assert len(before) >= len(UNPATCHED)
    yield
    assert server.workers() == before


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, rest: Client, grpc: Client) -> Client:
    return rest if request.param == "rest" else grpc
