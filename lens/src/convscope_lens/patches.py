"""Patches: the part of a picture that one cell of a map depends on, and the strongest cells of a channel."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from convscope import ConvscopeError, encode_pictures
from convscope.commands import raise_if_of_service
from convscope.pixels import html_image, to_display_pixels

if TYPE_CHECKING:
    from convscope import Client, Explanation, Layer, ModelCard
    from convscope.typing import Picture
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Patch:
    """The part of a picture that one cell depends on: no pixel outside it can change the cell.

    Attributes:
        pixels: (H, W, C), float32, 0..1: the part of the network's input inside `box`.
        box: (top, left, bottom, right) of the cell's receptive field in pixels of the network's input, bottom and right
            exclusive. It may extend past the picture into the padding.
        layer: Name of the layer.
        cell: (row, column) in the layer's map.
        channel: Index of the channel; None if it does not concern a single channel.
        value: Value of the cell; None if unknown.
        picture_index: Index of the picture in the iterable that was passed.
        original_box: `box` in pixels of the picture that was sent, rotated according to EXIF; None if unknown.
    """

    pixels: NDArray[np.float32]
    box: tuple[int, int, int, int]
    layer: str
    cell: tuple[int, int]
    channel: int | None = None
    value: float | None = None
    picture_index: int = 0
    original_box: tuple[float, float, float, float] | None = None

    def display_pixels(self) -> NDArray[np.uint8]:
        """Return the patch for display: (H', W', C), uint8, enlarged to at least 256 pixels on the longer side."""
        return to_display_pixels(self.pixels)

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the patch, in colour if it has three channels, else its first channel."""
        pixels = self.display_pixels()
        shown = pixels if pixels.shape[2] == 3 else pixels[:, :, :1]
        return html_image(shown, f"{self.layer}, cell {self.cell}")


def cut_patch(
    picture: NDArray[np.float32],
    layer: Layer,
    cell: tuple[int, int],
    *,
    channel: int | None = None,
    value: float | None = None,
    picture_index: int = 0,
    region: tuple[float, float, float, float] | None = None,
) -> Patch:
    """Cut out the part of a picture that one cell depends on.

    Args:
        picture: The network's input, (C, H, W), float32, 0..1, as in `Explanation.picture`.
        layer: A layer of the model card.
        cell: (row, column) in the layer's map.
        channel: Stored in `Patch.channel`.
        value: Stored in `Patch.value`.
        picture_index: Stored in `Patch.picture_index`.
        region: Where `picture` lies in the picture that was sent, as in `Explanation.region`; None for no
            `Patch.original_box`.

    Returns:
        The patch.

    Raises:
        ValueError: The card does not state the layer's receptive field, or there is no such cell.
    """
    top, left, bottom, right = box = layer.receptive_field_box(*cell)
    pixels = picture[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if min(cell) < 0 or pixels.size == 0:
        raise ValueError(f"layer {layer.name!r} has no cell {cell} for this picture")
    return Patch(
        pixels=np.ascontiguousarray(pixels.transpose(1, 2, 0)),
        box=box,
        layer=layer.name,
        cell=cell,
        channel=channel,
        value=value,
        picture_index=picture_index,
        original_box=None if region is None else _place(box, region, picture.shape[1], picture.shape[2]),
    )


def _place(
    box: tuple[int, int, int, int], region: tuple[float, float, float, float], height: int, width: int
) -> tuple[float, float, float, float]:
    """Return a box in pixels of the network's input in pixels of the picture that the region is in."""
    y, x = (region[2] - region[0]) / height, (region[3] - region[1]) / width
    return region[0] + box[0] * y, region[1] + box[1] * x, region[0] + box[2] * y, region[1] + box[3] * x


def strongest_patches(
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
    on_error: Callable[[int, ConvscopeError], None] | None = None,
) -> list[Patch]:
    """Find the cells with the largest values of a channel, and cut out the patches that they depend on.

    First the maps of all pictures are requested, then the network's input for the pictures with one of the strongest
    cells. Of all pictures only those are kept in memory.

    Args:
        client: An open client.
        pictures: An iterable of pictures, as in `Client.predict`; read once, in batches.
        model: Name of the model.
        layer: Name of the layer.
        channel: Index of the channel.
        n: Number of patches.
        per_picture: Maximum number of patches per picture.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of each request, in seconds; None for the client's.
        on_error: Called with the index and the error of a failed picture; None to raise the error. An error of the
            service is raised, with a note that says how many pictures were measured.

    Returns:
        At most `n` patches, strongest cell first; of equal cells, the one of the earlier picture first.

    Raises:
        ConvscopeError: A picture or a request failed, or there is no such layer (`UnknownLayer`).
        OSError: A path cannot be read.
        TypeError: `pictures` is a single picture, or contains something else than pictures.
        ValueError: The card does not state the layer's receptive field, or an option is out of range.
    """
    if n < 1 or per_picture < 1:
        raise ValueError("n and per_picture must be at least 1")
    card = client.model_card(model, version, deadline_s=deadline_s)
    layer_card = card.layer(layer)
    layer_card.receptive_field_box(0, 0)  # Raises before anything is sent.
    heap: list[tuple[float, int, int, tuple[int, int]]] = []  # (value, -picture index, -flat cell index, cell)
    kept: dict[int, bytes] = {}  # Files of the pictures with one of the strongest cells.
    for batch in _batched(_numbered_files(pictures), card.pictures_per_request(4 * math.prod(layer_card.shape[1:]))):
        so_far = f"{batch[0][0]:,} pictures were measured before"
        try:
            predictions = client.predict(
                [file for _, file in batch],
                model=model,
                version=version,
                layers=[layer],
                channels=[channel],
                top_k=1,
                deadline_s=deadline_s,
            )
        except ConvscopeError as error:
            error.add_note(so_far)
            raise
        for (index, _), prediction in zip(batch, predictions, strict=True):
            if on_error is not None and prediction.error is not None:
                raise_if_of_service(prediction.error, lambda: client.model_card(model, version), so_far)
                on_error(index, prediction.error)
                continue
            [values] = prediction.maps[layer]
            for flat_index in np.argsort(-values, axis=None, kind="stable")[:per_picture].tolist():
                cell = divmod(flat_index, values.shape[1])
                entry = (float(values[cell]), -index, -flat_index, cell)
                if len(heap) < n:
                    heapq.heappush(heap, entry)
                elif entry[0] > heap[0][0]:
                    heapq.heapreplace(heap, entry)
        used = {-negative_index for _, negative_index, _, _ in heap}
        kept = {index: file for index, file in [*kept.items(), *batch] if index in used}
    inputs = dict(fetch_inputs(client, card, kept.items(), model=model, version=version, deadline_s=deadline_s))
    return [
        cut_patch(
            inputs[-index].picture,
            layer_card,
            cell,
            channel=channel,
            value=value,
            picture_index=-index,
            region=inputs[-index].region,
        )
        for value, index, _, cell in sorted(heap, reverse=True)
    ]


def fetch_inputs(
    client: Client,
    card: ModelCard,
    files: Iterable[tuple[int, bytes]],
    *,
    model: str,
    version: str | None = None,
    deadline_s: float | None = None,
) -> Iterator[tuple[int, Explanation]]:
    """Fetch the network's input for numbered picture files, many in a request.

    Yields:
        The number of each picture, and an explanation with its input and region.

    Raises:
        ConvscopeError: A request failed.
    """
    input_bytes = 4 * card.input.channels * (card.input.height or 1) * (card.input.width or 1)
    for batch in _batched(iter(files), card.pictures_per_request(input_bytes)):
        explanations = client.explain(
            [file for _, file in batch],
            model=model,
            version=version,
            method="picture",
            top_k=1,
            deadline_s=deadline_s,
        )
        yield from zip((number for number, _ in batch), explanations, strict=True)


def _numbered_files(pictures: Iterable[Picture]) -> Iterator[tuple[int, bytes]]:
    """Yield index and file of each picture."""
    if isinstance(pictures, str | bytes):
        raise TypeError("pictures must be an iterable of pictures, not a single picture")
    return enumerate(file for picture in pictures for file in encode_pictures([picture]).files)


def _batched(items: Iterator[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    """Yield lists of at most `size` items."""
    while batch := list(islice(items, size)):
        yield batch
