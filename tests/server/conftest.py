"""A folder for private directories whose path is short enough for the sockets in it, and quick starts."""

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def work():
    path = Path(tempfile.mkdtemp(prefix="srv-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module", autouse=True)
def _quick_starts(quick_starts):
    """This room's archives need no torch, and none of its tests asks how fast Java becomes."""
