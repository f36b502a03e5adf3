"""One deployment for all tests that need a cluster; those are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster import Cluster, cluster_missing

HERE = Path(__file__).parent
NEED_NO_CLUSTER = "test_manifests.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents and item.path.name != NEED_NO_CLUSTER]
    missing = cluster_missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.kubernetes)
        item.add_marker(pytest.mark.timeout(1800))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"no cluster to test on: {missing}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    work = Path(tempfile.mkdtemp(prefix="convscope-kubernetes-"))
    running = Cluster(work)
    try:
        running.bring_images()
        running.up()
        yield running
    finally:
        running.down()
        shutil.rmtree(work)
