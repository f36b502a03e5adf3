"""Asking about many changed copies of pictures in few requests, and where the cells of their maps lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._sources import Image, Source, expand, read
from convscope_lens.probes._warp import Grid, Values

if TYPE_CHECKING:
    from convscope._card import Layer, ModelCard
    from convscope._client import Client
    from convscope._prediction import Prediction

_OTHER_BYTES = 4096  # Of a reply, a picture: scores and framing.


class Session:
    """A model, the pictures it is probed with, and the layers looked at.

    Args:
        client: Whom to ask.
        sources: Pictures and folders, as `expand` takes them.
        model: The model's name.
        version: Its version; None for the server's default.
        layers: Names, one name, or `"all"`.
        limit: Probe with so many of the pictures, chosen at random; None for all.
        seed: Of that choice.

    Attributes:
        model: Its name.
        card: Its card.
        layers: Those looked at, in the order of the forward pass.
        count: How many pictures there are.

    Raises:
        ConvscopeError: The model does not answer.
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
        self._sources = expand(sources, limit=limit, seed=seed)
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

    def pictures(self) -> Iterator[Image]:
        """Read the pictures, (H, W, C), float32, 0..1; of a network of fixed size, all alike."""
        return read(self._sources, self.card.input)

    def ask(
        self, copies: Callable[[Image], list[Image]], *, maps: bool = True
    ) -> Iterator[tuple[Image, list[Prediction]]]:
        """Ask about the copies of every picture, as many in a request as it may hold.

        Args:
            copies: Makes the same number of copies of each picture.
            maps: Whether to ask for the layers' maps, or for scores alone.

        Yields:
            Each picture, and the predictions of its copies.

        Raises:
            ConvscopeError: A request failed.
        """
        layers = [layer.name for layer in self.layers] if maps else []
        if not layers and not self.has_scores:
            return
        waiting: list[tuple[Image, int]] = []

        def stream() -> Iterator[Image]:
            for picture in self.pictures():
                changed = copies(picture)
                waiting.append((picture, len(changed)))
                yield from changed

        answers = self._client.predict_many(
            stream(),
            model=self.model,
            version=self._version,
            layers=layers,
            top_k=0,
            batch=self._batch(maps),
            concurrency=1,
        )
        for first in answers:  # Reading the next answer may have read more pictures: take them in order.
            picture, count = waiting.pop(0)
            yield picture, [first, *itertools.islice(answers, count - 1)]

    def _batch(self, maps: bool) -> int:
        """Return how many pictures a request may hold, and its reply's bytes allow."""
        limits = self.card.limits
        each = _OTHER_BYTES + (sum(layer.bytes.get("float32", 0) for layer in self.layers) if maps else 0)
        if self.card.input.height is None:  # The card's bytes are of the warm-up picture.
            return 1
        return max(1, min(limits.max_images, limits.max_reply_bytes // each))


class Sums:
    """Sums of squares by measure, layer and step, from which a relative distance is made at the end."""

    def __init__(self, layers: Iterable[str], steps: int) -> None:
        self._parts: dict[str, NDArray[np.float64]] = {name: np.zeros((2, steps)) for name in layers}

    def add(self, layer: str, step: int, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Add what was found and what was expected of the same cells."""
        wanted = expected.astype(np.float64)
        self._parts[layer][:, step] += np.square(found - wanted).sum(), np.square(wanted).sum()

    def distance(self) -> dict[str, NDArray[np.float64]]:
        """Return √(Σ (found - expected)² / Σ expected²) by layer, (S,); NaN where there was nothing to compare."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.sqrt(parts[0] / parts[1]) for name, parts in self._parts.items()}


class Verdicts:
    """Whether copies are still taken for what the unchanged picture was taken for."""

    def __init__(self, steps: int) -> None:
        self._sums = np.zeros((2, steps))
        self._counts = np.zeros(steps)

    def add(self, step: int, unchanged: Prediction, copy: Prediction) -> None:
        """Add a copy's scores; of a model without classes there are none."""
        if not unchanged.top:
            return
        chosen = unchanged.top[0].index
        probability = next(score.probability for score in copy.top if score.index == chosen)
        self._sums[:, step] += copy.top[0].index == chosen, probability
        self._counts[step] += 1

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return `agreement` and `probability`, each (S,), 0..1; nothing for a model without classes."""
        if not self._counts.any():
            return {}
        with np.errstate(invalid="ignore"):
            agreement, probability = self._sums / self._counts
        return {"agreement": agreement, "probability": probability}


def cells(prediction: Prediction, layer: str) -> Values:
    """Return a map as (h, w, C); one that has no cells side by side as (1, 1, C)."""
    found = prediction.maps[layer]
    return found.reshape(1, 1, -1) if found.ndim != 3 else found.transpose(1, 2, 0)


def grid(layer: Layer, shape: tuple[int, ...], picture: Image) -> Grid:
    """Return where a map's cells lie: as the card says, else spread evenly over the picture.

    Args:
        layer: As the card has it.
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
