"""`make demo` and `make stop`, in a folder of their own so that a developer's demonstration goes on."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.server.harness import ROOT, Launched, processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    (tmp_path / "model_store").mkdir()
    for model in ("cifar", "digits", "edges", "simple"):  # Those that it shows.
        shutil.copy(ROOT / f"model_store/{model}.mar", tmp_path / "model_store")
    return tmp_path


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that nothing listens on, and that no other program can take."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def demo(folder: Path, *options: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, "samples/demo.py", *options]
    environment = os.environ | {"_JAVA_OPTIONS": Launched.java_options}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_service(folder: Path, text: str) -> None:
    (folder / "server").mkdir()
    (folder / "server/__init__.py").touch()  # Or it would stand behind another `server` that can be imported.
    (folder / "server/__main__.py").write_text(text)


@pytest.mark.timeout(900)
def test_the_demonstration_draws_maps_and_leaves_a_service_that_stop_ends(folder: Path, quick_python: Path) -> None:
    (folder / "server").symlink_to(ROOT / "server")
    script = folder / "samples/demo.py"
    text = script.read_text(encoding="utf-8")
    [pictures] = re.findall(r"^PICTURES = (\{.*?^\})$", text, re.MULTILINE | re.DOTALL)
    for names in ast.literal_eval(pictures).values():
        assert all((folder / f"samples/{name}.png").exists() for name in names)
    # Of all twenty figures most would be drawn by the same code.
    fewer = pictures.replace('("airplane", "cat", "frog", "horse", "ship", "truck")', '("cat",)')
    assert fewer != pictures
    script.write_text(text.replace(pictures, fewer.replace('("cat", "ship")', '("cat",)')), encoding="utf-8")
    rest, grpc, metrics = free_ports(3)
    try:
        ports = ("--rest-port", f"{rest}", "--grpc-port", f"{grpc}", "--metrics-port", f"{metrics}")
        done = demo(folder, *ports, python=quick_python)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Starting the service; its log is out/demo/server.log.\nServing cifar, ")
        assert "cifar    cat        cat " in done.stdout
        assert f"curl -T samples/cat.png localhost:{rest}/predictions/cifar" in done.stdout
        figures = list((folder / "out/demo").glob("*.png"))
        assert f"{len(figures)} figures of feature maps are in out/demo/" in done.stdout
        card = f"http://127.0.0.1:{rest}/predictions/cifar"
        assert urllib.request.urlopen(card, timeout=60).status == 200
    finally:
        stopped = demo(folder, "--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not (folder / "out/demo/server.pid").exists()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(card, timeout=60)


def test_a_service_that_ends_is_quoted(folder: Path, refusing: int) -> None:
    write_service(folder, "raise SystemExit('there is no Java')")
    done = demo(folder, "--rest-port", f"{refusing}")
    assert done.returncode == 1
    assert "there is no Java\n" in done.stderr
    assert done.stderr.endswith("demo: no answer from cifar, digits, edges, simple; the service is stopped\n")


def test_a_service_that_is_late_is_named_and_stopped(folder: Path, refusing: int) -> None:
    write_service(folder, "import time\ntime.sleep(300)")
    script = folder / "samples/demo.py"
    text = script.read_text(encoding="utf-8")
    assert "\nSTART_S = 600.0 " in text
    script.write_text(text.replace("\nSTART_S = 600.0 ", "\nSTART_S = -5.0 "), encoding="utf-8")  # Patience of 5 s.
    done = demo(folder, "--rest-port", f"{refusing}")
    assert done.returncode == 1
    assert done.stderr.endswith("demo: no answer from cifar, digits, edges, simple; the service is stopped\n")
    assert not processes(f"--rest-port {refusing} ")
