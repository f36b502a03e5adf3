"""Tests that need Prometheus are skipped where there is none, with one reason."""

from __future__ import annotations

import pytest

from tests.watching.tools import MISSING, find


@pytest.fixture(scope="session")
def prometheus_installed() -> None:
    if not (find("promtool") and find("prometheus")):
        pytest.skip(MISSING)
