"""What all probes share: requests for many changed copies of pictures, and sums over what comes back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import Cells, Grid, Image, Source, list_pictures, read_pictures

if TYPE_CHECKING:
    from convscope import Client, Layer, ModelCard, Prediction

_OTHER_BYTES = 4096  # Of the reply for one picture: scores and framing.


class Session:
    """A model, the pictures it is probed with, and the layers that are measured.

    Args:
        client: A connected client.
        sources: Pictures and folders, as in `list_pictures`.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        limit: Use so many of the pictures, chosen at random; None for all.
        seed: Seed of that choice.

    Attributes:
        model: The model's name.
        card: Its card.
        layers: The layers that are measured, in the order of the forward pass.
        count: Number of pictures.

    Raises:
        ConvscopeError: The card could not be fetched.
        ValueError: A layer is not published, or there is no picture.
    """

    def __init__(
        self,
        client: Client,
        sources: Source | Iterable[Source],
        *,
        model: str,
        version: str | None,
        layers: str | Iterable[str],
        limit: int | None,
        seed: int,
    ) -> None:
        self._client = client
        self.model, self._version = model, version
        self._sources = list_pictures(sources, limit=limit, seed=seed)
        self.count = len(self._sources)
        self.card: ModelCard = client.model_card(model, version)
        names = [layers] if isinstance(layers, str) else list(layers)
        published = [layer.name for layer in self.card.layers]
        unknown = set(names) - {*published, "all"}
        if unknown:
            raise ValueError(f"{model} publishes no layer {min(unknown)!r}; there are {', '.join(published)}")
        self.layers: list[Layer] = [layer for layer in self.card.layers if "all" in names or layer.name in names]

    @property
    def has_scores(self) -> bool:
        """Whether the model has classes."""
        return bool(self.card.classes)

    def predict_copies(
        self, copy: Callable[[Image], list[Image]], *, maps: bool = True
    ) -> Iterator[tuple[Image, list[Prediction]]]:
        """Predict changed copies of every picture, as many in a request as fit.

        Args:
            copy: Makes the copies of a picture (H, W, C), float32, 0..1: the same number for every picture.
            maps: Whether to ask for the layers' maps, or for scores alone.

        Yields:
            Each picture, and the predictions of its copies.

        Raises:
            ConvscopeError: A request failed.
        """
        layers = [layer.name for layer in self.layers] if maps else []
        if not layers and not self.has_scores:
            return
        pending: list[tuple[Image, int]] = []

        def copies() -> Iterator[Image]:
            for picture in read_pictures(self._sources, self.card.input):
                changed = copy(picture)
                pending.append((picture, len(changed)))
                yield from changed

        predictions = self._client.predict_many(
            copies(),
            model=self.model,
            version=self._version,
            layers=layers,
            top_k=0,
            batch=self._batch(maps),
            concurrency=1,
        )
        for first in predictions:  # predict_many reads ahead, so several pictures may be pending.
            picture, count = pending.pop(0)
            yield picture, [first, *itertools.islice(predictions, count - 1)]

    def _batch(self, maps: bool) -> int:
        """Return how many pictures the model takes in a request, and whose reply it can send."""
        limits = self.card.limits
        each = _OTHER_BYTES + (sum(layer.bytes.get("float32", 0) for layer in self.layers) if maps else 0)
        if self.card.input.height is None:  # The bytes of the card are those of the warm-up picture.
            return 1
        return max(1, min(limits.max_images, limits.max_reply_bytes // each))


class RelativeDistance:
    """The relative distance √(Σ (found - expected)² / Σ expected²) by layer and step, summed over many maps.

    Args:
        layers: Names.
        steps: Number of steps.
    """

    def __init__(self, layers: Iterable[str], steps: int) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {name: np.zeros((2, steps)) for name in layers}

    def add(self, layer: str, step: int, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Add the found and the expected values of the same cells."""
        wanted = expected.astype(np.float64)
        self._sums[layer][:, step] += np.square(found - wanted).sum(), np.square(wanted).sum()

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return the distance by layer, (S,); NaN where nothing was added."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.sqrt(sums[0] / sums[1]) for name, sums in self._sums.items()}


class ScoreCurves:
    """Whether changed copies still have the most probable class of the unchanged picture, by step.

    Args:
        steps: Number of steps.
    """

    def __init__(self, steps: int) -> None:
        self._sums = np.zeros((2, steps))
        self._counts = np.zeros(steps)

    def add(self, step: int, unchanged: Prediction, changed: Prediction) -> None:
        """Add the scores of a copy; those of a model without classes are ignored."""
        if not unchanged.top:
            return
        chosen = unchanged.top[0].index
        probability = next(score.probability for score in changed.top if score.index == chosen)
        self._sums[:, step] += changed.top[0].index == chosen, probability
        self._counts[step] += 1

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return `agreement` and `probability`, each (S,), 0..1; nothing for a model without classes."""
        if not self._counts.any():
            return {}
        with np.errstate(invalid="ignore"):
            agreement, probability = self._sums / self._counts
        return {"agreement": agreement, "probability": probability}


def map_cells(prediction: Prediction, layer: str) -> Cells:
    """Return a map as (h, w, C); a map of one number a channel as (1, 1, C)."""
    found = prediction.maps[layer]
    return found.reshape(1, 1, -1) if found.ndim != 3 else found.transpose(1, 2, 0)


def map_grid(layer: Layer, shape: tuple[int, ...], picture: Image) -> Grid:
    """Return where the cells of a map lie: as the card states, else spread evenly over the picture.

    Args:
        layer: A layer of the model card.
        shape: (h, w, ...) of its map.
        picture: (H, W, C).
    """
    height, width = shape[:2]
    if layer.stride is None or layer.receptive_field is None or layer.receptive_field_start is None:
        step = (picture.shape[0] / height, picture.shape[1] / width)
        return Grid(((step[0] - 1) / 2, (step[1] - 1) / 2), step, (height, width))
    starts, sizes, strides = layer.receptive_field_start, layer.receptive_field, layer.stride
    first = (starts[0] + (sizes[0] - 1) / 2, starts[1] + (sizes[1] - 1) / 2)
    return Grid(first, (float(strides[0]), float(strides[1])), (height, width))
