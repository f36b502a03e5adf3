"""Patches: the part of a picture that one cell of a map depends on, and the cells where a channel is strongest."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from convscope import encode_pictures
from convscope.pixels import to_pixels

if TYPE_CHECKING:
    from convscope import Client, ConvscopeError, Layer, ModelCard
    from convscope.typing import Picture
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Patch:
    """The part of a picture that one cell depends on: no pixel outside it can change the cell.

    Attributes:
        pixels: (H, W, C), float32, 0..1: the part of the network's input that lies in `box`.
        box: (top, left, bottom, right) of the cell's receptive field in pixels of the network's input, bottom and right
            exclusive. Where it reaches beyond the picture the network saw padding.
        layer: Name of the layer.
        cell: (row, column) in the layer's map.
        channel: Number of the channel; None if the patch is not about one channel.
        value: Value of the cell; None if it is not known.
        picture: Index of the picture among those given.
    """

    pixels: NDArray[np.float32]
    box: tuple[int, int, int, int]
    layer: str
    cell: tuple[int, int]
    channel: int | None = None
    value: float | None = None
    picture: int = 0

    def image(self) -> NDArray[np.uint8]:
        """Return the patch as a picture that is large enough to look at.

        Returns:
            (H', W', C), uint8: enlarged by a whole factor where the longer side is below 256.
        """
        return to_pixels(self.pixels)


def cut_patch(
    picture: NDArray[np.float32],
    layer: Layer,
    cell: tuple[int, int],
    *,
    channel: int | None = None,
    value: float | None = None,
    number: int = 0,
) -> Patch:
    """Cut the part of a picture that one cell depends on.

    Args:
        picture: (C, H, W), the network's input as `Explanation.picture` holds it.
        layer: A layer of the model card.
        cell: (row, column) in the layer's map.
        channel: Number of the channel, for `Patch.channel`.
        value: Value of the cell, for `Patch.value`.
        number: Index of the picture, for `Patch.picture`.

    Returns:
        The patch.

    Raises:
        ValueError: The card does not state the layer's receptive field, or there is no such cell.
    """
    starts, sizes, strides = _geometry(layer)
    top, left = (int(start + place * stride) for start, place, stride in zip(starts, cell, strides, strict=True))
    bottom, right = top + sizes[0], left + sizes[1]
    pixels = picture[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if min(cell) < 0 or pixels.size == 0:
        raise ValueError(f"layer {layer.name!r} has no cell {cell} for this picture")
    return Patch(
        pixels=np.ascontiguousarray(pixels.transpose(1, 2, 0)),
        box=(top, left, bottom, right),
        layer=layer.name,
        cell=cell,
        channel=channel,
        value=value,
        picture=number,
    )


def strongest(
    client: Client,
    pictures: Iterable[Picture],
    *,
    model: str,
    layer: str,
    channel: int,
    n: int = 9,
    per_picture: int = 1,
    version: str | None = None,
    deadline_s: float | None = None,
    errors: dict[int, ConvscopeError] | None = None,
) -> list[Patch]:
    """Find the cells where a channel is strongest in pictures, and cut the patches they depend on.

    The maps of all pictures are requested first, as many pictures in a request as the model takes; then, of the
    pictures that have one of the strongest cells, the network's input.

    Args:
        client: A connected client.
        pictures: An iterable of pictures, as in `Client.predict`.
        model: The model's name.
        layer: Name of the layer.
        channel: Number of the channel in the layer.
        n: How many cells to return.
        per_picture: How many of them may be in one picture.
        version: The model's version; None for the server's default.
        deadline_s: Seconds each request may take; None for the client's own.
        errors: If given, the error of a picture that fails is put here, by the picture's index, instead of being
            raised.

    Returns:
        At most `n` patches, the strongest cell first; of equal cells the one of the earlier picture.

    Raises:
        ConvscopeError: A picture failed, or a request did.
        OSError: A path cannot be read.
        TypeError: Something is not a picture.
        ValueError: There is no such layer, or its card does not state its receptive field.
    """
    if n < 1 or per_picture < 1:
        raise ValueError("n and per_picture must be at least 1")
    files = encode_pictures(pictures).files
    card = client.model_card(model, version, deadline_s=deadline_s)
    source = next((item for item in card.layers if item.name == layer), None)
    if source is None:
        names = ", ".join(item.name for item in card.layers)
        raise ValueError(f"{model} has no layer {layer!r}; there are: {names}")
    _geometry(source)  # Raises before anything is sent.
    best: list[tuple[float, int, int, tuple[int, int]]] = []  # A heap of (value, -picture, -place, cell).
    batch = _batch(card, math.prod(source.shape[1:]))
    for start in range(0, len(files), batch):
        predictions = client.predict(
            files[start : start + batch],
            model=model,
            version=version,
            layers=[layer],
            channels=[channel],
            top_k=1,
            deadline_s=deadline_s,
        )
        for number, prediction in enumerate(predictions, start):
            if errors is not None and prediction.error is not None:
                errors[number] = prediction.error
                continue
            [cells] = prediction.maps[layer]
            for place in np.argsort(-cells, axis=None, kind="stable")[:per_picture].tolist():
                cell = divmod(place, cells.shape[1])
                entry = (float(cells[cell]), -number, -place, cell)
                if len(best) < n:
                    heapq.heappush(best, entry)
                elif entry[0] > best[0][0]:
                    heapq.heapreplace(best, entry)
    inputs: dict[int, NDArray[np.float32]] = {}
    chosen = sorted({-number for _, number, _, _ in best})
    batch = _batch(card, card.input.channels * (card.input.height or 0) * (card.input.width or 0))
    for start in range(0, len(chosen), batch):
        numbers = chosen[start : start + batch]
        explanations = client.explain(
            [files[number] for number in numbers],
            model=model,
            version=version,
            method="picture",
            top_k=1,
            deadline_s=deadline_s,
        )
        inputs |= {number: found.picture for number, found in zip(numbers, explanations, strict=True)}
    return [
        cut_patch(inputs[-number], source, cell, channel=channel, value=value, number=-number)
        for value, number, _, cell in sorted(best, reverse=True)
    ]


def _geometry(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return start, size and stride of a layer's receptive fields."""
    if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
        raise ValueError(f"the model card does not state the receptive field of layer {layer.name!r}")
    return layer.receptive_field_start, layer.receptive_field, layer.stride


def _batch(card: ModelCard, values: int) -> int:
    """Return how many pictures may go into a request whose reply has so many float32 values for each."""
    if card.input.height is None or card.input.width is None:  # The sizes of the replies are not known.
        return 1
    return max(1, min(card.limits.max_images, card.limits.max_reply_bytes // 2 // (4 * values)))
