"""A folder for private directories whose path is short enough for the sockets in it."""

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def work():
    path = Path(tempfile.mkdtemp(prefix="srv-"))
    yield path
    shutil.rmtree(path)
