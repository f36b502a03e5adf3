"""Shift: how maps and predictions follow a moved picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes import _warp
from convscope_lens.probes._asking import Session, Sums, Verdicts, cells
from convscope_lens.probes._probe import Probe

if TYPE_CHECKING:
    from convscope._card import Layer
    from convscope._client import Client

    from convscope_lens.probes._sources import Image, Source
    from convscope_lens.probes._warp import Values

_WAYS = ((1, 0), (0, 1))  # Down and right, in pixels of each step.


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
    """Measure how maps follow a picture that is moved, and how steady the prediction is.

    Each picture is moved down and right by each shift; what comes in at its edge is its mirror image. A layer of stride
    t should answer with its own map moved by shift/t cells; where that is no whole number, with the mean of the two
    nearest moves, weighted. The error is the relative distance √(Σ (found - expected)² / Σ expected²) over the cells of
    all pictures and both ways:

    * `interior`: cells whose receptive field lies in the picture and on none of what came in, so that neither padding
      nor the filling has a part in it. 0 for shifts that are multiples of the stride: convolutions and pools do the
      same everywhere. Not defined for a layer whose cells all see the border.
    * `whole`: all cells that have a counterpart. A layer without a stride is compared with itself unmoved.

    The fact `shift_consistency` is the share of pairs of random moves of one picture that are taken for the same class,

        E over X, (y1, x1), (y2, x2) of [argmax P(move(X, y1, x1)) = argmax P(move(X, y2, x2))],

    the measure of R. Zhang, Making Convolutional Networks Shift-Invariant Again (ICML 2019, arXiv:1904.11486). Moves
    are drawn evenly from -`max_shift`..`max_shift` along each axis. There they are crops of a larger picture, at 32
    positions of 224 pixels; here the mirror image fills in, since small pictures have nothing beyond their edge.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        shifts: Pixels, each at least 1 and less than the picture's sides.
        pairs: Random pairs of moves a picture; 0 for none.
        max_shift: Pixels; None for a fourteenth of the shorter side, at least 1.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of all random choices.

    Returns:
        Layers: `interior` and `whole`. Scores: of the moved pictures. Facts: `shift_consistency`, 0..1, of so many
        `pairs`, each move by up to `max_shift_px`; a model without classes has none.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    if not shifts or min(shifts) < 1 or pairs < 0 or (max_shift is not None and max_shift < 1):
        raise ValueError("shifts and max_shift are at least 1 pixel, and pairs at least 0")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    interior, whole = Sums(names, len(shifts)), Sums(names, len(shifts))
    verdicts = Verdicts(len(shifts))
    moves = [(step, pixels * down, pixels * right) for step, pixels in enumerate(shifts) for down, right in _WAYS]

    def moved(picture: Image) -> list[Image]:
        if max(shifts) >= min(picture.shape[:2]):
            raise ValueError(f"a picture of {picture.shape[0]}×{picture.shape[1]} cannot move by {max(shifts)} pixels")
        return [picture, *(_warp.shift(picture, down, right) for _, down, right in moves)]

    for picture, (unmoved, *answers) in session.ask(moved):
        for (step, down, right), answer in zip(moves, answers, strict=True):
            verdicts.add(step, unmoved, answer)
            for layer in session.layers:
                found, before = cells(answer, layer.name), cells(unmoved, layer.name)
                expected, there = _expect(layer, before, down, right)
                whole.add(layer.name, step, found[there], expected[there])
                inside = there & _untouched(layer, found, picture, down, right)
                interior.add(layer.name, step, found[inside], expected[inside])
    return Probe(
        "shift",
        session.model,
        session.card.version,
        session.count,
        "shift (px)",
        np.array(shifts, float),
        verdicts.curves(),
        {"interior": interior.distance(), "whole": whole.distance()},
        _consistency(session, pairs, max_shift, seed),
    )


def _expect(layer: Layer, before: Values, down: int, right: int) -> tuple[Values, NDArray[np.bool_]]:
    """Return the map that a moved picture should have, and where it is known, (h, w)."""
    height, width = before.shape[:2]
    if layer.stride is None:
        return before, np.ones((height, width), bool)
    y, x = np.meshgrid(
        np.arange(height) - down / layer.stride[0], np.arange(width) - right / layer.stride[1], indexing="ij"
    )
    return _warp.sample(before, (y, x)), (y >= 0) & (x >= 0)


def _untouched(layer: Layer, found: Values, picture: Image, down: int, right: int) -> NDArray[np.bool_]:
    """Say which cells, and those that they are compared with, see nothing of border and filling; (h, w)."""
    if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
        return np.zeros(found.shape[:2], bool)
    lines = []
    for axis, pixels in enumerate((down, right)):
        step, size, start = layer.stride[axis], layer.receptive_field[axis], layer.receptive_field_start[axis]
        first = start + step * np.arange(found.shape[axis])  # The first pixel that each cell sees.
        earliest = first - step * -(-pixels // step)  # And the first that the cell it is compared with sees.
        lines.append((first >= pixels) & (earliest >= 0) & (first + size <= picture.shape[axis]))
    return np.asarray(lines[0][:, np.newaxis] & lines[1])


def _consistency(session: Session, pairs: int, max_shift: int | None, seed: int) -> dict[str, float]:
    """Measure Zhang's shift consistency."""
    if not session.has_scores or not pairs:
        return {}
    draw = np.random.default_rng(seed)
    reach = 0

    def moved(picture: Image) -> list[Image]:
        nonlocal reach
        shorter = min(picture.shape[:2])
        reach = max(1, shorter // 14) if max_shift is None else max_shift
        if reach >= shorter:
            raise ValueError(f"a picture of {picture.shape[0]}×{picture.shape[1]} cannot move by {reach} pixels")
        return [_warp.shift(picture, *move) for move in draw.integers(-reach, reach + 1, (2 * pairs, 2)).tolist()]

    agreed = total = 0
    for _, answers in session.ask(moved, maps=False):
        chosen = [answer.top[0].index for answer in answers]
        agreed += sum(one == other for one, other in zip(chosen[::2], chosen[1::2], strict=True))
        total += pairs
    return {"shift_consistency": agreed / total, "pairs": total, "max_shift_px": reach}
