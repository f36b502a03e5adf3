"""Marks that tests get by where they are and what they start, so that no file has to name them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Rooms whose tests start a TorchServe, a browser, a Prometheus, kubectl or a training run; and what starts a process in
# others.
STARTING_ROOMS = frozenset(
    {"e2e", "docker", "drill", "gpu", "kubernetes", "watching", "page", "training", "archiver", "kserve"}
)
STARTERS = frozenset({"launched", "listening", "serve", "serving", "subprocess", "venv"})
STARTING_FIXTURES = frozenset({"stand_in"})
EXHAUSTIVE = frozenset(
    f"test_{subject}.py" for subject in ("captured", "carriers", "explanations", "geometry", "gpu", "hostile")
)
# What takes longest is handed out first, or one process would still run it when the others are done. The rest keeps the
# order of the folders.
LONGEST = (
    *("e2e patched", "server/test_watch.py", "archiver exporting", "e2e unpatched", "server/test_life.py"),
    *("server/test_refusals.py", "watching/test_live.py", "archiver/test_packages.py", "training/test_train.py"),
    *("archiver/test_your_own_network.py", "watching/test_rules.py", "archiver/test_stock_torchserve.py"),
    *("e2e/test_engines.py", "e2e/test_demo.py", "server/test_serving.py", "client/test_install.py"),
)
# The first export for ONNX Runtime in a process takes six seconds longer than the next.
EXPORTING = frozenset(f"archiver/test_{subject}.py" for subject in ("any_network", "graph", "layouts", "outputs"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out."""
    for item in items:
        room, *_ = item.path.relative_to(HERE).parts
        if room in STARTING_ROOMS or starts_server(item) or tries_many_cases(item):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # In a process of pytest-xdist.
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)  # Of pytest-xdist.
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests by the group. Marks (`xdist_group`) do not work with pytest 9.2 and pytest-xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Scheduling(config, log)


def group(nodeid: str) -> str:
    """Return which tests run in the same process: those of a file, or those that share what is slow to start."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    if path.startswith("docker/"):
        return "docker"
    if path in EXPORTING:
        return "archiver exporting"
    if path.startswith("e2e/") and (server := re.search(r"[\[-]((?:un)?patched)[\]-]", nodeid)):
        return f"e2e {server[1]}"
    return path


def starts_server(item: pytest.Item) -> bool:
    """Tell whether a test, or another one of its file, starts a server or another process."""
    names = vars(getattr(item, "module", None) or object).keys()
    return bool(STARTERS & names or STARTING_FIXTURES & set(getattr(item, "fixturenames", ())))


def tries_many_cases(item: pytest.Item) -> bool:
    """Tell whether a test generates its cases (Hypothesis) or goes through a large product of them."""
    return item.path.name in EXHAUSTIVE or item.get_closest_marker("hypothesis") is not None
