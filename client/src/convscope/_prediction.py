"""The result of one picture: scores and maps, or its error; and the timing of a request.

`figures` and `_export`, which draw and save, are imported when they are used.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convscope._exceptions import ConvscopeError
from convscope.pixels import encode_png, tile_grid

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray


class ClassScore(NamedTuple):  # There may be a thousand in a reply, and a frozen dataclass is twice as slow to make.
    """The score of one class.

    Attributes:
        index: The class's index in the model card's `classes`.
        label: The class's name.
        probability: Softmax over all classes, 0..1.
        logit: The network's output.
    """

    index: int  # type: ignore[assignment]  # It hides a tuple's own.
    label: str
    probability: float
    logit: float


@dataclass(frozen=True, slots=True)
class Timing:
    """The timing of a request, in seconds, for all its pictures together.

    The stages need not add up to `handler_s`: the rest was spent on other requests of the batch.

    Attributes:
        read_s: Reading the body and its options.
        decode_s: From picture files to pixels of the network's size.
        preprocess_s: Normalising and stacking.
        forward_s: The forward passes that this request took part in.
        encode_s: Selecting, pooling and converting maps, and writing the reply.
        handler_s: From the worker receiving the batch to the reply being ready.
        batch_requests: Requests in that batch.
        total_s: Measured by the client, from sending the request to having read the reply; of the last attempt only.
    """

    read_s: float
    decode_s: float
    preprocess_s: float
    forward_s: float
    encode_s: float
    handler_s: float
    batch_requests: int
    total_s: float

    @property
    def outside_s(self) -> float:
        """Seconds outside the worker: the network, the gateway, waiting for a worker, and this client."""
        return self.total_s - self.handler_s


class Prediction:
    """The result of one picture.

    If the picture failed, reading `top`, `maps` or `channels` raises its error, and `error` holds it. Predictions are
    equal if their results are; `request_id` and `timing` do not count.

    Attributes:
        model: The model's name.
        version: The model's version.
        engine: What ran the network, such as `torch-2.15.0`.
        device: Where it ran: `cpu` or `cuda:0`.
        request_id: The id of the request in the service's log; all pictures of a request share it.
        timing: The request's timing, if it was asked for and the service reports it; else None.
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
        """The channel numbers of each map's first axis, by layer name.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._check()
        return MappingProxyType(self._channels)

    def figure(self, layer: str, *, columns: int = 8, tile_inches: float = 1.2) -> Figure:
        """Draw a layer's map as rows of grey tiles, one for each channel, each scaled to its own range.

        Args:
            layer: Name of a layer asked for in `predict`.
            columns: Tiles in a row.
            tile_inches: Width of a tile.

        Returns:
            A matplotlib figure, not registered with pyplot; above each tile stands its channel's number.

        Raises:
            ConvscopeError: The picture's own error.
            ImportError: matplotlib is not installed; says how to get it.
            KeyError: The layer was not asked for; names those that were.
            ValueError: The map was pooled to one number per channel.
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
        """Write scores and maps into a new directory: manifest.json, maps.npz, and a PNG of grey tiles for each layer.

        Args:
            directory: A path that does not exist yet. It is removed again if writing fails.

        Returns:
            The directory.

        Raises:
            ConvscopeError: The picture's own error.
            FileExistsError: The directory exists.
            OSError: It cannot be written.
        """
        self._check()
        from convscope._export import file_stem, write_directory

        layers: dict[str, Any] = {}
        pictures: dict[str, NDArray[np.uint8]] = {}
        for name, cells in self._maps.items():
            grid = f"{file_stem(name, len(layers))}.png" if cells.ndim == 3 and cells.size else None
            if grid is not None:
                pictures[grid] = tile_grid(cells)
            layers[name] = {
                "shape": list(cells.shape),
                "dtype": cells.dtype.name,
                "channels": list(self._channels[name]),
                "grid": grid,
            }
        manifest = {**manifest_fields(self), "maps": "maps.npz" if layers else None, "layers": layers}
        return write_directory(directory, manifest, {"maps.npz": self._maps} if layers else {}, pictures)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)

    def _repr_html_(self) -> str:
        """Show scores and maps in a notebook; every text from the service is escaped. Needs no matplotlib."""
        heading = f"<b>{escape(self.model)}</b> {escape(self.version)} on {escape(self.device)}"
        if self.error is not None:
            return f"<div>{heading}<br>{escape(self.error.code)}: {escape(str(self.error))}</div>"
        parts = [heading]
        if self._top:
            rows = "".join(
                f"<tr><td>{score.index}</td><td>{escape(score.label)}</td>"
                f"<td>{score.probability:.4f}</td><td>{score.logit:.3f}</td></tr>"
                for score in self._top
            )
            parts.append(
                "<table><tr><th>index</th><th>label</th><th>probability</th><th>logit</th></tr>" + rows + "</table>"
            )
        for name, cells in self._maps.items():
            parts.append(f"<p>{escape(name)} {cells.shape}</p>")
            if cells.ndim == 3 and cells.size:
                png = base64.b64encode(encode_png(tile_grid(cells))).decode()
                parts.append(f'<img alt="{escape(name)}" src="data:image/png;base64,{png}">')
        return "<div>" + "\n".join(parts) + "</div>"

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


def manifest_fields(prediction: Prediction) -> dict[str, Any]:
    """Return the fields that every saved manifest.json begins with: the model, where it ran, and the scores."""
    return {
        "model": prediction.model,
        "version": prediction.version,
        "engine": prediction.engine,
        "device": prediction.device,
        "request_id": prediction.request_id,
        "scores": [score._asdict() for score in prediction.top],
    }


def _identity(error: ConvscopeError | None) -> tuple[type, str, str] | None:
    """Return what two equal errors have in common."""
    return None if error is None else (type(error), error.code, error.message)
