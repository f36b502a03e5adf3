"""Probes of position: what maps and scores do as pictures move, rotate and scale, and near the border."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import Grid, interpolate, shift_image, transform_points
from convscope_lens.probes._probe import Probe
from convscope_lens.probes._session import RelativeDistance, ScoreCurves, Session, map_cells, map_grid

if TYPE_CHECKING:
    from convscope import Client, Layer

    from convscope_lens.probes._images import Cells, Image, Source

_GREY = np.float32(0.5)
_DIRECTIONS = ((1, 0), (0, 1))  # Down and right.


def shift(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    shifts: Sequence[int] = tuple(range(1, 9)),
    pairs: int = 10,
    max_shift: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure how maps follow a moved picture, and how stable the predicted class is.

    Each picture is moved down and right by each shift; what comes in at the edge is its mirror image. The map of a
    layer with stride t should move by shift/t cells; where that is not a whole number, the expected map is interpolated
    between the two nearest cells. The error is the relative distance √(Σ (found - expected)² / Σ expected²) over the
    cells of all pictures and both directions:

    * `interior`: only cells whose receptive field lies in the picture and on nothing that came in, so that neither
      padding nor the filling matters. 0 for shifts that are multiples of the stride, since convolution and pooling do
      the same everywhere. Not defined for a layer whose cells all reach the border.
    * `whole`: all cells that have a counterpart. A layer without a stride is compared with its own unmoved map.

    The fact `shift_consistency` is the share of pairs of random moves of one picture with the same predicted class,

        E over X, (y1, x1), (y2, x2) of [argmax P(move(X, y1, x1)) = argmax P(move(X, y2, x2))],

    the measure of R. Zhang, Making Convolutional Networks Shift-Invariant Again (ICML 2019, arXiv:1904.11486). Moves
    are drawn uniformly from -`max_shift`..`max_shift` along each axis. The paper crops a larger picture at 32 positions
    of 224 pixels; here the mirror image fills in, since small pictures have nothing beyond their edge.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        shifts: Pixels, each at least 1 and less than the sides of the pictures.
        pairs: Random pairs of moves for each picture; 0 for none.
        max_shift: Pixels; None for a fourteenth of the shorter side, at least 1.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of all random choices.

    Returns:
        Layers: `interior` and `whole`. Scores: of the moved pictures. Facts: `shift_consistency`, 0..1, of so many
        `pairs`, each move by up to `max_shift_px`; none for a model without classes.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not shifts or min(shifts) < 1 or pairs < 0 or (max_shift is not None and max_shift < 1):
        raise ValueError("shifts and max_shift are at least 1 pixel, and pairs at least 0")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    interior, whole = RelativeDistance(names, len(shifts)), RelativeDistance(names, len(shifts))
    scores = ScoreCurves(len(shifts))
    moves = [(step, pixels * down, pixels * right) for step, pixels in enumerate(shifts) for down, right in _DIRECTIONS]

    def moved(picture: Image) -> list[Image]:
        _check_shift(picture, max(shifts))
        return [picture, *(shift_image(picture, down, right) for _, down, right in moves)]

    for picture, (unmoved, *predictions) in session.predict_copies(moved):
        for (step, down, right), prediction in zip(moves, predictions, strict=True):
            scores.add(step, unmoved, prediction)
            for layer in session.layers:
                found, before = map_cells(prediction, layer.name), map_cells(unmoved, layer.name)
                expected, known = _expected_after_shift(layer, before, down, right)
                whole.add(layer.name, step, found[known], expected[known])
                inside = known & _unaffected_cells(layer, found, picture, down, right)
                interior.add(layer.name, step, found[inside], expected[inside])
    return Probe(
        "shift",
        session.model,
        session.card.version,
        session.count,
        "shift (px)",
        np.array(shifts, float),
        scores.curves(),
        {"interior": interior.curves(), "whole": whole.curves()},
        _shift_consistency(session, pairs, max_shift, seed),
    )


def _check_shift(picture: Image, pixels: int) -> None:
    height, width, _ = picture.shape
    if pixels >= min(height, width):
        raise ValueError(f"a picture of {height}×{width} cannot move by {pixels} pixels")


def _expected_after_shift(layer: Layer, before: Cells, down: int, right: int) -> tuple[Cells, NDArray[np.bool_]]:
    """Return the map that a moved picture should have, and the cells (h, w) where it is known."""
    height, width = before.shape[:2]
    if layer.stride is None:
        return before, np.ones((height, width), bool)
    y, x = np.meshgrid(
        np.arange(height) - down / layer.stride[0], np.arange(width) - right / layer.stride[1], indexing="ij"
    )
    return interpolate(before, (y, x)), (y >= 0) & (x >= 0)


def _unaffected_cells(layer: Layer, found: Cells, picture: Image, down: int, right: int) -> NDArray[np.bool_]:
    """Return the cells (h, w) that see neither border nor filling, before the move nor after it."""
    if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
        return np.zeros(found.shape[:2], bool)
    lines = []
    for axis, pixels in enumerate((down, right)):
        stride, size, start = layer.stride[axis], layer.receptive_field[axis], layer.receptive_field_start[axis]
        first = start + stride * np.arange(found.shape[axis])  # The first pixel of each cell's receptive field,
        earliest = first - stride * -(-pixels // stride)  # and of the cell that it is compared with.
        lines.append((first >= pixels) & (earliest >= 0) & (first + size <= picture.shape[axis]))
    return np.asarray(lines[0][:, np.newaxis] & lines[1])


def _shift_consistency(session: Session, pairs: int, max_shift: int | None, seed: int) -> dict[str, float]:
    """Return the shift consistency of `shift`."""
    if not session.has_scores or not pairs:
        return {}
    random = np.random.default_rng(seed)
    reach = 0

    def moved(picture: Image) -> list[Image]:
        nonlocal reach
        reach = max(1, min(picture.shape[:2]) // 14) if max_shift is None else max_shift
        _check_shift(picture, reach)
        return [shift_image(picture, *move) for move in random.integers(-reach, reach + 1, (2 * pairs, 2)).tolist()]

    agreed = total = 0
    for _, predictions in session.predict_copies(moved, maps=False):
        classes = [prediction.top[0].index for prediction in predictions]
        agreed += sum(one == other for one, other in zip(classes[::2], classes[1::2], strict=True))
        total += pairs
    return {"shift_consistency": agreed / total, "pairs": total, "max_shift_px": reach}


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
    """Measure how scores and maps change as pictures rotate about their centre.

    The measure `distance` of a layer compares its map of the rotated picture, rotated back, with its map of the
    original: √(Σ (found - expected)² / Σ expected²) over all cells whose place is still in the picture. It is 0 for a
    map that rotates with its picture. Interpolation alone costs something too, except for quarter turns of square maps:
    the row `picture` is the same measure of the pictures themselves, rotated and rotated back.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        angles: Degrees, counter-clockwise. The mirror image fills the corners.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice.

    Returns:
        Layers: `distance`. Scores: of the rotated pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    return _transform("rotate", session, "angle (°)", [(angle, angle, 1.0) for angle in angles])


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
    """Measure how scores and maps change as pictures are scaled about their centre.

    The measure `distance` is that of `rotate`, with the map scaled back instead of rotated back.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        factors: Above 0: 2 shows the centre twice as large. Below 1 the mirror image fills the edges.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice.

    Returns:
        Layers: `distance`. Scores: of the scaled pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not factors or min(factors) <= 0:
        raise ValueError("factors are above 0")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    return _transform("scale", session, "factor", [(factor, 0.0, factor) for factor in factors])


def _transform(name: str, session: Session, unit: str, changes: Sequence[tuple[float, float, float]]) -> Probe:
    """Probe with changes (step, degrees, factor)."""
    if not changes:
        raise ValueError("there is nothing to probe: no steps")
    distance = RelativeDistance(["picture", *(layer.name for layer in session.layers)], len(changes))
    scores = ScoreCurves(len(changes))

    def changed(picture: Image) -> list[Image]:
        return [picture, *(_transform_image(picture, degrees, factor) for _, degrees, factor in changes)]

    for picture, (before, *predictions) in session.predict_copies(changed):
        pixels = _pixel_grid(picture)
        for step, ((_, degrees, factor), prediction) in enumerate(zip(changes, predictions, strict=True)):
            scores.add(step, before, prediction)
            maps = {"picture": (picture, _transform_image(picture, degrees, factor), pixels)}
            for layer in session.layers:
                expected, found = map_cells(before, layer.name), map_cells(prediction, layer.name)
                maps[layer.name] = expected, found, map_grid(layer, expected.shape, picture)
            for layer_name, (expected, found, grid) in maps.items():
                y, x = transform_points(grid.points(), _centre(pixels), degrees, factor)
                inside = (y > -0.5) & (y < pixels.shape[0] - 0.5) & (x > -0.5) & (x < pixels.shape[1] - 0.5)
                back = interpolate(found, grid.to_cells((y, x)))
                distance.add(layer_name, step, back[inside], expected[inside])
    return Probe(
        name,
        session.model,
        session.card.version,
        session.count,
        unit,
        np.array([step for step, _, _ in changes], float),
        scores.curves(),
        {"distance": distance.curves()},
    )


def _transform_image(picture: Image, degrees: float, factor: float) -> Image:
    """Rotate and scale a picture about its centre."""
    pixels = _pixel_grid(picture)
    return interpolate(picture, transform_points(pixels.points(), _centre(pixels), -degrees, 1 / factor))


def _pixel_grid(picture: Image) -> Grid:
    return Grid((0.0, 0.0), (1.0, 1.0), (picture.shape[0], picture.shape[1]))


def _centre(pixels: Grid) -> tuple[float, float]:
    return (pixels.shape[0] - 1) / 2, (pixels.shape[1] - 1) / 2


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

    Ring 0 is the outermost row and column of cells, ring 1 the next. If padding made no difference, both measures would
    be 0 everywhere; in rings whose receptive fields lie in the picture they are.

    * `constant`: of a uniformly grey (0.5) picture, how far the ring's cells are from the map's centre cell:
      √(mean over the ring of (cell - centre)² / mean over the map of cell²).
    * `moved`: the centre of each picture, half its height and width, on grey, once in the centre and once in the upper
      left corner. The second map is compared with the first one moved alike, √(Σ (found - expected)² / Σ expected²)
      over the ring's cells in the upper left quarter of the map. The move is the largest multiple of the layer's stride
      up to a quarter of the picture's shorter side, so it differs between strides; not defined for a layer without a
      stride, or with a larger one.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        rings: Number of rings, at least 1.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice.

    Returns:
        Layers: `constant` and `moved`, NaN where a map has no such ring. Facts: `agreement` and `probability` of the
        predicted class of the centre once it is in the corner; none for a model without classes.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if rings < 1:
        raise ValueError("rings are at least 1")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    strides = sorted({layer.stride for layer in session.layers if layer.stride is not None} | {(1, 1)})
    names = [layer.name for layer in session.layers]
    constant = {name: np.zeros((2, rings)) for name in names}
    moved, scores = RelativeDistance(names, rings), ScoreCurves(1)

    def copies(picture: Image) -> list[Image]:
        grey = np.full_like(picture, _GREY)
        corners = (_centre_on_grey(picture, _move_to_corner(picture, stride)) for stride in strides)
        return [grey, _centre_on_grey(picture, (0, 0)), *corners]

    for picture, (grey, centred, *predictions) in session.predict_copies(copies):
        by_stride = dict(zip(strides, predictions, strict=True))
        scores.add(0, centred, by_stride[1, 1])
        for layer in session.layers:
            constant[layer.name] += _ring_deviation(map_cells(grey, layer.name), rings)
            if layer.stride is None:
                continue
            move = _move_to_corner(picture, layer.stride)
            down, right = (pixels // stride for pixels, stride in zip(move, layer.stride, strict=True))
            if not down or not right:
                continue
            found, before = map_cells(by_stride[layer.stride], layer.name), map_cells(centred, layer.name)
            tall, wide = (size - size // 2 for size in found.shape[:2])  # Beyond, the opposite border comes near.
            expected = before[down : down + tall, right : right + wide]  # A small map ends before that.
            found = found[: expected.shape[0], : expected.shape[1]]
            ring = np.minimum.outer(np.arange(found.shape[0]), np.arange(found.shape[1]))
            for number in range(rings):
                moved.add(layer.name, number, found[ring == number], expected[ring == number])
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = {name: np.sqrt(sums[0] / sums[1]) for name, sums in constant.items()}
    return Probe(
        "border",
        session.model,
        session.card.version,
        session.count,
        "ring (cells)",
        np.arange(rings, dtype=float),
        {},
        {"constant": deviation, "moved": moved.curves()},
        {name: float(curve[0]) for name, curve in scores.curves().items()},
    )


def _move_to_corner(picture: Image, stride: tuple[int, ...]) -> tuple[int, int]:
    """Return how far the centre moves up and left: a multiple of the stride, up to a quarter of the shorter side."""
    quarter = min(picture.shape[:2]) // 4
    return quarter // stride[0] * stride[0], quarter // stride[1] * stride[1]


def _centre_on_grey(picture: Image, move: tuple[int, int]) -> Image:
    """Return the centre of a picture on grey, moved up and left by so many pixels."""
    (height, width), placed = picture.shape[:2], np.full_like(picture, _GREY)
    top, left, tall, wide = height // 4, width // 4, height // 2, width // 2
    placed[top - move[0] : top - move[0] + tall, left - move[1] : left - move[1] + wide] = picture[
        top : top + tall, left : left + wide
    ]
    return placed


def _ring_deviation(cells: Cells, rings: int) -> NDArray[np.float64]:
    """Return the mean of (cell - centre)² of each ring, and the map's mean of cell²; NaN where there is no ring."""
    values = cells.astype(np.float64)
    height, width = values.shape[:2]
    centre = values[height // 2, width // 2]
    rows, columns = (np.minimum(np.arange(size), size - 1 - np.arange(size)) for size in (height, width))
    ring = np.minimum.outer(rows, columns)
    sums = np.full((2, rings), np.nan)
    for number in range(min(rings, int(ring.max()) + 1)):
        sums[:, number] = np.square(values[ring == number] - centre).mean(), max(np.square(values).mean(), 1e-30)
    return sums
