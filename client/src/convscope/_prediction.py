"""What the service saw in one picture: scores, maps, or why there are none.

Drawing, showing and saving are done by `figures`, `_notebook` and `_export`, imported when asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from convscope._exceptions import ConvscopeError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from convscope._timing import Timing


class ClassScore(NamedTuple):  # There may be a thousand in a reply, and a frozen dataclass is twice as slow to make.
    """One class and how strongly the network believes in it.

    Attributes:
        index: The class's place in the model card's `classes`.
        label: Its name.
        probability: Softmax over all classes, 0..1.
        logit: The network's own number.
    """

    index: int  # type: ignore[assignment]  # It hides a tuple's own.
    label: str
    probability: float
    logit: float


class Prediction:
    """One picture's answer.

    Where the picture failed alone among others, reading `top`, `maps` or `channels` raises its error; `error` tells
    without raising. Two are equal when the same was seen: whose request it was, and how long it took, do not count.

    Attributes:
        model: Name of the model that answered.
        version: Its version.
        engine: What computed it, such as `torch-2.15.0`.
        device: Where, `cpu` or `cuda:0`.
        request_id: The id of the request, as the service's log has it; that of all its pictures.
        timing: Where the request's time went, if that was asked for and the service tells; else None.
        error: Why this picture has no result; None if it has one.
    """

    def __init__(
        self,
        *,
        model: str,
        version: str,
        engine: str,
        device: str,
        top: Sequence[ClassScore] = (),
        maps: Mapping[str, NDArray[np.float32]] | None = None,
        channels: Mapping[str, tuple[int, ...]] | None = None,
        request_id: str = "",
        timing: Timing | None = None,
        error: ConvscopeError | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.engine = engine
        self.device = device
        self.request_id = request_id
        self.timing = timing
        self.error = error
        self._top = list(top)
        self._maps = dict(maps or {})
        self._channels = dict(channels or {})

    @property
    def top(self) -> list[ClassScore]:
        """The classes, most probable first; empty for a model without classes.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._check()
        return list(self._top)

    @property
    def maps(self) -> Mapping[str, NDArray[np.float32]]:
        """The maps by layer name: (C, h, w), or (C,) with `pool=1`; float32, read-only.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._check()
        return MappingProxyType(self._maps)

    @property
    def channels(self) -> Mapping[str, tuple[int, ...]]:
        """Which channels of the layer the first axis of each map holds, by layer name.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._check()
        return MappingProxyType(self._channels)

    def figure(self, layer: str, *, columns: int = 8, tile_inches: float = 1.2) -> Figure:
        """Draw a layer's map as rows of grey tiles, one a channel, each scaled to its own least and greatest value.

        Args:
            layer: Name of a layer asked for in `predict`.
            columns: Tiles in a row.
            tile_inches: Width of a tile.

        Returns:
            A matplotlib figure, not registered with pyplot; above each tile stands its channel's number.

        Raises:
            ConvscopeError: The picture's own error.
            ImportError: matplotlib is not installed; says how to get it.
            KeyError: The layer was not asked for; says which were.
            ValueError: The map was pooled to one number a channel.
        """
        maps = self.maps
        if layer not in maps:
            raise KeyError(f"no map of layer {layer!r} here; there are: {', '.join(maps) or 'none'}")
        try:
            from convscope.figures import draw_map
        except ImportError as error:
            raise ImportError(
                "figure() draws with matplotlib, which cannot be imported: pip install 'convscope[figure]'"
            ) from error
        return draw_map(
            maps[layer],
            self._channels[layer],
            title=f"{self.model} {self.version}: {layer}",
            columns=columns,
            tile_inches=tile_inches,
        )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write scores and maps into a new directory: manifest.json, maps.npz, and a PNG of grey tiles a layer.

        Args:
            directory: Where; it must not exist yet. What was written is removed again if writing fails.

        Returns:
            The directory.

        Raises:
            ConvscopeError: The picture's own error.
            FileExistsError: The directory exists.
            OSError: It cannot be written.
        """
        self._check()
        from convscope._export import save_prediction

        return save_prediction(self, directory)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)

    def _repr_html_(self) -> str:
        """Show scores and maps in a notebook; needs no matplotlib."""
        from convscope._notebook import prediction_html

        return prediction_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prediction):
            return NotImplemented
        return (
            (self.model, self.version, self.engine, self.device)
            == (other.model, other.version, other.engine, other.device)
            and _identity(self.error) == _identity(other.error)
            and self._top == other._top
            and self._channels == other._channels
            and self._maps.keys() == other._maps.keys()
            and all(np.array_equal(cells, other._maps[name], equal_nan=True) for name, cells in self._maps.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Prediction(model={self.model!r}, error={self.error!r})"
        best = f"{self._top[0].label} {self._top[0].probability:.3f}" if self._top else "none"
        shapes = {name: cells.shape for name, cells in self._maps.items()}
        return f"Prediction(model={self.model!r}, top={best!r}, maps={shapes})"


def _identity(error: ConvscopeError | None) -> tuple[type, str, str] | None:
    """Return what makes two errors the same."""
    return None if error is None else (type(error), error.code, error.message)
