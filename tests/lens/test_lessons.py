"""The commands of docs/lessons.md run as they stand, on networks that have learned nothing and on few pictures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convscope._cli import main
from PIL import Image

from handlers.images.preprocessing import Preprocessing
from handlers.networks import NETWORKS
from tests.client.served import serving
from tests.client.stand_in import StandIn
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service
from training import shuffled, train

ROOT = Path(__file__).parents[2]
LESSONS = (ROOT / "docs" / "lessons.md").read_text("utf-8")
DIGITS = tuple("0123456789")
COLOUR = ("airplane", "cat", "frog", "horse", "ship", "truck")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", LESSONS, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith(".venv/bin/convscope ")]
TRAININGS = [line for line in LINES if line.startswith(".venv/bin/python -m training.shuffled ")]
TWINS = [line for line in LINES if line.startswith(".venv/bin/python -m training.train ")]
PYTHON = blocks("python")


@pytest.fixture(scope="module")
def networks() -> Iterator[StandIn]:
    torch.manual_seed(0)
    takes = {"edges": (Preprocessing(1, None, None), ()), "digits": (Preprocessing(1, 28, 28), DIGITS)}
    with serving(
        {name: make_service(made(), *takes.get(name, (CIFAR_INPUT, CIFAR_CLASSES))) for name, made in NETWORKS.items()}
    ) as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "out" / "lessons").mkdir(parents=True)
    for split in ("train", "test"):
        for label in COLOUR:
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            Image.open(ROOT / f"samples/{label}.png").save(tmp_path / f"pictures/{split}/{label}/0000.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_is_one_that_is_run_here_or_starts_the_server() -> None:
    others = set(LINES) - {*COMMANDS, *TRAININGS, *TWINS}
    assert {line.partition(" --")[0] for line in others} == {
        ".venv/bin/python -m server",
        ".venv/bin/python -m archiver",
    }
    assert len(COMMANDS) >= 15
    assert len(TRAININGS) == 2


@pytest.mark.parametrize("line", TWINS)
def test_a_twins_training_is_one_that_can_be_requested(line: str) -> None:
    options = train.parser().parse_args(shlex.split(line)[3:])
    checkpoint = options.out / train.CHECKPOINT
    assert f".venv/bin/python -m archiver --checkpoint {checkpoint} --store out/twins" in "\n".join(LINES)


def test_every_claim_has_a_command_and_what_it_printed() -> None:
    sections = re.split(r"^## (?=\d)", LESSONS, flags=re.MULTILINE)[1:]
    assert [section[0] for section in sections] == list("12345678")
    for section in sections:
        assert re.search(r"```(sh|python)\n[^`]*```\n\n```text\n[^`]+```", section), section[:40]
    assert "```text\n```" not in LESSONS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(command: str, networks: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(command)[1:], "--url", networks.rest_url]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_the_python_works(code: str, networks: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code.replace("http://localhost:8080", networks.rest_url), "lessons.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_reads_its_options_and_pictures(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def compare(model: str, corpus: object, **options: object) -> tuple[float, float]:
        received.append((model, options["epochs"]))
        return 0.0, 0.0

    monkeypatch.setattr(shuffled, "compare", compare)
    assert shuffled.main(shlex.split(command)[3:]) == 0
    assert received == [(shlex.split(command)[4], 5)]


def test_what_is_stated_of_convolutions_holds() -> None:
    for line in (
        "28   26     3      1",
        " 5    3     3      1",
        "32   28     5      1",
        "28   28     5",
        "28   16     3      2",
    ):
        assert line in LESSONS


def test_the_pictures_are_there_and_small() -> None:
    shown = re.findall(r"\((pictures/[\w/-]+\.png)\)", LESSONS)
    kept = {path.name for path in (ROOT / "docs/pictures/lessons").iterdir()}
    assert {Path(name).name for name in shown if name.startswith("pictures/lessons/")} == kept
    for name in shown:
        with Image.open(ROOT / "docs" / name) as picture:
            assert picture.size[0] > 300
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "docs/pictures/lessons").iterdir())
