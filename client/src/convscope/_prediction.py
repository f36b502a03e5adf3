"""The result of one picture: scores and maps, or its error; and the timing of a request.

`figures` and `_export` are imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from convscope._exceptions import ConvscopeError
from convscope.commands import STAGES, format_table
from convscope.pixels import html_image, tile_grid

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray


class ClassScore(NamedTuple):  # A NamedTuple: users unpack it.
    """The score of one class, or a regression output.

    Attributes:
        index: Index of the class in the model card's `classes`.
        label: Name of the class, or of the number.
        probability: 0..1: softmax over all classes, or with `scores` "sigmoid" the class's own; NaN for a regression
            output.
        logit: The network's output before that; NaN likewise.
        value: The number, with `scores` "value"; None for the score of a class.
    """

    index: int  # type: ignore[assignment]  # Shadows `tuple.index`.
    label: str
    probability: float
    logit: float
    value: float | None = None

    def as_values(self) -> dict[str, Any]:
        """Return what there is: probability and logit of a class, or the value of a number."""
        left_out = ("probability", "logit") if self.value is not None else ("value",)
        return {name: value for name, value in self._asdict().items() if name not in left_out}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What edits changed: each number after them minus the number before them.

    Attributes:
        top: Differences of the classes in `Prediction.top`, then of those that would be there without the edits.
        maps: Differences by layer name, of the channels in `Prediction.channels`; shapes as in `Prediction.maps`,
            float32, read-only.
    """

    top: list[ClassScore]
    maps: Mapping[str, NDArray[np.float32]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Change):
            return NotImplemented
        return self.top == other.top and _maps_equal(self.maps, other.maps)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Timing:
    """The timing of a request, in seconds, for all its pictures together.

    The stages need not add up to `handler_s`: the rest was spent on other requests of the batch.

    Attributes:
        read_s: Parsing the request.
        decode_s: Decoding and resizing.
        preprocess_s: Normalising and batching.
        forward_s: Forward passes that this request was part of.
        encode_s: Selecting, pooling and converting the maps, and encoding the reply.
        handler_s: The worker's handler, from receiving the batch to the complete reply.
        batch_requests: Number of requests in that batch.
        total_s: Seconds from sending the request to parsing the reply, last attempt only; measured by the client.
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
        """Seconds outside the worker's handler: network, gateway, queue and client."""
        return self.total_s - self.handler_s

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the stages in milliseconds."""
        return f"<pre>{escape(format_timing(self))}</pre>"


class _ByLayer(dict[str, Any]):
    """A dict by layer whose KeyError lists the layers."""

    def __missing__(self, layer: str) -> NoReturn:
        raise KeyError(f"layer {layer!r} was not requested; maps: {', '.join(self) or 'none'}")


class Prediction:
    """The result of one picture.

    If the picture failed, `error` is set, and reading `top`, `maps`, `channels` or `change` raises it. Equality ignores
    `request_id`, `timing` and `notes`.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        engine: What ran the network, such as `torch-2.15.0`.
        device: `cpu` or `cuda:0`.
        scores: What `top` holds: "softmax", mutually exclusive classes; "sigmoid", multi-label; "value", regression
            outputs; "none". Empty if the service is too old to report it.
        request_id: Id of the request in the service's log; all pictures of a request share it.
        timing: Timing of the request; None if it was not requested, or if the service is too old to report it.
        notes: How the picture was converted where that changes what is seen, such as `grey to RGB` or `cropped`: by
            the service, and by this client if it had to; proto/README.md lists all notes. Empty if it was not, or if
            the service is too old to report it.
        error: The picture's error; None if it has a result.
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
        scores: str = "",
        request_id: str = "",
        timing: Timing | None = None,
        change: Change | None = None,
        notes: Sequence[str] = (),
        error: ConvscopeError | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.engine = engine
        self.device = device
        self.scores = scores
        self.request_id = request_id
        self.timing = timing
        self.notes = tuple(notes)
        self.error = error
        self._top = list(top)
        self._maps = _ByLayer(maps or {})
        self._channels = _ByLayer(channels or {})
        self._change = change

    @property
    def top(self) -> list[ClassScore]:
        """The classes, most probable first, or the numbers in the network's order; empty for a model without either.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._raise_error()
        return list(self._top)

    @property
    def maps(self) -> Mapping[str, NDArray[np.float32]]:
        """The maps by layer name: (C, h, w), or (C,) with `pool=1`; float32, read-only. A KeyError lists the layers.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._raise_error()
        return MappingProxyType(self._maps)

    @property
    def channels(self) -> Mapping[str, tuple[int, ...]]:
        """The channel indexes of each map's first axis, by layer name.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._raise_error()
        return MappingProxyType(self._channels)

    @property
    def change(self) -> Change | None:
        """What the edits of the request changed; None unless `compare` was requested.

        Raises:
            ConvscopeError: The picture's own error.
        """
        self._raise_error()
        return self._change

    def figure(self, layer: str, *, columns: int = 8, tile_inches: float = 1.2) -> Figure:
        """Draw a layer's map as rows of grey tiles, one per channel, each scaled to its own range.

        Args:
            layer: Name of a requested layer.
            columns: Tiles per row.
            tile_inches: Width of a tile.

        Returns:
            A matplotlib figure, not registered with pyplot; each tile is titled with its channel index.

        Raises:
            ConvscopeError: The picture's own error.
            ImportError: matplotlib is not installed.
            KeyError: The layer was not requested.
            ValueError: The map was pooled to one number per channel.
        """
        feature_map = self.maps[layer]
        from convscope.figures import draw_map

        return draw_map(
            feature_map,
            self._channels[layer],
            title=f"{self.model} {self.version}: {layer}",
            columns=columns,
            tile_inches=tile_inches,
        )

    def save(self, directory: str | os.PathLike[str], *, source: str | None = None, overwrite: bool = False) -> Path:
        """Write scores and maps into a new directory: manifest.json, maps.npz, one PNG of grey tiles per layer.

        With `change`, its scores are in manifest.json and its maps in change.npz.

        Args:
            directory: A path that does not exist yet, unless `overwrite`. It appears when it is complete.
            source: What the picture was, such as its path, for the manifest.
            overwrite: Whether to replace an existing directory with a manifest.

        Returns:
            The directory.

        Raises:
            ConvscopeError: The picture's own error.
            FileExistsError: The directory exists, and has no manifest or is not to be replaced.
            OSError: It cannot be written.
        """
        self._raise_error()
        from convscope._export import file_stem, write_directory

        layers: dict[str, Any] = {}
        pictures: dict[str, NDArray[np.uint8]] = {}
        for name, feature_map in self._maps.items():
            grid = f"{file_stem(name, len(layers))}.png" if feature_map.ndim == 3 and feature_map.size else None
            if grid is not None:
                pictures[grid] = tile_grid(feature_map)
            layers[name] = {
                "shape": list(feature_map.shape),
                "dtype": feature_map.dtype.name,
                "channels": list(self._channels[name]),
                "grid": grid,
            }
        manifest = {**manifest_fields(self, source), "maps": "maps.npz" if layers else None, "layers": layers}
        arrays: dict[str, Mapping[str, NDArray[np.float32]]] = {"maps.npz": self._maps} if layers else {}
        if self._change is not None:
            changed = [score.as_values() for score in self._change.top]
            manifest["change"] = {"scores": changed, "maps": "change.npz" if self._change.maps else None}
            arrays |= {"change.npz": self._change.maps} if self._change.maps else {}
        return write_directory(directory, manifest, arrays, pictures, overwrite=overwrite)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: scores and maps. All text from the service is escaped."""
        heading = f"<b>{escape(self.model)}</b> {escape(self.version)} on {escape(self.device)}"
        if self.error is not None:
            return f"<div>{heading}<br>{escape(self.error.code)}: {escape(str(self.error))}</div>"
        parts = [heading]
        if self.notes:
            parts.append(f"<p>converted: {escape(', '.join(self.notes))}</p>")
        if self._top:
            rows = "".join(
                f"<tr><td>{score.index}</td><td>{escape(score.label)}</td>"
                + "".join(f"<td>{text}</td>" for text in score_texts(score))
                + "</tr>"
                for score in self._top
            )
            headings = "".join(f"<th>{name}</th>" for name in ("index", "label", *score_headings(self)))
            parts.append(f"<table><tr>{headings}</tr>{rows}</table>")
        for name, feature_map in self._maps.items():
            parts.append(f"<p>{escape(name)} {feature_map.shape}</p>")
            if feature_map.ndim == 3 and feature_map.size:
                parts.append(html_image(tile_grid(feature_map), name))
        return "<div>" + "\n".join(parts) + "</div>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prediction):
            return NotImplemented
        return (
            (self.model, self.version, self.engine, self.device, self.scores)
            == (other.model, other.version, other.engine, other.device, other.scores)
            and _error_key(self.error) == _error_key(other.error)
            and self._top == other._top
            and self._channels == other._channels
            and self._change == other._change
            and _maps_equal(self._maps, other._maps)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Prediction(model={self.model!r}, error={self.error!r})"
        best = f"{self._top[0].label} {score_texts(self._top[0], 3)[0]}" if self._top else "none"
        shapes = {name: feature_map.shape for name, feature_map in self._maps.items()}
        return f"Prediction(model={self.model!r}, top={best!r}, maps={shapes})"


def score_headings(prediction: Prediction) -> tuple[str, ...]:
    """Return what `score_texts` spells of this prediction's classes or numbers."""
    return ("value",) if prediction.scores == "value" else ("probability", "logit")


def score_texts(score: ClassScore, digits: int = 4, *, signed: bool = False) -> tuple[str, ...]:
    """Return probability and logit as text, or the value of a regression output.

    Args:
        score: The score.
        digits: Number of decimals of the probability.
        signed: Whether positive numbers get a plus sign, as differences do.
    """
    sign = "+" if signed else ""
    if score.value is not None:
        return (f"{score.value:{sign}.6g}",)
    return f"{score.probability:{sign}.{digits}f}", f"{score.logit:{sign}.3f}"


def format_timing(timing: Timing) -> str:
    """Format the stages of a request as a table, in milliseconds."""
    labels = STAGES | {"handler_s": f"{STAGES['handler_s']} ({timing.batch_requests} in the batch)"}
    rows = [[label, f"{1000 * getattr(timing, name):.2f}"] for name, label in labels.items()]
    return format_table(["time", "ms"], rows, right_aligned=(1,))


def manifest_fields(prediction: Prediction, source: str | None) -> dict[str, Any]:
    """Return the first fields of every manifest.json: the source, the model, the device, and the scores."""
    return {
        "source": source,
        "model": prediction.model,
        "version": prediction.version,
        "engine": prediction.engine,
        "device": prediction.device,
        "request_id": prediction.request_id,
        "scores": [score.as_values() for score in prediction.top],
        **({"notes": list(prediction.notes)} if prediction.notes else {}),
    }


def _maps_equal(first: Mapping[str, NDArray[np.float32]], second: Mapping[str, NDArray[np.float32]]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(feature_map, second[name], equal_nan=True) for name, feature_map in first.items()
    )


def _error_key(error: ConvscopeError | None) -> tuple[type, str, str] | None:
    """Return what makes two errors equal."""
    return None if error is None else (type(error), error.code, error.message)
