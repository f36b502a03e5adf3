"""Probes with blurred and block-shuffled pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import blur_picture
from convscope_lens.probes._result import ProbeResult, make_result
from convscope_lens.probes._session import AnotherPicture, Distances, PictureSums, ProbeSession, ScoreSums, map_array
from convscope_lens.probes._statistics import Figures

if TYPE_CHECKING:
    from convscope import Client, Layer

    from convscope_lens.probes._images import MapArray, PictureArray, Source


def blur(
    client: Client,
    pictures: Source | Iterable[Source],
    *,
    model: str,
    version: str | None = None,
    layers: str | Iterable[str] = "all",
    sigmas: Sequence[float] = (0, 0.5, 1, 1.5, 2, 3, 4),
    limit: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Measure how maps and scores change when pictures are blurred.

    The measure `energy` of a layer is Σ (cell - mean)² of the maps of the blurred pictures, where the mean is that of
    the channel in the picture, as a share of the same sum for the original pictures: 1 if the pattern is unchanged, 0
    if it has vanished. It is undefined for a layer with one cell per channel. The row `picture` is the same measure of
    the pictures themselves.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        sigmas: Standard deviations of the Gaussian in pixels, at least 0.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Returns:
        Measures: `energy`. Scores: of the blurred pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not sigmas or min(sigmas) < 0:
        raise ValueError("sigmas must be a non-empty list of numbers >= 0")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = ["picture", *(layer.name for layer in session.layers)] if session.layers else []
    energies = PictureSums(names, len(sigmas))
    scores = ScoreSums(session, len(sigmas))

    def blurred(picture: PictureArray) -> list[PictureArray]:
        return [picture, *(blur_picture(picture, sigma) for sigma in sigmas)]

    for picture, (before, *predictions) in session.predict_copies(blurred):
        scores.next_picture(before)
        energies.next_picture()
        original_energies = {name: _energy(picture if name == "picture" else map_array(before, name)) for name in names}
        for index, (sigma, prediction) in enumerate(zip(sigmas, predictions, strict=True)):
            scores.add(index, prediction)
            for name in names:
                values = blur_picture(picture, sigma) if name == "picture" else map_array(prediction, name)
                energies.add(name, index, _energy(values), original_energies[name])
    return make_result(
        "blur",
        session,
        "sigma (px)",
        np.array(sigmas, float),
        scores=scores,
        measures={"energy": Figures(energies.sums(), root=False)},
        note="pictures blurred with a Gaussian; edges continue mirrored",
    )


def _energy(feature_map: MapArray) -> float:
    """Return Σ (cell - mean of its channel)² of a map (h, w, C)."""
    values = feature_map.astype(np.float64)
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
) -> ProbeResult:
    """Measure how maps and scores change when blocks of the picture are shuffled.

    Each picture is cut into square blocks, which are permuted at random so that none stays where it was; the remainder
    at the right and at the bottom is unchanged. A cell whose receptive field is inside one block has the same input as
    before, at another position. Per layer:

    * `interior_share`: the share of cells whose receptive field is inside one block of the picture.
    * `interior`: these cells compared with the map shuffled the same way, √(Σ (found - expected)² / Σ expected²). It is
      0: they do not depend on the other blocks.
    * `whole`: the same over all cells. A layer without a stride is compared with its own unshuffled map.

    The baseline of both is the distance from another picture's map, shuffled likewise.

    Shuffling also makes seams: edges where blocks meet that did not meet before. The control is a grid, lines of one
    pixel along the edges of the blocks in the picture's mean colour. Scores of `grid` are of pictures that are not
    shuffled and have this grid: what the lines alone do. Those of `grid_shuffled` have the same grid after the blocks
    have changed places: here seams are alike, and the difference is the order of the blocks. Neither is defined for
    blocks of one pixel.

    `interior` and `whole` are undefined unless the side of the block is a multiple of the layer's stride.

    Args:
        client: An open client.
        pictures: Paths, folders, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        blocks: Sides of the blocks in pixels, at least 1.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample, and of the permutations.

    Returns:
        Measures: `interior_share`, `interior` and `whole`. Scores: of the shuffled pictures; and by name of the
        control, as in `grid_agreement` and, with labels, `grid_accuracy`.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError("blocks must be a non-empty list of integers >= 1")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    interior, whole = (Distances(names, len(blocks)) for _ in range(2))
    shares = PictureSums(names, len(blocks))
    scores, another = ScoreSums(session, len(blocks)), AnotherPicture()
    rng = np.random.default_rng(seed)
    orders: list[list[BlockPermutation]] = []  # Of each picture, in the order of the pictures.

    def shuffled(picture: PictureArray) -> list[PictureArray]:
        orders.append([BlockPermutation.random(block, picture.shape, rng) for block in blocks])
        return [picture, *(order.apply(picture) for order in orders[-1])]

    for number, (picture, (before, *predictions)) in enumerate(session.predict_copies(shuffled)):
        scores.next_picture(before)
        for sums in (interior, whole, shares):
            sums.next_picture()
        for step_index, prediction in enumerate(predictions):
            scores.add(step_index, prediction)
        for layer in session.layers:
            original_map = map_array(before, layer.name)
            other_map = another.swap(layer.name, original_map)
            for step_index, (order, prediction) in enumerate(zip(orders[number], predictions, strict=True)):
                shuffled_map = map_array(prediction, layer.name)
                inside = order.cells_within_blocks(layer, shuffled_map, picture)
                shares.add(layer.name, step_index, float(inside.sum()), float(inside.size))
                if layer.stride is None:
                    whole.compare(layer.name, step_index, shuffled_map, original_map, other_map)
                elif all(order.block % stride == 0 for stride in layer.stride):
                    expected, defined = order.expected_map(layer, original_map)
                    unrelated = None if other_map is None else order.expected_map(layer, other_map)[0]
                    whole.compare(layer.name, step_index, shuffled_map, expected, unrelated, defined)
                    interior.compare(layer.name, step_index, shuffled_map, expected, unrelated, inside & defined)
    return make_result(
        "shuffle",
        session,
        "block (px)",
        np.array(blocks, float),
        scores=scores,
        controls=_grid_scores(session, blocks, orders),
        measures={
            "interior_share": Figures(shares.sums(), root=False, varies=False),
            "interior": interior.figures(),
            "whole": whole.figures(),
        },
        note="no block stays where it was; the grid's lines of one pixel are the control for seams",
    )


def _grid_scores(
    session: ProbeSession, blocks: Sequence[int], orders: Sequence[Sequence[BlockPermutation]]
) -> dict[str, ScoreSums]:
    """Return the scores of pictures with a grid along the edges of the blocks, in order and shuffled."""
    controls = {name: ScoreSums(session, len(blocks)) for name in ("grid", "grid_shuffled")}
    given = iter(orders)

    def with_grids(picture: PictureArray) -> list[PictureArray]:
        copies = [picture]
        for order in next(given):
            copies += [draw_grid(picture, order.block), draw_grid(order.apply(picture), order.block)]
        return copies

    for _, (before, *predictions) in session.predict_copies(with_grids, maps=False):
        for offset, scores in enumerate(controls.values()):
            scores.next_picture(before)
            for step_index, block in enumerate(blocks):
                if block > 1:
                    scores.add(step_index, predictions[2 * step_index + offset])
    return controls


def draw_grid(picture: PictureArray, block: int) -> PictureArray:
    """Return a picture with lines of one pixel, in its mean colour, along the upper and left edges of its blocks.

    Args:
        picture: (H, W, C), float32, 0..1.
        block: Side of a block in pixels.
    """
    lined, colour = picture.copy(), picture.mean(axis=(0, 1))
    lined[block::block] = colour
    lined[:, block::block] = colour
    return lined


class BlockPermutation(NamedTuple):
    """A permutation of the blocks of a picture.

    Attributes:
        block: Side of a block in pixels.
        sources: (rows, columns, 2): row and column of the source block of each position.
    """

    block: int
    sources: NDArray[np.int_]

    @classmethod
    def random(cls, block: int, shape: tuple[int, ...], rng: np.random.Generator) -> BlockPermutation:
        """Return a random permutation for a picture of shape (H, W, ...), in which no block stays where it was.

        One block alone stays.
        """
        rows, columns = shape[0] // block, shape[1] // block
        home = np.arange(rows * columns)
        order = rng.permutation(home)
        while len(home) > 1 and (order == home).any():  # Each try succeeds with a probability of about 1/e.
            order = rng.permutation(home)
        return cls(block, np.stack(np.divmod(order, max(columns, 1)), axis=-1).reshape(rows, columns, 2))

    def apply(self, picture: PictureArray) -> PictureArray:
        """Return the picture, (H, W, C), float32, 0..1, with its blocks permuted."""
        y, x = (np.arange(size) for size in picture.shape[:2])
        offsets = self._offsets(y, x)
        return np.ascontiguousarray(picture[y[:, np.newaxis] + offsets[..., 0], x + offsets[..., 1]])

    def expected_map(self, layer: Layer, before: MapArray) -> tuple[MapArray, NDArray[np.bool_]]:
        """Return a map shuffled the same way as the picture, and the cells (h, w) where it is defined."""
        size, strides = before.shape[:2], layer.stride or (1, 1)
        cell = np.stack(np.meshgrid(*(np.arange(count) for count in size), indexing="ij"), axis=-1)
        y, x = (np.arange(count) * stride for count, stride in zip(size, strides, strict=True))
        cell = cell + self._offsets(y, x) // strides
        defined = ((cell >= 0) & (cell < size)).all(axis=-1)
        cell[~defined] = 0
        return before[cell[..., 0], cell[..., 1]], np.asarray(defined)

    def cells_within_blocks(self, layer: Layer, feature_map: MapArray, picture: PictureArray) -> NDArray[np.bool_]:
        """Return the cells (h, w) whose receptive field is inside one block."""
        if not layer.has_receptive_field:
            return np.zeros(feature_map.shape[:2], bool)
        rows, columns = (np.arange(count) for count in feature_map.shape[:2])
        top, left, bottom, right = layer.receptive_field_box(rows, columns)
        axis_masks = []
        for first, end, size in ((top, bottom, picture.shape[0]), (left, right, picture.shape[1])):
            last = end - 1
            in_picture = (first >= 0) & (last < size // self.block * self.block)
            axis_masks.append(in_picture & (first // self.block == last // self.block))
        return np.asarray(axis_masks[0][:, np.newaxis] & axis_masks[1])

    def _offsets(self, y: NDArray[np.int_], x: NDArray[np.int_]) -> NDArray[np.int_]:
        """Return the offset (dy, dx), in pixels, from each position to the source of its content.

        The result has shape (len(y), len(x), 2).
        """
        block_index = np.stack(np.meshgrid(y // self.block, x // self.block, indexing="ij"), axis=-1)
        in_block = (block_index < self.sources.shape[:2]).all(axis=-1)
        offsets = np.zeros_like(block_index)
        indexes = block_index[in_block]
        offsets[in_block] = (self.sources[indexes[:, 0], indexes[:, 1]] - indexes) * self.block
        return offsets
