"""Marks tests by their folder and by what they start; and a quick worker."""

from __future__ import annotations

import os
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

# As a worker has it with more workers than cores. With more threads, those of one test wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# jsonschema does without it, for what none of ours has: it checks IRIs, and takes two seconds to import.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out."""
    for item in items:
        room, *_ = item.path.relative_to(HERE).parts
        if room in STARTING_ROOMS or starts_server(item) or tries_many_cases(item):
            item.add_marker(pytest.mark.slow)


def starts_server(item: pytest.Item) -> bool:
    """Tell whether a test, or another one of its file, starts a server or another process."""
    names = vars(getattr(item, "module", None) or object).keys()
    return bool(STARTERS & names or STARTING_FIXTURES & set(getattr(item, "fixturenames", ())))


def tries_many_cases(item: pytest.Item) -> bool:
    """Tell whether a test generates its cases (Hypothesis) or goes through a large product of them."""
    return item.path.name in EXHAUSTIVE or item.get_closest_marker("hypothesis") is not None


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has what this one has, and a TorchServe whose worker does not import torch.

    It imports torch, four processor seconds each time, to tell a tensor among the values of a response. Ours are bytes.
    """
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    installed = Path(sysconfig.get_path("purelib"))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "ours.pth").write_text(f"import site; site.addsitedir({str(installed)!r})\n")
    changed = Path("ts/protocol/otf_message_handler.py")
    for parent in (Path("ts"), changed.parent):
        (site / parent).mkdir()
        for entry in (installed / parent).iterdir():
            place = parent / entry.name
            if place not in (changed, changed.parent) and entry.name != "__pycache__":
                (site / place).symlink_to(entry)
    text = (installed / changed).read_text()
    assert text.count("\nimport torch\n") == 1
    (site / changed).write_text(text.replace("\nimport torch\n", "\nclass torch:\n    class Tensor:\n        pass\n"))
    return folder / "bin/python"


@pytest.fixture(scope="module")
def quick_starts(quick_python: Path) -> Iterator[None]:
    """Start the module's servers with the Python whose workers do not import torch until a request needs it."""
    from tests.server.harness import Launched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launched, "python", str(quick_python))
        yield
