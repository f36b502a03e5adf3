"""Probes with shifted, rotated and scaled pictures, and border effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import Grid, interpolate, shift_picture, transform_points
from convscope_lens.probes._result import ProbeResult
from convscope_lens.probes._session import ProbeSession, RelativeDistance, ScoreCurves, map_array, map_grid

if TYPE_CHECKING:
    from convscope import Client, Layer

    from convscope_lens.probes._images import MapArray, PictureArray, Source

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
) -> ProbeResult:
    """Measure how maps change when the picture is shifted, and how stable the predicted class is.

    Each picture is shifted down and right by each shift; edges are filled by reflection. The map of a layer with stride
    t should shift by shift/t cells; if that is not an integer, the expected map is interpolated between the two nearest
    cells. The error is the relative distance √(Σ (found - expected)² / Σ expected²) over the cells of all pictures and
    both directions:

    * `interior`: only cells whose receptive field contains neither padding nor fill pixels. 0 for shifts that are
      multiples of the stride, since convolution and pooling are the same everywhere. Undefined for a layer whose cells
      all reach the border.
    * `whole`: all cells that have a counterpart. A layer without a stride is compared with its own unshifted map.

    The total `shift_consistency` is the share of pairs of random shifts of one picture with the same predicted class,

        E over X, (y1, x1), (y2, x2) of [argmax P(shift(X, y1, x1)) = argmax P(shift(X, y2, x2))],

    the measure of R. Zhang, Making Convolutional Networks Shift-Invariant Again (ICML 2019, arXiv:1904.11486). Shifts
    are drawn uniformly from -`max_shift`..`max_shift` along each axis. The paper crops a larger picture at 32 positions
    of 224 pixels; here reflection fills the edges, since small pictures have no pixels beyond them.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        shifts: Pixels, each at least 1 and less than the sides of the pictures.
        pairs: Random pairs of shifts per picture; 0 for none.
        max_shift: Pixels; None for a fourteenth of the shorter side, at least 1.
        limit: Use a random sample of this size; None for all.
        seed: Seed of all random choices.

    Returns:
        Measures: `interior` and `whole`. Scores: of the shifted pictures. Totals: `shift_consistency`, 0..1, the number
        of `pairs`, and `max_shift_px`; none for a model without classes.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not shifts or min(shifts) < 1 or pairs < 0 or (max_shift is not None and max_shift < 1):
        raise ValueError("shifts must be a non-empty list of integers >= 1, max_shift >= 1 and pairs >= 0")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    interior, whole = RelativeDistance(names, len(shifts)), RelativeDistance(names, len(shifts))
    scores = ScoreCurves(len(shifts))
    offsets = [
        (step_index, pixels * down, pixels * right)
        for step_index, pixels in enumerate(shifts)
        for down, right in _DIRECTIONS
    ]

    def shifted(picture: PictureArray) -> list[PictureArray]:
        _check_shift(picture, max(shifts))
        return [picture, *(shift_picture(picture, down, right) for _, down, right in offsets)]

    for picture, (unshifted, *predictions) in session.predict_copies(shifted):
        for (step_index, down, right), prediction in zip(offsets, predictions, strict=True):
            scores.add(step_index, unshifted, prediction)
            for layer in session.layers:
                shifted_map, original_map = map_array(prediction, layer.name), map_array(unshifted, layer.name)
                expected, defined = _expected_after_shift(layer, original_map, down, right)
                whole.add(layer.name, step_index, shifted_map[defined], expected[defined])
                inside = defined & _unaffected_cells(layer, shifted_map, picture, down, right)
                interior.add(layer.name, step_index, shifted_map[inside], expected[inside])
    return ProbeResult(
        "shift",
        session.model,
        session.card.version,
        session.picture_count,
        "shift (px)",
        np.array(shifts, float),
        scores.curves(),
        {"interior": interior.curves(), "whole": whole.curves()},
        _shift_consistency(session, pairs, max_shift, seed),
    )


def _check_shift(picture: PictureArray, pixels: int) -> None:
    height, width, _ = picture.shape
    if pixels >= min(height, width):
        raise ValueError(f"a picture of {height}×{width} cannot be shifted by {pixels} pixels")


def _expected_after_shift(layer: Layer, before: MapArray, down: int, right: int) -> tuple[MapArray, NDArray[np.bool_]]:
    """Return the map expected for a shifted picture, and the cells (h, w) where it is defined."""
    height, width = before.shape[:2]
    if layer.stride is None:
        return before, np.ones((height, width), bool)
    y, x = np.meshgrid(
        np.arange(height) - down / layer.stride[0], np.arange(width) - right / layer.stride[1], indexing="ij"
    )
    return interpolate(before, (y, x)), (y >= 0) & (x >= 0)


def _unaffected_cells(
    layer: Layer, shifted_map: MapArray, picture: PictureArray, down: int, right: int
) -> NDArray[np.bool_]:
    """Return the cells (h, w) whose receptive field has neither padding nor fill pixels, before and after the shift."""
    if layer.stride is None or not layer.has_receptive_field:
        return np.zeros(shifted_map.shape[:2], bool)
    rows, columns = (np.arange(count) for count in shifted_map.shape[:2])
    top, left, bottom, right_end = layer.receptive_field_box(rows, columns)
    axis_masks = []
    for axis, (first, end, pixels) in enumerate(((top, bottom, down), (left, right_end, right))):
        stride = layer.stride[axis]
        earliest = first - stride * -(-pixels // stride)  # First pixel of the cell that it is compared with.
        axis_masks.append((first >= pixels) & (earliest >= 0) & (end <= picture.shape[axis]))
    return np.asarray(axis_masks[0][:, np.newaxis] & axis_masks[1])


def _shift_consistency(session: ProbeSession, pairs: int, max_shift: int | None, seed: int) -> dict[str, float]:
    """Return the shift consistency of `shift`."""
    if not session.has_scores or not pairs:
        return {}
    rng = np.random.default_rng(seed)
    limit = 0

    def shifted(picture: PictureArray) -> list[PictureArray]:
        nonlocal limit
        limit = max(1, min(picture.shape[:2]) // 14) if max_shift is None else max_shift
        _check_shift(picture, limit)
        return [shift_picture(picture, *offset) for offset in rng.integers(-limit, limit + 1, (2 * pairs, 2)).tolist()]

    agreed = total = 0
    for _, predictions in session.predict_copies(shifted, maps=False):
        classes = [prediction.top[0].index for prediction in predictions]
        agreed += sum(first == second for first, second in zip(classes[::2], classes[1::2], strict=True))
        total += pairs
    return {"shift_consistency": agreed / total, "pairs": total, "max_shift_px": limit}


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
) -> ProbeResult:
    """Measure how scores and maps change when pictures are rotated about their centre.

    The measure `distance` of a layer compares the map of the rotated picture, rotated back, with the map of the
    original: √(Σ (found - expected)² / Σ expected²) over all cells that are still inside the picture. It is 0 for a map
    that rotates with its picture. Interpolation adds to it, except for quarter turns of square maps: the row `picture`
    is the same measure of the pictures themselves, rotated and rotated back.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        angles: Degrees, counter-clockwise. Corners are filled by reflection.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `distance`. Scores: of the rotated pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not angles:
        raise ValueError("angles must not be empty")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
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
) -> ProbeResult:
    """Measure how scores and maps change when pictures are scaled about their centre.

    The measure `distance` is that of `rotate`, with the map scaled back instead of rotated back.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        factors: Above 0: 2 enlarges the centre twofold. Below 1, edges are filled by reflection.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `distance`. Scores: of the scaled pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not factors or min(factors) <= 0:
        raise ValueError("factors must be a non-empty list of numbers > 0")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    return _transform("scale", session, "factor", [(factor, 0.0, factor) for factor in factors])


def _transform(
    name: str, session: ProbeSession, step_label: str, changes: Sequence[tuple[float, float, float]]
) -> ProbeResult:
    """Probe with changes (step, degrees, factor)."""
    distance = RelativeDistance(["picture", *(layer.name for layer in session.layers)], len(changes))
    scores = ScoreCurves(len(changes))

    def changed(picture: PictureArray) -> list[PictureArray]:
        return [picture, *(_transform_picture(picture, degrees, factor) for _, degrees, factor in changes)]

    for picture, (before, *predictions) in session.predict_copies(changed):
        pixels = _pixel_grid(picture)
        for step_index, ((_, degrees, factor), prediction) in enumerate(zip(changes, predictions, strict=True)):
            scores.add(step_index, before, prediction)
            maps = {"picture": (picture, _transform_picture(picture, degrees, factor), pixels)}
            for layer in session.layers:
                original_map, changed_map = map_array(before, layer.name), map_array(prediction, layer.name)
                maps[layer.name] = original_map, changed_map, map_grid(layer, original_map.shape, picture)
            for layer_name, (original_map, changed_map, grid) in maps.items():
                y, x = transform_points(grid.points(), _centre(pixels), degrees, factor)
                inside = (y > -0.5) & (y < pixels.shape[0] - 0.5) & (x > -0.5) & (x < pixels.shape[1] - 0.5)
                transformed_back = interpolate(changed_map, grid.to_cells((y, x)))
                distance.add(layer_name, step_index, transformed_back[inside], original_map[inside])
    return ProbeResult(
        name,
        session.model,
        session.card.version,
        session.picture_count,
        step_label,
        np.array([step for step, _, _ in changes], float),
        scores.curves(),
        {"distance": distance.curves()},
    )


def _transform_picture(picture: PictureArray, degrees: float, factor: float) -> PictureArray:
    """Rotate and scale a picture about its centre."""
    pixels = _pixel_grid(picture)
    return interpolate(picture, transform_points(pixels.points(), _centre(pixels), -degrees, 1 / factor))


def _pixel_grid(picture: PictureArray) -> Grid:
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
) -> ProbeResult:
    """Measure how cells near the border differ from those inside, by their distance from the border in cells.

    Ring 0 is the outermost row and column of cells, ring 1 the next. Without an effect of padding, both measures are 0
    everywhere; they are 0 in rings whose receptive fields are inside the picture.

    * `constant`: for a uniformly grey (0.5) picture, the distance of the ring's cells from the map's centre cell:
      √(mean over the ring of (cell - centre)² / mean over the map of cell²).
    * `shifted`: the centre of each picture, half its height and width, on grey, once in the centre and once in the
      upper left corner. The second map is compared with the first one shifted the same way,
      √(Σ (found - expected)² / Σ expected²) over the ring's cells in the upper left quarter of the map. The shift is
      the largest multiple of the layer's stride up to a quarter of the picture's shorter side, so it differs between
      strides; undefined for a layer without a stride, or with a larger one.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        rings: Number of rings, at least 1.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `constant` and `shifted`, NaN where a map has no such ring. Totals: `agreement` and `probability` of
        the predicted class of the centre when it is in the corner; none for a model without classes.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if rings < 1:
        raise ValueError("rings must be at least 1")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    strides = sorted({layer.stride for layer in session.layers if layer.stride is not None} | {(1, 1)})
    names = [layer.name for layer in session.layers]
    constant = {name: np.zeros((2, rings)) for name in names}
    shifted, scores = RelativeDistance(names, rings), ScoreCurves(1)

    def copies(picture: PictureArray) -> list[PictureArray]:
        grey = np.full_like(picture, _GREY)
        corners = (_centre_on_grey(picture, _shift_to_corner(picture, stride)) for stride in strides)
        return [grey, _centre_on_grey(picture, (0, 0)), *corners]

    for picture, (grey, centred, *predictions) in session.predict_copies(copies):
        by_stride = dict(zip(strides, predictions, strict=True))
        scores.add(0, centred, by_stride[1, 1])
        for layer in session.layers:
            constant[layer.name] += _ring_deviation(map_array(grey, layer.name), rings)
            if layer.stride is None:
                continue
            shift = _shift_to_corner(picture, layer.stride)
            down, right = (pixels // stride for pixels, stride in zip(shift, layer.stride, strict=True))
            if not down or not right:
                continue
            shifted_map, centred_map = map_array(by_stride[layer.stride], layer.name), map_array(centred, layer.name)
            # The lower and right half is affected by the opposite border.
            rows, columns = (size - size // 2 for size in shifted_map.shape[:2])
            expected = centred_map[down : down + rows, right : right + columns]  # Smaller at the end of the map.
            shifted_map = shifted_map[: expected.shape[0], : expected.shape[1]]
            ring = np.minimum.outer(np.arange(shifted_map.shape[0]), np.arange(shifted_map.shape[1]))
            for index in range(rings):
                shifted.add(layer.name, index, shifted_map[ring == index], expected[ring == index])
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = {name: np.sqrt(sums[0] / sums[1]) for name, sums in constant.items()}
    return ProbeResult(
        "border",
        session.model,
        session.card.version,
        session.picture_count,
        "ring (cells)",
        np.arange(rings, dtype=float),
        {},
        {"constant": deviation, "shifted": shifted.curves()},
        {name: float(curve[0]) for name, curve in scores.curves().items()},
    )


def _shift_to_corner(picture: PictureArray, stride: tuple[int, ...]) -> tuple[int, int]:
    """Return the shift of the centre, up and left: a multiple of the stride, up to a quarter of the shorter side."""
    quarter = min(picture.shape[:2]) // 4
    return quarter // stride[0] * stride[0], quarter // stride[1] * stride[1]


def _centre_on_grey(picture: PictureArray, shift: tuple[int, int]) -> PictureArray:
    """Return the centre of a picture on grey, shifted up and left by `shift` pixels."""
    (height, width), shifted = picture.shape[:2], np.full_like(picture, _GREY)
    top, left, rows, columns = height // 4, width // 4, height // 2, width // 2
    centre = picture[top : top + rows, left : left + columns]
    shifted[top - shift[0] : top - shift[0] + rows, left - shift[1] : left - shift[1] + columns] = centre
    return shifted


def _ring_deviation(feature_map: MapArray, rings: int) -> NDArray[np.float64]:
    """Return the mean of (cell - centre)² of each ring, and the map's mean of cell²; NaN for missing rings."""
    values = feature_map.astype(np.float64)
    height, width = values.shape[:2]
    centre = values[height // 2, width // 2]
    rows, columns = (np.minimum(np.arange(size), size - 1 - np.arange(size)) for size in (height, width))
    ring = np.minimum.outer(rows, columns)
    sums = np.full((2, rings), np.nan)
    for index in range(min(rings, int(ring.max()) + 1)):
        sums[:, index] = np.square(values[ring == index] - centre).mean(), max(np.square(values).mean(), 1e-30)
    return sums
