"""The client, and with it the lens, install and run where nothing else of this repository, and no torch, is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement

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


def required(distribution: importlib.metadata.Distribution, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield what a distribution requires with some of its extras."""
    for requirement in map(Requirement, distribution.requires or ()):
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def link_requirements(wheel: Path, site: Path) -> None:
    """Link what a wheel requires into an environment, where pip finds it installed: to download it takes half a minute.

    What this environment does not have is left to pip.
    """
    [built] = importlib.metadata.Distribution.discover(path=[str(wheel)])
    wanted = [*required(built)]
    while wanted:
        requirement = wanted.pop()
        with suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(requirement.name)
            names = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            new = [name for name in names if not (site / name).exists()]
            if requirement.name != "convscope":  # Which is installed.
                for name in new:
                    (site / name).symlink_to(str(found.locate_file(name)))
            wanted += required(found, requirement.extras) if new else ()


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
    for package in (CLIENT, LENS):
        build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path / "wheels"]
        subprocess.run(build, check=True, capture_output=True, cwd=package)
    [client], [lens] = (tmp_path / "wheels").glob("convscope-*.whl"), (tmp_path / "wheels").glob("convscope_lens-*.whl")
    site = Path(run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    link_requirements(client, site)
    pip("install", "--quiet", "--no-compile", str(client))
    assert "predict" in run("convscope", "--help")
    run("python", "-c", PROGRAM)
    assert "package convscope-lens, which is not installed" in run("convscope", "report", "cat.png", status=2)

    link_requirements(lens, site)
    pip("install", "--quiet", "--no-compile", str(lens))
    assert "--out FILE" in run("convscope", "report", "--help")
    run("python", "-c", LENS_PROGRAM)
    pip("check")
