"""Marks that tests get by where they are and what they start, so that no file has to name them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Rooms whose tests start a TorchServe, a browser, a Prometheus or a training run; functions that start one elsewhere.
STARTING_ROOMS = frozenset({"e2e", "docker", "gpu", "watching", "page", "training", "archive"})
STARTERS = frozenset({"launched", "listening", "serve", "venv"})
STARTING_FIXTURES = frozenset({"stand_in"})
SHARED_SERVER = frozenset({"e2e", "docker"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start a server, and keep those that share one in one process of pytest-xdist."""
    for item in items:
        room, *_ = item.path.relative_to(HERE).parts
        starters = STARTERS & vars(getattr(item, "module", None) or object).keys()
        if room in STARTING_ROOMS or starters or STARTING_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(room if room in SHARED_SERVER else str(item.path)))
