"""Probes with shifted, rotated and scaled pictures, with pooled maps, and of border effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import Grid, interpolate, shift_picture, transform_points
from convscope_lens.probes._result import ProbeResult, make_result
from convscope_lens.probes._session import (
    AnotherPicture,
    Distances,
    PictureSums,
    ProbeSession,
    ScoreSums,
    map_array,
    map_grid,
)
from convscope_lens.probes._statistics import CHANCE, Figures, Sums

if TYPE_CHECKING:
    from convscope import Client, Layer

    from convscope_lens.probes._images import MapArray, PictureArray, Source

MIXED_CHANNELS = 256  # Of a layer at most, for the mix of channels of `rotate` and `scale`: it is a matrix per step.
_MIRRORED = "what comes in at the edges is the picture's own, mirrored"
_RIDGE = 1e-3  # As a share of the mean square of a channel.
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

    The baseline of both is the distance from another picture's map, shifted likewise.

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
    interior, whole = (Distances(names, len(shifts)) for _ in range(2))
    scores, another = ScoreSums(session, len(shifts)), AnotherPicture()
    offsets = [
        (step_index, pixels * down, pixels * right)
        for step_index, pixels in enumerate(shifts)
        for down, right in _DIRECTIONS
    ]

    def shifted(picture: PictureArray) -> list[PictureArray]:
        _check_shift(picture, max(shifts))
        return [picture, *(shift_picture(picture, down, right) for _, down, right in offsets)]

    for picture, (unshifted, *predictions) in session.predict_copies(shifted):
        scores.next_picture(unshifted)
        interior.next_picture()
        whole.next_picture()
        for (step_index, _, _), prediction in zip(offsets, predictions, strict=True):
            scores.add(step_index, prediction)
        for layer in session.layers:
            original_map = map_array(unshifted, layer.name)
            other_map = another.swap(layer.name, original_map)
            for (step_index, down, right), prediction in zip(offsets, predictions, strict=True):
                shifted_map = map_array(prediction, layer.name)
                expected, defined = _expected_after_shift(layer, original_map, down, right)
                inside = defined & _unaffected_cells(layer, shifted_map, picture, down, right)
                unrelated = None if other_map is None else _expected_after_shift(layer, other_map, down, right)[0]
                whole.compare(layer.name, step_index, shifted_map, expected, unrelated, defined)
                interior.compare(layer.name, step_index, shifted_map, expected, unrelated, inside)
    consistency, counts = _shift_consistency(session, pairs, max_shift, seed)
    return make_result(
        "shift",
        session,
        "shift (px)",
        np.array(shifts, float),
        scores=scores,
        measures={"interior": interior.figures(), "whole": whole.figures()},
        totals=consistency,
        counts=counts,
        note=f"pictures shifted down and right; {_MIRRORED}",
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


def _shift_consistency(
    session: ProbeSession, pairs: int, max_shift: int | None, seed: int
) -> tuple[Mapping[str, Figures], Mapping[str, int]]:
    """Return the shift consistency of `shift`, and the counts that belong to it."""
    if not session.has_scores or not pairs:
        return {}, {}
    rng = np.random.default_rng(seed)
    limit = 0

    def shifted(picture: PictureArray) -> list[PictureArray]:
        nonlocal limit
        limit = max(1, min(picture.shape[:2]) // 14) if max_shift is None else max_shift
        _check_shift(picture, limit)
        return [shift_picture(picture, *offset) for offset in rng.integers(-limit, limit + 1, (2 * pairs, 2)).tolist()]

    agreed = PictureSums(["shift_consistency"], 1)
    answers = np.zeros(len(session.card.classes))
    for _, predictions in session.predict_copies(shifted, maps=False):
        agreed.next_picture()
        classes = [prediction.top[0].index for prediction in predictions]
        for first, second in zip(classes[::2], classes[1::2], strict=True):
            agreed.add("shift_consistency", 0, first == second, 1)
        answers += np.bincount(classes, minlength=len(answers))
    chance = np.array([np.square(answers / answers.sum()).sum()])
    figures = Figures(agreed.sums(), False, CHANCE, {"shift_consistency": chance})
    return {"consistency": figures}, {"pairs": pairs * session.picture_count, "max_shift_px": limit}


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
    original, channel by channel: √(Σ (found - expected)² / Σ expected²) over all cells that are still inside the
    picture. It is 0 for a map that rotates with its picture. Interpolation adds to it, except for quarter turns of
    square maps: the row `picture` is the same measure of the pictures themselves, rotated and rotated back. Its
    baseline is the distance from another picture's map.

    A network may follow a rotation with other channels: what one channel finds upright, another finds in the rotated
    picture. `mixed` allows for that. For each layer and angle one matrix of channels × channels is fitted by least
    squares on the first half of the pictures, so that the rotated map, rotated back and mixed by it, is the original;
    `mixed` is the distance on the other half. It is 0 for a map that rotates up to a fixed mix of its channels, as in a
    rotation-equivariant network. Its baseline is the same fit and distance between the maps of unrelated pictures:
    what the mix gains by knowing the mean of the maps alone. Layers with more than 256 channels have no `mixed`.

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
        Measures: `distance` and `mixed`. Scores: of the rotated pictures. Totals: `fitted_pictures`, on how many of
        them the mix was fitted.

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

    The measures `distance` and `mixed` are those of `rotate`, with the map scaled back instead of rotated back.

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
        Measures: `distance` and `mixed`. Scores: of the scaled pictures. Totals: `fitted_pictures`.

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
    name_of_probe: str, session: ProbeSession, step_label: str, changes: Sequence[tuple[float, float, float]]
) -> ProbeResult:
    """Probe with changes (step, degrees, factor)."""
    names = [layer.name for layer in session.layers]
    shown = ["picture", *names] if names else []
    mixed_names = [name for name in names if session.card.layer(name).shape[0] <= MIXED_CHANNELS]
    fitted_pictures = session.picture_count // 2
    distance, mixed = Distances(shown, len(changes)), Distances(mixed_names, len(changes))
    mixes: dict[tuple[str, int], ChannelMix] = {}
    scores, another = ScoreSums(session, len(changes)), AnotherPicture()

    def changed(picture: PictureArray) -> list[PictureArray]:
        return [picture, *(_transform_picture(picture, degrees, factor) for _, degrees, factor in changes)]

    for number, (picture, (before, *predictions)) in enumerate(session.predict_copies(changed)):
        scores.next_picture(before)
        for step_index, prediction in enumerate(predictions):
            scores.add(step_index, prediction)
        distance.next_picture()
        if number >= fitted_pictures:
            mixed.next_picture()
        pixels = _pixel_grid(picture)
        for name in shown:
            if name == "picture":
                original_map, grid = picture, pixels
            else:
                original_map = map_array(before, name)
                grid = map_grid(session.card.layer(name), original_map.shape, picture)
            other_map = another.swap(name, original_map)
            for step_index, ((_, degrees, factor), prediction) in enumerate(zip(changes, predictions, strict=True)):
                changed_map = (
                    _transform_picture(picture, degrees, factor) if name == "picture" else map_array(prediction, name)
                )
                y, x = transform_points(grid.points(), _centre(pixels), degrees, factor)
                inside = (y > -0.5) & (y < pixels.shape[0] - 0.5) & (x > -0.5) & (x < pixels.shape[1] - 0.5)
                found, expected = interpolate(changed_map, grid.to_cells((y, x)))[inside], original_map[inside]
                unrelated = None if other_map is None else other_map[inside]
                distance.compare(name, step_index, found, expected, unrelated)
                if unrelated is None or name not in mixed_names:
                    continue
                if number < fitted_pictures:
                    mix = mixes.setdefault((name, step_index), ChannelMix(found.shape[1]))
                    mix.fit(found, expected, unrelated)
                elif (name, step_index) in mixes:
                    own_mix, unrelated_mix = mixes[name, step_index].apply(found)
                    mixed.add_distance(name, step_index, own_mix, expected)
                    mixed.another.add_distance(name, step_index, unrelated_mix, unrelated)
    return make_result(
        name_of_probe,
        session,
        step_label,
        np.array([step for step, _, _ in changes], float),
        scores=scores,
        measures={
            "distance": distance.figures(),
            "mixed": mixed.figures("the same fit between unrelated pictures"),
        },
        counts={"fitted_pictures": fitted_pictures} if mixed_names else {},
        note=f"pictures changed about their centre; {_MIRRORED}",
    )


class ChannelMix:
    """A fixed mix of channels that turns one map into another, fitted by least squares on many cells.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._gram = np.zeros((channels, channels))
        self._cross = np.zeros((2, channels, channels))
        self._solved: NDArray[np.float64] | None = None

    def fit(self, found: MapArray, expected: MapArray, unrelated: MapArray) -> None:
        """Add cells (P, C) of a map, those it should become, and those of an unrelated picture."""
        cells = found.astype(np.float64)
        self._gram += cells.T @ cells
        self._cross += cells.T @ expected, cells.T @ unrelated

    def apply(self, found: MapArray) -> NDArray[np.float64]:
        """Return cells (P, C) mixed by the two fits, (2, P, C), float64."""
        if self._solved is None:
            size = len(self._gram)
            ridge = np.eye(size) * (_RIDGE * np.trace(self._gram) / size or 1.0)
            self._solved = np.asarray(np.linalg.solve(self._gram + ridge, self._cross), np.float64)
        return np.asarray(found.astype(np.float64) @ self._solved)


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
    margin: int | None = None,
    background: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Measure how cells near the border differ from those inside, by their distance from the border in cells.

    Ring 0 is the outermost row and column of cells, ring 1 the next. Without an effect of padding, both measures are 0
    everywhere; they are 0 in rings whose receptive fields are inside the picture.

    * `constant`: for a picture of the background alone, the distance of the ring's cells from the map's centre cell:
      √(mean over the ring of (cell - centre)² / mean over the map of cell²).
    * `shifted`: each picture without its margin, on the background, once in the centre and once in the upper left
      corner. The second map is compared with the first one shifted the same way, √(Σ (found - expected)² /
      Σ expected²) over the ring's cells in the upper left quarter of the map. The shift is the largest multiple of the
      layer's stride up to the margin, so it differs between strides; undefined for a layer without a stride, or with a
      larger one. Its baseline is the distance from another picture's map, shifted likewise.

    Choose margin and background so that the object is whole and looks as in training, or the scores say nothing: a
    handwritten digit has a margin of 4 pixels, and its background is 0. `accuracy_centre` against
    `accuracy_unchanged` tells.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        rings: Number of rings, at least 1.
        margin: Pixels to leave out at each edge, and to shift by; None for a quarter of the shorter side.
        background: Around what is left, 0..1.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `constant` and `shifted`, NaN where a map has no such ring. Totals: `agreement` and `probability` of
        the predicted class of the centre when it is in the corner, and with labels `accuracy_unchanged`,
        `accuracy_centre`, `accuracy_corner` and `accuracy_change`, corner less centre; none for a model without
        classes.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if rings < 1 or (margin is not None and margin < 1) or not 0 <= background <= 1:
        raise ValueError("rings and margin must be at least 1, background 0 to 1")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    strides = sorted({layer.stride for layer in session.layers if layer.stride is not None} | {(1, 1)})
    names = [layer.name for layer in session.layers]
    constant, shifted = PictureSums(names, rings), Distances(names, rings)
    whole, corner, another = ScoreSums(session, 1), ScoreSums(session, 1), AnotherPicture()

    def copies(picture: PictureArray) -> list[PictureArray]:
        edge = _margin(picture, margin)
        moves = ((0, 0), *((edge // stride[0] * stride[0], edge // stride[1] * stride[1]) for stride in strides))
        placed = (_without_margin(picture, edge, background, shift) for shift in moves)
        return [picture, np.full_like(picture, background), *placed]

    for picture, (unchanged, plain, centred, *predictions) in session.predict_copies(copies):
        by_stride = dict(zip(strides, predictions, strict=True))
        whole.next_picture(unchanged)
        whole.add(0, centred)
        corner.next_picture(centred)
        corner.add(0, by_stride[1, 1])
        constant.next_picture()
        shifted.next_picture()
        edge = _margin(picture, margin)
        for layer in session.layers:
            for index, (numerator, denominator) in enumerate(_ring_deviation(map_array(plain, layer.name), rings)):
                constant.add(layer.name, index, numerator, denominator)
            if layer.stride is None:
                continue
            down, right = (edge // stride for stride in layer.stride)
            if not down or not right:
                continue
            shifted_map, centred_map = map_array(by_stride[layer.stride], layer.name), map_array(centred, layer.name)
            # The lower and right half is affected by the opposite border.
            rows, columns = (size - size // 2 for size in shifted_map.shape[:2])
            part = slice(down, down + rows), slice(right, right + columns)  # Smaller at the end of the map.
            expected, other_map = centred_map[part], another.swap(layer.name, centred_map)
            unrelated = None if other_map is None else other_map[part]
            shifted_map = shifted_map[: expected.shape[0], : expected.shape[1]]
            ring = np.minimum.outer(np.arange(shifted_map.shape[0]), np.arange(shifted_map.shape[1]))
            for index in range(rings):
                shifted.compare(layer.name, index, shifted_map, expected, unrelated, ring == index)
    return make_result(
        "border",
        session,
        "ring (cells)",
        np.arange(rings, dtype=float),
        measures={"constant": Figures(constant.sums(), varies=False), "shifted": shifted.figures()},
        totals=_border_totals(whole, corner),
        note=f"pictures without their margin on a background of {background:g}, in the centre and in the corner",
    )


def _border_totals(whole: ScoreSums, corner: ScoreSums) -> dict[str, Figures]:
    """Return the scores of the centred and of the shifted picture as totals."""
    sums, chance = corner.sums(), corner.chance()
    if not sums:
        return {}
    totals: dict[str, Sums] = {name: sums[name] for name in ("agreement", "probability")}
    baselines = {name: chance[name] for name in totals}
    if (unchanged := whole.unchanged_sums()) is not None:
        totals["accuracy_unchanged"] = unchanged
        totals["accuracy_centre"] = whole.sums()["accuracy"]
        totals["accuracy_corner"] = sums["accuracy"]
        totals["accuracy_change"] = sums["accuracy_change"]
        baselines["accuracy_centre"] = whole.chance()["accuracy"]
        baselines["accuracy_corner"] = chance["accuracy"]
    return {"scores": Figures(totals, False, CHANCE, baselines)}


def _margin(picture: PictureArray, margin: int | None) -> int:
    shorter = min(picture.shape[:2])
    if margin is not None and 2 * margin >= shorter:
        raise ValueError(f"a margin of {margin} leaves nothing of a picture whose shorter side is {shorter}")
    return shorter // 4 if margin is None else margin


def _without_margin(picture: PictureArray, margin: int, background: float, shift: tuple[int, int]) -> PictureArray:
    """Return a picture without its margin on the background, shifted up and left by `shift` pixels."""
    (height, width), placed = picture.shape[:2], np.full_like(picture, background)
    (top, left), (down, right) = (margin - shift[0], margin - shift[1]), (height - 2 * margin, width - 2 * margin)
    placed[top : top + down, left : left + right] = picture[margin : height - margin, margin : width - margin]
    return placed


def _ring_deviation(feature_map: MapArray, rings: int) -> NDArray[np.float64]:
    """Return the mean of (cell - centre)² of each ring, and the map's mean of cell², (rings, 2); NaN if missing."""
    values = feature_map.astype(np.float64)
    height, width = values.shape[:2]
    centre = values[height // 2, width // 2]
    rows, columns = (np.minimum(np.arange(size), size - 1 - np.arange(size)) for size in (height, width))
    ring = np.minimum.outer(rows, columns)
    sums = np.full((rings, 2), np.nan)
    for index in range(min(rings, int(ring.max()) + 1)):
        sums[index] = np.square(values[ring == index] - centre).mean(), max(np.square(values).mean(), 1e-30)
    return sums


def pool(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    windows: Sequence[int] = (1, 2, 4, 8, 16, 32),
    pixels: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Measure how far pooling makes maps stay as they were when the picture is shifted.

    Each picture is shifted right, and the map of the shifted picture is compared with that of the original in place,
    both pooled by windows of w × w cells: √(Σ (found - expected)² / Σ expected²) over all pooled cells and pictures.
    It is 0 for a map that does not change (invariance), where `shift` is 0 for a map that moves along (equivariance).

    * `maximum`: the largest cell of each window.
    * `average`: the mean of each window.

    Pooled maps of *different* pictures are closer to each other too, the more so the larger the window: the baseline is
    the distance from another picture's pooled map, and what counts is the share of it that is left.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        windows: Sides of the windows in cells, at least 1. Rows and columns beyond the last whole window are left out;
            a window larger than the map is undefined.
        pixels: How far pictures are shifted, at least 1.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `maximum` and `average`. No scores.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not windows or min(windows) < 1 or pixels < 1:
        raise ValueError("windows must be a non-empty list of integers >= 1, and pixels >= 1")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    if not session.layers:
        raise ValueError("pool measures maps: it needs layers")
    names = [layer.name for layer in session.layers]
    reductions: dict[str, Callable[..., MapArray]] = {"maximum": np.max, "average": np.mean}
    measured = {kind: Distances(names, len(windows)) for kind in reductions}
    another = AnotherPicture()

    def copies(picture: PictureArray) -> list[PictureArray]:
        _check_shift(picture, pixels)
        return [picture, shift_picture(picture, 0, pixels)]

    for _, (before, after) in session.predict_copies(copies):
        for distances in measured.values():
            distances.next_picture()
        for layer in session.layers:
            original_map, shifted_map = map_array(before, layer.name), map_array(after, layer.name)
            other_map = another.swap(layer.name, original_map)
            for step_index, window in enumerate(windows):
                if window > min(original_map.shape[:2]):
                    continue
                for kind, reduce in reductions.items():
                    found, expected = (_pooled(each, window, reduce) for each in (shifted_map, original_map))
                    unrelated = None if other_map is None else _pooled(other_map, window, reduce)
                    measured[kind].compare(layer.name, step_index, found, expected, unrelated)
    return make_result(
        "pool",
        session,
        "window (cells)",
        np.array(windows, float),
        measures={kind: distances.figures() for kind, distances in measured.items()},
        note=f"pictures shifted right by {pixels} px; {_MIRRORED}",
    )


def _pooled(feature_map: MapArray, window: int, reduce: Callable[..., MapArray]) -> MapArray:
    """Return what each window of a map (h, w, C) is reduced to."""
    rows, columns = (size // window for size in feature_map.shape[:2])
    whole = feature_map[: rows * window, : columns * window].reshape(rows, window, columns, window, -1)
    return reduce(whole, axis=(1, 3))
