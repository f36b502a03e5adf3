"""The commands of docs/lessons.md run as they stand, on networks that have learned nothing and on few pictures.

What they print on the committed archives is tested in tests/e2e/test_lessons.py where that needs no more than the
repository, and by `python docs/lessons.py check` for all of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convscope._cli import main
from matplotlib.figure import Figure
from PIL import Image

from docs import lessons
from handlers.images.preprocessing import Preprocessing
from handlers.networks import NETWORKS
from tests.client.served import serving
from tests.client.stand_in import StandIn
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service
from training import shuffled

ROOT = Path(__file__).parents[2]
LESSONS = (ROOT / "docs" / "lessons.md").read_text("utf-8")
DIGITS = tuple("0123456789")
COLOUR = ("airplane", "cat")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", LESSONS, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.splitlines()]
BLOCKS = [block for block in lessons.blocks() if block.needs_pictures]
COMMANDS = [block.code for block in BLOCKS if block.language == "sh"]
TRAININGS = [line for line in LINES if line.startswith(".venv/bin/python -m training.shuffled ")]
EXPERIMENT = ".venv/bin/python -m experiments augmentation"
PYTHON = [block.code for block in BLOCKS if block.language == "python"]
TWIN_NETWORKS = {"Deep": NETWORKS["deep"], "Cifar": NETWORKS["cifar"]}


@pytest.fixture(scope="module")
def networks() -> Iterator[StandIn]:
    torch.manual_seed(0)
    takes = {"edges": (Preprocessing(1, None, None), ()), "digits": (Preprocessing(1, 28, 28), DIGITS)}
    made = {**NETWORKS, **{name: TWIN_NETWORKS[network] for name, network in lessons.TWINS.items()}}
    with serving(
        {
            name: make_service(network(), *takes.get(name, (CIFAR_INPUT, CIFAR_CLASSES)))
            for name, network in made.items()
        }
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
    for digit in "37":
        (tmp_path / "pictures" / "digits" / digit).mkdir(parents=True)
        (tmp_path / f"pictures/digits/{digit}/0000.png").symlink_to(ROOT / f"samples/digit-{digit}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_prints_what_stands_below_it_or_trains_or_serves() -> None:
    checked = {line for block in lessons.blocks() for line in block.code.splitlines()}
    others = set(LINES) - {*checked, *TRAININGS, EXPERIMENT}
    assert {line.partition(" --")[0] for line in others} == {
        ".venv/bin/python -m server",
        ".venv/bin/python docs/lessons.py prepare",
    }
    assert set(blocks("python")) <= {block.code for block in lessons.blocks()}
    assert len(COMMANDS) >= 12
    assert len(TRAININGS) == 2


def test_every_claim_has_a_command_and_what_it_printed() -> None:
    sections = re.split(r"^## (?=\d)", LESSONS, flags=re.MULTILINE)[1:]
    assert [section[0] for section in sections] == list("123456789")
    for section in sections:
        assert lessons.PAIR.search(section), section[:40]
        assert section.splitlines()[2].startswith("**Predict.** "), section[:40]
        assert "**Exercise.** " in section
        assert "weaker than it sounds.** " in section
        assert re.search(r"\(pictures/lessons/[\w-]+\.png\)", section) or section[0] == "2"
    assert all(block.printed.strip(" …\n") for block in lessons.blocks())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(
    command: str, networks: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # tests/lens/test_probes.py saves one.
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


def test_outputs_differ_where_more_than_a_rounding_does() -> None:
    text = "blur: cifar 1.0, 300 pictures\nruns on  cpu\nsigma  agreement\n  1  0.520 ±0.057 (0.121)\n"
    assert not lessons.differences(
        text, text.replace("cpu", "cuda").replace("0.520", "0.523").replace("  1 ", "  1   ")
    )
    for changed in (
        text.replace("0.520", "0.540"),
        text.replace("0.520", "–"),
        text.replace("300", "200"),
        text.replace("cifar", "deep"),
        text + "more\n",
    ):
        assert lessons.differences(text, changed)


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
