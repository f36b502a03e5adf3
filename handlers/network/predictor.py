"""The predictor: runs all pictures of a batch through the network, and gives each picture its result.

It takes pictures and options from jobs and puts results into them; encoding is done elsewhere. Axes: `N`
batch, `C` channels, `H, W` picture pixels, `K` classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from handlers.api.errors import BadImage, Internal, RequestError
from handlers.api.job import Job
from handlers.api.options import Options
from handlers.images.preprocessing import ANY_SIZE, Picture, to_input_on
from handlers.network.archive import SIGMOID, VALUE, Archive
from handlers.network.engines import MAX_INPUT_BYTES, Cells, Engine
from handlers.outputs.maps import prepare
from handlers.outputs.response import ClassScore, Result

_LEAST_PROBABILITY = 2.0**-149


class Predictor:
    """A network with its preprocessing and the meaning of its outputs.

    Args:
        network: The loaded network, in its engine.
        archive: The network's archive.
        device: The network's device: `cpu`, or `cuda:` and a number.
    """

    def __init__(self, network: Engine, archive: Archive, device: str) -> None:
        self._network, self._device = network, device
        self._kind, self._gives_probabilities = archive.scores, archive.gives_probabilities
        self._preprocessing, self._classes = archive.preprocessing, archive.classes
        height, width = self._preprocessing.size or ANY_SIZE
        self._black: Picture = np.zeros((height, width, self._preprocessing.channels), np.uint8)

    def run_black(self, layers: frozenset[str] | None = None) -> NDArray[np.float32] | None:
        """Run one real forward pass of a black picture.

        Args:
            layers: Maps to compute; None for none, or for all if the network has no scores.

        Returns:
            Scores (1, K), or None for a network without scores.

        Raises:
            RuntimeError: The scores are not finite, or the network failed.
        """
        if layers is None:
            layers = frozenset() if self._network.has_scores else frozenset(self._network.layers)
        logits, _ = self._network.run(to_input_on(self._device, [self._black], self._preprocessing), layers)
        if logits is not None and not np.isfinite(logits).all():
            raise RuntimeError("the scores for a black picture are not finite; check the weights for NaN or infinity")
        return logits

    def check_maps_leave_scores_alone(self) -> None:
        """Run once with every map and once without, so that workers start warm and the extracted graph is checked.

        Raises:
            RuntimeError: The graph computes other scores than the network.
        """
        traced = self.run_black(frozenset(self._network.layers))
        plain = self.run_black()
        if traced is not None and plain is not None and not np.allclose(traced, plain, rtol=1e-4, atol=1e-5):
            raise RuntimeError("the extracted graph does not compute what the network computes")

    def run(self, jobs: list[Job]) -> None:
        """Run all pictures of a batch, those of one size together, and set every picture's result in its job."""
        groups: dict[tuple[int, int], list[tuple[Job, int]]] = defaultdict(list)
        for job in jobs:
            job.results = [None] * len(job.pictures)
            for index, picture in enumerate(job.pictures):
                if isinstance(picture, RequestError):
                    job.results[index] = picture
                else:
                    groups[picture.shape[0], picture.shape[1]].append((job, index))
        for (height, width), places in groups.items():
            step = max(1, MAX_INPUT_BYTES // (height * width * self._preprocessing.channels * 4))
            for start in range(0, len(places), step):
                self._run_together(places[start : start + step], height, width)

    def _run_together(self, places: list[tuple[Job, int]], height: int, width: int) -> None:
        """Run pictures of one size in one forward pass; all of its time counts for every request in it.

        Maps of neighbours with the same options are converted together, which takes half the time of converting one by
        one, as most of a small map's time is the overhead of calling numpy. Each request is charged its share.
        """
        jobs = {job for job, _ in places}
        wanted = frozenset(name for job, _ in places for name in job.layers)
        pictures = [job.pictures[index] for job, index in places]
        try:
            began = perf_counter()
            images = to_input_on(self._device, pictures, self._preprocessing)  # type: ignore[arg-type]  # (N, C, H, W)
            stacked = perf_counter()
            for job in jobs:
                job.add("preprocess", stacked - began, stacked)
            logits, maps = self._network.run(images, wanted)
            scores = self._score(logits, places)
            ended = perf_counter()
            for job in jobs:
                job.add("forward", ended - stacked, ended)
        except Exception as failure:
            error = self.failure(failure, height, width)
            for job, index in places:
                job.results[index] = error
            return
        start = 0
        for (options, layers), group in groupby(places, key=lambda place: (place[0].options, place[0].layers)):
            members = list(group)
            part = slice(start, start + len(members))
            start = part.stop
            began = perf_counter()
            found = self.results(options, {name: maps[name][part] for name in layers}, scores[part])
            ended = perf_counter()
            share_s = (ended - began) / len(members)
            for (job, index), result in zip(members, found, strict=True):
                job.results[index] = result
                job.add("encode", share_s, ended)

    def failure(self, cause: Exception, height: int, width: int) -> RequestError:
        """Return the error of pictures of H×W pixels on which the network failed."""
        if self._preprocessing.size is None:
            return BadImage(f"the network cannot take a picture of {width}×{height} pixels", unexpected=cause)
        return Internal("the network failed on this picture; the server's log has the reason", unexpected=cause)

    def _score(
        self, logits: NDArray[np.float32] | None, places: list[tuple[Job, int]]
    ) -> list[tuple[ClassScore, ...] | RequestError]:
        """Return each picture's most probable classes, or its numbers."""
        if logits is None:
            return [()] * len(places)
        count = len(self._classes)
        # In Python: between two forward passes a call into torch or numpy is cold, and costs more than ten classes do.
        # A thousand classes take a tenth of a millisecond.
        pairs = zip(logits.tolist(), places, strict=True)
        return [self.top(values, job.options.top_k or count) for values, (job, _) in pairs]

    def top(self, values: list[float], count: int) -> tuple[ClassScore, ...] | RequestError:
        """Return one picture's scores from what the network gave, K numbers.

        Classes are sorted by probability, of equally probable ones the first is first. Numbers that are not scores
        stay in the network's order. Where the network gives probabilities p itself, the
        logit is log p of a softmax, and log p - log(1 - p) of a sigmoid.
        """
        if not math.isfinite(sum(values)):  # One value that is not finite makes the sum so; float32's cannot overflow.
            return BadImage("the scores are not finite; send values on the 0..1 scale")
        if self._kind == VALUE:
            named = zip(self._classes, values, strict=True)
            numbers = [ClassScore(i, label, None, None, value) for i, (label, value) in enumerate(named)]
            return tuple(numbers[:count])
        probabilities, logits = values, values
        if self._gives_probabilities and self._kind == SIGMOID:
            logits = [_log(value) - _log(1 - value) for value in values]
        elif self._gives_probabilities:
            logits = [_log(value) for value in values]
        elif self._kind == SIGMOID:
            probabilities = [_sigmoid(value) for value in values]
        else:
            largest = max(values)
            shares = [math.exp(value - largest) for value in values]
            total = sum(shares)
            probabilities = [share / total for share in shares]
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:count]
        return tuple(ClassScore(index, self._classes[index], probabilities[index], logits[index]) for index in best)

    def results(
        self, options: Options, maps: dict[str, Cells], scores: list[tuple[ClassScore, ...] | RequestError]
    ) -> list[Result | RequestError]:
        """Return the results of pictures that ran together, with the same options."""
        try:
            layers = [prepare(name, values, options) for name, values in maps.items()]
        except RequestError as error:
            return [score if isinstance(score, RequestError) else error for score in scores]
        except Exception as cause:  # Out of memory, also on a GPU. Retry picture by picture, so that only some fail.
            if len(scores) == 1:
                return [Internal("the maps of the picture could not be converted", unexpected=cause)]
            alone = [{name: values[i : i + 1] for name, values in maps.items()} for i in range(len(scores))]
            return [self.results(options, own, [score])[0] for own, score in zip(alone, scores, strict=True)]
        results: list[Result | RequestError] = []
        for number, score in enumerate(scores):
            if isinstance(score, RequestError):
                results.append(score)
                continue
            found = [maps_of_layer[number] for maps_of_layer in layers]
            failure = next((item for item in found if isinstance(item, RequestError)), None)
            carried = tuple(item for item in found if not isinstance(item, RequestError))
            results.append(failure or Result(score, carried))
        return results


def _sigmoid(value: float) -> float:
    """Return 1 / (1 + e^-value), which neither overflows nor loses digits near 0."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    grown = math.exp(value)
    return grown / (1 + grown)


def _log(probability: float) -> float:
    """Return the logarithm; for 0, the logarithm of the least positive float32."""
    return math.log(max(probability, _LEAST_PROBABILITY))
