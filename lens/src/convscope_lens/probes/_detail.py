"""Probes of detail: what is left of maps and scores as pictures are blurred, or cut into blocks that change places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import blur_image
from convscope_lens.probes._probe import Probe
from convscope_lens.probes._session import RelativeDistance, ScoreCurves, Session, map_cells

if TYPE_CHECKING:
    from convscope import Client, Layer

    from convscope_lens.probes._images import Cells, Image, Source


def blur(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    radii: Sequence[float] = (0, 0.5, 1, 1.5, 2, 3, 4),
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure what is left of maps and scores as pictures are blurred.

    The measure `energy` of a layer is Σ (cell - mean)² of the maps of the blurred pictures, where the mean is that of
    the channel in the picture, as a share of the same sum for the original pictures: 1 if the whole pattern is left, 0
    if nothing is. It is not defined for a layer of one cell a channel. The row `picture` is the same measure of the
    pictures themselves.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        radii: Standard deviations of the Gaussian in pixels, at least 0.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice.

    Returns:
        Layers: `energy`. Scores: of the blurred pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not radii or min(radii) < 0:
        raise ValueError("radii are at least 0 pixels")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    energies = {name: np.zeros(1 + len(radii)) for name in ("picture", *(layer.name for layer in session.layers))}
    scores = ScoreCurves(len(radii))

    def copies(picture: Image) -> list[Image]:
        return [picture, *(blur_image(picture, radius) for radius in radii)]

    for picture, predictions in session.predict_copies(copies):
        for number, (copy, prediction) in enumerate(zip(copies(picture), predictions, strict=True)):
            energies["picture"][number] += _energy(copy)
            for layer in session.layers:
                energies[layer.name][number] += _energy(map_cells(prediction, layer.name))
            if number:
                scores.add(number - 1, predictions[0], prediction)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {name: energy[1:] / energy[0] for name, energy in energies.items()}
    return Probe(
        "blur",
        session.model,
        session.card.version,
        session.count,
        "radius (px)",
        np.array(radii, float),
        scores.curves(),
        {"energy": shares},
    )


def _energy(cells: Cells) -> float:
    """Return Σ (cell - mean of its channel)² of a map (h, w, C)."""
    values = cells.astype(np.float64)
    return float(np.square(values - values.mean(axis=(0, 1))).sum())


def shuffle(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    blocks: Sequence[int] = (1, 2, 4, 8, 16),
    limit: int | None = None,
    seed: int = 0,
) -> Probe:
    """Measure what is left of maps and scores as pictures lose all structure larger than a block.

    Each picture is cut into square blocks, which change places in a random order; what is left over at the right and at
    the bottom stays. A cell whose receptive field lies in one block has the same input as before, in another place. Of
    each layer:

    * `within`: the share of cells whose receptive field lies in one block of the picture.
    * `inside`: those cells against the cells where their block was, √(Σ (found - expected)² / Σ expected²). It is 0:
      they do not depend on the other blocks.
    * `whole`: the same over all cells. A layer without a stride is compared with its own unshuffled map.

    `inside` and `whole` are not defined where the side of the block is not a multiple of the layer's stride.

    Args:
        client: A connected client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        blocks: Sides of the blocks in pixels, at least 1.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice, and of the orders.

    Returns:
        Layers: `within`, `inside` and `whole`. Scores: of the shuffled pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError("blocks are at least 1 pixel")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    inside, whole = RelativeDistance(names, len(blocks)), RelativeDistance(names, len(blocks))
    within = {name: np.zeros((2, len(blocks))) for name in names}
    scores = ScoreCurves(len(blocks))
    random = np.random.default_rng(seed)
    pending: list[list[BlockOrder]] = []  # The orders of pictures whose predictions have not come yet.

    def shuffled(picture: Image) -> list[Image]:
        orders = [BlockOrder.draw(block, picture.shape, random) for block in blocks]
        pending.append(orders)
        return [picture, *(order.apply(picture) for order in orders)]

    for picture, (before, *predictions) in session.predict_copies(shuffled):
        for step, (order, prediction) in enumerate(zip(pending.pop(0), predictions, strict=True)):
            scores.add(step, before, prediction)
            for layer in session.layers:
                found, original = map_cells(prediction, layer.name), map_cells(before, layer.name)
                kept = order.cells_within_blocks(layer, found, picture)
                within[layer.name][:, step] += kept.sum(), kept.size
                if layer.stride is None:
                    whole.add(layer.name, step, found, original)
                elif all(order.block % stride == 0 for stride in layer.stride):
                    expected, known = order.expected_map(layer, original)
                    whole.add(layer.name, step, found[known], expected[known])
                    inside.add(layer.name, step, found[known & kept], expected[known & kept])
    return Probe(
        "shuffle",
        session.model,
        session.card.version,
        session.count,
        "block (px)",
        np.array(blocks, float),
        scores.curves(),
        {
            "within": {name: counts[0] / counts[1] for name, counts in within.items()},
            "inside": inside.curves(),
            "whole": whole.curves(),
        },
    )


class BlockOrder(NamedTuple):
    """An order of the blocks of a picture.

    Attributes:
        block: Side of a block in pixels.
        sources: (rows, columns, 2): the row and column of the block that comes to each place.
    """

    block: int
    sources: NDArray[np.int_]

    @classmethod
    def draw(cls, block: int, shape: tuple[int, ...], random: np.random.Generator) -> BlockOrder:
        """Draw a random order for a picture of a shape (H, W, ...)."""
        rows, columns = shape[0] // block, shape[1] // block
        sources = np.stack(np.divmod(random.permutation(rows * columns), max(columns, 1)), axis=-1)
        return cls(block, sources.reshape(rows, columns, 2))

    def apply(self, picture: Image) -> Image:
        """Return the picture with its blocks in this order."""
        y, x = (np.arange(size) for size in picture.shape[:2])
        offsets = self._offsets(y, x)
        return np.ascontiguousarray(picture[y[:, np.newaxis] + offsets[..., 0], x + offsets[..., 1]])

    def expected_map(self, layer: Layer, before: Cells) -> tuple[Cells, NDArray[np.bool_]]:
        """Return a map cut and shuffled as the picture is, and the cells (h, w) where it is known."""
        size, strides = before.shape[:2], layer.stride or (1, 1)
        cell = np.stack(np.meshgrid(*(np.arange(cells) for cells in size), indexing="ij"), axis=-1)
        y, x = (np.arange(cells) * stride for cells, stride in zip(size, strides, strict=True))
        cell = cell + self._offsets(y, x) // strides
        known = ((cell >= 0) & (cell < size)).all(axis=-1)
        cell[~known] = 0
        return before[cell[..., 0], cell[..., 1]], np.asarray(known)

    def cells_within_blocks(self, layer: Layer, found: Cells, picture: Image) -> NDArray[np.bool_]:
        """Return the cells (h, w) whose receptive field lies in one block."""
        if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
            return np.zeros(found.shape[:2], bool)
        lines = []
        for axis in (0, 1):
            stride, size, start = layer.stride[axis], layer.receptive_field[axis], layer.receptive_field_start[axis]
            first = start + stride * np.arange(found.shape[axis])
            last = first + size - 1
            end = picture.shape[axis] // self.block * self.block
            lines.append((first >= 0) & (last < end) & (first // self.block == last // self.block))
        return np.asarray(lines[0][:, np.newaxis] & lines[1])

    def _offsets(self, y: NDArray[np.int_], x: NDArray[np.int_]) -> NDArray[np.int_]:
        """Return from how many pixels away the content of rows y and columns x comes, (len(y), len(x), 2)."""
        rows, columns = self.sources.shape[:2]
        place = np.stack(np.meshgrid(y // self.block, x // self.block, indexing="ij"), axis=-1)
        in_block = (place < (rows, columns)).all(axis=-1)
        offsets = np.zeros_like(place)
        offsets[in_block] = (self.sources[place[in_block][:, 0], place[in_block][:, 1]] - place[in_block]) * self.block
        return offsets
