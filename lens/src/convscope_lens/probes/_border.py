"""Border: what padding does to the cells near a map's edge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._asking import Session, Sums, Verdicts, cells
from convscope_lens.probes._probe import Probe

if TYPE_CHECKING:
    from convscope._client import Client

    from convscope_lens.probes._sources import Image, Source
    from convscope_lens.probes._warp import Values

_GREY = np.float32(0.5)


def border(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    rings: int = 9,
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure how cells near the border differ from those inside, by their distance from the border in cells.

    Ring 0 is the outermost row and column of cells, ring 1 the next. Both measures would be 0 everywhere if padding
    made no difference; in rings whose receptive fields lie in the picture they are.

    * `constant`: of a picture of one grey (0.5), how far the ring's cells are from the map's middle cell:
      √(mean over the ring of (cell - middle)² / mean over the map of cell²).
    * `moved`: each picture's middle, half its height and width, on grey, in two places: in the middle, and in the upper
      left corner. The map of the second against the map of the first moved likewise,
      √(Σ (found - expected)² / Σ expected²) over the ring's cells in the map's upper left quarter. The move is the
      largest multiple of the layer's stride up to a quarter of the picture's shorter side, so each stride has its own;
      not defined for a layer without a stride, or whose stride is larger.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        rings: How many, at least 1.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice.

    Returns:
        Layers: `constant` and `moved`, NaN where a map has no such ring. Facts: `agreement` and `probability` of the
        class of the picture's middle once it is in the corner; a model without classes has none.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    if rings < 1:
        raise ValueError("rings are at least 1")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    strides = sorted({layer.stride for layer in session.layers if layer.stride is not None} | {(1, 1)})
    names = [layer.name for layer in session.layers]
    constant = {name: np.zeros((2, rings)) for name in names}
    moved, verdicts = Sums(names, rings), Verdicts(1)

    def copies(picture: Image) -> list[Image]:
        flat = np.full_like(picture, _GREY)
        return [flat, _placed(picture, (0, 0)), *(_placed(picture, _move(picture, stride)) for stride in strides)]

    for picture, (flat, centred, *answers) in session.ask(copies):
        by_stride = dict(zip(strides, answers, strict=True))
        verdicts.add(0, centred, by_stride[1, 1])
        for layer in session.layers:
            plain = cells(flat, layer.name)
            constant[layer.name] += _unevenness(plain, rings)
            if layer.stride is None:
                continue
            move = _move(picture, layer.stride)
            down, right = (pixels // step for pixels, step in zip(move, layer.stride, strict=True))
            if not down or not right:
                continue
            found, before = cells(by_stride[layer.stride], layer.name), cells(centred, layer.name)
            tall, wide = (size - size // 2 for size in found.shape[:2])  # Further on, the other border comes near.
            expected = before[down : down + tall, right : right + wide]  # A small map ends before that.
            found = found[: expected.shape[0], : expected.shape[1]]
            ring = np.minimum.outer(np.arange(found.shape[0]), np.arange(found.shape[1]))
            for number in range(rings):
                moved.add(layer.name, number, found[ring == number], expected[ring == number])
    with np.errstate(divide="ignore", invalid="ignore"):
        uneven = {name: np.sqrt(sums[0] / sums[1]) for name, sums in constant.items()}
    return Probe(
        "border",
        session.model,
        session.card.version,
        session.count,
        "ring (cells)",
        np.arange(rings, dtype=float),
        {},
        {"constant": uneven, "moved": moved.distance()},
        {name: float(curve[0]) for name, curve in verdicts.curves().items()},
    )


def _move(picture: Image, stride: tuple[int, ...]) -> tuple[int, int]:
    """Return how far the middle goes up and left: a multiple of the stride, up to a quarter of the shorter side."""
    quarter = min(picture.shape[:2]) // 4
    return quarter // stride[0] * stride[0], quarter // stride[1] * stride[1]


def _placed(picture: Image, move: tuple[int, int]) -> Image:
    """Return the picture's middle on grey, moved up and left by so many pixels."""
    (height, width), placed = picture.shape[:2], np.full_like(picture, _GREY)
    top, left, tall, wide = height // 4, width // 4, height // 2, width // 2
    placed[top - move[0] : top - move[0] + tall, left - move[1] : left - move[1] + wide] = picture[
        top : top + tall, left : left + wide
    ]
    return placed


def _unevenness(plain: Values, rings: int) -> NDArray[np.float64]:
    """Return, for each ring, its mean of (cell - middle)² and the map's mean of cell²; NaN where there is no ring."""
    values = plain.astype(np.float64)
    height, width = values.shape[:2]
    middle = values[height // 2, width // 2]
    rows, columns = (np.minimum(np.arange(size), size - 1 - np.arange(size)) for size in (height, width))
    ring = np.minimum.outer(rows, columns)
    parts = np.full((2, rings), np.nan)
    for number in range(min(rings, int(ring.max()) + 1)):
        parts[:, number] = np.square(values[ring == number] - middle).mean(), max(np.square(values).mean(), 1e-30)
    return parts
