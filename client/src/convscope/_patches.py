"""Patches: the piece of a picture that one cell of a map answers to, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convscope._heat import enlarge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convscope._card import Layer


@dataclass(frozen=True, eq=False)
class Patch:
    """The piece of a picture that one cell answers to: nothing outside it can change the cell.

    Attributes:
        pixels: (H, W, C), float32, 0..1: the picture as the network saw it, within `box` and the picture.
        box: (top, left, bottom, right) of what the cell answers to, in pixels of the picture as the network saw it, the
            last two exclusive. Where it reaches beyond the picture the network saw padding.
        layer: Name of the layer.
        cell: (row, column) in the layer's map.
        channel: Of the layer; None where the patch was cut for all of them.
        value: Of the cell; None where it is not known.
        picture: Which of the pictures asked about it comes from, from 0.
    """

    pixels: NDArray[np.float32]
    box: tuple[int, int, int, int]
    layer: str
    cell: tuple[int, int]
    channel: int | None = None
    value: float | None = None
    picture: int = 0

    def image(self) -> NDArray[np.uint8]:
        """Return the patch as a picture that a person can see.

        Returns:
            (H', W', C), uint8: enlarged by a whole factor where the longer side is below 256.
        """
        return enlarge(self.pixels)


def cut_patch(
    picture: NDArray[np.float32],
    layer: Layer,
    cell: tuple[int, int],
    *,
    channel: int | None = None,
    value: float | None = None,
    number: int = 0,
) -> Patch:
    """Cut out of a picture what a cell answers to.

    Args:
        picture: (C, H, W), as the network saw it.
        layer: Of the model card.
        cell: (row, column) in the layer's map.
        channel: Of the layer, if it is about one.
        value: Of the cell, if known.
        number: Which of the pictures asked about it is.

    Returns:
        The patch.

    Raises:
        ValueError: The card does not say what the layer's cells answer to, or there is no such cell.
    """
    if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
        raise ValueError(f"the card does not say which pixels a cell of layer {layer.name!r} answers to")
    row, column = cell
    top, left = (
        int(start + place * step)
        for start, place, step in zip(layer.receptive_field_start, cell, layer.stride, strict=True)
    )
    bottom, right = top + layer.receptive_field[0], left + layer.receptive_field[1]
    pixels = picture[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if row < 0 or column < 0 or pixels.size == 0:
        raise ValueError(f"layer {layer.name!r} has no cell {cell} for this picture")
    return Patch(
        pixels=np.ascontiguousarray(pixels.transpose(1, 2, 0)),
        box=(top, left, bottom, right),
        layer=layer.name,
        cell=(row, column),
        channel=channel,
        value=value,
        picture=number,
    )
