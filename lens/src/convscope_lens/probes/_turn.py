"""Rotate and scale: what a network without a rule for them makes of turned and scaled pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from convscope_lens.probes import _warp
from convscope_lens.probes._asking import Session, Sums, Verdicts, cells, grid
from convscope_lens.probes._probe import Probe
from convscope_lens.probes._warp import Grid

if TYPE_CHECKING:
    from convscope._client import Client

    from convscope_lens.probes._sources import Image, Source
    from convscope_lens.probes._warp import Values

PICTURE = "picture"  # Stands among the layers for the picture itself: what bilinear reading alone costs.


def rotate(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    angles: Sequence[float] = tuple(range(0, 360, 15)),
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure how scores and maps change as pictures turn about their middle.

    The measure `distance` of a layer: its map of the turned picture, turned back, against its map of the picture as it
    was, √(Σ (found - expected)² / Σ expected²) over all cells whose place is still in the picture after the turn. A map
    that turned with its picture would have 0. Reading between cells costs something too, except for quarter turns of
    square maps; the row `picture` is the same measure of the pictures themselves, turned forth and back.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        angles: Degrees, counter-clockwise. Corners that come in are filled with the mirror image.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice.

    Returns:
        Layers: `distance`. Scores: of the turned pictures.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    return _probe("rotate", session, "angle (°)", [(angle, angle, 1.0) for angle in angles])


def scale(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    factors: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5),
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure how scores and maps change as what is in pictures grows and shrinks about their middle.

    The measure `distance` is that of `rotate`, with the map scaled back instead of turned back.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        factors: Of the size, above 0: 2 shows the middle twice as large. What comes in below 1 is the mirror image.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice.

    Returns:
        Layers: `distance`. Scores: of the scaled pictures.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    if not factors or min(factors) <= 0:
        raise ValueError("factors are above 0")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    return _probe("scale", session, "factor", [(factor, 0.0, factor) for factor in factors])


def _probe(name: str, session: Session, unit: str, changes: Sequence[tuple[float, float, float]]) -> Probe:
    """Probe with changes (step, degrees, factor)."""
    if not changes:
        raise ValueError("there is nothing to probe: no steps")
    distance = Sums([PICTURE, *(layer.name for layer in session.layers)], len(changes))
    verdicts = Verdicts(len(changes))

    def changed(picture: Image) -> list[Image]:
        return [picture, *(_change(picture, degrees, factor) for _, degrees, factor in changes)]

    for picture, (before, *answers) in session.ask(changed):
        pixels = _pixels(picture)
        for step, ((_, degrees, factor), answer) in enumerate(zip(changes, answers, strict=True)):
            verdicts.add(step, before, answer)
            copy = _change(picture, degrees, factor)
            _compare(distance, PICTURE, step, picture, copy, pixels, pixels, degrees, factor)
            for layer in session.layers:
                expected, found = cells(before, layer.name), cells(answer, layer.name)
                lies = grid(layer, expected.shape, picture)
                _compare(distance, layer.name, step, expected, found, lies, pixels, degrees, factor)
    return Probe(
        name,
        session.model,
        session.card.version,
        session.count,
        unit,
        np.array([step for step, _, _ in changes], float),
        verdicts.curves(),
        {"distance": distance.distance()},
    )


def _compare(
    sums: Sums,
    layer: str,
    step: int,
    expected: Values,
    found: Values,
    lies: Grid,
    pixels: Grid,
    degrees: float,
    factor: float,
) -> None:
    """Add a map, and the map of the changed picture read where each cell's place went."""
    height, width = pixels.shape
    y, x = _warp.turn(lies.points(), _middle(pixels), degrees, factor)
    inside = (y > -0.5) & (y < height - 0.5) & (x > -0.5) & (x < width - 0.5)
    back = _warp.sample(found, lies.cells((y, x)))
    sums.add(layer, step, back[inside], expected[inside])


def _change(picture: Image, degrees: float, factor: float) -> Image:
    """Turn and scale a picture about its middle."""
    pixels = _pixels(picture)
    return _warp.sample(picture, _warp.turn(pixels.points(), _middle(pixels), -degrees, 1 / factor))


def _pixels(picture: Image) -> Grid:
    return Grid((0.0, 0.0), (1.0, 1.0), (picture.shape[0], picture.shape[1]))


def _middle(pixels: Grid) -> tuple[float, float]:
    return (pixels.shape[0] - 1) / 2, (pixels.shape[1] - 1) / 2
