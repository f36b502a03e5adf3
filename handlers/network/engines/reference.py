"""Reference: what a network computes for the pictures of `noise`, and the comparison of an engine with it.

The archiver stores what torch computes: all scores, and for each map the largest absolute value and some cells,
evenly spread. Axes: `N` batch, `C` channels, `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.network.engines import Cells, Engine

PICTURES = 2
"""Number of pictures of `noise` in the reference."""

TOLERANCE = 1e-5
"""How far an engine's output may be from eager torch's: the largest difference of any cell, as a share of the largest
absolute value in that map or in those logits. float32 itself rounds by 6e-8 per operation."""

TOLERANCES = {"float32": TOLERANCE, "float16": 1e-2, "bfloat16": 5e-2}
"""Tolerance by the engine's precision. float16 rounds by 2**-11 per operation, bfloat16 by 2**-8; errors of layers
add up."""

_MOST_CELLS = 256  # Per map. A wrong graph shows in a few cells; they take a kilobyte.

Reference = Mapping[str, NDArray[Any]]
"""Arrays by name: `scores`; for each layer `shape/NAME`, `largest/NAME` and `cells/NAME`."""


def take(engine: Engine, images: Cells) -> dict[str, NDArray[Any]]:
    """Return what an engine computes, as a reference.

    Args:
        engine: The engine that runs the network.
        images: (N, C, H, W), `PICTURES` pictures of `noise`.
    """
    scores, maps = engine.run(images, frozenset(engine.layers))
    found: dict[str, NDArray[Any]] = {} if scores is None else {"scores": scores}
    for name in engine.layers:
        cells = host(maps[name])
        found |= {
            f"shape/{name}": np.array(cells.shape, np.int64),
            f"largest/{name}": np.array([np.abs(cells).max(initial=0)], np.float32),
            f"cells/{name}": cells.reshape(-1)[_places(cells.size)],
        }
    return found


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Read an archive's reference."""
    from safetensors.numpy import load_file

    found: dict[str, NDArray[Any]] = load_file(path)
    return found


def compare(found: Reference, expected: Reference, tolerance: float = TOLERANCE) -> None:
    """Check that an engine's outputs equal the reference.

    Args:
        found: The engine's outputs, from `take`.
        expected: The reference of an engine with the same layers; other entries are ignored.
        tolerance: The largest `difference` allowed.

    Raises:
        RuntimeError: An output is missing, has another shape, or is further off than `tolerance`.
    """
    for name, value in found.items():
        kind, _, layer = name.partition("/")
        what = f"the maps of {layer}" if layer else "the scores"
        if name not in expected:
            raise RuntimeError(f"{what} are not in the archive's reference")
        if kind == "shape" and not np.array_equal(value, expected[name]):
            raise RuntimeError(f"{what} have shape {tuple(value.tolist())} and not {tuple(expected[name].tolist())}")
        if kind != "shape":
            largest = expected.get(f"largest/{layer}")
            _compare(what, value, expected[name], tolerance, None if largest is None else float(largest[0]))


def check(engine: Engine, other: Engine, images: Cells, tolerance: float = TOLERANCE) -> None:
    """Check that two engines compute the same in every cell of the scores and of every published map.

    Args:
        engine: The engine to check.
        other: TorchEngine torch with the same network.
        images: (N, C, H, W), float32, on the CPU.
        tolerance: The largest `difference` allowed.

    Raises:
        RuntimeError: An output has another shape, or is further off than `tolerance`.
    """
    layers = frozenset(engine.layers)
    found, found_maps = engine.run(images, layers)
    expected, expected_maps = other.run(images, layers)
    pairs = {f"the maps of {name}": (host(found_maps[name]), host(expected_maps[name])) for name in layers}
    if found is not None and expected is not None:
        pairs["the scores"] = (found, expected)
    for what, (one, two) in pairs.items():
        _compare(what, one, two, tolerance)


def _compare(
    what: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float, largest: float | None = None
) -> None:
    if found.shape != expected.shape:
        raise RuntimeError(f"{what} have shape {found.shape} and not {expected.shape}")
    off = difference(found, expected, largest)
    if not off <= tolerance:
        raise RuntimeError(f"{what} differ from torch's by {off:.1e} of its largest value")


def difference(found: NDArray[Any], expected: NDArray[Any], largest: float | None = None) -> float:
    """Return the largest difference of any cell, as a share of the largest absolute value expected; NaN if any is.

    Args:
        found: Any array.
        expected: An array of the same shape.
        largest: The largest absolute value expected, if `expected` is only a part.
    """
    if largest is None:
        largest = float(np.abs(expected).max(initial=0))
    with np.errstate(invalid="ignore"):
        return float(np.abs(found - expected).max(initial=0) / max(largest, np.finfo(np.float32).tiny))


def host(cells: Cells) -> NDArray[np.float32]:
    """Return the values of maps as an array."""
    return cells if isinstance(cells, np.ndarray) else cells.cpu().numpy()


def _places(size: int) -> NDArray[np.int64]:
    """Return the places of at most `_MOST_CELLS` of a map's cells, the first and the last among them."""
    count = min(size, _MOST_CELLS)
    return np.arange(count) * (size - 1) // max(count - 1, 1)
