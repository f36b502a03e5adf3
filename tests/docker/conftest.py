"""One running stack for all tests of this room; skipped, with the reason, where there is no Docker engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import Stack, mark_docker

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_docker([item for item in items if HERE in item.path.parents], 900)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    work = Path(tempfile.mkdtemp(prefix="convscope-docker-"))
    work.chmod(0o755)
    running = Stack(work)
    try:
        running.build()
        running.up(3)
        yield running
    finally:
        running.down()
        shutil.rmtree(work)
