"""Shuffle: what a network still sees once a picture is cut into blocks and these are put in another order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._asking import Session, Sums, Verdicts, cells
from convscope_lens.probes._probe import Probe

if TYPE_CHECKING:
    from convscope._card import Layer
    from convscope._client import Client

    from convscope_lens.probes._sources import Image, Source
    from convscope_lens.probes._warp import Values


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
    """Measure what is left of maps and scores as pictures lose all structure that is larger than a block.

    Each picture is cut into square blocks, which change places in a random order; what is left over at the right and at
    the bottom stays. A cell whose receptive field lies in one block sees what it saw before, elsewhere. Of each layer:

    * `within`: the share of cells whose receptive field lies in one block of the picture.
    * `inside`: those cells against the cells where their block was, √(Σ (found - expected)² / Σ expected²). 0: they
      cannot know what became of the rest.
    * `whole`: the same over all cells. A layer without a stride is compared with itself as it was.

    `inside` and `whole` are not defined for a layer of whose stride the block is no multiple.

    Args:
        client: Whom to ask.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        blocks: Sides of the blocks in pixels, at least 1.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice, and of the orders.

    Returns:
        Layers: `within`, `inside` and `whole`. Scores: of the shuffled pictures.

    Raises:
        ConvscopeError: A request failed.
        ImportError: Pillow is not installed.
        OSError: A picture cannot be read.
        ValueError: An argument cannot be used.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError("blocks are at least 1 pixel")
    session = Session(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    inside, whole, verdicts = Sums(names, len(blocks)), Sums(names, len(blocks)), Verdicts(len(blocks))
    within = {name: np.zeros((2, len(blocks))) for name in names}
    draw = np.random.default_rng(seed)
    drawn: list[list[_Order]] = []

    def shuffled(picture: Image) -> list[Image]:
        orders = [_Order.draw(block, picture.shape, draw) for block in blocks]
        drawn.append(orders)
        return [picture, *(order.apply(picture) for order in orders)]

    for picture, (before, *answers) in session.ask(shuffled):
        for step, (order, answer) in enumerate(zip(drawn.pop(0), answers, strict=True)):
            verdicts.add(step, before, answer)
            for layer in session.layers:
                found, was = cells(answer, layer.name), cells(before, layer.name)
                kept = order.kept(layer, found, picture)
                within[layer.name][:, step] += kept.sum(), kept.size
                if layer.stride is None:
                    whole.add(layer.name, step, found, was)
                elif all(order.block % stride == 0 for stride in layer.stride):
                    expected, there = order.follow(layer, was)
                    whole.add(layer.name, step, found[there], expected[there])
                    inside.add(layer.name, step, found[there & kept], expected[there & kept])
    return Probe(
        "shuffle",
        session.model,
        session.card.version,
        session.count,
        "block (px)",
        np.array(blocks, float),
        verdicts.curves(),
        {
            "within": {name: counts[0] / counts[1] for name, counts in within.items()},
            "inside": inside.distance(),
            "whole": whole.distance(),
        },
    )


class _Order(NamedTuple):
    """Where the blocks of a picture come from.

    Attributes:
        block: Pixels, each way.
        places: (rows, columns, 2) of blocks: the row and column of the block that is put there.
    """

    block: int
    places: NDArray[np.int_]

    @classmethod
    def draw(cls, block: int, shape: tuple[int, ...], draw: np.random.Generator) -> _Order:
        rows, columns = shape[0] // block, shape[1] // block
        places = np.stack(np.divmod(draw.permutation(rows * columns), max(columns, 1)), axis=-1)
        return cls(block, places.reshape(rows, columns, 2))

    def moves(self, y: NDArray[np.int_], x: NDArray[np.int_]) -> NDArray[np.int_]:
        """Return how many pixels away that which is put at rows y and columns x was, (len(y), len(x), 2)."""
        rows, columns = self.places.shape[:2]
        here = np.stack(np.meshgrid(y // self.block, x // self.block, indexing="ij"), axis=-1)
        cut = (here < (rows, columns)).all(axis=-1)
        moves = np.zeros_like(here)
        moves[cut] = (self.places[here[cut][:, 0], here[cut][:, 1]] - here[cut]) * self.block
        return moves

    def apply(self, picture: Image) -> Image:
        """Return the picture with its blocks in this order."""
        y, x = (np.arange(size) for size in picture.shape[:2])
        moves = self.moves(y, x)
        return np.ascontiguousarray(picture[y[:, np.newaxis] + moves[..., 0], x + moves[..., 1]])

    def follow(self, layer: Layer, before: Values) -> tuple[Values, NDArray[np.bool_]]:
        """Return a map in this order, cut where the picture is, and where it is known, (h, w)."""
        size, strides = before.shape[:2], layer.stride or (1, 1)
        cell = np.stack(np.meshgrid(*(np.arange(cells) for cells in size), indexing="ij"), axis=-1)
        y, x = (np.arange(cells) * stride for cells, stride in zip(size, strides, strict=True))
        cell = cell + self.moves(y, x) // strides
        there = ((cell >= 0) & (cell < size)).all(axis=-1)
        cell[~there] = 0
        return before[cell[..., 0], cell[..., 1]], np.asarray(there)

    def kept(self, layer: Layer, found: Values, picture: Image) -> NDArray[np.bool_]:
        """Say which cells see the pixels of one block only, (h, w)."""
        if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
            return np.zeros(found.shape[:2], bool)
        lines = []
        for axis in (0, 1):
            step, size, start = layer.stride[axis], layer.receptive_field[axis], layer.receptive_field_start[axis]
            first = start + step * np.arange(found.shape[axis])
            last = first + size - 1
            cut = picture.shape[axis] // self.block * self.block
            lines.append((first >= 0) & (last < cut) & (first // self.block == last // self.block))
        return np.asarray(lines[0][:, np.newaxis] & lines[1])
