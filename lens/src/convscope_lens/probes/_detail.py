"""Probes with blurred and block-shuffled pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import blur_picture
from convscope_lens.probes._result import ProbeResult
from convscope_lens.probes._session import ProbeSession, RelativeDistance, ScoreCurves, map_array

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
    energies = {name: np.zeros(1 + len(sigmas)) for name in ("picture", *(layer.name for layer in session.layers))}
    scores = ScoreCurves(len(sigmas))

    def blurred(picture: PictureArray) -> list[PictureArray]:
        return [picture, *(blur_picture(picture, sigma) for sigma in sigmas)]

    for picture, predictions in session.predict_copies(blurred):
        for index, (copy, prediction) in enumerate(zip(blurred(picture), predictions, strict=True)):
            energies["picture"][index] += _energy(copy)
            for layer in session.layers:
                energies[layer.name][index] += _energy(map_array(prediction, layer.name))
            if index:
                scores.add(index - 1, predictions[0], prediction)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {name: energy[1:] / energy[0] for name, energy in energies.items()}
    return ProbeResult(
        "blur",
        session.model,
        session.card.version,
        session.picture_count,
        "sigma (px)",
        np.array(sigmas, float),
        scores.curves(),
        {"energy": shares},
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

    Each picture is cut into square blocks, which are permuted at random; the remainder at the right and at the bottom
    is unchanged. A cell whose receptive field is inside one block has the same input as before, at another position.
    Per layer:

    * `interior_share`: the share of cells whose receptive field is inside one block of the picture.
    * `interior`: these cells compared with the map shuffled the same way, √(Σ (found - expected)² / Σ expected²). It is
      0: they do not depend on the other blocks.
    * `whole`: the same over all cells. A layer without a stride is compared with its own unshuffled map.

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
        Measures: `interior_share`, `interior` and `whole`. Scores: of the shuffled pictures.

    Raises:
        ConvscopeError: A request failed.
        OSError: A picture cannot be read.
        ValueError: An argument is out of range.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError("blocks must be a non-empty list of integers >= 1")
    session = ProbeSession(client, pictures, model=model, version=version, layers=layers, limit=limit, seed=seed)
    names = [layer.name for layer in session.layers]
    interior, whole = RelativeDistance(names, len(blocks)), RelativeDistance(names, len(blocks))
    cell_counts = {name: np.zeros((2, len(blocks))) for name in names}
    scores = ScoreCurves(len(blocks))
    rng = np.random.default_rng(seed)
    pending: list[list[BlockPermutation]] = []  # Of the pictures whose predictions have not been received.

    def shuffled(picture: PictureArray) -> list[PictureArray]:
        permutations = [BlockPermutation.random(block, picture.shape, rng) for block in blocks]
        pending.append(permutations)
        return [picture, *(permutation.apply(picture) for permutation in permutations)]

    for picture, (before, *predictions) in session.predict_copies(shuffled):
        for step_index, (permutation, prediction) in enumerate(zip(pending.pop(0), predictions, strict=True)):
            scores.add(step_index, before, prediction)
            for layer in session.layers:
                shuffled_map, original_map = map_array(prediction, layer.name), map_array(before, layer.name)
                inside = permutation.cells_within_blocks(layer, shuffled_map, picture)
                cell_counts[layer.name][:, step_index] += inside.sum(), inside.size
                if layer.stride is None:
                    whole.add(layer.name, step_index, shuffled_map, original_map)
                elif all(permutation.block % stride == 0 for stride in layer.stride):
                    expected, defined = permutation.expected_map(layer, original_map)
                    whole.add(layer.name, step_index, shuffled_map[defined], expected[defined])
                    inside &= defined
                    interior.add(layer.name, step_index, shuffled_map[inside], expected[inside])
    return ProbeResult(
        "shuffle",
        session.model,
        session.card.version,
        session.picture_count,
        "block (px)",
        np.array(blocks, float),
        scores.curves(),
        {
            "interior_share": {name: counts[0] / counts[1] for name, counts in cell_counts.items()},
            "interior": interior.curves(),
            "whole": whole.curves(),
        },
    )


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
        """Return a random permutation for a picture of shape (H, W, ...)."""
        rows, columns = shape[0] // block, shape[1] // block
        sources = np.stack(np.divmod(rng.permutation(rows * columns), max(columns, 1)), axis=-1)
        return cls(block, sources.reshape(rows, columns, 2))

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
