"""Spans of TorchServe's workers, in a collector. They are sent when the server stops."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from convscope import Client

from tests.collector import collecting
from tests.e2e.conftest import STORE
from tests.server.harness import launched
from tests.tracing import CHECKS, PATIENT, Asked, ask


@pytest.fixture(scope="module")
def asked(quick_starts: None) -> Iterator[Asked]:
    work = Path(tempfile.mkdtemp(prefix="e2e-"))
    with collecting() as collector:
        own = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        own |= {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test", **PATIENT}
        options = ("--workers", "1", "--models", "cifar", "--log-format", "json")
        with launched(STORE, work, *options, environment=own) as server:
            url, target = (f"127.0.0.1:{server.await_ready().port(what)}" for what in ("REST", "gRPC"))
            with Client(f"http://{url}") as rest, Client(f"grpc://{target}") as rpc:
                forward_s = ask(f"http://{url}", rest, rpc)
            assert not collector.spans
            server.signal(signal.SIGTERM)
            assert server.end() == 0
            yield Asked(collector, server.err, forward_s)
    shutil.rmtree(work)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_spans(asked: Asked, check: Callable[[Asked], None]) -> None:
    check(asked)
