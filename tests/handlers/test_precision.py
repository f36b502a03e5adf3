"""Precision and memory format of the torch engine: other numbers inside, the same contract outside."""

from __future__ import annotations

import pytest
import torch

from archiver.trial import noise
from handlers.network.engines.choice import PRECISIONS as NAMES
from handlers.network.engines.choice import choose
from handlers.network.engines.reference import TOLERANCE, check, difference
from handlers.network.engines.torch_choice import PRECISIONS, choose_in_torch
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_archive

LAYERS = frozenset(Cifar.layers)


@pytest.fixture
def eager() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(Cifar(), Cifar.layers, has_scores=True)


def test_channels_last_leaves_no_trace_in_maps(eager: TorchEngine) -> None:
    other = Cifar()
    other.load_state_dict(eager.module.state_dict())
    last = TorchEngine(other, Cifar.layers, has_scores=True, memory_format=torch.channels_last)
    convolutions = [part for part in last.module.modules() if isinstance(part, torch.nn.Conv2d)]
    assert any(part.weight.is_contiguous(memory_format=torch.channels_last) for part in convolutions)
    check(last, eager, noise(CIFAR_INPUT, 3))
    _, maps = last.forward(noise(CIFAR_INPUT, 3), LAYERS)
    assert all(values.is_contiguous() and values.dtype == torch.float32 for values in maps.values())
    assert last.name.endswith("-channels-last")


def test_bfloat16_is_near_float32_and_says_its_name(eager: TorchEngine) -> None:
    images = noise(CIFAR_INPUT, 3)
    engine = choose_in_torch(eager, CIFAR_INPUT, wanted="auto", precision="bfloat16")
    assert isinstance(engine, TorchEngine)
    assert engine.name == f"{eager.name}-bfloat16"
    scores, maps = engine.forward(images, LAYERS)
    expected_scores, expected = eager.forward(images, LAYERS)
    assert scores is not None
    assert expected_scores is not None
    assert scores.dtype == torch.float32
    off = [difference(maps[name].numpy(), expected[name].numpy()) for name in LAYERS]
    off.append(difference(scores.numpy(), expected_scores.numpy()))
    assert max(off) <= PRECISIONS["bfloat16"][1]
    assert max(off) > TOLERANCE, "it computed in float32"
    assert all(values.is_contiguous() and values.dtype == torch.float32 for values in maps.values())


def test_the_network_for_gradients_stays_float32(eager: TorchEngine) -> None:
    choose_in_torch(eager, CIFAR_INPUT, wanted="torch", precision="bfloat16")
    assert {value.dtype for value in eager.module.parameters()} == {torch.float32}


def test_what_cannot_be_is_refused(eager: TorchEngine) -> None:
    archive = make_archive(eager.module, CIFAR_INPUT, CIFAR_CLASSES)
    with pytest.raises(RuntimeError, match="is for a GPU"):
        choose(archive, lambda: eager, precision="float16")
    with pytest.raises(RuntimeError, match="runs float32"):
        choose(archive, lambda: eager, precision="bfloat16", wanted="onnxruntime")
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        choose(archive, lambda: eager, precision="int8")


def test_both_modules_name_the_same_precisions() -> None:
    assert tuple(PRECISIONS) == NAMES
