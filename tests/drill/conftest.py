"""One running stack for the drill; skipped, with the reason, where there is no Docker engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import mark_docker
from tests.drill import table
from tests.drill.site import Site

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_docker(
        [item for item in items if HERE in item.path.parents and "site" in getattr(item, "fixturenames", ())], 3000
    )


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    work = Path(tempfile.mkdtemp(prefix="convscope-drill-"))
    work.chmod(0o755)
    table.start()
    try:
        with Site(work).running() as running:
            yield running
    finally:
        shutil.rmtree(work)
