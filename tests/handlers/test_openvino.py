"""OpenVINO: the answers of torch, from committed archives; bfloat16 where the processor has it, else a reason."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray

from archiver import packing
from handlers.network import archive as archives
from handlers.network.archive import GRAPH, WEIGHTS, Archive
from handlers.network.engines import choice, openvino
from handlers.network.engines.choice import choose
from handlers.network.engines.openvino import OpenVinoEngine
from handlers.network.engines.reference import TOLERANCE, TOLERANCES
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from tests.handlers.support import unpack

ROOT = Path(__file__).parents[2]
Name = Callable[..., str]
"""The name of the engine that is chosen with these options."""
needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.capabilities(), reason="this processor does not compute in bfloat16"
)


class Net:
    """A committed archive, and its network in torch."""

    def __init__(self, model: str, folder: Path) -> None:
        self.archive: Archive = archives.load(unpack(model, folder))
        self.eager: TorchEngine = self.archive.eager("cpu")
        self.layers = frozenset(self.archive.layers)

    def pictures(self, count: int, height: int = 32, width: int = 32) -> NDArray[np.float32]:
        shape = (count, self.archive.preprocessing.channels, height, width)
        return np.random.default_rng(count).standard_normal(shape, np.float32)

    def compiled(self, precision: str = "float32", threads: int = 1) -> OpenVinoEngine:
        return OpenVinoEngine(
            self.archive.directory / GRAPH,
            self.archive.layers,
            self.pictures(2),
            has_scores=self.eager.has_scores,
            threads=threads,
            precision=precision,
        )


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


@pytest.fixture(scope="module", params=["deep", "edges"])  # A residual network, and one without scores, of any size.
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net(request.param, tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net("cifar", tmp_path_factory.mktemp("cifar"))


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_what_torch_does_whatever_the_size_and_the_batch(net: Net, threads: int) -> None:
    engine = net.compiled(threads=threads)
    assert engine.name.startswith("openvino-2")
    assert "bfloat16" not in engine.name
    sizes = [(2, 16, 56), (1, 44, 20)] if net.archive.preprocessing.size is None else []
    for shape in ((1, 32, 32), (3, 32, 32), *sizes, (1, 32, 32)):
        assert max(changes(engine, net.eager, net.pictures(*shape), net.layers).values()) <= TOLERANCE


def test_maps_of_a_layout_are_the_graphs_output_of_that_layout(cifar: Net, tmp_path: Path) -> None:
    model = onnx.load(cifar.archive.directory / GRAPH, load_external_data=False)
    text = text_format.MessageToString(model).replace("/maps/conv2", "/maps/conv2@channels_last")
    (tmp_path / GRAPH).write_bytes(text_format.Parse(text, onnx.ModelProto()).SerializeToString())
    shutil.copy(cifar.archive.directory / WEIGHTS, tmp_path)
    layouts, images = {"conv2": "channels_last"}, cifar.pictures(2)
    turned = OpenVinoEngine(tmp_path / GRAPH, {"conv2": "conv2"}, images, has_scores=True, layouts=layouts)
    assert changes(turned, cifar.compiled(), images, frozenset({"conv2"})) == {"": 0, "conv2": 0}


def test_the_maps_asked_for_come_alone_and_are_the_same(net: Net) -> None:
    engine = net.compiled()
    images = net.pictures(3)
    scores, every = engine.run(images, net.layers)
    for wanted in (frozenset(), *(frozenset({name}) for name in net.layers)):
        found, maps = engine.run(images, wanted)
        assert maps.keys() == wanted
        assert all(np.array_equal(maps[name], every[name]) for name in wanted)
        assert (scores is None) == (found is None)
        assert scores is None or change(found, scores) <= TOLERANCE


def test_what_it_returns_is_the_callers(net: Net) -> None:
    engine = net.compiled()
    scores, maps = engine.run(net.pictures(2), net.layers)
    kept = {name: np.array(values) for name, values in maps.items()}
    kept_scores = None if scores is None else scores.copy()
    engine.run(-net.pictures(2), net.layers)
    assert all(np.array_equal(maps[name], kept[name]) for name in kept)
    assert scores is None or np.array_equal(scores, kept_scores)
    assert all(values.flags.writeable and values.flags.c_contiguous for values in maps.values())


@needs_bfloat16
def test_bfloat16_is_near_float32_and_says_its_name(net: Net) -> None:
    engine = net.compiled("bfloat16")
    assert engine.name.startswith("openvino-2")
    assert engine.name.endswith("-bfloat16")
    off = max(changes(engine, net.eager, net.pictures(2), net.layers).values())
    assert TOLERANCE < off <= TOLERANCES["bfloat16"]


@needs_bfloat16
@pytest.mark.parametrize("model", ["cifar", "deep"])
def test_scores_in_bfloat16_do_not_depend_on_the_maps_asked_for(model: str, tmp_path: Path) -> None:
    """Requests share a pass, so a map may be another caller's wish."""
    net = Net(model, tmp_path)
    engine = net.compiled("bfloat16")
    alone, _ = engine.run(net.pictures(4))
    for wanted in (frozenset(sorted(net.layers)[:1]), net.layers):
        assert change(engine.run(net.pictures(4), wanted)[0], alone) <= TOLERANCE


def test_a_thread_may_run_on_every_core(cifar: Net) -> None:
    """Otherwise the workers of one machine would all compute on its first core."""
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("this machine has one core")
    engine, main, done = cifar.compiled(), threading.get_native_id(), threading.Event()
    images, seen = cifar.pictures(64), {frozenset(cores)}

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
from handlers.network.engines.openvino import OpenVinoEngine

images = np.zeros((1, 3, 32, 32), np.float32)
OpenVinoEngine(Path(sys.argv[1]), {}, images, has_scores=True).run(images)
"""


def test_it_reports_nothing_and_writes_nothing(cifar: Net, tmp_path: Path) -> None:
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
    before = sorted(cifar.archive.directory.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(cifar.archive.directory / GRAPH)],
        cwd=home,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert list(home.iterdir()) == []
    assert sorted(cifar.archive.directory.iterdir()) == before


class TestTheChoice:
    @pytest.fixture(autouse=True)
    def _bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever this processor has."""
        monkeypatch.setattr(choice, "computes_bfloat16", lambda: True)

    @pytest.fixture
    def name(self, cifar: Net) -> Name:
        return lambda **options: choose(cifar.archive, lambda: cifar.eager, **options).name

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

    def test_the_weights_of_another_network(self, cifar: Net, tmp_path: Path) -> None:
        other = archives.load(unpack("cifar", tmp_path))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            (tmp_path / WEIGHTS).write_bytes(packing.weights(Cifar().state_dict()))
        with pytest.raises(RuntimeError, match=r"cannot run: .* differ from torch's"):
            choose(other, lambda: cifar.eager, wanted="openvino")
