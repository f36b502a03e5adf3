"""Layouts: which axis of a tensor is which. Every layer's tensor is converted to maps (N, C, h, w).

    ""                     (N, C, h, w), as convolutions return them
    channels_last          (N, h, w, C)
    plane                  (N, h, w), one number per cell: a map of one channel
    vector                 (N, C), no spatial axes: maps of one cell
    tokens:14x14+1         (N, T, C): 14 × 14 patches, row by row, after one other token
    extra_tokens:14x14+1   the tokens of such a tensor that are not patches, in order: (N, C, n, 1)

An archive stores a layout for each layer; the default is the first. Axes: `N` batch, `C` channels, `h, w` map cells,
`T` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS_FIRST = ""
CHANNELS_LAST = "channels_last"
PLANE = "plane"
VECTOR = "vector"
TOKENS = "tokens"
EXTRA_TOKENS = "extra_tokens"

_AXES = {CHANNELS_FIRST: 4, CHANNELS_LAST: 4, PLANE: 3, VECTOR: 2, TOKENS: 3, EXTRA_TOKENS: 3}
_WORD = re.compile(r"([a-z_]*)(?::([1-9]\d{0,4})x([1-9]\d{0,4})\+(\d{1,4}))?")


@dataclass(frozen=True)
class Layout:
    """A parsed layout.

    Attributes:
        kind: The layout's name without its numbers.
        grid: Rows and columns of patches, for layouts of tokens.
        first: Number of other tokens before the patches, for layouts of tokens.
    """

    kind: str
    grid: tuple[int, int] = (0, 0)
    first: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.grid[0]}x{self.grid[1]}+{self.first}" if self.grid[0] else self.kind

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]


@lru_cache(maxsize=256)
def parse(word: str) -> Layout:
    """Parse a layout.

    Raises:
        ValueError: The layout does not exist.
    """
    found = _WORD.fullmatch(word)
    kind = found[1] if found else word
    needs_grid = kind in (TOKENS, EXTRA_TOKENS)
    if not found or kind not in _AXES or needs_grid != (found[2] is not None):
        raise ValueError(
            f"{word!r} is no layout; there are channels_first, {CHANNELS_LAST}, {PLANE}, {VECTOR}, and "
            f"{TOKENS}:HxW+N for H×W patches after N other tokens"
        )
    return Layout(kind, (int(found[2]), int(found[3])), int(found[4])) if needs_grid else Layout(kind)


def to_maps(values: Tensor, word: str) -> Tensor:
    """Convert a layer's tensor to maps.

    Args:
        values: The tensor, in this layout.
        word: The layout.

    Returns:
        (N, C, h, w), a view if possible. Values that are already in that order are returned unchanged, whatever their
        axes.

    Raises:
        ValueError: The axes or the number of tokens do not fit the layout.
    """
    if word == CHANNELS_FIRST:
        return values
    import torch

    layout = parse(word)
    check(values.shape[1:], layout)
    if layout.kind == CHANNELS_LAST:
        return values.permute(0, 3, 1, 2)
    if layout.kind == PLANE:
        return values.unsqueeze(1)
    if layout.kind == VECTOR:
        return values[:, :, None, None]
    end = layout.first + layout.patches
    if layout.kind == TOKENS:
        return torch.unflatten(values[:, layout.first : end].transpose(1, 2), 2, layout.grid)
    others = torch.cat([values[:, : layout.first], values[:, end:]], dim=1)
    return others.transpose(1, 2).unsqueeze(3)


def change(values: Tensor, word: str, edit: Callable[[Tensor], None]) -> None:
    """Edit the maps of a layer's tensor in place.

    Args:
        values: The tensor, in this layout; changed in place. Values outside the maps are unchanged.
        word: The layout.
        edit: Changes maps (N, C, h, w) in place.

    Raises:
        ValueError: As for `to_maps`.
    """
    maps = to_maps(values, word)
    edit(maps)
    layout = parse(word)
    if layout.kind == EXTRA_TOKENS:  # The only maps that are not a view of the values.
        others = maps.squeeze(3).transpose(1, 2)
        values[:, : layout.first] = others[:, : layout.first]
        values[:, layout.first + layout.patches :] = others[:, layout.first :]


def map_shape(shape: Sequence[int], word: str) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of a layer's maps.

    Args:
        shape: The tensor's shape, without the batch.
        word: The layout.

    Raises:
        ValueError: The shape does not fit the layout.
    """
    layout = parse(word)
    check(shape, layout)
    if layout.kind == CHANNELS_FIRST:
        return shape[0], shape[1], shape[2]
    if layout.kind == CHANNELS_LAST:
        return shape[2], shape[0], shape[1]
    if layout.kind == PLANE:
        return 1, shape[0], shape[1]
    if layout.kind == VECTOR:
        return shape[0], 1, 1
    if layout.kind == TOKENS:
        return shape[1], *layout.grid
    return shape[1], shape[0] - layout.patches, 1


def check(shape: Sequence[int], layout: Layout) -> None:
    """Check that a shape fits a layout.

    Args:
        shape: The tensor's shape, without the batch.
        layout: The layout.

    Raises:
        ValueError: The shape does not fit.
    """
    if len(shape) + 1 != _AXES[layout.kind]:
        raise ValueError(f"{str(layout) or 'channels_first'} takes {_AXES[layout.kind]} axes, not (N, {_spelt(shape)})")
    if layout.grid[0] and layout.first + layout.patches + (layout.kind == EXTRA_TOKENS and not layout.first) > shape[0]:
        raise ValueError(f"{layout} takes more than the {shape[0]} tokens there are")


def _spelt(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
