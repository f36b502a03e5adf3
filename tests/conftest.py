"""Marks that tests get by where they are and what they start, so that no file has to name them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Rooms whose tests start a TorchServe, a browser, a Prometheus or a training run; what starts a process elsewhere.
STARTING_ROOMS = frozenset({"e2e", "docker", "drill", "gpu", "watching", "page", "training", "archiver"})
STARTERS = frozenset({"launched", "listening", "serve", "serving", "subprocess", "venv"})
STARTING_FIXTURES = frozenset({"stand_in"})
EXHAUSTIVE = frozenset(
    f"test_{subject}.py" for subject in ("captured", "carriers", "explanations", "geometry", "gpu", "hostile")
)
SHARED_SERVER = frozenset({"e2e", "docker"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option that is read by tests/e2e."""
    parser.addoption(
        "--no-patches", action="store_true", help="run tests/e2e with a TorchServe that is not patched (server.patches)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out, and keep tests that share a server in one process of pytest-xdist."""
    for item in items:
        room, *_ = item.path.relative_to(HERE).parts
        if room in STARTING_ROOMS or starts_server(item) or tries_many_cases(item):
            item.add_marker(pytest.mark.slow)
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(room if room in SHARED_SERVER else str(item.path)))
    if config.getoption("no_patches"):
        patched = [item for item in items if item.get_closest_marker("patched")]
        config.hook.pytest_deselected(items=patched)
        items[:] = [item for item in items if item not in patched]


def starts_server(item: pytest.Item) -> bool:
    """Tell whether a test, or another one of its file, starts a server or another process."""
    names = vars(getattr(item, "module", None) or object).keys()
    return bool(STARTERS & names or STARTING_FIXTURES & set(getattr(item, "fixturenames", ())))


def tries_many_cases(item: pytest.Item) -> bool:
    """Tell whether a test generates its cases (Hypothesis) or goes through a large product of them."""
    return item.path.name in EXHAUSTIVE or item.get_closest_marker("hypothesis") is not None
