"""Sends changed copies of pictures to a model and accumulates the results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convscope_lens.probes._images import Grid, MapArray, PictureArray, Source, list_pictures, load_network_inputs

if TYPE_CHECKING:
    from convscope import Client, Layer, ModelCard, Prediction


class ProbeSession:
    """A model, the pictures it is probed with, and the layers that are measured.

    Args:
        client: An open client.
        sources: Pictures and folders, as in `list_pictures`.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        layers: Names, one name, or `"all"`.
        limit: Use a random sample of this size; None for all.
        seed: Seed of the sample.

    Attributes:
        model: Name of the model.
        card: The model card.
        layers: The measured layers, in the order of the forward pass.
        picture_count: Number of pictures.

    Raises:
        ConvscopeError: The card could not be fetched, or there is no such layer (`UnknownLayer`).
        ValueError: There is no picture.
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
        self.picture_count = len(self._sources)
        self.card: ModelCard = client.model_card(model, version)
        names = [layers] if isinstance(layers, str) else list(layers)
        selected = {self.card.layer(name).name for name in names if name != "all"}
        self.layers: list[Layer] = [layer for layer in self.card.layers if "all" in names or layer.name in selected]

    @property
    def has_scores(self) -> bool:
        """Whether the model has classes."""
        return bool(self.card.classes)

    def _convert(self, file: str | os.PathLike[str] | bytes) -> NDArray[np.float32]:
        """Return the network's input for a picture file, (C, H, W), float32, 0..1."""
        explanation = self._client.explain(file, model=self.model, version=self._version, method="picture", top_k=1)
        levels: NDArray[np.float32] = np.rint(explanation.picture * 255)
        return levels / np.float32(255)  # As bytes become numbers in the service, to the last bit.

    def predict_copies(
        self, make_copies: Callable[[PictureArray], list[PictureArray]], *, maps: bool = True
    ) -> Iterator[tuple[PictureArray, list[Prediction]]]:
        """Predict for changed copies of every picture, in the largest batches the model allows.

        Args:
            make_copies: Returns the copies of a picture (H, W, C), float32, 0..1; the same number for every picture.
            maps: Whether to request the maps of the layers, or only scores.

        Yields:
            Each picture, (H, W, C), float32, 0..1, and the predictions of its copies.

        Raises:
            ConvscopeError: A request failed.
        """
        layers = [layer.name for layer in self.layers] if maps else []
        reply_bytes = sum(layer.bytes.get("float32", 0) for layer in self.layers) if maps else 0
        if not layers and not self.has_scores:
            return
        pending: list[tuple[PictureArray, int]] = []

        def copies() -> Iterator[PictureArray]:
            for picture in load_network_inputs(self._sources, self.card.input, self._convert):
                changed = make_copies(picture)
                pending.append((picture, len(changed)))
                yield from changed

        predictions = self._client.predict_many(
            copies(),
            model=self.model,
            version=self._version,
            layers=layers,
            top_k=0,
            batch=self.card.pictures_per_request(reply_bytes),
            concurrency=1,
        )
        for first in predictions:  # predict_many reads ahead, so several pictures may be pending.
            picture, count = pending.pop(0)
            yield picture, [first, *itertools.islice(predictions, count - 1)]


class RelativeDistance:
    """The relative distance √(Σ (found - expected)² / Σ expected²) by layer and step, over many maps.

    Args:
        layers: Names of the layers.
        steps: Number of steps.
    """

    def __init__(self, layers: Iterable[str], steps: int) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {name: np.zeros((2, steps)) for name in layers}

    def add(self, layer: str, step_index: int, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Add the found and the expected values of the same cells: float32, any range, of equal shape."""
        reference = expected.astype(np.float64)
        self._sums[layer][:, step_index] += np.square(found - reference).sum(), np.square(reference).sum()

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return the distance by layer, (S,), float64; NaN where nothing was added."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.sqrt(sums[0] / sums[1]) for name, sums in self._sums.items()}


class ScoreCurves:
    """Agreement of changed copies with the most probable class of the unchanged picture, by step.

    Args:
        steps: Number of steps.
    """

    def __init__(self, steps: int) -> None:
        self._sums = np.zeros((2, steps))
        self._counts = np.zeros(steps)

    def add(self, step_index: int, unchanged: Prediction, changed: Prediction) -> None:
        """Add the scores of a copy; does nothing for a model without classes, or whose outputs are no scores."""
        if not unchanged.top or unchanged.scores == "value":
            return
        predicted = unchanged.top[0].index
        probability = next(score.probability for score in changed.top if score.index == predicted)
        self._sums[:, step_index] += changed.top[0].index == predicted, probability
        self._counts[step_index] += 1

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return `agreement` and `probability`, each (S,), float64, 0..1; an empty dict for a model without classes."""
        if not self._counts.any():
            return {}
        with np.errstate(invalid="ignore"):
            agreement, probability = self._sums / self._counts
        return {"agreement": agreement, "probability": probability}


def map_array(prediction: Prediction, layer: str) -> MapArray:
    """Return a map as (h, w, C), float32, any range; a map of one number per channel as (1, 1, C)."""
    feature_map = prediction.maps[layer]
    return feature_map.reshape(1, 1, -1) if feature_map.ndim != 3 else feature_map.transpose(1, 2, 0)


def map_grid(layer: Layer, shape: tuple[int, ...], picture: PictureArray) -> Grid:
    """Return the positions of a map's cells: as the card states, else spread evenly over the picture.

    Args:
        layer: A layer of the model card.
        shape: (h, w, ...) of its map.
        picture: (H, W, C), float32, 0..1.
    """
    height, width = shape[:2]
    if layer.stride is None or not layer.has_receptive_field:
        spacing = (picture.shape[0] / height, picture.shape[1] / width)
        return Grid(((spacing[0] - 1) / 2, (spacing[1] - 1) / 2), spacing, (height, width))
    top, left, bottom, right = layer.receptive_field_box(0, 0)
    first = ((top + bottom - 1) / 2, (left + right - 1) / 2)
    return Grid(first, (float(layer.stride[0]), float(layer.stride[1])), (height, width))
