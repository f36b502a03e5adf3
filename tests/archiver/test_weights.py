"""Weights as training loops leave them: found by the network's own names, read without running anything."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from archiver import packing
from archiver.__main__ import main

OPTIONS = ("--name", "own", "--layers", "conv1=relu", "--size", "16x16")
Tensors = dict[str, torch.Tensor]
Archive = Callable[..., tuple[int, str]]


def state(seed: int = 0) -> Tensors:
    """Weights of the network of `conftest`."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "fc.weight": (3, 4), "fc.bias": (3,)}
    return {name: torch.rand(shape, generator=made) for name, shape in shapes.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


class Hyperparameters(dict[str, Any]):
    """As Lightning keeps them: a dict of a type of its own."""


@pytest.fixture
def archive(net_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Archive:
    """A function that archives the network with the weights in a file, and returns status and what was shown."""

    def call(content: Any, *options: str, name: str = "weights.pt", arch: str = f"{net_file}:Net") -> tuple[int, str]:
        path = tmp_path / name
        if not isinstance(content, Path):
            torch.save(content, path)
        else:
            path = content
        status = main(
            ["--arch", arch, *OPTIONS, "--store", str(tmp_path / "store"), "--state-dict", str(path), *options]
        )
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return call


def taken(tmp_path: Path) -> bytes:
    return packing.unpack(tmp_path / "store" / "own.mar")["weights.safetensors"]


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
        pytest.param({"teacher": state(1) | {"more": torch.ones(1)}, "model": state()}, None, id="the usual of two"),
    ],
)
def test_the_networks_weights_are_found(content: Any, told: str | None, archive: Archive, tmp_path: Path) -> None:
    status, shown = archive(content)
    assert status == 0, shown
    assert taken(tmp_path) == packing.weights(state())
    assert told is None or told in shown


def test_of_plain_and_averaged_weights_the_plain_ones_are_taken_unless_the_average_is_asked_for(
    archive: Archive, tmp_path: Path
) -> None:
    both = {"model": state(1), "model_ema": state(2)}
    one_dict = under("model.", state(1)) | under("ema_model.", state(2))
    for content in (both, one_dict, state(1) | under("ema.", state(2))):
        status, shown = archive(content)
        assert (status, "--ema takes them" in shown) == (0, True), shown
        assert taken(tmp_path) == packing.weights(state(1))
        status, shown = archive(content, "--ema")
        assert (status, "without --ema" in shown) == (0, True), shown
        assert taken(tmp_path) == packing.weights(state(2))
    status, shown = archive(state(), "--ema")
    assert status == 1
    assert "holds no moving average" in shown


def test_several_sets_that_fit_are_not_guessed_between(archive: Archive) -> None:
    status, shown = archive(under("student.", state(1)) | under("teacher.", state(2)))
    assert status == 1
    assert "several sets of weights that fit" in shown
    assert "'student.'" in shown
    assert "'teacher.'" in shown


def test_weights_of_another_network_say_what_does_not_fit(archive: Archive) -> None:
    wrong = {name: value for name, value in state().items() if name != "fc.bias"} | {"head": torch.ones(1)}
    for content in (wrong, {"state_dict": under("model.", wrong)}):
        status, shown = archive(content)
        assert status == 1
        assert "do not fit the network" in shown
        assert "1 missing: fc.bias" in shown
        assert "1 not of the network: head" in shown


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


def test_the_versions_of_modules_are_kept(archive: Archive, tmp_path: Path) -> None:
    """As torchvision's MNASNet needs them; weights that name none are those of today's class."""
    (tmp_path / "elsewhere/old_net.py").write_text(VERSIONED)
    names: dict[str, Any] = {}
    exec(VERSIONED, names)
    plain = names["Old"]().state_dict()
    arch = f"{tmp_path}/elsewhere/old_net.py:Old"
    without_counts = {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")}
    for content in (plain, dict(plain), without_counts, {"state_dict": plain}):
        status, shown = archive(content, arch=arch)
        assert status == 0, shown
        assert taken(tmp_path) == packing.weights(plain)
    plain._metadata[""]["version"] = 1
    status, shown = archive(plain, arch=arch)
    assert status == 0, shown
    assert taken(tmp_path) == packing.weights({**plain, "conv.weight": plain["conv.weight"] * 2})


def test_safetensors_in_shards_are_read_from_their_index_or_their_folder(archive: Archive, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = {"one.safetensors": ["conv.weight", "fc.bias"], "two.safetensors": ["conv.bias", "fc.weight"]}
    for file, names in parts.items():
        safetensors.save_file({name: state()[name] for name in names}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
    for path in (index, folder):
        status, shown = archive(path)
        assert status == 0, shown
        assert taken(tmp_path) == packing.weights(state())
    index.write_text(json.dumps({"weight_map": {"conv.weight": "../weights.safetensors"}}))
    status, shown = archive(index)
    assert (status, "outside its folder" in shown) == (1, True)
    index.write_text("[]")
    assert "no weight_map" in archive(index)[1]
    index.unlink()
    assert "must hold one" in archive(folder)[1]


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
    name: str, write: Callable[[Path], object], told: str, archive: Archive, tmp_path: Path
) -> None:
    write(tmp_path / name)
    status, shown = archive(tmp_path / name)
    assert status == 1
    assert told in shown


def test_nothing_that_a_file_holds_is_run(archive: Archive, tmp_path: Path) -> None:
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
            archive(content)
            assert not sprung.exists()
