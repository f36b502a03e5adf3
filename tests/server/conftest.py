"""A folder for private directories whose path is short enough for the sockets in it, and cheap starts."""

import shutil
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

from tests.server.harness import Launched

# TorchServe's worker imports torch, two processor seconds each time, to tell a tensor among the values of a response.
TORCH = "class Tensor:\n    pass\n"


@pytest.fixture
def work():
    path = Path(tempfile.mkdtemp(prefix="srv-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def python_without_torch(tmp_path_factory):
    """The Python of an environment that has what this one has, but for torch, which is three words there."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text(TORCH)
    (site / "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin/python"


@pytest.fixture(scope="module", autouse=True)
def cheap_starts(python_without_torch):
    """This room's archives need no torch, and none of its tests asks how fast Java becomes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launched, "python", str(python_without_torch))
        yield
