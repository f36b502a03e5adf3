"""The service under test: two models behind `python -m server`, or behind the gateway in Docker."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.load import MODELS, Target
from tests.campaign.watch import Watch
from tests.docker.stack import Stack
from tests.server.harness import ROOT, Launched, launched


@contextlib.contextmanager
def own_service(workers: int) -> Iterator[tuple[Target, Watch, Launched]]:
    """Start `python -m server` with two models, without a gateway."""
    work = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        options = ("--models", ",".join(MODELS), "--workers", str(workers))
        as_operated = {"_JAVA_OPTIONS": ""}  # Not as tests start Java.
        with launched(ROOT / "model_store", work, *options, environment=as_operated) as server:
            server.await_ready()
            target = Target(
                f"http://127.0.0.1:{server.port('REST')}",
                f"127.0.0.1:{server.port('gRPC')}",
                metrics=f"http://127.0.0.1:{server.port('metrics')}/metrics",
            )
            yield target, Watch(server.process.pid), server
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def docker_service() -> Iterator[tuple[Target, Stack]]:
    """Start the compose file's gateway with one replica, in a project of its own."""
    work = Path(tempfile.mkdtemp(prefix="campaign-docker-"))
    work.chmod(0o755)
    stack = Stack(work, MODELS)
    try:
        stack.compose("build", "torchserve")
        stack.up(1)
        target = Target(
            f"https://localhost:{stack.port}", f"localhost:{stack.port}", str(stack.ca_file), stack.key, gateway=True
        )
        yield target, stack
    finally:
        stack.down()
        shutil.rmtree(work, ignore_errors=True)
