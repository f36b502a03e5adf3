"""Resizing and pooling without torch: what torch's own functions give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from handlers.images.resizing import bilinear, without_antialiasing
from handlers.outputs.maps import average

SIZES = [
    ((1, 1), (5, 7)), ((7, 1), (2, 9)), ((32, 32), (32, 32)), ((48, 64), (32, 32)), ((61, 300), (33, 32)),
    ((200, 31), (31, 200)), ((480, 640), (224, 224)), ((500, 3), (2, 64)), ((13, 17), (130, 170)),
]  # fmt: skip


def in_torch(picture: np.ndarray, size: tuple[int, int], **options: object) -> np.ndarray:
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return functional.interpolate(images, size, **options)[0].permute(1, 2, 0).numpy()  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bytes_are_torchs_level_for_level(before: tuple[int, int], after: tuple[int, int], channels: int) -> None:
    generator = np.random.default_rng(0)
    for picture in (
        generator.integers(0, 256, (*before, channels), np.uint8),
        generator.choice(np.array([0, 255], np.uint8), (*before, channels)),
    ):
        found = bilinear(picture, after)
        assert np.array_equal(found, in_torch(picture, after, mode="bilinear", antialias=True))
        assert found.flags.c_contiguous


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_without_antialiasing_it_is_torchs_but_for_rounding(
    before: tuple[int, int], after: tuple[int, int], interpolation: str
) -> None:
    numbers = np.random.default_rng(0).random((*before, 3), np.float32)
    expected = in_torch(numbers, after, mode=interpolation)
    assert np.abs(without_antialiasing(numbers, after, interpolation) - expected).max() < 5e-5
    levels = (numbers * 255).astype(np.uint8)
    expected = in_torch(levels.astype(np.float32), after, mode=interpolation).round().clip(0, 255)
    off = np.abs(without_antialiasing(levels, after, interpolation) - expected)
    assert off.max() <= 1
    assert (off > 0).sum() <= max(3, 0.005 * off.size)


@pytest.mark.parametrize("pool", [1, 2, 3, 7])
def test_maps_are_averaged_as_torch_cuts_them(pool: int) -> None:
    maps = np.random.default_rng(0).standard_normal((2, 3, 7, 16), np.float32)
    expected = functional.adaptive_avg_pool2d(torch.from_numpy(maps), pool).numpy()
    assert np.allclose(average(maps, pool), expected[:, :, 0, 0] if pool == 1 else expected, rtol=0, atol=1e-6)
