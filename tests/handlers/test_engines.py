"""Engines: the faster one where it can run, torch where it cannot, and the same answers from both."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from archiver import packing
from archiver.trial import noise
from handlers import loading
from handlers.network.archive import GRAPH, WEIGHTS, Archive
from handlers.network.engines import choice
from handlers.network.engines.choice import choose
from handlers.network.engines.reference import TOLERANCE, check, difference
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import (
    CIFAR_CLASSES,
    CIFAR_INPUT,
    STORE,
    ask_json,
    ask_message,
    ask_rest,
    cells,
    make_archive,
    unpack,
)
from tests.pictures import colours, png
from tests.thorough import variants

MODELS = variants(["cifar", "deep", "edges", "flat"], ["digits", "simple"])


def load(model: str, folder: Path, engine: str, **more: str) -> Pipeline:
    unpack(model, folder)
    environment = {"CONVSCOPE_ENGINE": engine, "CONVSCOPE_MAX_RESPONSE_BYTES": str(2**28), **more}
    return loading.load(
        folder,
        model=model,
        version="1.0",
        config={},
        batch_size=1,
        gpu=None,
        settings=Settings.from_environment(environment),
    )


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline]:
    """A committed archive in torch and in ONNX Runtime."""
    folder = tmp_path_factory.mktemp(request.param)
    return load(request.param, folder, "torch"), load(request.param, folder, "onnxruntime")


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Within the contract's tolerance."""
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())


PICTURES = [png(colours(seed, 40, 36)) for seed in range(5)]


class TestTheSameAnswers:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_of_float32(self, both: tuple[Pipeline, Pipeline], count: int) -> None:
        message = wire.PredictRequest(pictures=PICTURES[:count], layers=["all"], top_k=0)
        torch_reply, fast_reply = (ask_message(service, message) for service in both)
        assert torch_reply.engine.startswith("torch-")
        assert fast_reply.engine.startswith("onnxruntime-")
        for expected, found in zip(torch_reply.results, fast_reply.results, strict=True):
            assert [score.index for score in found.top] == [score.index for score in expected.top]
            logits = [np.array([score.logit for score in result.top]) for result in (found, expected)]
            assert not len(logits[0]) or close(*logits)
            assert [one.layer for one in found.maps] == [one.layer for one in expected.maps]
            assert all(close(cells(one), cells(other)) for one, other in zip(found.maps, expected.maps, strict=True))

    def test_of_float16(self, both: tuple[Pipeline, Pipeline]) -> None:
        """Rounding may go the other way: two neighbours of float16 apart, at most."""
        message = wire.PredictRequest(pictures=PICTURES, layers=["all"], map_dtype=wire.FLOAT16)
        expected, found = (ask_message(service, message) for service in both)
        for one, other in self.pairs(found, expected):
            largest = np.abs(cells(other).astype(np.float32)).max()
            apart = np.abs(cells(one).astype(np.float32) - cells(other).astype(np.float32))
            assert (apart <= np.abs(cells(other).astype(np.float32)) * 2**-10 + TOLERANCE * largest).all()

    def test_of_uint8(self, both: tuple[Pipeline, Pipeline]) -> None:
        message = wire.PredictRequest(pictures=PICTURES, layers=["all"], map_dtype=wire.UINT8)
        expected, found = (ask_message(service, message) for service in both)
        for one, other in self.pairs(found, expected):
            assert np.abs(cells(one).astype(int) - cells(other).astype(int)).max() <= 1
            for values in ("scale", "offset"):
                largest = np.abs(np.array(other.tensor.scale)).max() * 255 + np.abs(np.array(other.tensor.offset)).max()
                apart = np.array(getattr(one.tensor, values)) - np.array(getattr(other.tensor, values))
                assert np.abs(apart).max() <= 2 * TOLERANCE * largest

    @pytest.mark.parametrize("options", [{"pool": 1}, {"pool": 3}, {"channels": {"indexes": [0]}}])
    def test_of_selections(self, both: tuple[Pipeline, Pipeline], options: dict[str, Any]) -> None:
        message = wire.PredictRequest(pictures=PICTURES, layers=["all"], **options)
        expected, found = (ask_message(service, message) for service in both)
        if options.get("pool", 1) > min(min(layer.shape[1:]) for layer in both[0]._published.values()):
            assert found.error == expected.error
            assert found.error.code == "bad_request"
            return
        for one, other in self.pairs(found, expected):
            assert np.allclose(cells(one), cells(other), rtol=1e-4, atol=1e-4)

    def test_in_every_format(self, both: tuple[Pipeline, Pipeline]) -> None:
        first = next(iter(both[0]._published))
        row, asked = {"body": bytearray(PICTURES[0])}, {"x_convscope_layers": first}
        one, other = (ask_json(service, row, **asked)["results"][0]["maps"][first] for service in both)
        assert (one["dtype"], one["shape"]) == (other["dtype"], other["shape"])
        archives = [ask_rest(service, row, accept="application/x-npz", **asked).body for service in both]
        arrays = [np.load(io.BytesIO(body), allow_pickle=False)[first] for body in archives]
        assert close(arrays[1], arrays[0])
        pictures = [ask_rest(service, row, accept="image/png", **asked).body for service in both]
        assert all(body.startswith(b"\x89PNG") for body in pictures)

    @staticmethod
    def pairs(found: wire.PredictReply, expected: wire.PredictReply) -> list[tuple[wire.FeatureMap, wire.FeatureMap]]:
        results = zip(found.results, expected.results, strict=True)
        pairs = [pair for one, other in results for pair in zip(one.maps, other.maps, strict=True)]
        assert pairs
        return pairs


def test_one_layer_alone_is_the_same_as_among_all(both: tuple[Pipeline, Pipeline]) -> None:
    _, fast = both
    together = ask_message(fast, wire.PredictRequest(pictures=PICTURES[:1], layers=["all"])).results[0]
    for item in together.maps:
        alone = ask_message(fast, wire.PredictRequest(pictures=PICTURES[:1], layers=[item.layer])).results[0]
        assert [one.layer for one in alone.maps] == [item.layer]
        assert np.array_equal(cells(alone.maps[0]), cells(item))
        assert alone.top == together.top


def test_maps_stay_what_they_were_when_more_pictures_run(both: tuple[Pipeline, Pipeline]) -> None:
    for service in both:
        engine = service.predictor._network
        images = noise(service._preprocessing, 4).numpy()
        layers = frozenset(engine.layers)
        _, maps = engine.run(images, layers)
        kept = {name: np.array(values) for name, values in maps.items()}
        for _ in range(5):
            engine.run(images * -3, layers)
        assert all(np.array_equal(np.asarray(maps[name]), kept[name]) for name in layers)


def test_arrays_come_out_as_tensors_do(both: tuple[Pipeline, Pipeline]) -> None:
    for service in both[:1]:
        engine = service.predictor._network
        assert isinstance(engine, TorchEngine)
        images = noise(service._preprocessing, 3)
        scores, maps = engine.forward(images, frozenset(engine.layers))
        found, arrays = engine.run(images.numpy(), frozenset(engine.layers))
        if engine.has_scores:
            assert isinstance(found, np.ndarray)
            assert isinstance(scores, Tensor)
            assert np.array_equal(found, scores.numpy())
        else:
            assert found is scores is None
        assert arrays.keys() == maps.keys() == set(engine.layers)
        for name, cells_ in arrays.items():
            assert isinstance(cells_, np.ndarray)
            assert np.array_equal(cells_, maps[name].numpy())
        assert engine.run(images.numpy())[1] == {}


@pytest.mark.parametrize("asked", [{}, {"layers": ["all"]}, {"layers": ["all"], "map_dtype": wire.UINT8}])
def test_torch_has_no_part_in_what_another_engine_answers(
    asked: dict[str, Any], both: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code costs more than the work does, where it is called once a request."""
    calls: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **kwargs or {})

    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: [calls.append("from_numpy"), from_numpy(array)][1])
    slow, fast = both
    taken = ask_message(fast, wire.PredictRequest(describe=True)).card.input
    fitting = png(colours(0, taken.height or 8, taken.width or 8))  # torch is what resizes others.
    request = wire.PredictRequest(pictures=[fitting] * 2, **asked)
    for service in both:
        ask_message(service, request)
    with Watch():
        calls.clear()
        ask_message(fast, request)
        assert calls == []
        ask_message(slow, request)
        assert calls != []


def test_the_card_says_which_engine_runs(both: tuple[Pipeline, Pipeline]) -> None:
    for service, name in zip(both, ("torch-", "onnxruntime-"), strict=True):
        assert ask_json(service, {"body": bytearray()})["engine"].startswith(name)


def test_a_layer_bound_to_no_node_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'conv9' is bound to 'nowhere', which the network does not have: .*'relu1'"):
        TorchEngine(Cifar().eval(), {"conv9": "nowhere"}, has_scores=True)


def test_torch_has_the_workers_threads_for_the_network_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting maps is too little for threads to share out."""
    before, seen = torch.get_num_threads(), []
    forward = TorchEngine.forward_with_gradients

    def watched(self: TorchEngine, images: Tensor, layers: frozenset[str] = frozenset()) -> Any:
        seen.append(torch.get_num_threads())
        return forward(self, images, layers)

    monkeypatch.setattr(TorchEngine, "forward_with_gradients", watched)
    try:
        service = load("cifar", tmp_path, "onnxruntime", CONVSCOPE_THREADS="3")
        assert torch.get_num_threads() == 1
        answer = ask_json(service, {"data": png(colours()), "explain": b"grad_cam"})
        assert "explanation" in answer["results"][0]
        assert (seen, torch.get_num_threads()) == ([3], 1)
        for precision in ("float32", "bfloat16"):
            load("cifar", tmp_path, "torch", CONVSCOPE_THREADS="3", CONVSCOPE_PRECISION=precision)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class TestWithoutIt:
    """Whatever keeps ONNX Runtime from running, torch does."""

    @pytest.fixture
    def network(self) -> Cifar:
        torch.manual_seed(0)
        return Cifar()

    @pytest.fixture
    def archive(self, network: Cifar) -> Archive:
        """Random weights, with the committed graph of the same network."""
        with zipfile.ZipFile(STORE / "cifar.mar") as archive:
            return make_archive(network, CIFAR_INPUT, CIFAR_CLASSES, graph=archive.read("graph.onnx"))

    @pytest.fixture
    def eager(self, network: Cifar) -> TorchEngine:
        return TorchEngine(network, Cifar.layers, has_scores=True)

    def test_the_package_missing(self, archive: Archive, eager: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "find_spec", lambda name: None)
        assert choose(archive, lambda: eager) is eager
        with pytest.raises(RuntimeError, match="not installed"):
            choose(archive, lambda: eager, wanted="onnxruntime")

    def test_the_graph_missing(self, archive: Archive, eager: TorchEngine) -> None:
        (archive.directory / GRAPH).unlink()
        assert choose(archive, lambda: eager) is eager
        with pytest.raises(RuntimeError, match="holds no graph"):
            choose(archive, lambda: eager, wanted="onnxruntime")

    def test_a_gpu(self, archive: Archive, eager: TorchEngine) -> None:
        with pytest.raises(RuntimeError, match="it runs on the CPU, and this worker on cuda:1"):
            choose(archive, lambda: eager, device="cuda:1", wanted="onnxruntime")

    def test_torch_asked_for(self, archive: Archive, eager: TorchEngine) -> None:
        assert choose(archive, lambda: eager, wanted="torch") is eager

    def test_an_engine_there_is_not(self, archive: Archive, eager: TorchEngine) -> None:
        with pytest.raises(ValueError, match="auto, torch, onnxruntime"):
            choose(archive, lambda: eager, wanted="tensorrt")

    @pytest.mark.parametrize("file", [GRAPH, WEIGHTS])
    def test_a_file_damaged(
        self, file: str, archive: Archive, eager: TorchEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = archive.directory / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with caplog.at_level(logging.WARNING):
            assert choose(archive, lambda: eager) is eager
        assert "torch runs instead" in caplog.text
        with pytest.raises(RuntimeError, match="cannot run"):
            choose(archive, lambda: eager, wanted="onnxruntime")

    def test_the_graph_of_another_network(self, network: Cifar, caplog: pytest.LogCaptureFixture) -> None:
        class Negated(Cifar):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(-images)

        with zipfile.ZipFile(STORE / "cifar.mar") as file:
            negated = Negated()
            archive = make_archive(negated, CIFAR_INPUT, CIFAR_CLASSES, graph=file.read("graph.onnx"))
        eager = TorchEngine(negated, Cifar.layers, has_scores=True)
        with caplog.at_level(logging.WARNING):
            assert choose(archive, lambda: eager) is eager
        assert "differ from torch's" in caplog.text
        with pytest.raises(RuntimeError, match="differ from torch's"):
            choose(archive, lambda: eager, wanted="onnxruntime")

    def test_neither_does_what_the_archive_was_made_to_do(self, archive: Archive) -> None:
        (archive.directory / WEIGHTS).write_bytes(packing.weights(Cifar().state_dict()))
        other = TorchEngine(Cifar(), Cifar.layers, has_scores=True)
        with pytest.raises(RuntimeError, match="neither its graph nor its weights reproduce the reference"):
            choose(archive, lambda: other)

    def test_nothing(self, archive: Archive) -> None:
        def build() -> TorchEngine:
            raise AssertionError("torch is not needed")

        assert choose(archive, build, wanted="auto").name.startswith("onnxruntime-")


class Shifted(nn.Module):
    """The network, off by a share of its largest score."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner = Cifar()
        self.share = share

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.inner(images)
        return scores + self.share * scores.abs().max()


@pytest.mark.parametrize(("share", "passes"), [(0.0, True), (0.5 * TOLERANCE, True), (3 * TOLERANCE, False)])
def test_an_engine_passes_within_the_tolerance_only(share: float, passes: bool) -> None:
    torch.manual_seed(0)
    shifted = Shifted(share)
    layers = {"conv2": "inner.conv2"}
    eager = TorchEngine(shifted.inner, {"conv2": "conv2"}, has_scores=True)
    off = TorchEngine(shifted, layers, has_scores=True)
    if passes:
        check(off, eager, noise(CIFAR_INPUT, 2))
    else:
        with pytest.raises(RuntimeError, match="the scores differ"):
            check(off, eager, noise(CIFAR_INPUT, 2))


def test_a_value_that_is_no_number_is_a_difference() -> None:
    assert not difference(np.array([1.0, np.nan]), np.array([1.0, 1.0])) <= TOLERANCE
    assert difference(np.zeros(3), np.zeros(3)) == 0


class Doubtful(nn.Module):
    """Cannot be traced, and computes something else in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.norm(images)
        return maps if maps.sum() > 0 else maps + 1


def test_a_network_that_cannot_be_traced_runs_in_evaluation_mode() -> None:
    network = Doubtful()
    eager = TorchEngine(network, {"norm": "norm"}, has_scores=False)
    images = torch.rand(2, 3, 5, 5)
    _, maps = eager.forward(images, frozenset({"norm"}))
    assert difference(maps["norm"].numpy(), images.numpy()) < 1e-4, (
        "a fresh norm leaves its input as it is, but for its epsilon"
    )
    assert int(network.norm.num_batches_tracked) == 0
    assert not network.norm.training
