"""What archiving writes on standard error: its own steps, and warnings of the user's own code only."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from archiver.__main__ import main

# With another graph in training mode, which torchvision remarks upon each time it traces, and loggers of libraries.
NOISY = """
import logging
import warnings

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("torch.fx", "timm.models", "onnxscript", "torchvision"):
            logging.getLogger(name).error("a library's log line")
        logging.getLogger("mine").error("my own log line")
        warnings.warn_explicit("a library's warning", UserWarning, torch.__file__, 1)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)
        self.more = nn.Linear(4, 3)

    def forward(self, images):
        maps = self.conv(images).relu().mean((2, 3))
        return (self.fc(maps), self.more(maps)) if self.training else self.fc(maps)
"""
STEPS = [
    "building",
    "looking for layers",
    "testing the network",
    "exporting the graph",
    "comparing with ONNX Runtime",
    "packing",
]


@pytest.fixture
def noisy(tmp_path: Path) -> list[str]:
    path = tmp_path / "noisy.py"
    path.write_text(NOISY)
    return [f"--arch={path}:Net", "--name=noisy", "--size=16x16", "--random-weights=0", f"--store={tmp_path / 'store'}"]


@pytest.mark.usefixtures("exporter")
def test_the_steps_are_told_with_their_seconds_and_nothing_of_libraries(
    noisy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*noisy, "--layers=auto"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "my own log line"]
    found = [re.fullmatch(r"\[ *(\d+\.\d) s\] (.+)", line) for line in lines]
    assert all(found), lines
    told = [(float(match[1]), match[2]) for match in found if match]
    assert [seconds for seconds, _ in told] == sorted(seconds for seconds, _ in told)
    assert all(said.startswith(step) for (_, said), step in zip(told, [*STEPS, "done"], strict=True)), lines


def test_quiet_leaves_the_steps_out(noisy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*noisy, "--layers=auto", "--quiet"]) == 0
    assert set(capsys.readouterr().err.splitlines()) <= {"my own log line"}


def test_a_warning_of_the_users_own_code_is_told_once(
    noisy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tmp_path / "noisy.py").read_text().replace("self.fc(maps)\n", "nn.functional.softmax(self.fc(maps))\n")
    (tmp_path / "noisy.py").write_text(text)
    assert main([*noisy, "--layers=auto", "--quiet"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line != "my own log line")
    assert re.match(r"noisy\.py, line \d+: UserWarning: Implicit dimension choice for softmax", line)


def test_loggers_of_libraries_speak_again_afterwards(noisy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for level in (logging.NOTSET, logging.INFO):
        logging.getLogger("timm.models").setLevel(level)
        main(noisy)
        assert logging.getLogger("timm.models").level == level
    logging.getLogger("timm.models").setLevel(logging.NOTSET)
