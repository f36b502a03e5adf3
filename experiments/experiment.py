"""Shared by all experiments: their setting, their result, intervals, tables and figures.

An experiment is a module of this package with `run(setting) -> Result` and `table(figures) -> str`. It writes no files;
`experiments.__main__` writes its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from convscope import Client, Prediction
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import nn

from experiments import service

Figures = dict[str, Any]
"""The numbers that an experiment found, in the types of JSON."""

T = TypeVar("T")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Result:
    """What an experiment returns.

    Attributes:
        figures: The numbers, in the types of JSON.
        picture: A figure; None if the table is enough.
    """

    figures: Figures
    picture: Figure | None = None


@dataclass(frozen=True)
class Setting:
    """Settings of an experiment's run.

    Attributes:
        pictures: Folder with `train/<class>/*` and `test/<class>/*`: CIFAR-10 as JPEG files.
        store: Folder of the archives.
        url: Server of the models; empty to run the archives' handlers in this process, as experiments with an untrained
            twin always do.
        small: Run in about a second: enough to see that the experiment works, not what it shows.
    """

    pictures: Path = Path("pictures")
    store: Path = Path("model_store")
    url: str = ""
    small: bool = False

    def size(self, full: T, small: T) -> T:
        """Return `small` if the run is a small one, else `full`."""
        return small if self.small else full

    @contextmanager
    def client(
        self, *models: str, untrained: Sequence[str] = (), twins: Mapping[str, nn.Module] | None = None
    ) -> Iterator[Client]:
        """Open a client.

        Args:
            *models: Names of archives.
            untrained: Networks to serve with their first weights (seed 0) too, as `NAME-untrained`; then everything is
                served in this process.
            twins: Networks by the names `NAME-...` to serve beside them with the card of the archive NAME, likewise in
                this process.
        """
        first = {name + service.UNTRAINED: service.first_weights(name) for name in untrained}
        with service.client(self.store, self.url, models, first | dict(twins or {})) as client:
            yield client


def predictions(client: Client, pictures: Sequence[Any], *, batch: int = 50, **options: Any) -> Iterator[Prediction]:
    """Predict for many pictures, `batch` in each request; options are those of `Client.predict`."""
    for start in range(0, len(pictures), batch):
        yield from client.predict(pictures[start : start + batch], **options)


def embeddings(
    client: Client, model: str, pictures: Sequence[Any], layers: Sequence[str], pool: int = 1
) -> dict[str, NDArray[np.float64]]:
    """Return the maps of each picture, averaged to `pool`×`pool` cells, by layer: (N, C·pool²)."""
    seen = list(predictions(client, pictures, model=model, layers=layers, pool=pool, top_k=1))
    return {layer: np.stack([one.maps[layer].reshape(-1) for one in seen]).astype(np.float64) for layer in layers}


def interval(values: ArrayLike) -> dict[str, float]:
    """Return the mean of some values with its 95 % bootstrap interval (percentiles of 2,000 resamples), and n.

    For a paired interval of two measurements on the same pictures, pass their differences.
    """
    found = np.asarray(values, np.float64)
    low = high = float(found.mean())
    if np.ptp(found):
        bootstrapped = stats.bootstrap(
            (found,), np.mean, n_resamples=_RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = bootstrapped.low, bootstrapped.high
    return {"mean": round(float(found.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(found)}


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """Return an interval as text: `0.93 (0.91 to 0.95)`."""
    mean, low, high = (f"{values[name] + 0.0:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def grid(rows: int, columns: int, *, width: float = 0.62, height: float = 0.62) -> tuple[Figure, NDArray[Any]]:
    """Return a figure of tiles without axes, and the axes (rows, columns)."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False)
    for tile in tiles.flat:
        tile.set_xticks([])
        tile.set_yticks([])
        for spine in tile.spines.values():
            spine.set_visible(False)
    return figure, tiles


def plot(width: float = 6.5, height: float = 3.2, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    """Return a figure with plots side by side, and their axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes
