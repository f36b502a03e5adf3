"""Surveys: what each channel of a network does over a whole folder of pictures, measured in one pass.

    from convscope import Client
    from convscope_lens import portrait, survey

    with Client("http://localhost:8080") as client:
        result = survey(client, "pictures/", model="deep")
        print(result.format_table())
        html = portrait(client, result)

Maps are reduced as they arrive: memory depends on the network, the classes and `k`, and of the pictures only their
paths are kept. Sums are float64. Mean and deviation are merged picture by picture with the update of T. F. Chan, G. H.
Golub and R. J. LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", The American
Statistician 37(3), 1983, which generalises B. P. Welford's (Technometrics 4(3), 1962) and does not cancel.

Axes: `C` channels, `K` classes, `h, w` map cells.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from convscope.commands import (
    PictureFailure,
    format_table,
    list_pictures,
    printable,
    raise_if_of_service,
    read_picture_files,
)

if TYPE_CHECKING:
    from convscope import Client, ConvscopeError, Layer, ModelCard, Prediction
    from numpy.typing import NDArray

__all__ = ["StrongCell", "Survey", "SurveyedClass", "SurveyedLayer", "survey"]

REPLY_BYTES = 16 * 2**20  # Size of the maps of one request; at most four replies are in memory at a time.
REQUEST_BYTES = 32 * 2**20  # Size of the pictures of one request: half of the server's default limit.
CONCURRENCY = 2  # Requests: the service computes one while the maps of the other are reduced.
SHUFFLE_BLOCK = 256  # Pictures whose classes are shuffled among each other.
_FILE_SHIFT = 20  # A picture's number: the place of its file, shifted, plus its place in a .npy file of several.


class StrongCell(NamedTuple):
    """One of the cells where a channel is strongest.

    Attributes:
        value: Value of the cell.
        file: Path of the picture's file.
        place: Place of the picture in a .npy file of several; None for other files.
        cell: (row, column) in the map; (0, 0) in a layer without rows and columns.
        label: Class of the picture; empty without classes.
    """

    value: float
    file: str
    place: int | None
    cell: tuple[int, int]
    label: str

    @property
    def picture(self) -> str:
        """Path of the picture, with its place in a .npy file of several."""
        return self.file if self.place is None else f"{self.file}[{self.place}]"


@dataclass(frozen=True, eq=False)
class SurveyedLayer:
    """Statistics of the channels of a layer over all pictures. Arrays are (C,), float64, unless stated otherwise.

    Attributes:
        name: Name of the layer.
        cells: Number of cells of each channel, over all pictures.
        mean: Mean of the cells.
        deviation: Their standard deviation, of the population.
        minimum: The smallest cell.
        maximum: The largest cell.
        sparsity: Share of the cells that are 0 or less, 0..1.
        preferred: Index of the class with the largest mean activity, int64; -1 without classes.
        selectivity: Class selectivity index, 0..1; NaN where it is undefined. See `survey`.
        chance: Mean of the index over the shuffles of the classes; NaN where it is undefined.
        chance_max: The largest index of a shuffle; NaN where it is undefined.
        strongest: For each channel its strongest cells, strongest first, at most one of each picture.
    """

    name: str
    cells: int
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    sparsity: NDArray[np.float64]
    preferred: NDArray[np.int64]
    selectivity: NDArray[np.float64]
    chance: NDArray[np.float64]
    chance_max: NDArray[np.float64]
    strongest: tuple[tuple[StrongCell, ...], ...]

    @property
    def dead(self) -> NDArray[np.bool_]:
        """(C,), bool: whether all cells of all pictures have the same value; after a ReLU, 0."""
        return np.asarray(self.minimum == self.maximum)

    @property
    def selective(self) -> NDArray[np.bool_]:
        """(C,), bool: whether the selectivity is above that of every shuffle."""
        return np.asarray(self.selectivity > self.chance_max)


class SurveyedClass(NamedTuple):
    """A class of the pictures.

    Attributes:
        label: Name of the subfolder, or label of the predicted class.
        pictures: Number of pictures.
        recognised: Number of them whose most probable class has this label.
    """

    label: str
    pictures: int
    recognised: int


@dataclass(frozen=True, eq=False)
class Survey:
    """The result of `survey`.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        folder: The folder of the pictures.
        pictures: Number of pictures that were measured.
        classes_from: What the classes are: names of `folders`, the `predicted` class, or `nothing`.
        classes: The classes, by label; empty without classes.
        layers: Layers, in the order of the forward pass.
        failed: Path of each picture that failed, and why.
        settings: The options `k`, `shuffles`, `seed` and `map_dtype`.
        converted: Number of pictures that were converted in each way, by `Prediction.notes`; the largest first.
    """

    model: str
    version: str
    folder: str
    pictures: int
    classes_from: Literal["folders", "predicted", "nothing"]
    classes: tuple[SurveyedClass, ...]
    layers: tuple[SurveyedLayer, ...]
    failed: tuple[tuple[str, PictureFailure], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    converted: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def format_table(self) -> str:
        """Format the layers as text: means over their channels, counts of channels, and how pictures were converted."""
        header = ["layer", "channels", "mean", "deviation", "sparsity", "dead"]
        header += ["selectivity", "shuffled", "above every shuffle"] if self.classes else []
        rows = []
        for layer in self.layers:
            row = [layer.name, str(len(layer.mean)), f"{layer.mean.mean():.4g}", f"{layer.deviation.mean():.4g}"]
            row += [f"{layer.sparsity.mean():.1%}", str(layer.dead.sum())]
            if self.classes:
                indexes = [nan_mean(layer.selectivity), nan_mean(layer.chance)]
                row += ["–" if math.isnan(index) else f"{index:.3f}" for index in indexes]
                row += [str(layer.selective.sum())]
            rows.append(row)
        classes = {
            "folders": f"{len(self.classes)} classes: the subfolders",
            "predicted": f"{len(self.classes)} classes: the predicted ones",
            "nothing": "no classes",
        }[self.classes_from]
        title = printable(f"{self.model} {self.version}, {self.folder}: {self.pictures:,} pictures, {classes}")
        lines = [
            printable(f"converted ({', '.join(notes)}): {count:,} of {self.pictures:,} pictures")
            for notes, count in self.converted.items()
        ]
        table = format_table(header, rows, right_aligned=range(1, len(header)))
        return "\n".join([title, "", table, *([""] if lines else []), *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict; what is undefined is None."""
        return {
            "model": self.model,
            "version": self.version,
            "folder": self.folder,
            "pictures": self.pictures,
            "settings": self.settings,
            "classes_from": self.classes_from,
            "classes": [each._asdict() for each in self.classes],
            "layers": [
                {"name": layer.name, "cells": layer.cells, "channels": self._channels(layer)} for layer in self.layers
            ],
            "converted": [{"notes": list(notes), "pictures": count} for notes, count in self.converted.items()],
            "failed": [{"picture": picture, "error": error._asdict()} for picture, error in self.failed],
        }

    def _channels(self, layer: SurveyedLayer) -> list[dict[str, Any]]:
        names = ("mean", "deviation", "minimum", "maximum", "sparsity", "selectivity", "chance", "chance_max")
        columns = {name: getattr(layer, name).tolist() for name in names}
        return [
            {"channel": channel}
            | {name: None if math.isnan(values[channel]) else values[channel] for name, values in columns.items()}
            | {
                "dead": bool(layer.dead[channel]),
                "preferred": self.classes[layer.preferred[channel]].label if self.classes else None,
                "strongest": [
                    {"value": cell.value, "picture": cell.picture, "cell": cell.cell, "label": cell.label}
                    for cell in layer.strongest[channel]
                ],
            }
            for channel in range(len(layer.mean))
        ]


def survey(
    client: Client,
    folder: str,
    *,
    model: str,
    layers: str | Iterable[str] = "all",
    k: int = 9,
    shuffles: int = 20,
    seed: int = 0,
    map_dtype: Literal["float32", "float16"] = "float16",
    version: str | None = None,
    deadline_s: float | None = None,
    progress: bool = False,
) -> Survey:
    """Measure what each channel does over all pictures of a folder, in one pass.

    Whole maps are requested as float16, which halves the bytes: it keeps the sign, and each cell to 2⁻¹¹ of itself
    (cells below 2⁻²⁵ become 0). uint8 would move values between 0 and the first of its 255 steps to 0, and so change
    the sparsity.

    A channel's *activity* for a picture is the mean of its cells. The class selectivity index is that of A. S. Morcos,
    D. G. T. Barrett, N. C. Rabinowitz and M. Botvinick, "On the importance of single directions for generalization"
    (ICLR 2018): (μ_max - μ_rest) / (μ_max + μ_rest), with μ_max the largest class mean of the activity and μ_rest the
    mean of the other class means. 0: equal for all classes; 1: active for one class only. It is undefined where a class
    mean is negative, where all are 0, and with fewer than two classes. A maximum over classes is above the rest by
    chance too, more so for few pictures and sparse channels. So the index is also measured with shuffled classes.

    Pictures are taken in a random order, and classes are shuffled within blocks of 256 to 511 of them, which keeps the
    size of each class. A picture keeps its own class in at most every 256th case, so a shuffled index is very slightly
    too large for a selective channel.

    Args:
        client: An open client.
        folder: Pictures, in subfolders or not. The classes are the first subfolders if there are any (pictures beside
            them have the class `.`), else the predicted classes.
        model: Name of the model.
        layers: Names, one name, or `"all"`.
        k: Number of strongest cells of each channel; at most one of each picture.
        shuffles: Number of times that the classes are shuffled. Each takes 8 · K · C bytes.
        seed: Seed of the order of the pictures and of the shuffles.
        map_dtype: Dtype of the maps on the wire.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of each request, in seconds; None for the client's.
        progress: Whether to show a progress bar, with tqdm.

    Returns:
        The statistics. Pictures that failed are listed in `failed`.

    Raises:
        ConvscopeError: The card could not be fetched, there is no such layer (`UnknownLayer`), all pictures failed, or
            the service failed, after how many pictures a note says.
        ImportError: tqdm is not installed.
        UsageError: The folder contains no picture.
        ValueError: `folder` is not a folder, `k` or `shuffles` is below 1, the model publishes no layers, or no picture
            could be read.
    """
    if k < 1 or shuffles < 1:
        raise ValueError("k and shuffles must be at least 1")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    card = client.model_card(model, version, deadline_s=deadline_s)
    chosen = card.select_layers(layers)
    if not chosen:
        raise ValueError(f"{model} publishes no layers")
    files = _Files(folder, seed)
    labels = files.labels or (list(card.classes) if card.scores != "value" else [])
    statistics = [_Statistics(_channels(layer), k) for layer in chosen]
    classes = _Classes(len(labels), sum(map(_channels, chosen)), shuffles, seed)
    pictures = 0
    converted = Counter[tuple[str, ...]]()
    failure: ConvscopeError | None = None
    for prediction in client.predict_many(
        files,
        model=model,
        concurrency=CONCURRENCY,
        batch=_pictures_per_request(card, chosen, map_dtype, files.largest_bytes),
        progress=progress,
        version=version,
        layers=[layer.name for layer in chosen],
        map_dtype=map_dtype,
        top_k=1,
        deadline_s=deadline_s,
    ):
        name, number, label = files.sent.popleft()
        reason = _failure(prediction)
        if reason is not None:
            so_far = f"{pictures:,} pictures were measured before; the folder has {len(files.paths):,} files"
            raise_if_of_service(prediction.error, lambda: client.model_card(model, version), so_far)
            files.failed.append((name, reason))
            failure = failure or prediction.error
            continue
        pictures += 1
        converted[prediction.notes] += 1
        is_recognised = False
        if files.labels:
            is_recognised = bool(prediction.top) and prediction.top[0].label == labels[label]
        elif labels:
            label, is_recognised = prediction.top[0].index, True
        activities = [
            one.add(number, label, prediction.maps[layer.name]) for layer, one in zip(chosen, statistics, strict=True)
        ]
        if labels:
            classes.add(label, is_recognised, np.concatenate(activities))
    if not pictures:
        raise failure or ValueError(f"no picture of {folder} could be measured: {files.failed[0][1]}")
    classes.finish()
    return Survey(
        model=card.model,
        version=card.version,
        folder=folder,
        pictures=pictures,
        classes_from="folders" if files.labels else "predicted" if labels else "nothing",
        classes=tuple(
            SurveyedClass(labels[index], int(classes.counts[index]), int(classes.recognised[index]))
            for index in classes.present
        ),
        layers=tuple(_surveyed_layers(chosen, statistics, classes, files, labels)),
        failed=tuple(sorted(files.failed)),
        converted={notes: count for notes, count in converted.most_common() if notes},
        settings={"k": k, "shuffles": shuffles, "seed": seed, "map_dtype": map_dtype},
    )


def nan_mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are defined; NaN if none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


class _Files:
    """The picture files of a folder in a random order, and which are in progress or failed.

    Attributes:
        paths: Paths of all files, in order.
        labels: The classes; empty without subfolders.
        largest_bytes: Size of the largest file.
        sent: Name, number and class (an index of `labels`) of each picture without a prediction so far.
        failed: Name of each picture that failed, and why.
        several: Indexes in `paths` of the .npy files of several pictures.
    """

    def __init__(self, folder: str, seed: int) -> None:
        self.paths = list_pictures([folder])
        parts = [Path(path).relative_to(folder).parts for path in self.paths]
        firsts = [part[0] if len(part) > 1 else "." for part in parts]
        self.labels = sorted(set(firsts)) if set(firsts) != {"."} else []
        indexes = {label: index for index, label in enumerate(self.labels)}
        self._classes = [indexes.get(first, 0) for first in firsts]
        self._order = np.random.default_rng(seed).permutation(len(self.paths))
        self.largest_bytes = max(Path(path).stat().st_size for path in self.paths)
        self.sent: deque[tuple[str, int, int]] = deque()
        self.failed: list[tuple[str, PictureFailure]] = []
        self.several: set[int] = set()

    def __length_hint__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[bytes]:
        for place in self._order.tolist():
            entries = list(read_picture_files([self.paths[place]]))
            if len(entries) > 1:
                self.several.add(place)
            for index, (name, file) in enumerate(entries):
                if isinstance(file, PictureFailure):
                    self.failed.append((name, file))
                else:
                    self.sent.append((name, place << _FILE_SHIFT | index, self._classes[place]))
                    yield file


class _Statistics:
    """The moments of the channels of a layer, and their strongest cells."""

    def __init__(self, channels: int, k: int) -> None:
        self.cells = 0
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)  # Sum of (cell - mean)².
        self.minimum = np.full(channels, np.inf)
        self.maximum = np.full(channels, -np.inf)
        self.nonpositive = np.zeros(channels, np.int64)
        self.values = np.full((channels, k), -np.inf)  # The strongest cells, in falling order.
        self.places = np.zeros((4, channels, k), np.int64)  # Their picture's number and class, row and column.

    def add(self, number: int, label: int, feature_map: NDArray[np.float32]) -> NDArray[np.float64]:
        """Add the map of a picture, (C, h, w) or (C,); return the mean of each channel, (C,)."""
        columns = feature_map.shape[2] if feature_map.ndim == 3 else 1
        cells = feature_map.reshape(len(self.mean), -1).astype(np.float64)
        count = cells.shape[1]
        mean = cells.mean(axis=1)
        delta, total = mean - self.mean, self.cells + count
        self.squares += np.square(cells - mean[:, None]).sum(axis=1) + delta**2 * (self.cells * count / total)
        self.mean += delta * (count / total)
        self.cells = total
        self.nonpositive += np.count_nonzero(cells <= 0, axis=1)
        np.minimum(self.minimum, cells.min(axis=1), out=self.minimum)
        strongest = cells.argmax(axis=1)
        values = cells[np.arange(len(cells)), strongest]
        np.maximum(self.maximum, values, out=self.maximum)
        self._keep_strongest(values, number, label, *np.divmod(strongest, columns))
        return np.asarray(mean)

    def _keep_strongest(
        self,
        values: NDArray[np.float64],
        number: int,
        label: int,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
    ) -> None:
        """Put a cell of each channel among its strongest; of equal cells, the one with the lower number is first."""
        k = self.values.shape[1]
        some = np.flatnonzero(values >= self.values[:, -1])
        new = np.stack([np.full(len(some), number), np.full(len(some), label), rows[some], columns[some]])
        candidates = np.column_stack([self.values[some], values[some]])
        places = np.concatenate([self.places[:, some], new[:, :, None]], axis=2)
        order = np.lexsort((places[0], -candidates))[:, :k]
        self.values[some] = np.take_along_axis(candidates, order, axis=1)
        self.places[:, some] = np.take_along_axis(places, order[None], axis=2)


class _Classes:
    """Sums of the activities by class, with the real classes and with shuffled ones.

    Attributes:
        counts: Pictures of each class, (K,).
        recognised: Number of these whose most probable class is their own, (K,).
    """

    def __init__(self, classes: int, channels: int, shuffles: int, seed: int) -> None:
        self.counts = np.zeros(classes, np.int64)
        self.recognised = np.zeros(classes, np.int64)
        self._sums = np.zeros((1 + shuffles, classes, channels))
        self._pending: list[tuple[int, NDArray[np.float64]]] = []
        self._random = np.random.default_rng(seed)

    def add(self, label: int, is_recognised: bool, activities: NDArray[np.float64]) -> None:
        """Add the activities of a picture, (C,)."""
        self.counts[label] += 1
        self.recognised[label] += is_recognised
        self._pending.append((label, activities))
        if len(self._pending) == 2 * SHUFFLE_BLOCK:
            self._sum(SHUFFLE_BLOCK)

    def finish(self) -> None:
        """Add the remaining pictures, with the classes shuffled among them."""
        if self._pending:
            self._sum(len(self._pending))

    def _sum(self, count: int) -> None:
        block, self._pending = self._pending[:count], self._pending[count:]
        labels = np.array([label for label, _ in block])
        activities = np.stack([activities for _, activities in block])
        one_hot = np.eye(len(self.counts))
        for sums in self._sums:  # First the real classes, then shuffled ones.
            sums += one_hot[labels].T @ activities
            labels = self._random.permutation(labels)

    @property
    def present(self) -> NDArray[np.int64]:
        """Indexes of the classes with a picture."""
        return np.flatnonzero(self.counts)

    def means(self, channels: slice) -> NDArray[np.float64]:
        """Return the means of the activities, (1 + shuffles, K, C), of the classes with a picture."""
        return np.asarray(self._sums[:, self.present, channels] / self.counts[self.present, None])


def _surveyed_layers(
    chosen: Sequence[Layer], statistics: Sequence[_Statistics], classes: _Classes, files: _Files, labels: Sequence[str]
) -> Iterator[SurveyedLayer]:
    """Yield the result of each layer."""
    start = 0
    for layer, found in zip(chosen, statistics, strict=True):
        count = len(found.mean)
        preferred = np.full(count, -1, np.int64)
        indexes = np.full((2, count), math.nan)
        if labels:
            means = classes.means(slice(start, start + count))
            preferred = means[0].argmax(axis=0)
            indexes = _selectivity(means)
        start += count
        yield SurveyedLayer(
            name=layer.name,
            cells=found.cells,
            mean=found.mean,
            deviation=np.sqrt(found.squares / found.cells),
            minimum=found.minimum,
            maximum=found.maximum,
            sparsity=found.nonpositive / found.cells,
            preferred=preferred,
            selectivity=indexes[0],
            chance=indexes[1:].mean(axis=0),
            chance_max=indexes[1:].max(axis=0),
            strongest=tuple(
                tuple(
                    StrongCell(
                        value=value,
                        file=files.paths[number >> _FILE_SHIFT],
                        place=number % (1 << _FILE_SHIFT) if number >> _FILE_SHIFT in files.several else None,
                        cell=(row, column),
                        label=labels[label] if labels else "",
                    )
                    for value, number, label, row, column in zip(values, *places, strict=True)
                    if value > -math.inf
                )
                for values, places in zip(found.values.tolist(), found.places.swapaxes(0, 1).tolist(), strict=True)
            ),
        )


def _selectivity(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the class selectivity index (..., C) of class means (..., K, C); NaN where it is undefined."""
    largest = means.max(axis=-2)
    rest = np.maximum(means.sum(axis=-2) - largest, 0) / max(1, means.shape[-2] - 1)
    is_defined = (means.min(axis=-2) >= 0) & (largest > 0) & (means.shape[-2] > 1)
    indexes = np.full(largest.shape, math.nan)
    np.divide(largest - rest, largest + rest, out=indexes, where=is_defined)
    return indexes


def _failure(prediction: Prediction) -> PictureFailure | None:
    """Return why a picture cannot be measured; None if it can."""
    if prediction.error is not None:
        return PictureFailure(prediction.error.code, prediction.error.message)
    for layer, feature_map in prediction.maps.items():
        if not np.isfinite(feature_map).all():
            return PictureFailure("not_finite", f"the map of {layer} holds values that are not finite")
    return None


def _channels(layer: Layer) -> int:
    return layer.shape[0] if layer.shape else 1


def _pictures_per_request(card: ModelCard, chosen: Sequence[Layer], map_dtype: str, largest_bytes: int) -> int:
    """Return how many pictures to send at a time, so that neither they nor their maps take much memory."""
    reply_bytes = sum(layer.bytes.get(map_dtype) or 4 * math.prod(layer.shape) for layer in chosen)
    limits = (
        card.pictures_per_request(reply_bytes),
        REPLY_BYTES // reply_bytes,
        REQUEST_BYTES // max(1, largest_bytes),
    )
    return max(1, min(limits))
