"""One running stack for all tests of this room; skipped, with the reason, where there is no Docker engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import Stack, engine_missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if not mine:
        return
    missing = engine_missing()
    for item in mine:
        item.add_marker(pytest.mark.docker)
        item.add_marker(pytest.mark.timeout(900))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"no Docker engine: {missing}"))


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
