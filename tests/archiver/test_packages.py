"""Installed packages that a network needs travel with it: what is used of them, with their licences."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest
import timm
import torch
from timm.data import ImageNetInfo

from archiver import packing
from archiver.__main__ import main
from archiver.external import look_up_timm
from archiver.recipes import timm_preprocessing
from archiver.trial import noise
from handlers.images.preprocessing import Preprocessing
from tests.archiver import stock

ROOT = packing.HANDLERS.parent
PACKAGE = {
    "toy_nets/__init__.py": """
from .version import __version__
from .squash import squash
from .blocks import Block
from .nets import *
from .data import *
""",
    "toy_nets/version.py": "from importlib.metadata import version\n\n__version__ = version('toy-nets')\n",
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
    "toy_nets/extra/sizes.py": "SIZES: dict[str, int] = {'small': 4}\n",
    "toy_nets/nets/__init__.py": "from .one import *\nfrom .two import *\nfrom .three import *\n",
    "toy_nets/nets/one.py": """
from toy_nets.blocks import Block

def one(size="small"):
    return Block(size)

class One:
    @classmethod
    def of(cls, size="small"):
        return one(size)
""",
    "toy_nets/nets/two.py": "from ..blocks import Block\n\ndef double():\n    return Block('small')\n",
    "toy_nets/nets/three.py": "",
    "toy_nets/data.py": "",
    "toy_nets-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-nets\nVersion: 1.2\n",
    "toy_nets-1.2.dist-info/top_level.txt": "toy_nets\n",
    "toy_nets-1.2.dist-info/licenses/LICENSE": "Toy Licence\n",
    "toy_nets-1.2.dist-info/RECORD": "toy_nets/__init__.py,,\ntoy_nets-1.2.dist-info/licenses/LICENSE,,\n",
}
LOAD = """
import sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[1])
from handlers.images.preprocessing import noise
from handlers.network.archive import load
archive = load(folder)
torch.save(archive.module(torch.from_numpy(noise(archive.preprocessing, 10))).detach(), folder / "scores.pt")
"""
OWN = "from toy_nets import one as build\n\n\ndef net():\n    return build()\n"


def install(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def archive(capsys: pytest.CaptureFixture[str], store: Path, arch: str, *more: str) -> tuple[int, str]:
    size = ("--size", "8x8", "--layers", "auto", "--random-weights", "1")
    status = main(["--arch", arch, "--name", "toy", "--store", str(store), *size, *more])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site-packages").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    return tmp_path


@pytest.mark.parametrize("arch", ["toy_nets.nets.one:one", "toy_nets:one", "toy_nets:One.of", "own.py:net"])
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
    assert b"{'SIZES': ('.sizes', 'SIZES')}" in files["toy_nets/extra/__init__.py"]
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


# It goes another way without its package, and another one still for more pictures than any proof runs.
OPTIONAL = """
import importlib
from torch import nn

try:
    from toy_nets.squash import squash
except ImportError:
    def squash(images):
        return images


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        if len(images) > 9:
            images = importlib.import_module("toy_nets.nets.two").double()(images)
        return squash(self.conv(images))
"""


@pytest.mark.parametrize(
    ("named", "also"),
    [
        pytest.param(["toy_nets"], set(), id="package"),
        pytest.param(["Toy.Nets"], set(), id="distribution"),
        pytest.param(
            ["toy_nets", "toy_nets.nets.two"], {"nets/__init__", "nets/two", "blocks", "version"}, id="module"
        ),
    ],
)
def test_a_package_that_is_named_travels(
    named: list[str], also: set[str], toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(toy, PACKAGE)
    (toy / "own.py").write_text(OPTIONAL)
    assert archive(capsys, toy / "store", f"{toy}/own.py:Net")[0] == 0
    assert not any("toy_nets" in name for name in packing.unpack(toy / "store/toy.mar"))
    options = [part for name in named for part in ("--package", name)]
    status, shown = archive(capsys, toy / "store", f"{toy}/own.py:Net", *options)
    assert status == 0, shown
    packed = {name for name in packing.unpack(toy / "store/toy.mar") if name.startswith("toy_nets/")}
    expected = {"__init__", "squash"} | also | ({"extra/__init__", "extra/sizes"} if also else set())
    assert packed == {"toy_nets/LICENSE", *(f"toy_nets/{name}.py" for name in expected)}


def test_of_a_named_package_that_no_proof_imports_all_travels(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(toy, PACKAGE)
    (toy / "own.py").write_text(OPTIONAL.replace("from toy_nets.squash import squash", "raise ImportError"))
    status, shown = archive(capsys, toy / "store", f"{toy}/own.py:Net", "--package", "toy_nets")
    assert status == 0, shown
    files = packing.unpack(toy / "store/toy.mar")
    whole = {name: code.encode() for name, code in PACKAGE.items() if name.endswith(".py")}
    assert {name: code for name, code in files.items() if name in whole} == whole


@pytest.mark.parametrize(
    ("named", "status", "said"),
    [
        pytest.param("numpy", 0, "not packed: numpy, which the serving image installs", id="numpy"),
        pytest.param("Pillow", 0, "not packed: Pillow, which the serving image installs", id="Pillow"),
        pytest.param("toy_net", 1, "no such package is installed here; there is toy_nets", id="misspelt"),
        pytest.param("toy_nets.nets.four", 1, "--package toy_nets.nets.four: importing it failed", id="module"),
        pytest.param("toy_fast", 1, "compiled modules (core.so)", id="compiled"),
    ],
)
def test_a_package_that_cannot_or_need_not_travel_is_said(
    named: str, status: int, said: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(toy, {**PACKAGE, "toy_fast/__init__.py": "", "toy_fast/core.so": ""})
    (toy / "own.py").write_text(OPTIONAL)
    found, shown = archive(capsys, toy / "store", f"{toy}/own.py:Net", "--package", named)
    assert (found, said in shown) == (status, True), shown


def test_a_package_without_a_licence_file_says_so(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(toy, {name: content for name, content in PACKAGE.items() if not name.endswith(("LICENSE", "RECORD"))})
    status, shown = archive(capsys, toy / "store", "toy_nets:one")
    assert (status, "it brings no licence file" in shown) == (0, True), shown


def test_a_module_of_one_file_travels(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(toy, {"toy_squash.py": PACKAGE["toy_nets/squash.py"]})
    (toy / "own.py").write_text(f"{OPTIONAL}\n\nfrom toy_squash import squash\n")
    assert archive(capsys, toy / "store", f"{toy}/own.py:Net")[0] == 0
    assert packing.unpack(toy / "store/toy.mar")["toy_squash.py"].decode() == PACKAGE["toy_nets/squash.py"]


def test_a_module_imported_by_its_name_must_be_there_too(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "own.py").write_text(OPTIONAL.replace("> 9", "> 0").replace("toy_nets.nets.two", "scipy"))
    status, shown = archive(capsys, toy / "store", f"{toy}/own.py:Net")
    assert (status, "needs the package 'scipy'" in shown) == (1, True), shown


def test_the_example_of_timm_makes_an_archive_that_needs_no_timm(
    toy: Path, stock_python: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of docs/your-own-network.md, for small pictures; the archive is loaded beside public packages."""
    [command] = re.findall(r"-m archiver (--timm .*)", (ROOT / "docs/your-own-network.md").read_text())
    words = shlex.split(command)
    name = words[words.index("--timm") + 1]
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    monkeypatch.chdir(toy)
    torch.save(network.state_dict(), words[words.index("--state-dict") + 1])
    assert main([*words, "--size", "64x64", "--store", "store"]) == 0
    assert "packed: timm" in capsys.readouterr().err
    path = toy / f"store/{name}.mar"
    card = json.loads(packing.unpack(path)["card.json"])
    assert card["architecture"] == f"timm.models.resnet:{name}"
    assert (card["preprocessing"]["mean"], card["preprocessing"]["height"]) == ([0.485, 0.456, 0.406], 64)
    assert len(card["classes"]) == 1000
    assert path.stat().st_size < len(packing.weights(network.state_dict())) + 1_200_000  # Ours included.
    with torch.no_grad():
        expected = network(noise(Preprocessing.from_dict(card["preprocessing"]), 10))
    assert stock.importable(stock_python, ["timm", "toy_nets", "torch"]) == {"torch"}
    ZipFile(path).extractall(toy / "unpacked")
    subprocess.run([stock_python, "-I", "-c", LOAD, toy / "unpacked"], check=True, cwd=toy / "unpacked")
    scores = torch.load(toy / "unpacked/scores.pt", weights_only=True)
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5)  # Another number of threads sums otherwise.


def test_what_timm_publishes_is_taken_and_imagenets_labels_where_weights_were_trained_for_it() -> None:
    published = look_up_timm("test_resnet", {})
    assert published.preprocessing == timm_preprocessing("test_resnet")
    assert (published.preprocessing.size, published.preprocessing.mean) == ((160, 160), (0.5,) * 3)
    old = look_up_timm("convnext_tiny_in22ft1k", {})  # A name that timm has given up.
    assert (old.architecture, old.weights) == ("timm.models.convnext:convnext_tiny", "fb_in22k_ft_in1k")
    assert look_up_timm("test_resnet.r160_in1k", {}).arguments == {"pretrained_cfg": "r160_in1k"}
    grey = look_up_timm("test_resnet", {"in_chans": 1, "img_size": 64, "mean": (0.4,), "std": (0.2,)})
    assert (grey.preprocessing.size, grey.preprocessing.mean, grey.preprocessing.std) == ((64, 64), (0.4,), (0.2,))
    lemmas = ImageNetInfo().label_descriptions()  # In more words.
    alike = sum(
        label.split()[-1].lower() in lemma.lower() for label, lemma in zip(published.classes, lemmas, strict=True)
    )
    assert alike > 900
    for name, arguments in (
        ("test_resnet", {"num_classes": 10}),
        ("vit_small_patch16_224.dino", {}),
        ("test_coatnet", {}),  # It has no weights.
    ):
        assert look_up_timm(name, arguments).classes == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--timm", "test_resnett"], "it has test_resnet", id="name"),
        pytest.param(["--timm", "test_resnet.r161_in1k"], "it has test_resnet.r160_in1k", id="tag"),
        pytest.param(["--timm", "resnet10t", "--arguments", '{"in_chans": 1}'], "give --mean and --std", id="grey"),
        pytest.param(["--timm", "hf-hub:timm/test_resnet"], "timm has no network", id="hub"),
        pytest.param(["--timm", "test_resnet", "--arguments", '{"pretrained": true}'], "not download", id="weights"),
        pytest.param(
            ["--arch", "timm:create_model", "--name", "x", "--arguments", '{"pretrained": true}'],
            "must not download",
            id="weights by create_model",
        ),
    ],
)
def test_a_network_that_timm_does_not_have_or_would_fetch_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(
            [*arguments, "--layers", "auto", "--size", "64x64", "--random-weights", "0", "--store", str(tmp_path)]
        )
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status != 0
    assert said in capsys.readouterr().err
