"""One running stack for the drill; skipped, with the reason, where there is no Docker engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import engine_missing
from tests.drill import table
from tests.drill.site import Site

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents and "site" in getattr(item, "fixturenames", ())]
    if not mine:
        return
    missing = engine_missing()
    for item in mine:
        item.add_marker(pytest.mark.docker)
        item.add_marker(pytest.mark.timeout(1500))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"no Docker engine: {missing}"))


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
