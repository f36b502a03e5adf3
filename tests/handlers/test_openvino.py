"""OpenVINO: the answers of torch, from networks of many kinds; bfloat16 where the processor has it, else a reason."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from archiver import packing
from archiver.graph import export
from handlers.network.archive import GRAPH, WEIGHTS, Archive
from handlers.network.engines import choice, openvino
from handlers.network.engines.choice import choose
from handlers.network.engines.eager import Eager
from handlers.network.engines.openvino import Compiled
from handlers.network.engines.reference import TOLERANCE, TOLERANCES
from tests.handlers.support import CIFAR_INPUT, make_archive

ROOT = Path(__file__).parents[2]
Name = Callable[..., str]
"""The name of the engine that is chosen with these options."""
needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.capabilities(), reason="this processor does not compute in bfloat16"
)


class Residual(nn.Module):
    """Two blocks whose input is added to their output, as in a ResNet."""

    layers: Mapping[str, str] = {"stem": "relu", "block1": "relu_1", "block2": "relu_2"}
    layouts: Mapping[str, str] = {}
    has_scores = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.stem(images))
        maps = self.relu(self.norm(self.one(maps)) + maps)
        maps = self.relu(self.two(maps) + maps)
        scores: Tensor = self.fc(maps.mean((2, 3)))
        return scores


class Branches(nn.Module):
    """Kernels of two sizes side by side, as in an Inception; no scores."""

    layers: Mapping[str, str] = {"both": "cat", "wide": "wide"}
    layouts: Mapping[str, str] = {}
    has_scores = False

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 5, padding=2)
        self.last = nn.Conv2d(10, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.last(torch.cat([self.narrow(images), self.wide(images)], 1))
        return maps


class ChannelsLast(nn.Module):
    """Channels are the last axis, as in a Swin."""

    layers: Mapping[str, str] = {"norm": "norm", "mixed": "gelu"}
    layouts: Mapping[str, str] = {"norm": "channels_last", "mixed": "channels_last"}
    has_scores = True

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.mix, self.fc = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.norm(self.stem(images).permute(0, 2, 3, 1))
        scores: Tensor = self.fc(nn.functional.gelu(self.mix(cells)).mean((1, 2)))
        return scores


class Net:
    """A network in torch, and its graph in a folder."""

    def __init__(self, make: Any, folder: Path, *, any_size: bool = True) -> None:
        torch.manual_seed(0)
        module = make().eval()
        self.eager = Eager(module, make.layers, has_scores=make.has_scores, layouts=make.layouts)
        self.layers = frozenset(make.layers)
        weights = packing.weights(module.state_dict())
        graph = export(
            module,
            make.layers,
            torch.from_numpy(pictures(1)),
            weights=weights,
            has_scores=make.has_scores,
            any_size=any_size,
            layouts=make.layouts,
        )
        self.graph = folder / GRAPH
        self.graph.write_bytes(graph.content)
        (folder / WEIGHTS).write_bytes(weights)

    def compiled(self, precision: str = "float32", threads: int = 1) -> Compiled:
        return Compiled(
            self.graph,
            self.eager.layers,
            pictures(2),
            has_scores=self.eager.has_scores,
            layouts=self.eager.layouts,
            threads=threads,
            precision=precision,
        )


def pictures(count: int, height: int = 32, width: int = 32) -> NDArray[np.float32]:
    return np.random.default_rng(count).standard_normal((count, 3, height, width), np.float32)


def change(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def changes(one: Any, other: Any, images: NDArray[np.float32], layers: frozenset[str]) -> dict[str, float]:
    (found, maps), (expected, expected_maps) = one.run(images, layers), other.run(images, layers)
    assert maps.keys() == expected_maps.keys() == layers
    off = {name: change(maps[name], expected_maps[name]) for name in layers}
    assert (found is None) == (expected is None)
    return off if found is None else {"": change(found, expected), **off}


@pytest.fixture(scope="module", params=[Residual, Branches, ChannelsLast])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net(request.param, tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net(Residual, tmp_path_factory.mktemp("residual"), any_size=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_what_torch_does_whatever_the_size_and_the_batch(net: Net, threads: int) -> None:
    engine = net.compiled(threads=threads)
    assert engine.name.startswith("openvino-2")
    assert "bfloat16" not in engine.name
    for shape in ((1, 32, 32), (5, 32, 32), (2, 16, 56), (1, 44, 20), (5, 32, 32)):
        assert max(changes(engine, net.eager, pictures(*shape), net.layers).values()) <= TOLERANCE


def test_the_maps_asked_for_come_alone_and_are_the_same(net: Net) -> None:
    engine = net.compiled()
    images = pictures(3)
    scores, every = engine.run(images, net.layers)
    for wanted in (frozenset(), *(frozenset({name}) for name in net.layers)):
        found, maps = engine.run(images, wanted)
        assert maps.keys() == wanted
        assert all(np.array_equal(maps[name], every[name]) for name in wanted)
        assert (scores is None) == (found is None)
        assert scores is None or change(found, scores) <= TOLERANCE


def test_what_it_returns_is_the_callers(net: Net) -> None:
    engine = net.compiled()
    scores, maps = engine.run(pictures(2), net.layers)
    kept = {name: np.array(values) for name, values in maps.items()}
    kept_scores = None if scores is None else scores.copy()
    engine.run(-pictures(2), net.layers)
    assert all(np.array_equal(maps[name], kept[name]) for name in kept)
    assert scores is None or np.array_equal(scores, kept_scores)
    assert all(values.flags.writeable and values.flags.c_contiguous for values in maps.values())


@needs_bfloat16
def test_bfloat16_is_near_float32_and_says_its_name(net: Net) -> None:
    engine = net.compiled("bfloat16")
    assert engine.name.startswith("openvino-2")
    assert engine.name.endswith("-bfloat16")
    for shape in ((2, 32, 32), (3, 16, 56)):
        off = max(changes(engine, net.eager, pictures(*shape), net.layers).values())
        assert TOLERANCE < off <= TOLERANCES["bfloat16"]


@needs_bfloat16
def test_scores_in_bfloat16_do_not_depend_on_the_maps_asked_for(residual: Net) -> None:
    """Requests share a pass, so a map may be another caller's wish."""
    engine = residual.compiled("bfloat16")
    alone, _ = engine.run(pictures(4))
    for wanted in (frozenset({"block1"}), residual.layers):
        assert change(engine.run(pictures(4), wanted)[0], alone) <= TOLERANCE


def test_a_thread_may_run_on_every_core(residual: Net) -> None:
    """Otherwise the workers of one machine would all compute on its first core."""
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("this machine has one core")
    engine, main, done = residual.compiled(), threading.get_native_id(), threading.Event()
    images, seen = pictures(64), {frozenset(cores)}

    def watch() -> None:
        while not done.wait(0.001):
            seen.add(frozenset(os.sched_getaffinity(main)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            engine.run(images)
    finally:
        done.set()
        watcher.join()
    assert seen == {frozenset(cores)}


RUN = """
import sys
from pathlib import Path
import numpy as np
from handlers.network.engines.openvino import Compiled

images = np.zeros((1, 3, 32, 32), np.float32)
Compiled(Path(sys.argv[1]), {}, images, has_scores=True).run(images)
"""


def test_it_reports_nothing_and_writes_nothing(residual: Net, tmp_path: Path) -> None:
    """With the package openvino_telemetry, OpenVINO reports that it was imported."""
    package = tmp_path / "site/openvino_telemetry/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise SystemExit('telemetry was imported')")
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'site'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(home),
    }
    before = sorted(residual.graph.parent.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(residual.graph)], cwd=home, env=environment, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert list(home.iterdir()) == []
    assert sorted(residual.graph.parent.iterdir()) == before


class TestTheChoice:
    @pytest.fixture(autouse=True)
    def _bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever this processor has."""
        monkeypatch.setattr(choice, "computes_bfloat16", lambda: True)

    @pytest.fixture
    def archive(self, residual: Net) -> Archive:
        graph = residual.graph.read_bytes()
        return make_archive(residual.eager.module, CIFAR_INPUT, tuple("abcde"), layers=Residual.layers, graph=graph)

    @pytest.fixture
    def name(self, residual: Net, archive: Archive) -> Name:
        return lambda **options: choose(archive, lambda: residual.eager, **options).name

    def test_asked_for_by_name_it_runs_float32(self, name: Name) -> None:
        assert name(wanted="openvino").startswith("openvino-")
        assert name().startswith("onnxruntime-")

    @needs_bfloat16
    @pytest.mark.parametrize("wanted", ["auto", "openvino"])
    def test_it_runs_bfloat16(self, name: Name, wanted: str) -> None:
        chosen = name(wanted=wanted, precision="bfloat16")
        assert chosen.startswith("openvino-")
        assert chosen.endswith("-bfloat16")

    def test_torch_runs_bfloat16_where_it_is_asked_for(self, name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "computes_bfloat16", lambda: False)
        chosen = name(wanted="torch", precision="bfloat16")
        assert chosen.startswith("torch-")
        assert chosen.endswith("-bfloat16")

    def test_without_the_package_torch_runs_bfloat16_and_the_log_says_why(
        self, name: Name, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(choice, "find_spec", lambda name: None)
        with caplog.at_level(logging.WARNING):
            assert name(precision="bfloat16").startswith("torch-")
        assert "torch runs instead of openvino: the package openvino is not installed" in caplog.text
        for precision in ("float32", "bfloat16"):
            with pytest.raises(RuntimeError, match="openvino was asked for and cannot run: the package openvino is no"):
                name(wanted="openvino", precision=precision)

    def test_what_openvino_cannot_compute_in_is_not_computed_in_something_else(
        self, name: Name, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"FP32", "INT8"}))
        reason = "OpenVINO does not compute in bfloat16 on this processor"
        with pytest.raises(RuntimeError, match=reason):
            name(wanted="openvino", precision="bfloat16")
        with caplog.at_level(logging.WARNING):
            assert name(precision="bfloat16").startswith("torch-")
        assert reason in caplog.text
        assert name(wanted="openvino").startswith("openvino-")

    @pytest.mark.parametrize("wanted", ["auto", "openvino"])
    def test_a_processor_without_bfloat16_is_not_asked_for_it(
        self, name: Name, monkeypatch: pytest.MonkeyPatch, wanted: str
    ) -> None:
        monkeypatch.setattr(choice, "computes_bfloat16", lambda: False)
        with pytest.raises(RuntimeError, match="which this processor has no instructions for"):
            name(wanted=wanted, precision="bfloat16")

    def test_float16_is_for_a_gpu(self, name: Name) -> None:
        with pytest.raises(RuntimeError, match="openvino was asked for and runs float32, bfloat16, not float16"):
            name(wanted="openvino", precision="float16")

    def test_the_weights_of_another_network(self, archive: Archive, name: Name) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            (archive.directory / WEIGHTS).write_bytes(packing.weights(Residual().state_dict()))
        with pytest.raises(RuntimeError, match=r"cannot run: .* differ from torch's"):
            name(wanted="openvino")
