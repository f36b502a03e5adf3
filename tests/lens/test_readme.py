"""The README's Python runs as it stands, and its table lists the commands there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.client.stand_in import StandIn

LENS = Path(__file__).parents[2] / "lens"
README = (LENS / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_python_runs(
    block: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.image.imsave("cat.png", np.zeros((32, 32, 3), np.uint8))
    exec(compile(block.replace("http://localhost:8080", stand_in.rest_url), "README.md", "exec"), {})
    assert stand_in.requests


def test_the_readme_lists_every_command() -> None:
    project = tomllib.loads((LENS / "pyproject.toml").read_text("utf-8"))["project"]
    listed = re.findall(r"^\| `convscope (\w+)`", README, re.MULTILINE)
    assert sorted(listed) == sorted(project["entry-points"]["convscope.commands"])
