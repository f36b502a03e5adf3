"""The command line of `python -m archiver` on what cannot be archived: a line that says why, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archiver.__main__ import main
from archiver.contents import check_names
from archiver.packing import ArchiveError

Run = Callable[..., tuple[int, str]]

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.relu(self.conv(images)).mean((2, 3)))


class RandomBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(4, 1, 1), persistent=False)

    def forward(self, images):
        return self.fc((self.relu(self.conv(images)) * self.scale).mean((2, 3)))


class RandomAttribute(RandomBuffer):
    def __init__(self):
        Net.__init__(self)
        self.scale = torch.rand(4, 1, 1)


class Kept(RandomBuffer):
    def __init__(self):
        Net.__init__(self)
        self.register_buffer("scale", torch.rand(4, 1, 1))


class OneRow(Net):
    def forward(self, images):
        return self.fc(self.relu(self.conv(images)).mean((2, 3)).reshape(1, -1))


class BatchMean(Net):
    def forward(self, images):
        maps = self.relu(self.conv(images))
        return self.fc((maps - maps.mean(0)).mean((2, 3)))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3)
        self.relu = nn.ReLU()

    def forward(self, images):
        return self.relu(self.conv(images))
"""


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that archives one of the networks above and returns status and what was said of mistakes."""
    (tmp_path / "own_net.py").write_text(NET)

    def call(name: str, *arguments: object, weights: object = None) -> tuple[int, str]:
        options = ["--random-weights", "0"]
        if weights is not None:
            torch.save(weights, tmp_path / "weights.pt")
            options = ["--state-dict", str(tmp_path / "weights.pt")]
        own = ["--arch", f"{tmp_path / 'own_net.py'}:{name}", "--name", "own", "--size", "16x16", "--quiet", *options]
        try:
            status = main([*own, "--layers", "conv1=relu", "--store", str(tmp_path / "store"), *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return call


def state() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.ones(4, 3, 3, 3),
        "conv.bias": torch.ones(4),
        "fc.weight": torch.ones(3, 4),
        "fc.bias": torch.ones(3),
    }


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\nship\n")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OneRow", "fails for two pictures in one pass"),
        ("BatchMean", "an answer depends on what else is in the batch"),
        ("RandomBuffer", "random values that the state dict does not hold"),
        ("RandomAttribute", "random values that the state dict does not hold"),
        ("Lazy", "conv.weight has no shape before the network saw a picture"),
    ],
)
def test_a_network_that_would_fail_its_callers_is_refused(
    name: str, message: str, run: Run, classes: Path, tmp_path: Path
) -> None:
    status, said = run(name, "--classes", classes)
    assert status == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "store").exists()


def test_random_values_that_the_state_dict_holds_are_archived(run: Run, classes: Path) -> None:
    assert run("Kept", "--classes", classes) == (0, "")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_that_cannot_be_written_to_is_told_in_a_line(place: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said = run("Net", "--store", tmp_path / place)
    assert status == 1
    assert f"own.mar cannot be written to {tmp_path / place}: " in said
    assert said.count("\n") == 1


def test_a_size_beyond_any_picture_is_refused_before_it_takes_memory(run: Run) -> None:
    status, said = run("Net", "--size", "99999x99999")
    assert status == 2
    assert "more than 16,000,000 pixels" in said


def test_a_name_is_refused_where_it_would_not_travel_and_nowhere_else() -> None:
    good = {"model": "n" * 100, "version": "1" * 100, "layers": {"indexed": "a", "scale": "b", "a.b": "c"}}
    check_names(good)
    taken = ("all", "none", "index", "label", "probability", "logit", "reply", "file", "allow_pickle")
    for name in (*taken, "conv1.scale", "conv1.offset", "conv1.channels", "conv1.npy"):
        with pytest.raises(ArchiveError, match="word of their own"):
            check_names({**good, "layers": {name: "relu"}})
    for change in ({"model": "n" * 101}, {"version": "1" * 101}, {"layers": {"n" * 101: "relu"}}):
        with pytest.raises(ArchiveError, match="at most 100"):
            check_names({**good, **change})


def test_a_label_given_twice_is_warned_of_and_archived(run: Run, classes: Path) -> None:
    classes.write_text("crane\ndog\ncrane\n")
    status, said = run("Net", "--classes", classes)
    assert status == 0
    assert said.startswith("warning: several classes have the same label, 'crane' first")


def test_weights_that_do_not_fit_are_named_in_one_line(run: Run) -> None:
    some = {name: value for name, value in state().items() if name != "fc.weight"}
    given = {f"model.{name}": value for name, value in some.items()} | {"fc.bias": torch.ones(5)}
    status, said = run("Net", weights=given)
    assert status == 1
    assert said.count("\n") == 1
    assert "3 missing: conv.weight, conv.bias, fc.weight; " in said
    assert "3 not of the network: model.conv.weight, model.conv.bias, model.fc.bias; " in said
    assert "1 of another shape: fc.bias (5,) for (3,)" in said
