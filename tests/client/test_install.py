"""The client installs and runs where nothing else of this repository, and no torch, is."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "client"
PROGRAM = """
import importlib.metadata, importlib.util, sys
from convscope import Client, __version__
for url in ("http://localhost:1", "grpc://localhost:1"):
    Client(url).close()
for absent in ("torch", "torchvision", "matplotlib", "PIL", "handlers", "ts"):
    assert importlib.util.find_spec(absent) is None, absent
assert importlib.metadata.version("convscope") == __version__
from convscope._page.assets import page_html
assert "<main" in page_html("", None) and "pad" in page_html("", None, controls={})
assert sys.prefix in importlib.util.find_spec("convscope").origin
"""


def test_the_client_installs_and_runs_without_torch(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")

    def run(program: str, *arguments: str) -> str:
        command = [programs / program, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    run("python", "-m", "pip", "install", "--quiet", str(CLIENT))
    assert "predict" in run("convscope", "--help")
    run("python", "-c", PROGRAM)
    run("python", "-m", "pip", "check")
