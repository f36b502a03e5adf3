"""Weights as training loops leave them: found by the network's own names, read without running anything."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from archiver import packing
from archiver.packing import ArchiveError
from archiver.weights import load
from tests.archiver.conftest import NET

Tensors = dict[str, torch.Tensor]
Take = Callable[..., tuple[bytes | None, str]]


def state(seed: int = 0) -> Tensors:
    """Weights of the network of `conftest`."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "fc.weight": (3, 4), "fc.bias": (3,)}
    return {name: torch.rand(shape, generator=made) for name, shape in shapes.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


class Hyperparameters(dict[str, Any]):
    """As Lightning keeps them: a dict of a type of its own."""


def network() -> nn.Module:
    names: dict[str, Any] = {}
    exec(NET, names)
    made = names["Net"]()
    assert isinstance(made, nn.Module)
    return made


@pytest.fixture
def take(tmp_path: Path) -> Take:
    """A function that loads a file into a network; returns its weights, or None, and what was said."""

    def call(content: Any, *, ema: bool = False, into: nn.Module | None = None) -> tuple[bytes | None, str]:
        path, into = tmp_path / "weights.pt", into or network()
        if isinstance(content, Path):
            path = content
        else:
            torch.save(content, path)
        try:
            said = load(into, path, ema=ema)
        except ArchiveError as err:
            return None, str(err)
        return packing.weights(into.state_dict()), said

    return call


LIGHTNING = {
    "state_dict": under("model.", state()) | {"loss.weight": torch.ones(3)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}],
    "hyper_parameters": Hyperparameters(lr=0.1),
    "pytorch-lightning_version": "2.5",
}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(state(), None, id="alone"),
        pytest.param(
            {"state_dict": state(), "best": np.float64(0.9)}, "weights: state_dict", id="a numpy scalar beside"
        ),
        pytest.param(LIGHTNING, "without it; left out: loss.weight", id="Lightning"),
        pytest.param(under("net.encoder.", state()), "'net.encoder.'", id="any prefix"),
        pytest.param(under("module._orig_mod.", state()), "'module.'", id="compiled in DataParallel"),
        pytest.param(
            {name.replace("conv.", "conv._orig_mod."): value for name, value in state().items()},
            None,
            id="a compiled part",
        ),
        pytest.param(
            under("module.", state()) | {"n_averaged": torch.tensor(7)}, "a moving average", id="AveragedModel"
        ),
        pytest.param(
            state() | {"epoch": 3, "args": argparse.Namespace(lr=0.1, folder=Path("here"))},
            "left out: epoch, args",
            id="a Namespace beside the tensors",
        ),
        pytest.param({"ema_state_dict": state()}, "a moving average", id="an average alone"),
        pytest.param({"net": state(), "optimizer": {"state": {}}, "epoch": 3}, "weights: net", id="an unusual key"),
        pytest.param({"model": {"width": 3}, "net": state()}, "weights: net", id="the usual key of something else"),
        pytest.param(under("_orig_mod.module.", state()), "'module.'", id="DataParallel compiled"),
        pytest.param({"teacher": state(1) | {"more": torch.ones(1)}, "model": state()}, None, id="the usual of two"),
    ],
)
def test_the_networks_weights_are_found(content: Any, told: str | None, take: Take) -> None:
    taken, said = take(content)
    assert taken == packing.weights(state()), said
    assert told is None or told in said


def test_of_plain_and_averaged_weights_the_plain_ones_are_taken_unless_the_average_is_asked_for(take: Take) -> None:
    both = {"model": state(1), "model_ema": state(2)}
    one_dict = under("model.", state(1)) | under("ema_model.", state(2))
    for content in (both, one_dict, state(1) | under("ema.", state(2))):
        taken, said = take(content)
        assert (taken, "--ema takes them" in said) == (packing.weights(state(1)), True), said
        taken, said = take(content, ema=True)
        assert (taken, "without --ema" in said) == (packing.weights(state(2)), True), said
    taken, said = take(state(), ema=True)
    assert (taken, "holds no moving average" in said) == (None, True), said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (under("student.", state(1)) | under("teacher.", state(2)), "that fit: .*'student.'.*'teacher.'"),
        ({"one": state(), "two": state()}, "several sets of weights that fit: one and two; write one"),
        ({"lr": 0.1, "epoch": 3, "a": 1, "b": 2}, "holds lr, epoch, a and 1 more, not a state dict"),
        ([1, 2], "holds a list, not a state dict"),
    ],
)
def test_a_file_without_one_state_dict_says_what_it_holds(content: Any, message: str, take: Take) -> None:
    taken, said = take(content)
    assert taken is None
    assert re.search(message, said), said


def test_weights_of_another_network_say_what_does_not_fit(take: Take) -> None:
    wrong = {name: value for name, value in state().items() if name != "fc.bias"} | {"head": torch.ones(1)}
    for content in (wrong, {"state_dict": under("model.", wrong)}):
        taken, said = take(content)
        assert taken is None
        assert "do not fit the network" in said
        assert "1 missing: fc.bias" in said
        assert "1 not of the network: head" in said


VERSIONED = """
import torch
from torch import nn


class Old(nn.Module):
    _version = 2

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, images):
        return self.relu(self.norm(self.conv(images)))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") in (1, 2)
        if metadata["version"] == 1:
            state[prefix + "conv.weight"] = state[prefix + "conv.weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)
"""


def test_the_versions_of_modules_are_kept(take: Take) -> None:
    """As torchvision's MNASNet needs them; weights that name none are those of today's class."""
    names: dict[str, Any] = {}
    exec(VERSIONED, names)
    plain = names["Old"]().state_dict()
    without_counts = {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")}
    for content in (plain, dict(plain), without_counts, {"state_dict": plain}):
        taken, said = take(content, into=names["Old"]())
        assert taken == packing.weights(plain), said
    plain._metadata[""]["version"] = 1
    taken, said = take(plain, into=names["Old"]())
    assert taken == packing.weights({**plain, "conv.weight": plain["conv.weight"] * 2}), said


def test_safetensors_in_shards_are_read_from_their_index_or_their_folder(take: Take, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = {"one.safetensors": ["conv.weight", "fc.bias"], "two.safetensors": ["conv.bias", "fc.weight"]}
    for file, names in parts.items():
        save_file({name: state()[name] for name in names}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
    for path in (index, folder):
        taken, said = take(path)
        assert taken == packing.weights(state()), said
    index.write_text(json.dumps({"weight_map": {"conv.weight": "../weights.safetensors"}}))
    taken, said = take(index)
    assert (taken, "outside its folder" in said) == (None, True)
    index.write_text("[]")
    assert "no weight_map" in take(index)[1]
    index.unlink()
    assert "must hold one" in take(folder)[1]


def write_script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def write_program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def write_zip(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"")

    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("script.pt", write_script, "torch.jit.load(path).state_dict()"),
        ("program.pt2", write_program, "torch.export.load(path).state_dict"),
        ("net.onnx", lambda path: path.write_bytes(b"\x08\x07"), "an ONNX graph"),
        ("net.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "as Keras writes"),
        ("net.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("net.bin", lambda path: path.write_text("<!DOCTYPE html><title>404</title>"), "a web page"),
        ("net.mar", write_zip("MAR-INF/MANIFEST.json"), "an archive for TorchServe"),
        ("net.npz", lambda path: np.savez(path, weight=np.ones(2)), "torch.from_numpy"),
        ("whole.pt", lambda path: torch.save(nn.Linear(2, 2), path), "a pickled object of the type torch.nn"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_way_out(
    name: str, write: Callable[[Path], object], told: str, take: Take, tmp_path: Path
) -> None:
    write(tmp_path / name)
    taken, said = take(tmp_path / name)
    assert taken is None
    assert told in said


def test_nothing_that_a_file_holds_is_run(take: Take, tmp_path: Path) -> None:
    class Trap:
        def __init__(self, function: Callable[..., object], *arguments: object) -> None:
            self.call = function, arguments

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call

    import os
    import subprocess

    sprung = tmp_path / "sprung"
    traps = [Trap(Path.touch, sprung), Trap(os.system, f"touch {sprung}"), Trap(subprocess.call, ["touch", sprung])]
    traps += [Trap(eval, f"open({str(sprung)!r}, 'w')"), Trap(pickle.loads, pickle.dumps(Trap(Path.touch, sprung)))]
    for trap in traps:
        for content in ({"state_dict": state(), "more": trap}, trap):
            take(content)
            assert not sprung.exists()
