"""Layouts found by proof: which axes of a network's tensors are places, seen from what a change of the picture does.

A picture of noise is changed in one quarter of its height and one of its width, four times, never twice in the same
row or column of quarters. Along an axis of rows the change then wanders as the quarters do, along an axis of channels it
does not, whatever the sizes are. Of tokens that are patches, in a grid, the same shows which they are. Attention spreads a
change over everything, but thinly: what counts of a place is the share of its changes that is this one's.

Nothing is asked of a tensor whose axes are known from the operations that led there. Axes: `N` batch, `C` channels, `h,
w` map cells, `T` tokens, `P` = 4 places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from archiver.packing import ArchiveError
from handlers.images.preprocessing import Preprocessing, noise
from handlers.network.geometry import LayerGeometry, layer_geometry, takes_hooks, trace
from handlers.network.layouts import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    EXTRA_TOKENS,
    PLANE,
    TOKENS,
    VECTOR,
    Layout,
    check,
    read,
)
from handlers.network.outputs import OUTPUT, tensors
from handlers.network.receptive_fields import MAP_AXES

UNTOLD = "which of its axes are places cannot be told from what it does"

_ROWS, _COLUMNS = (0, 1, 2, 3), (1, 3, 0, 2)  # The quarter that is changed, of each place.
_ENOUGH = 0.5  # The share of changes that must lie where they belong. Axes of channels give 0.06, one right axis 0.26.
_AHEAD = 0.05  # What a grid that begins a token later must have less.
_MOST_EXTRA = 32  # Tokens beside the patches.


@dataclass(frozen=True)
class Seen:
    """What the four changes did to one tensor.

    Attributes:
        shape: Without the batch.
        changes: For each two neighbouring axes, by the first of them, (P, length, length): how much changed at each
            position, summed over the third axis where there is one.
    """

    shape: tuple[int, ...]
    changes: tuple[Tensor, ...]


class Layouts:
    """Finds the layouts of a network's tensors.

    Args:
        network: In evaluation mode, on the CPU, nothing in place.
        preprocessing: What it takes.
        grid: Of tokens, where the user gives it, as a layout says it: `14x14+1`; empty to find out.

    Attributes:
        shapes: Of every node that was asked about, without the batch.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, grid: str = "") -> None:
        self._network, self._preprocessing = network, preprocessing
        self._grid = read(f"{TOKENS}:{grid}") if grid else None
        self._seen: dict[str, Seen] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shape = preprocessing.channels, *noise(preprocessing).shape[2:]

    def find(self, nodes: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Find layouts.

        Args:
            nodes: Of the network, or `output:` and the name of a tensor that it returns.

        Returns:
            Node → layout of those that are maps, and node → why not of the others.

        Raises:
            ValueError: There is no such node, or its output is not one tensor.
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

    def _find(self, node: str, shape: tuple[int, ...], geometry: LayerGeometry) -> str:
        if len(shape) == 1:
            return VECTOR
        if len(shape) not in (2, 3):
            raise ArchiveError(f"it has {len(shape) + 1} axes")
        if len(shape) == 3 and geometry.axes in (MAP_AXES, (1, 2)):
            return CHANNELS_FIRST if geometry.axes == MAP_AXES else CHANNELS_LAST
        if len(shape) == 3 and shape[1:] == (1, 1) and shape[0] > 1:
            return CHANNELS_FIRST
        if len(shape) == 3 and shape[:2] == (1, 1) and shape[2] > 1:
            return CHANNELS_LAST
        if self._seen is None:
            self._seen = _observe(self._network, self._preprocessing)
        seen = self._seen.get(node)
        if len(shape) == 2:
            return self._of_two_axes(shape, seen)
        made = geometry.operation
        by_convolution = made is not None and made.kind.startswith("Conv") and made.output_shape == shape
        return _of_three_axes(shape, seen, by_convolution=by_convolution)

    def _of_two_axes(self, shape: tuple[int, ...], seen: Seen | None) -> str:
        if self._grid is not None and self._grid.patches + self._grid.first <= shape[0]:
            explained = _explained(seen, self._grid)
            if explained is not None and explained < _ENOUGH / 2:
                raise ArchiveError(f"changes of the picture do not show in patches that lie as {self._grid} says")
            return str(self._grid)
        if seen is None:
            raise ArchiveError("its first axis is not the batch's")
        candidates = _grids(shape[0], self._shape[1], self._shape[2])
        shares = sorted(((_explained(seen, grid) or 0.0, grid) for grid in candidates), key=lambda pair: -pair[0])
        plane = _share(seen, 0)
        if shares and shares[0][0] >= _ENOUGH and (plane is None or plane < _ENOUGH):
            if len(shares) > 1 and shares[0][0] - shares[1][0] < _AHEAD:
                raise ArchiveError(
                    f"its {shape[0]} tokens may be patches as {shares[0][1]} or as {shares[1][1]} says: "
                    f"{_how_to_say(shares[0][1])}"
                )
            if self._preprocessing.size is None:
                raise ArchiveError("its tokens are another grid for a picture of another size; give --size HxW")
            return str(shares[0][1])
        if plane is not None and plane >= _ENOUGH:
            return PLANE
        raise ArchiveError(
            f"{UNTOLD}; if they are patches, say in which grid: --tokens HxW+N for H×W of them after N other tokens"
        )


def extra(word: str, shape: tuple[int, ...]) -> str:
    """Return the layout of the tokens beside the patches; empty where there are none, or no patches."""
    layout = read(word)
    if layout.kind != TOKENS or layout.patches == shape[0]:
        return ""
    return str(Layout(EXTRA_TOKENS, layout.grid, layout.first))


def check_said(node: str, shape: tuple[int, ...], word: str) -> None:
    """Check that a tensor can have the layout that the user says.

    Raises:
        ArchiveError: It cannot.
    """
    try:
        check(shape, read(word))
    except ValueError as err:
        raise ArchiveError(f"{node!r} cannot be read so: {err}") from err


def _of_three_axes(shape: tuple[int, ...], seen: Seen | None, *, by_convolution: bool) -> str:
    if seen is None:
        raise ArchiveError("its first axis is not the batch's")
    first, last = _share(seen, 1), _share(seen, 0)
    for word, mine, other in ((CHANNELS_FIRST, first, last), (CHANNELS_LAST, last, first)):
        if mine is not None and mine >= _ENOUGH and (other or 0.0) <= mine / 2:
            return word
    if by_convolution and (last is None or last < _ENOUGH):  # Its changes tell nothing, but a convolution made it.
        return CHANNELS_FIRST
    raise ArchiveError(
        f"{UNTOLD}; if they are (h, w, C), say NODE@{CHANNELS_LAST}, if (C, h, w), say NODE@channels_first"
    )


def _share(seen: Seen, rows: int) -> float | None:
    """Return the share of the changes that lies where they belong, if this axis is rows and the next one columns.

    Axes of one cell say nothing; None if both are.
    """
    high, wide = seen.shape[rows : rows + 2]
    return None if high == wide == 1 else _inside(seen.changes[rows], _areas(high, wide))


def _areas(high: int, wide: int) -> Tensor:
    """Return which cells of a map each change belongs to, (P, high, wide), 1 or 0."""
    areas = torch.zeros(len(_ROWS), high, wide)
    for area, row, column in zip(areas, _ROWS, _COLUMNS, strict=True):
        area[_quarter(row, high), _quarter(column, wide)] = 1
    return areas


def _quarter(number: int, length: int) -> slice:
    return slice(number * length // 4, -(-(number + 1) * length // 4))


def _inside(changes: Tensor, areas: Tensor) -> float:
    """Return the share of changes that lies in their areas, the mean of all places; 0 if one changes nothing.

    What all changes alike move counts for little: of each cell the share of its changes that is this one's, cubed.
    """
    changes = changes.flatten(1)
    weights = changes * (changes / changes.sum(dim=0).clamp_min(torch.finfo(changes.dtype).tiny)) ** 3
    totals = weights.sum(dim=1)
    if not bool((totals > 0).all()):
        return 0.0
    return float(((weights * areas.flatten(1)).sum(dim=1) / totals).mean())


def _explained(seen: Seen | None, grid: Layout) -> float | None:
    """Return the share of the changes that lies in the patches they belong to, if the tokens are such a grid."""
    if seen is None:
        return None
    changes = seen.changes[0].sum(dim=2)  # (P, T)
    areas = torch.zeros_like(changes)
    areas[:, grid.first : grid.first + grid.patches] = _areas(*grid.grid).flatten(1)
    return _inside(changes, areas)


def _grids(tokens: int, height: int, width: int) -> list[Layout]:
    """Return the grids of square patches that a picture can be cut into, with few tokens beside them."""
    found: dict[Layout, None] = {}
    for side in range(1, min(height, width) + 1):
        for high, wide in ((height // side, width // side), (-(-height // side), -(-width // side))):
            left = tokens - high * wide
            if high * wide > 1 and 0 <= left <= min(_MOST_EXTRA, high * wide):
                found |= {Layout(TOKENS, (high, wide), first): None for first in {left, 0}}
    return list(found)


def _how_to_say(grid: Layout) -> str:
    return f"say --tokens {str(grid).removeprefix(f'{TOKENS}:')}"


def _observe(network: nn.Module, preprocessing: Preprocessing) -> dict[str, Seen]:
    """Run the network once on a picture and its four changes, and see what they do to every tensor of two axes or more.

    Tensors whose first axis is not the batch's are left out.
    """
    picture, other = torch.split(noise(preprocessing, 2), 1)
    _, _, height, width = picture.shape
    images = picture.repeat(1 + len(_ROWS), 1, 1, 1)
    for image, row, column in zip(images[1:], _ROWS, _COLUMNS, strict=True):
        place = slice(None), _quarter(row, height), _quarter(column, width)
        image[place] = other[0][place]
    seen: dict[str, Seen] = {}

    def look(name: str, value: object) -> None:
        if isinstance(value, Tensor) and value.dim() in (3, 4) and len(value) == len(images):
            changes = (value[1:] - value[:1]).double().square().nan_to_num(0, 0, 0)
            parts = (changes,) if changes.dim() == 3 else (changes.sum(3), changes.sum(1))
            seen[name] = Seen(tuple(value.shape[1:]), parts)

    with torch.no_grad():
        try:
            graph, names = trace(network)
        except Exception:  # Tracing runs the network's own Python, which may raise anything.
            returned = _with_hooks(network, images, look)
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


def _with_hooks(network: nn.Module, images: Tensor, look: Any) -> object:
    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, output)

    modules: Iterable[tuple[str, nn.Module]] = [
        (name, module) for name, module in network.named_modules() if name and takes_hooks(module)
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        return network(images)
    finally:
        for handle in handles:
            handle.remove()
