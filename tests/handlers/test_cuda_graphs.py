"""CUDA graphs: one per shape, limited in number, not shared, and torch where none can be captured."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archiver.trial import noise
from handlers.network.engines.cuda_graphs import CudaGraphEngine, Outputs, Replay
from handlers.network.engines.reference import TOLERANCE, check
from handlers.network.engines.torch_choice import choose_on_gpu
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from tests.handlers.support import CIFAR_INPUT

LAYERS = frozenset(Cifar.layers)
PICTURE = (3, 32, 32)
CPU = torch.device("cpu")


class Recorder:
    """Stands in for CUDA graphs: what is replayed reads the same input and writes the same outputs."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, compute: Callable[[], Outputs], device: torch.device) -> tuple[Replay, Outputs]:
        self.recordings += 1
        outputs = {name: values.clone() for name, values in compute().items()}

        def replay() -> None:
            self.replays += 1
            for name, values in compute().items():
                outputs[name].copy_(values)

        return replay, outputs


def refuse(compute: Callable[[], Outputs], device: torch.device) -> tuple[Replay, Outputs]:
    raise RuntimeError("operation not permitted when stream is capturing")


def stuck(compute: Callable[[], Outputs], device: torch.device) -> tuple[Replay, Outputs]:
    """A recording that has its first input for ever."""
    return (lambda: None), {name: values.clone() for name, values in compute().items()}


@pytest.fixture
def eager() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(Cifar(), Cifar.layers, has_scores=True)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def captured(eager: TorchEngine, recorder: Recorder) -> CudaGraphEngine:
    return CudaGraphEngine(eager, PICTURE, record=recorder, kept=2, idle_calls=3)


def test_every_shape_is_recorded_once_and_replayed_with_the_pictures_of_the_call(
    eager: TorchEngine, captured: CudaGraphEngine, recorder: Recorder
) -> None:
    for scale in (1.0, -2.0, 0.5):
        for count in (1, 3):
            images = noise(CIFAR_INPUT, count) * scale
            expected_scores, expected = eager.forward(images, LAYERS)
            scores, maps = captured.forward(images, LAYERS)
            assert torch.equal(scores, expected_scores)  # type: ignore[arg-type]
            assert all(torch.equal(maps[name], expected[name]) for name in LAYERS)
    assert (recorder.recordings, recorder.replays) == (2, 6)
    assert captured.recorded == ((1, LAYERS), (3, LAYERS))


def test_sets_of_layers_are_recorded_apart(captured: CudaGraphEngine) -> None:
    images = noise(CIFAR_INPUT, 2)
    assert captured.forward(images)[1] == {}
    assert set(captured.forward(images, frozenset({"conv2"}))[1]) == {"conv2"}
    assert captured.recorded == ((2, frozenset()), (2, frozenset({"conv2"})))


def test_no_memory_is_shared_between_two_calls(captured: CudaGraphEngine) -> None:
    images = noise(CIFAR_INPUT, 2)
    scores, maps = captured.forward(images, LAYERS)
    kept = {name: values.clone() for name, values in maps.items()}
    kept_scores = scores.clone()  # type: ignore[union-attr]
    captured.forward(images * -3, LAYERS)
    assert torch.equal(scores, kept_scores)  # type: ignore[arg-type]
    assert all(torch.equal(maps[name], kept[name]) for name in LAYERS)


def test_the_callers_pictures_are_left_alone(captured: CudaGraphEngine) -> None:
    images = noise(CIFAR_INPUT, 2)
    captured.forward(images)
    captured.forward(torch.zeros_like(images))
    assert torch.equal(images, noise(CIFAR_INPUT, 2))


def test_a_full_house_keeps_what_is_in_use_and_lets_go_of_what_is_idle(
    captured: CudaGraphEngine, recorder: Recorder
) -> None:
    one, two, three = (noise(CIFAR_INPUT, count) for count in (1, 2, 3))
    for images in (one, two, three, one, two, three):  # More in turn than are kept: recorded twice, not six times.
        captured.forward(images)
    assert recorder.recordings == 2
    for _ in range(4):
        captured.forward(two)
    captured.forward(three)  # `one` was idle for more than three calls.
    assert [count for count, _ in captured.recorded] == [2, 3]
    assert recorder.recordings == 3


def test_pictures_of_another_size_run_as_they_are(recorder: Recorder) -> None:
    eager = TorchEngine(torch.nn.Conv2d(3, 4, 3), {}, has_scores=False)
    captured = CudaGraphEngine(eager, PICTURE, record=recorder)
    captured.forward(torch.rand(1, 3, 20, 20))
    assert captured.recorded == ()
    captured.forward(torch.rand(1, 3, 32, 32))
    assert len(captured.recorded) == 1


def test_what_cannot_be_recorded_runs_in_torch_and_is_told_once_a_shape(
    eager: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    captured = CudaGraphEngine(eager, PICTURE, record=refuse)
    with caplog.at_level(logging.WARNING):
        for count in (1, 1, 2, 1):
            check(captured, eager, noise(CIFAR_INPUT, count))
    assert [record.args[0] for record in caplog.records] == [1, 2]  # type: ignore[index]
    assert "stream is capturing" in caplog.text


class TestTheChoiceOnAGpu:
    """Made here of CPU tensors and a stand-in for CUDA graphs."""

    def test_is_channels_last_and_recorded(self, eager: TorchEngine, recorder: Recorder) -> None:
        engine = choose_on_gpu(eager, noise(CIFAR_INPUT, 2), record=recorder)
        assert engine.name == f"{eager.name}-channels-last-graphs"
        assert recorder.recordings == 1
        check(engine, eager, noise(CIFAR_INPUT, 3), 10 * TOLERANCE)
        assert all(weight.is_contiguous() for weight in eager.module.parameters()), "gradients keep the plain network"

    def test_in_16_bits_keeps_its_precision(self, eager: TorchEngine, recorder: Recorder) -> None:
        engine = choose_on_gpu(eager, noise(CIFAR_INPUT, 2), precision="bfloat16", record=recorder)
        assert engine.name == f"{eager.name}-bfloat16-channels-last-graphs"

    def test_falls_back_on_channels_last_with_one_warning(
        self, eager: TorchEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with caplog.at_level(logging.WARNING, "handlers.network.engines.torch_choice"):
            engine = choose_on_gpu(eager, noise(CIFAR_INPUT, 2), record=stuck)
        assert engine.name == f"{eager.name}-channels-last"
        told = [record for record in caplog.records if record.name == "handlers.network.engines.torch_choice"]
        assert len(told) == 1
        assert "differ from torch's" in caplog.text

    def test_falls_back_on_plain_torch_where_nothing_else_computes_the_same(
        self, eager: TorchEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compute = TorchEngine.compute

        def wrong(self: TorchEngine, images: Tensor, layers: frozenset[str]) -> dict[str, Tensor]:
            found = compute(self, images, layers)
            return found if self is eager else {name: values * 1.1 for name, values in found.items()}

        monkeypatch.setattr(TorchEngine, "compute", wrong)
        with caplog.at_level(logging.WARNING, "handlers.network.engines.torch_choice"):
            assert choose_on_gpu(eager, noise(CIFAR_INPUT, 2), record=refuse) is eager
        told = [record for record in caplog.records if record.name == "handlers.network.engines.torch_choice"]
        assert len(told) == 1
        assert "channels-last" in told[0].getMessage()
        assert "cannot be recorded" in told[0].getMessage()
