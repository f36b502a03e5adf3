"""Layouts: which axes of a network's tensors are rows and columns, found by changing parts of the picture.

The input is random noise, divided into 4×4 patches. In four more runs a different patch is replaced by other noise, no
two of them in the same row or column of patches. Every cell of a tensor then changes in these runs, by different
amounts. If two of its axes are rows and columns, a cell changes most in the run whose patch lies at the cell's place,
and less in those whose patch lies elsewhere in its row or column. An axis of channels shows no such pattern, whatever
its size. Tokens are read as every possible grid, and the grid that fits best is taken. Attention lets a patch change
every cell, but its own cells most. Where the difference is small, four more runs with other patches must agree.
No such run is needed for a tensor whose axes are known from the operations that led there.
Axes: `N` batch, `C` channels, `h, w` map cells, `T` tokens, `P` = 4 places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from archiver.geometry import LayerGeometry, layer_geometry
from archiver.packing import ArchiveError
from archiver.receptive_fields import MAP_AXES
from archiver.trial import noise
from handlers.images.preprocessing import Preprocessing
from handlers.network.engines.torch_engine import trace
from handlers.network.layouts import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    EXTRA_TOKENS,
    PLANE,
    TOKENS,
    VECTOR,
    Layout,
    parse,
)
from handlers.network.modules import watchable, watching
from handlers.network.outputs import OUTPUT, tensors

UNTOLD = "which of its axes are places cannot be told from what it does"

_ROWS = (0, 1, 2, 3)
_COLUMNS = (2, 0, 3, 1), (1, 3, 0, 2)
"""Row and column, of four each, of the patch that each of the four runs replaces; the second columns are for doubtful
cases. The first are in no order, as windows that a network cuts a picture into would be."""

_CONTRAST = 1.2
"""By how much the share must be larger where the change belongs than beside it. With random weights, maps of
torchvision's and timm's transformers have 1.23 or more, most of them hundreds, and wrong readings, of which one axis
may be right, up to 1.19."""

_CLEAR = 1.5  # Below this the second four changes must agree.
_ONE_AXIS = 2.0  # Least contrast of one axis, where the other has one cell.
_AHEAD = 1.1  # Least lead of the best grid over any other: a grid that begins one token later has a share of 0.75.
_MOST_EXTRA = 32  # Tokens besides the patches.


@dataclass(frozen=True)
class Reading:
    """How well changes fit a reading of a tensor.

    Attributes:
        share: Mean share of a cell's changes that comes from the run whose patch lies at its place; 0.25 if places made
            no difference.
        contrast: `share` divided by the share of runs whose patch lies elsewhere in the cell's row, or in its column,
            whichever is less; 0 if both axes have one cell, or nothing changes.
        axes: Number of the two axes that have more than one cell.
    """

    share: float
    contrast: float
    axes: int

    def fits(self, least: float) -> bool:
        """Return whether the contrast is enough."""
        return self.axes > 0 and self.contrast >= (least if self.axes == 2 else _ONE_AXIS)


@dataclass(frozen=True)
class Changes:
    """Effect of four changes on one tensor.

    Attributes:
        columns: The quarter of the picture's width in which each change lies.
        along: For each two neighbouring axes (P, length, length): how much changed at each position, summed over the
            third axis, if any.
    """

    columns: tuple[int, ...]
    along: tuple[Tensor, ...]


class Layouts:
    """Finds the layouts of a network's tensors.

    Args:
        network: The network in evaluation mode, on the CPU; nothing in it works in place.
        preprocessing: Preprocessing of the network's input.
        grid: Grid of tokens, if the user states it, written as a layout: `14x14+1`; empty to find out.

    Attributes:
        shapes: Shape, without the batch, of every node looked up so far.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, grid: str = "") -> None:
        self._network, self._preprocessing = network, preprocessing
        self._grid = parse(f"{TOKENS}:{grid}") if grid else None
        self.check_size(self._grid)
        self._seen: list[dict[str, Changes]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shape = preprocessing.channels, *noise(preprocessing).shape[2:]

    def find(self, nodes: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Find layouts.

        Args:
            nodes: Nodes of the network, or `output:` and the name of a tensor that it returns.

        Returns:
            Node → layout of the nodes that are maps, and node → reason for the others.

        Raises:
            ValueError: A node does not exist, or its output is not one tensor.
        """
        geometry = layer_geometry(self._network, {node: node for node in nodes}, self._shape)
        found: dict[str, str] = {}
        unfit: dict[str, str] = {}
        for node, one in geometry.items():
            self.shapes[node] = one.shape
            try:
                found[node] = self._find(node, one.shape, one)
            except ArchiveError as err:
                unfit[node] = str(err)
        return found, unfit

    def check_size(self, layout: Layout | None) -> None:
        """Check that the network takes a single size, if a layout is of tokens.

        Raises:
            ArchiveError: The network takes any size.
        """
        if layout is not None and layout.grid[0] and self._preprocessing.size is None:
            raise ArchiveError("tokens are another grid for a picture of another size; give --size HxW")

    def _find(self, node: str, shape: tuple[int, ...], geometry: LayerGeometry) -> str:
        if len(shape) == 1:
            return VECTOR
        if len(shape) not in (2, 3):
            raise ArchiveError(f"it has {len(shape) + 1} axes")
        if len(shape) == 3 and geometry.axes in (MAP_AXES, (1, 2)):
            return CHANNELS_FIRST if geometry.axes == MAP_AXES else CHANNELS_LAST
        if len(shape) == 3 and shape[1:] == (1, 1):
            return CHANNELS_FIRST
        if len(shape) == 3 and shape[:2] == (1, 1):
            return CHANNELS_LAST
        if len(shape) == 2:
            return self._of_two_axes(node, shape)
        made = geometry.operation
        by_convolution = made is not None and made.kind.startswith("Conv") and made.output_shape == shape
        return self._of_three_axes(node, by_convolution=by_convolution)

    def _of_three_axes(self, node: str, *, by_convolution: bool) -> str:
        readings = {CHANNELS_FIRST: partial(_read, axis=1), CHANNELS_LAST: partial(_read, axis=0)}
        first, last = (reading(self._changes(node)) for reading in readings.values())
        for word, mine, other in ((CHANNELS_FIRST, first, last), (CHANNELS_LAST, last, first)):
            if mine.contrast >= _AHEAD * other.contrast and self._is_sure(node, mine, readings[word]):
                return word
        if by_convolution and not last.fits(_CONTRAST):  # The changes are unclear, but a convolution made it.
            return CHANNELS_FIRST
        raise ArchiveError(
            f"{UNTOLD}; if they are (h, w, C), say {node}@{CHANNELS_LAST}, if (C, h, w), say {node}@channels_first"
        )

    def _of_two_axes(self, node: str, shape: tuple[int, ...]) -> str:
        changes = self._changes(node)
        if self._grid is not None and self._grid.first + self._grid.patches <= shape[0]:
            reading = _read_tokens(changes, self._grid)
            if reading.axes == 2 and reading.contrast < 1:
                raise ArchiveError(
                    f"--tokens {_spelt(self._grid)} does not fit: changing a part of the picture changes other patches "
                    "than it predicts; leave --tokens out to have the grid found"
                )
            return str(self._grid)
        grids = _grids(shape[0], self._shape[1], self._shape[2])
        ranked = sorted(((_read_tokens(changes, grid), grid) for grid in grids), key=lambda pair: -pair[0].share)
        if ranked and self._is_sure(node, ranked[0][0], partial(_read_tokens, grid=ranked[0][1])):
            (best, grid), *others = ranked
            if others and best.share - 0.25 < _AHEAD * (others[0][0].share - 0.25):
                raise ArchiveError(
                    f"its {shape[0]} tokens may be {_spelt(grid)} or {_spelt(others[0][1])}: say which with --tokens"
                )
            self.check_size(grid)
            return str(grid)
        if self._is_sure(node, _read(changes, axis=0), partial(_read, axis=0)):
            return PLANE
        raise ArchiveError(
            f"{UNTOLD}; if its {shape[0]} tokens are patches, say in which grid: --tokens HxW+N, or "
            f"{node}@tokens:HxW+N, for H×W of them after N other tokens"
        )

    def _is_sure(self, node: str, found: Reading, again: Callable[[Changes], Reading]) -> bool:
        if not found.fits(_CONTRAST):
            return False
        return found.fits(_CLEAR) or again(self._changes(node, 1)).fits(_CONTRAST)

    def _changes(self, node: str, times: int = 0) -> Changes:
        while len(self._seen) <= times:
            self._seen.append(_observe(self._network, self._preprocessing, _COLUMNS[len(self._seen)]))
        if node not in self._seen[times]:
            raise ArchiveError(
                "its first axis is not the batch (windows or heads are folded into it); publish the node after they "
                "are merged again"
            )
        return self._seen[times][node]


def extra_tokens_layout(word: str, shape: tuple[int, ...]) -> str:
    """Return the layout of the tokens besides the patches; empty without such tokens or without patches."""
    layout = parse(word)
    if layout.kind != TOKENS or layout.patches == shape[0]:
        return ""
    return str(Layout(EXTRA_TOKENS, layout.grid, layout.first))


def _spelt(grid: Layout) -> str:
    """Return a grid as `--tokens` takes it."""
    return str(grid).removeprefix(f"{TOKENS}:")


def _read(changes: Changes, axis: int) -> Reading:
    """Read an axis as rows, and the next one as columns."""
    return _fit(changes.along[axis], changes.columns)


def _read_tokens(changes: Changes, grid: Layout) -> Reading:
    """Read tokens as a grid of patches."""
    tokens = changes.along[0].sum(dim=2)  # (P, T)
    patches = tokens[:, grid.first : grid.first + grid.patches].reshape(len(tokens), *grid.grid)
    return _fit(patches, changes.columns)


def _fit(changes: Tensor, columns: Sequence[int]) -> Reading:
    """Return how well changes (P, h, w) match the places of the patches."""
    _, high, wide = changes.shape
    total = changes.sum(dim=0)
    shares = changes / total.clamp_min(torch.finfo(changes.dtype).tiny)
    here = in_row = in_column = 0.0
    for share, row, column in zip(shares, _ROWS, columns, strict=True):
        rows, along = _quarter(row, high), _quarter(column, wide)
        here += _mean(share, total > 0, rows, along) / len(shares)
        in_row += _mean(share, total > 0, rows, ~along) / len(shares)
        in_column += _mean(share, total > 0, ~rows, along) / len(shares)
    beside = max([in_row] * (wide > 1) + [in_column] * (high > 1), default=0.0)
    axes = (high > 1) + (wide > 1)
    return Reading(here, here / max(beside, 1e-9) if axes else 0.0, axes)


def _quarter(number: int, length: int) -> Tensor:
    """Return which of `length` positions a quarter touches, (length,)."""
    positions = torch.arange(length)
    return (positions >= number * length // 4) & (positions < -(-(number + 1) * length // 4))


def _mean(share: Tensor, moved: Tensor, rows: Tensor, columns: Tensor) -> float:
    taken = share[rows[:, None] & columns & moved]
    return float(taken.mean()) if len(taken) else 0.0


def _grids(tokens: int, height: int, width: int) -> list[Layout]:
    """Return the grids of square patches that a picture can be cut into, with few other tokens."""
    found: dict[Layout, None] = {}
    for side in range(1, min(height, width) + 1):
        for high, wide in ((height // side, width // side), (-(-height // side), -(-width // side))):
            left = tokens - high * wide
            if high * wide > 1 and 0 <= left <= min(_MOST_EXTRA, high * wide):
                found |= {Layout(TOKENS, (high, wide), first): None for first in {left, 0}}
    return list(found)


def _observe(network: nn.Module, preprocessing: Preprocessing, columns: tuple[int, ...]) -> dict[str, Changes]:
    """Run the network once on a picture and its four changes, and measure their effect on its tensors.

    Tensors without three or four axes, or whose first axis is not the batch, are left out.
    """
    picture, other = torch.split(noise(preprocessing, 2), 1)
    height, width = picture.shape[2:]
    images = picture.repeat(1 + len(_ROWS), 1, 1, 1)
    for image, row, column in zip(images[1:], _ROWS, columns, strict=True):
        place = _quarter(row, height)[:, None] & _quarter(column, width)
        image[:, place] = other[0][:, place]
    seen: dict[str, Changes] = {}

    def look(name: str, value: object) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():  # A mask has no changes to measure.
            return
        if value.dim() in (3, 4) and len(value) == len(images):
            changes = (value[1:] - value[:1]).double().square().nan_to_num(0, 0, 0)
            seen[name] = Changes(columns, (changes,) if changes.dim() == 3 else (changes.sum(3), changes.sum(1)))

    with torch.no_grad():
        try:
            graph, names = trace(network)
        except Exception:  # Tracing runs the network's own Python, which may raise anything.
            with watching(watchable(network), lambda name, inputs, output: look(name, output)):
                returned = network(images)
        else:
            returned = _Looking(graph, names, look).run(images)
    for name, value in tensors(returned):
        look(f"{OUTPUT}{name}", value)
    return seen


class _Looking(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, names: Mapping[str, str], look: Any) -> None:
        super().__init__(graph)
        self._names, self._look = names, look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names and n.op != "placeholder":
            self._look(self._names[n.name], value)
        return value
