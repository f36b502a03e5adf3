"""Installed packages that a network needs travel with it: what is used of them, with their licences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from archiver import packing
from archiver.__main__ import main

PACKAGE = {
    "toy_nets/__init__.py": """
from .version import __version__
from .squash import squash
from .blocks import Block
from .nets import *
from .data import *
""",
    "toy_nets/version.py": "__version__ = '1.2'\n",
    "toy_nets/blocks.py": """
from torch import nn
from toy_nets import __version__, squash
from toy_nets.extra import SIZES

class Block(nn.Sequential):
    def __init__(self, size):
        assert __version__ == "1.2"
        super().__init__(nn.Conv2d(3, SIZES[size], 3, padding=1), nn.ReLU())

    def forward(self, images):
        return squash(super().forward(images))
""",
    "toy_nets/squash.py": "import torch\n\ndef squash(images):\n    return torch.tanh(images)\n",
    "toy_nets/extra/__init__.py": "from .sizes import *\n",
    "toy_nets/extra/sizes.py": "SIZES = {'small': 4}\n",
    "toy_nets/nets/__init__.py": "from .one import *\nfrom .two import *\nfrom .three import *\n",
    "toy_nets/nets/one.py": """
from toy_nets.blocks import Block

def one(size="small"):
    return Block(size)
""",
    "toy_nets/nets/two.py": "from ..blocks import Block\n\ndef double():\n    return Block('small')\n",
    "toy_nets/nets/three.py": "",
    "toy_nets/data.py": "",
    "toy_nets-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-nets\nVersion: 1.2\n",
    "toy_nets-1.2.dist-info/top_level.txt": "toy_nets\n",
    "toy_nets-1.2.dist-info/licenses/LICENSE": "Toy Licence\n",
    "toy_nets-1.2.dist-info/RECORD": "toy_nets/__init__.py,,\ntoy_nets-1.2.dist-info/licenses/LICENSE,,\n",
}
OWN = "from toy_nets import one as build\n\n\ndef net():\n    return build()\n"


def install(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def archive(capsys: pytest.CaptureFixture[str], store: Path, arch: str) -> tuple[int, str]:
    size = ("--size", "8x8", "--layers", "auto", "--random-weights", "1")
    status = main(["--arch", arch, "--name", "toy", "--store", str(store), *size])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site-packages").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    return tmp_path


@pytest.mark.parametrize("arch", ["toy_nets.nets.one:one", "toy_nets:one", "own.py:net"])
def test_what_is_used_of_a_package_travels_with_its_licence(
    arch: str, toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(toy, PACKAGE)
    (toy / "own.py").write_text(OWN)
    monkeypatch.chdir(toy)
    status, shown = archive(capsys, toy / "store", arch)
    assert status == 0, shown
    assert "packed: toy-nets 1.2" in shown
    files = packing.unpack(toy / "store/toy.mar")
    assert files["toy_nets/LICENSE"] == b"Toy Licence\n"
    packed = {name for name in files if name.startswith("toy_nets/") and name.endswith(".py")}
    used = {"__init__", "version", "blocks", "squash", "extra/__init__", "extra/sizes", "nets/__init__", "nets/one"}
    assert packed == {f"toy_nets/{name}.py" for name in used}
    assert json.loads(files["card.json"])["layers"]
    assert main(["--refresh", "--store", str(toy / "store")]) == 0


def test_a_package_that_cannot_be_imported_as_a_whole_says_why(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(toy, {**PACKAGE, "toy_nets/data.py": "raise RuntimeError('the data are not there')\n"})
    status, shown = archive(capsys, toy / "store", "toy_nets:one")
    assert (status, "the data are not there" in shown) == (1, True)


def test_a_package_with_compiled_modules_cannot_travel(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(toy, {**PACKAGE, "toy_nets/fast.so": ""})
    (toy / "own.py").write_text(OWN)
    status, shown = archive(capsys, toy / "store", f"{toy}/own.py:net")
    assert status == 1
    assert "compiled modules (fast.so)" in shown
    assert str(toy / "site-packages") not in shown
