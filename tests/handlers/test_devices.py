"""On a GPU that only seems to be there: no operation mixes devices, and none that is to be recorded waits for the GPU.

torch's fake tensors have a device, a shape and no values: two devices in one operation are an error, and so is reading
a value, for which a GPU would have to be waited for, and which a recording (`CudaGraphEngine`) forbids.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from archiver.geometry import blank, layer_geometry
from archiver.operations import count_multiply_adds
from handlers.images import preprocessing as pictures
from handlers.network.engines.torch_engine import SCORES, TorchEngine
from handlers.networks import NETWORKS, Network
from handlers.outputs.maps import quantise_in_torch
from tests.handlers.support import CIFAR_INPUT

GPU = torch.device("cuda:0")
CLASSIFIERS = sorted(set(NETWORKS) - {"edges"})

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, fake tensors wake it; see tests/gpu")


@pytest.fixture(autouse=True)
def seeming_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tensors that have no values; a module whose parameters are such cannot be moved, and need not be."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **how: module)
    with FakeTensorMode():
        yield


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Network, torch.Tensor]:
    """Return a network, and pictures for it, on the GPU."""
    torch.set_default_dtype(dtype)
    try:
        with GPU:
            network = NETWORKS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    channels, height, width = network.pictures
    return network, torch.zeros(4, channels, height or 8, width or 8, device=GPU)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_card_is_drawn_up_where_the_network_is(name: str) -> None:
    network, images = made(name)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    assert list(layer_geometry(network, network.layers, shape)) == list(network.layers)
    assert count_multiply_adds(network, blank(network, shape)) > 0


@pytest.mark.parametrize(
    ("name", "dtype", "order"),
    [
        *((name, torch.float16, torch.channels_last) for name in NETWORKS),
        *((name, torch.float32, order) for name in ("cifar", "edges")
          for order in (torch.contiguous_format, torch.channels_last)),
    ],
)  # fmt: skip
def test_a_pass_stays_on_the_gpu_and_waits_for_nothing(
    name: str, dtype: torch.dtype, order: torch.memory_format
) -> None:
    network, images = made(name, dtype)
    has_scores = name != "edges"
    eager = TorchEngine(network, network.layers, has_scores=has_scores, device=GPU, dtype=dtype, memory_format=order)
    with torch.inference_mode():
        found = eager.compute(images, frozenset(network.layers))
    assert found.keys() == {*network.layers} | ({SCORES} if has_scores else set())
    for values in found.values():
        assert values.device == GPU
        assert values.dtype == torch.float32
        assert values.is_contiguous()


def test_a_branch_on_a_value_would_be_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        bool(torch.zeros(2, device=GPU).sum() > 0)


@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (4, 6)])
def test_bytes_are_made_on_the_gpu(shape: tuple[int, ...]) -> None:
    whole, scale, offset = quantise_in_torch(torch.zeros(shape, device=GPU))
    assert (whole.device, scale.device, offset.device) == (GPU, GPU, GPU)
    assert (whole.shape, scale.shape) == (shape, shape[:2])


@pytest.fixture
def forgetting() -> Iterator[None]:
    """Let no tensor without values outlive the test."""
    yield
    pictures._statistics.cache_clear()


@pytest.mark.usefixtures("forgetting")
def test_pictures_are_normalised_on_the_gpu() -> None:
    values = pictures.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=GPU), CIFAR_INPUT)
    assert (values.device, values.dtype, tuple(values.shape)) == (GPU, torch.float32, (1, 3, 32, 32))
    assert values.is_contiguous()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_gradients_are_taken_of_is_on_the_gpu(name: str) -> None:
    network, images = made(name)
    eager = TorchEngine(network, network.layers, has_scores=True, device=GPU)
    [layer] = list(network.layers)[-1:]
    logits, maps = eager.forward_with_gradients(images[:1], frozenset([layer]))
    assert logits.requires_grad
    assert (logits.device, maps[layer].device) == (GPU, GPU)
