"""The README's Python runs as it stands, and its tree and options are the real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from convscope.typing import PredictOptions
from PIL import Image

from tests.client.stand_in import StandIn
from tests.client.test_errors import EXCEPTIONS

README = (Path(__file__).parents[2] / "client" / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_python_runs(block: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("cat.png")
    for url, real in (("http://localhost:8080", stand_in.rest_url), ("grpc://localhost:7070", stand_in.grpc_url)):
        block = block.replace(url, real)
    exec(compile(block, "README.md", "exec"), {})
    assert stand_in.requests or "FakeTransport" in block


def test_the_readme_draws_the_tree_there_is():
    tree = README.partition("## Exceptions")[2].partition("##")[0]
    stack: list[str] = []
    parents = {}
    for indent, name in re.findall(r"^    ([│├└─ ]*)(\w+)", tree, re.MULTILINE):
        del stack[len(indent) // 4 :]
        parents[name] = stack[-1] if stack else "Exception"
        stack.append(name)
    assert parents == {kind.__name__: kind.__base__.__name__ for kind in EXCEPTIONS}


def test_the_readme_lists_every_option():
    table = README.partition("## Options of `predict`")[2].partition("`client.model_card")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert listed == {"model", *PredictOptions.__annotations__}
