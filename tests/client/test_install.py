"""The client, and with it the lens, install and run where nothing else of this repository, and no torch, is."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENT, LENS = ROOT / "client", ROOT / "lens"
PROGRAM = """
import importlib.metadata, importlib.util, sys
from convscope import Client, __version__
for url in ("http://localhost:1", "grpc://localhost:1"):
    Client(url).close()
for absent in ("torch", "torchvision", "matplotlib", "PIL", "handlers", "ts"):
    assert importlib.util.find_spec(absent) is None, absent
assert importlib.metadata.version("convscope") == __version__
assert sys.prefix in importlib.util.find_spec("convscope").origin
"""
LENS_PROGRAM = """
import importlib.metadata
from convscope_lens import __version__
from convscope_lens._page.html import page_html
assert importlib.metadata.version("convscope-lens") == __version__
from convscope_lens._page.page_data import thumbnail
from convscope_lens._page.server import SAMPLES
from importlib.resources import files
assert len(page_html("", None)) > 20_000
for name in SAMPLES:
    assert thumbnail(files("convscope_lens._page").joinpath("samples", name).read_bytes())
"""


def test_the_client_and_then_the_lens_install_and_run_without_torch(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    venv.create(tmp_path / "venv")
    programs = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")

    def run(program: str | Path, *arguments: str, status: int = 0) -> str:
        command = [programs / program, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout or ran.stderr

    def pip(*arguments: str) -> None:
        """Run this environment's pip on that one, as a pip of its own takes seconds to install."""
        run(Path(sys.executable), "-m", "pip", "--python", str(tmp_path / "venv"), *arguments)

    # Built with this environment's hatchling: pip would make an environment for each.
    wheels = tmp_path / "wheels"
    build = (
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(CLIENT),
        str(LENS),
    )
    run(Path(sys.executable), "-m", "pip", *build)
    [client], [lens] = wheels.glob("convscope-*.whl"), wheels.glob("convscope_lens-*.whl")

    pip("install", "--quiet", "--no-compile", str(client))
    assert "predict" in run("convscope", "--help")
    run("python", "-c", PROGRAM)
    assert "package convscope-lens, which is not installed" in run("convscope", "report", "cat.png", status=2)

    pip("install", "--quiet", "--no-compile", str(lens))
    assert "--out FILE" in run("convscope", "report", "--help")
    run("python", "-c", LENS_PROGRAM)
    pip("check")
