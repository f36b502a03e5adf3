"""The README's own commands, run as they stand (on the test server's ports)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.harness import ROOT, Launched

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith(("curl ", ".venv/bin/convscope ")) and "grpcurl" not in line
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "out").mkdir()
    return tmp_path


def on_ports(text: str, server: Launched) -> str:
    text = text.replace("localhost:8080", f"127.0.0.1:{server.port('REST')}")
    return text.replace("localhost:7070", f"127.0.0.1:{server.port('gRPC')}")


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 7
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(server: Launched, folder: Path, command: str) -> None:
    command = on_ports(command, server).replace("curl ", "curl --fail -sS ", 1)
    if command.startswith(".venv") and "--url" not in command:
        command += f" --url http://127.0.0.1:{server.port('REST')}"
    if command.startswith(".venv/bin/convscope ui "):  # It serves until told to stop.
        with subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, stdout=subprocess.PIPE) as running:
            assert running.stdout
            said = running.stdout.readline()
            running.terminate()
        assert b"http://" in said
        assert running.returncode == 0
        return
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "-o " in command:
        assert (folder / command.split("-o ")[1].split()[0]).stat().st_size > 1000
    else:
        assert done.stdout


def test_the_python_example_works(server: Launched, folder: Path) -> None:
    [code] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", on_ports(code, server)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(32, 16, 16)" in done.stdout
    assert (folder / "conv1.png").exists()
