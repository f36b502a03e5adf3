"""Maps of several pictures at once are those of each alone, and one that cannot travel harms no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from handlers.api.errors import BadImage, BadRequest
from handlers.api.options import Options
from handlers.outputs.maps import FeatureMap, prepare, quantise, quantise_in_torch

OPTIONS = [
    *({"map_dtype": dtype} for dtype in ("float32", "float16", "uint8")),
    {"pool": 2},
    {"pool": 1, "map_dtype": "uint8"},
    {"channels": (4, 0)},
    {"channels": 3},
    {"channels": 2, "pool": 3, "map_dtype": "float16"},
]


@pytest.fixture
def values() -> Tensor:
    """(4, 6, 5, 7) float32."""
    return torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", OPTIONS)
def test_together_is_as_alone(values: Tensor, options: dict[str, Any]) -> None:
    asked = Options(**options)
    together = prepare("conv1", values, asked)
    alone = [item for number in range(4) for item in prepare("conv1", values[number : number + 1], asked)]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, FeatureMap)
        assert isinstance(other, FeatureMap)
        assert np.array_equal(one.cells, other.cells)
        assert one.cells.flags.c_contiguous
        assert (one.dtype, one.channels) == (other.dtype, other.channels)
        for mine, its in ((one.scale, other.scale), (one.offset, other.offset)):
            assert (mine is None and its is None) or np.array_equal(mine, its)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
def test_arrays_become_what_tensors_become(values: Tensor, options: dict[str, Any]) -> None:
    asked = Options(**options)
    for one, other in zip(prepare("conv1", values.numpy(), asked), prepare("conv1", values, asked), strict=True):
        assert isinstance(one, FeatureMap)
        assert isinstance(other, FeatureMap)
        if asked.pool is None:
            assert np.array_equal(one.cells, other.cells)
        else:  # Sums of another order.
            assert np.allclose(one.values(), other.values(), rtol=1e-3, atol=1e-5)
        assert (one.dtype, one.channels) == (other.dtype, other.channels)


def test_each_picture_has_strongest_channels_of_its_own(values: Tensor) -> None:
    values[0, 5], values[1, 2] = 100, 50
    chosen = [item.channels for item in prepare("conv1", values, Options(channels=1)) if isinstance(item, FeatureMap)]
    assert chosen[:2] == [(5,), (2,)]


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_what_float16_cannot_carry_is_refused_for_its_picture_alone(values: Tensor, value: float) -> None:
    values[2, 1, 0, 0] = value
    found = prepare("conv1", values, Options(map_dtype="float16"))
    assert [isinstance(item, BadImage) for item in found] == [False, False, True, False]


def test_the_largest_float16_is_carried(values: Tensor) -> None:
    values[0, 0, 0, 0], values[1, 0, 0, 0] = 65519.0, -65504.0
    assert all(isinstance(item, FeatureMap) for item in prepare("conv1", values, Options(map_dtype="float16")))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
def test_what_uint8_cannot_carry_is_refused_for_its_picture_alone(values: Tensor, value: float) -> None:
    values[1, 3, 0, 0], values[1, 3, 0, 1] = value, -3.4e38
    found = prepare("conv1", values, Options(map_dtype="uint8"))
    assert [isinstance(item, BadImage) for item in found] == [False, True, False, False]


@pytest.mark.parametrize("span", [0.0, 1e-44, 1e-38, 1.0, 1e38])
def test_uint8_is_within_half_a_step_of_any_range(span: float) -> None:
    values = torch.linspace(-span, span, 60).reshape(1, 1, 6, 10)
    [item] = prepare("conv1", values, Options(map_dtype="uint8"))
    assert isinstance(item, FeatureMap)
    assert item.scale is not None
    assert item.offset is not None
    back = item.offset[0].astype(float) + item.scale[0].astype(float) * item.cells
    rounding = 2e-6 * span + 255 * 1.5e-45  # float32's; of a tiny span, that of the scale to its least number.
    assert np.abs(back - values[0].numpy().astype(float)).max() <= 0.5 * item.scale[0] + rounding


def test_an_option_that_does_not_fit_is_refused_for_all(values: Tensor) -> None:
    with pytest.raises(BadRequest, match="channels 0 to 5"):
        prepare("conv1", values, Options(channels=(6,)))
    with pytest.raises(BadRequest, match="needs a map of shape"):
        prepare("fc", values.mean(dim=(2, 3)), Options(pool=1))
    assert len(prepare("fc", values.mean(dim=(2, 3)), Options())) == 4


def _channels(values: Tensor) -> dict[str, Tensor]:
    """Maps whose quantisation has something about it."""
    edges = values.clone()
    edges[0, 0], edges[1, 1], edges[2, 2] = 7.5, 0.0, -1e-44
    edges[3, 3, 0, 0] = 1e-44  # A range of hardly a number.
    halves = torch.arange(0, 256).repeat(4, 6, 1).float().reshape(4, 6, 16, 16)
    halves[:, :, 1:15] += 0.5  # Ties, which round to even.
    return {
        "plain": values,
        "constant and tiny": edges,
        "huge": values * 1e37,
        "relu": values.relu(),
        "ties": halves,
        "pooled": values.mean(dim=(2, 3)),
        "channels-last": values.contiguous(memory_format=torch.channels_last),
        "many": torch.randn(3, 16, 64, 64, generator=torch.Generator().manual_seed(1)),
    }


@pytest.mark.parametrize(
    "name", ["plain", "constant and tiny", "huge", "relu", "ties", "pooled", "channels-last", "many"]
)
def test_bytes_made_in_torch_are_those_of_numpy(values: Tensor, name: str) -> None:
    maps = _channels(values)[name]
    whole, scale, offset = (part.numpy() for part in quantise_in_torch(maps))
    expected, expected_scale, expected_offset = quantise(maps.contiguous().numpy())
    assert np.array_equal(whole, expected)
    assert np.array_equal(scale, expected_scale)
    assert np.array_equal(offset, expected_offset)
    step = scale.reshape(*scale.shape, *(1 for _ in maps.shape[2:]))
    off = np.abs(whole.astype(np.float64) * step + offset.reshape(step.shape) - maps.numpy())
    assert (off <= step * 0.5001 + np.abs(maps.numpy()) * 1e-6).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -3e38])
def test_what_bytes_cannot_carry_is_seen_in_torch_too(values: Tensor, value: float) -> None:
    values[2, 1, 0, 0], values[2, 1, 0, 1] = value, 3e38
    _, scale, _ = quantise_in_torch(values)
    finite = torch.isfinite(scale).all(dim=1).tolist()
    assert finite == [True, True, False, True]
    found = prepare("conv1", values, Options(map_dtype="uint8"))
    assert [isinstance(item, FeatureMap) for item in found] == finite
