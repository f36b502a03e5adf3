"""The examples for a network of one's own, in the README and in docs/your-own-network.md, run as they stand."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from archiver.__main__ import main
from handlers import loading
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_message
from tests.pictures import npy

ROOT = Path(__file__).parents[2]
TEXT = "\n".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/your-own-network.md"))
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
COMMANDS = list(
    dict.fromkeys(re.findall(r"^(?:PYTHONPATH=\S+ )?\.venv/bin/python -m archiver (.*)", TEXT, re.MULTILINE))
)
MAKING = [command for command in COMMANDS if "--timm" not in command]  # That of timm is in test_packages.
NAMES = [re.findall(r"--(?:name|torchvision) (\S+)", command)[-1] for command in MAKING]
PACKAGE = {
    "lite_nets/__init__.py": "from .nets import *\n",
    "lite_nets/nets.py": """
from torch import nn

class Lite(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
""",
    "lite_nets-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: lite-nets\nVersion: 1.0\n",
    "lite_nets-1.0.dist-info/top_level.txt": "lite_nets\n",
    "lite_nets-1.0.dist-info/RECORD": "lite_nets/__init__.py,,\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with the files that the examples show, and an installed package."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for name, content in PACKAGE.items():
        path = tmp_path / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    before = set(sys.modules)
    yield tmp_path
    for name in [name for name in sys.modules if name not in before]:
        if name.split(".")[0] in {Path(file).parts[0].removesuffix(".py") for file in (*FILES, *PACKAGE)}:
            del sys.modules[name]


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def build(words: list[str]) -> nn.Module:
    """Build the network that a command names, as its training did."""
    arguments = json.loads(option(words, "--arguments") or "{}")
    torch.manual_seed(0)
    if name := option(words, "--torchvision"):
        return torchvision.models.get_model(name, weights=None, **arguments)
    module, _, name = (option(words, "--arch") or "").partition(":")
    return getattr(importlib.import_module(module.removesuffix(".py")), name)(**arguments)


def leave_behind(words: list[str]) -> int:
    """Write what training left: weights, and a label for each output; return how many outputs there are."""
    network = build(words).eval()
    state = network.state_dict()
    weights = option(words, "--state-dict") or ""
    whole = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3}
    torch.save(whole if weights.endswith(".ckpt") else state, weights)
    channels = int(option(words, "--channels") or 3)
    with torch.no_grad():
        returned = network(torch.rand(1, channels, 64, 64))
    outputs = int((returned[key] if (key := option(words, "--output")) else returned).shape[1])
    if classes := option(words, "--classes"):
        Path(classes).write_text("".join(f"label {number}\n" for number in range(outputs)))
    return outputs


@pytest.mark.parametrize("command", MAKING, ids=NAMES)
def test_an_example_makes_an_archive_that_answers(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    outputs = leave_behind(words)
    size = [] if "--size" in words else ["--size", "64x64"]  # Published sizes are in test_recipes.
    status = main([*words, *size, "--store", "model_store"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    name = option(words, "--name") or option(words, "--torchvision") or ""
    ZipFile(folder / "model_store" / f"{name}.mar").extractall(folder / "unpacked")
    for source in (*FILES, *{Path(file).parts[0] for file in PACKAGE}):  # The server has the archive alone.
        monkeypatch.delitem(sys.modules, source.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(folder / "unpacked")
    service = loading.load(
        folder / "unpacked",
        model=name,
        version="1.0",
        config={},
        batch_size=1,
        gpu=None,
        settings=Settings.from_environment({"CONVSCOPE_ENGINE": "torch"}),
    )
    channels = int(option(words, "--channels") or 3)
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, channels), np.uint8)
    reply = ask_message(service, wire.PredictRequest(pictures=[npy(picture)], layers=["all"], pool=1, top_k=0))
    assert not reply.HasField("error"), reply.error
    [result] = reply.results
    assert result.maps
    assert len(result.top) == (0 if option(words, "--scores") == "none" else outputs)


def test_every_kind_has_an_example() -> None:
    """What an example shows and no command uses is out of date."""
    used = " ".join(COMMANDS)
    for wanted in (
        "--torchvision",
        "--timm",
        ".ckpt",
        "sigmoid",
        "value",
        "--scores none",
        "--channels 1",
        "--channels 5",
        "--output",
        "output:",
        "vit",
    ):
        assert wanted in used, wanted
    for file in FILES:
        module = file.removesuffix(".py").replace("/", ".")
        assert module in used or any(f"from {module} " in content for content in FILES.values()), file
