"""Sends changed copies of pictures to a model and accumulates the results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np
from convscope import ConvscopeError
from numpy.typing import NDArray

from convscope_lens.probes._images import File, Grid, MapArray, PictureArray, Source, list_pictures, load_network_inputs
from convscope_lens.probes._statistics import ANOTHER, Curve, Figures, Sums, ratio

if TYPE_CHECKING:
    from convscope import Client, Layer, ModelCard, Prediction

NO_LAYERS = "none"


class ProbeSession:
    """A model, the pictures it is probed with, and the layers that are measured.

    Arguments are those of the probes; with the layers `"none"` scores alone are measured. Pictures are sent in a random
    order, so that the picture before another one, its baseline, is seldom of the same class though folders are sorted.

    Attributes:
        model: Name of the model.
        card: The model card.
        layers: The measured layers, in the order of the forward pass.
        picture_count: Number of pictures.
        labels: Index of each picture's class, in the order of the pictures: that of its folder's name, None where the
            folder is not named as a class.

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
        self.model, self._version, self.seed = model, version, seed
        pictures = list_pictures(sources, limit=limit, seed=seed)
        self._sources = [pictures[index] for index in np.random.default_rng(seed).permutation(len(pictures))]
        self.picture_count = len(pictures)
        self.card: ModelCard = client.model_card(model, version)
        names = [layers] if isinstance(layers, str) else list(layers)
        self.layers: list[Layer] = [] if names == [NO_LAYERS] else self.card.select_layers(names)
        index = {label: position for position, label in enumerate(self.card.classes)}
        self.labels = [
            index.get(Path(source).parent.name) if isinstance(source, str | os.PathLike) else None
            for source in self._sources
        ]

    @property
    def has_scores(self) -> bool:
        """Whether the model has classes."""
        return bool(self.card.classes)

    def _convert(self, files: list[File]) -> list[NDArray[np.float32]]:
        """Return the network's inputs for picture files, each (C, H, W), float32, 0..1."""
        explanations = self._client.explain(files, model=self.model, version=self._version, method="picture", top_k=1)
        # As bytes become numbers in the service, to the last bit.
        return [(np.rint(each.picture * 255) / np.float32(255)).astype(np.float32) for each in explanations]

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
            ConvscopeError: A request or a picture failed; a note says how many pictures were measured before.
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
        done = 0
        try:
            for first in predictions:  # predict_many reads ahead, so several pictures may be pending.
                picture, count = pending.pop(0)
                found = [first, *itertools.islice(predictions, count - 1)]
                for prediction in found:
                    if prediction.error is not None:
                        raise prediction.error
                yield picture, found
                done += 1
        except ConvscopeError as error:
            error.add_note(f"{done:,} of {self.picture_count:,} pictures were measured before")
            raise


class PictureSums:
    """The numerator and the denominator of ratios, by name, picture and step."""

    def __init__(self, names: Iterable[str], steps: int) -> None:
        self._steps = steps
        self._rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}

    def next_picture(self) -> None:
        """Begin with the next picture."""
        for rows in self._rows.values():
            rows.append(np.zeros((self._steps, 2)))

    def add(self, name: str, step_index: int, numerator: float, denominator: float) -> None:
        """Add to the sums of this picture."""
        self._rows[name][-1][step_index] += numerator, denominator

    def add_distance(
        self, name: str, step_index: int, found: NDArray[np.floating], expected: NDArray[np.floating]
    ) -> None:
        """Add Σ (found - expected)² and Σ expected² of the same cells: any range, of equal shape.

        The root of their ratio is the relative distance.
        """
        reference = expected.astype(np.float64)
        self.add(name, step_index, float(np.square(found - reference).sum()), float(np.square(reference).sum()))

    def sums(self) -> dict[str, Sums]:
        """Return the sums by name, each (N, S, 2), float64."""
        return {name: np.reshape(rows, (-1, self._steps, 2)) for name, rows in self._rows.items()}


class Distances(PictureSums):
    """The sums of relative distances; in `another` those of their baseline, the distance from another picture's map."""

    def __init__(self, names: Iterable[str], steps: int) -> None:
        super().__init__(names, steps)
        self.another = PictureSums(self._rows, steps)

    def next_picture(self) -> None:
        """Begin with the next picture."""
        super().next_picture()
        self.another.next_picture()

    def compare(
        self,
        name: str,
        step_index: int,
        found: MapArray,
        expected: MapArray,
        unrelated: MapArray | None,
        cells: NDArray[np.bool_] | EllipsisType = ...,
    ) -> None:
        """Add the distance of some cells (h, w) of a map (h, w, C) from those expected, and from another picture's."""
        self.add_distance(name, step_index, found[cells], expected[cells])
        if unrelated is not None:
            self.another.add_distance(name, step_index, found[cells], unrelated[cells])

    def figures(self, baseline: str = ANOTHER) -> Figures:
        """Return the distances; `baseline` says what theirs is."""
        baselines = {name: ratio(sums, root=True) for name, sums in self.another.sums().items()}
        return Figures(self.sums(), True, baseline, baselines)


class ScoreSums:
    """Scores of changed copies of pictures, by step, beside those of the unchanged pictures."""

    def __init__(self, session: ProbeSession, steps: int) -> None:
        self._labels = [label for label in session.labels if label is not None]
        self._has_labels = len(self._labels) == session.picture_count
        self._classes = np.zeros((2, len(session.card.classes)))  # Of the unchanged pictures: predicted, true.
        self._answers = np.zeros((2, steps, len(session.card.classes)))  # Of the copies: predicted; probabilities.
        self._sums = PictureSums(("agreement", "probability", "accuracy", "accuracy_change", "unchanged"), steps)
        self._picture, self._predicted, self._correct = -1, -1, False

    def next_picture(self, unchanged: Prediction) -> None:
        """Begin with the next picture; does nothing for a model without classes, or whose outputs are no scores."""
        self._picture += 1
        self._predicted = unchanged.top[0].index if unchanged.top and unchanged.scores != "value" else -1
        if self._predicted < 0:
            return
        self._sums.next_picture()
        self._classes[0, self._predicted] += 1
        if self._has_labels:
            self._classes[1, self._labels[self._picture]] += 1
            self._correct = self._predicted == self._labels[self._picture]

    def add(self, step_index: int, changed: Prediction) -> None:
        """Add the scores of a copy of this picture."""
        if self._predicted < 0:
            return
        answer = changed.top[0].index
        for score in changed.top:
            self._answers[1, step_index, score.index] += score.probability
            if score.index == self._predicted:
                self._sums.add("probability", step_index, score.probability, 1)
        self._answers[0, step_index, answer] += 1
        self._sums.add("agreement", step_index, answer == self._predicted, 1)
        if self._has_labels:
            correct = answer == self._labels[self._picture]
            self._sums.add("accuracy", step_index, correct, 1)
            self._sums.add("accuracy_change", step_index, int(correct) - int(self._correct), 1)
            self._sums.add("unchanged", step_index, self._correct, 1)

    def sums(self) -> dict[str, Sums]:
        """Return the sums of `agreement` and `probability`, and of `accuracy` and `accuracy_change` with labels.

        Empty for a model without classes.
        """
        if not self._answers.any():
            return {}
        names = ["agreement", "probability", *(["accuracy", "accuracy_change"] if self._has_labels else [])]
        return {name: sums for name, sums in self._sums.sums().items() if name in names}

    def unchanged_sums(self) -> Sums | None:
        """Return the sums of the accuracy on the unchanged pictures, (N, S, 2); None without labels."""
        return self._sums.sums()["unchanged"] if self._has_labels and self._answers.any() else None

    def chance(self) -> dict[str, Curve]:
        """Return what each score would be if the answers to the copies were dealt out to the pictures at random.

        Σ over classes of the class's share of the pictures times its share of the copies' answers (of `probability`:
        times its mean probability), (S,), float64. For `agreement` and `probability` a picture's class is the predicted
        one, for `accuracy` the true one.
        """
        with np.errstate(invalid="ignore"):
            pictures = self._classes / self._classes.sum(axis=1, keepdims=True)
            answers = self._answers / self._answers[0].sum(axis=1, keepdims=True)
        return {
            "agreement": answers[0] @ pictures[0],
            "probability": answers[1] @ pictures[0],
            "accuracy": answers[0] @ pictures[1],
        }


class AnotherPicture:
    """The baseline of distances: the maps of the picture before."""

    def __init__(self) -> None:
        self._before: dict[str, MapArray] = {}

    def swap(self, name: str, feature_map: MapArray) -> MapArray | None:
        """Keep a map for the next picture, and return that of the picture before; None if its shape is another."""
        before, self._before[name] = self._before.get(name), feature_map
        return before if before is not None and before.shape == feature_map.shape else None


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
