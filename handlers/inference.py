"""Inference: all pictures of one call through the network, and each picture's result.

It knows pictures and options, and nothing of where they came from or how results travel. Axes: `N` batch, `C` channels,
`H, W` picture pixels, `K` classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from handlers.engines.engine import Cells, Engine
from handlers.errors import BadImage, Internal, RequestError
from handlers.images import ANY_SIZE, Picture, Preprocessing, stack_on
from handlers.maps import prepare
from handlers.options import Options
from handlers.reply import ClassScore, Result
from handlers.trace import Trace

_MAX_INPUT_BYTES = 8 * 2**20  # Of one forward pass: activations are many times their input.


@dataclass
class Job:
    """One row on its way: its request, and for each picture first the picture, then its result."""

    trace: Trace
    options: Options
    layers: tuple[str, ...]
    media_type: str
    pictures: list[Picture | RequestError]
    results: list[Result | RequestError | None] = field(default_factory=list)


class Inference:
    """A network together with what it takes and what its outputs mean.

    Args:
        network: The loaded network, in its engine.
        preprocessing: What it takes.
        classes: Labels by index; empty for a network without classes.
        device: Where it runs.
    """

    def __init__(
        self, network: Engine, preprocessing: Preprocessing, classes: tuple[str, ...], device: torch.device
    ) -> None:
        self._network = network
        self._device = device
        self._preprocessing = preprocessing
        self._classes = classes
        height, width = preprocessing.size or ANY_SIZE
        self._black: Picture = np.zeros((height, width, preprocessing.channels), np.uint8)

    def warm_up(self, layers: frozenset[str] | None = None) -> NDArray[np.float32] | None:
        """Run one real forward pass of a black picture.

        Args:
            layers: Maps to compute; None for none, or for all where the network has no scores.

        Returns:
            Logits (1, K), or None for a network without classes.

        Raises:
            RuntimeError: The scores are not finite, or the network failed.
        """
        if layers is None:
            layers = frozenset() if self._network.has_scores else frozenset(self._network.layers)
        logits, _ = self._network.run(stack_on(self._device, [self._black], self._preprocessing), layers)
        if logits is not None and not np.isfinite(logits).all():
            raise RuntimeError("the network's scores for a black picture are not finite; are its weights?")
        return logits

    def check_graph(self) -> None:
        """Run once with every map and once plain, so that workers start warm and the extracted graph is proven.

        Raises:
            RuntimeError: The graph scores something else than the network.
        """
        traced = self.warm_up(frozenset(self._network.layers))
        plain = self.warm_up()
        if traced is not None and plain is not None and not np.allclose(traced, plain, rtol=1e-4, atol=1e-5):
            raise RuntimeError("the extracted graph does not compute what the network computes")

    def run(self, jobs: list[Job]) -> None:
        """Run all pictures of a call, those of one size together, and file every picture's result in its job."""
        groups: dict[tuple[int, int], list[tuple[Job, int]]] = defaultdict(list)
        for job in jobs:
            for index, picture in enumerate(job.pictures):
                if isinstance(picture, RequestError):
                    job.results[index] = picture
                else:
                    groups[picture.shape[0], picture.shape[1]].append((job, index))
        for (height, width), places in groups.items():
            step = max(1, _MAX_INPUT_BYTES // (height * width * self._preprocessing.channels * 4))
            for start in range(0, len(places), step):
                self._run_together(places[start : start + step], height, width)

    def _run_together(self, places: list[tuple[Job, int]], height: int, width: int) -> None:
        """Run pictures of one size in one forward pass; all of its time counts for every request in it.

        Maps of neighbours who ask alike are converted together, of which each request's part counts: half the time that
        one after the other takes, as most of a small map's goes to calling numpy.
        """
        traces = {job.trace for job, _ in places}
        wanted = frozenset(name for job, _ in places for name in job.layers)
        pictures = [job.pictures[index] for job, index in places]
        try:
            began = perf_counter()
            images = stack_on(self._device, pictures, self._preprocessing)  # type: ignore[arg-type]  # (N, C, H, W)
            stacked = perf_counter()
            for trace in traces:
                trace.add("preprocess", stacked - began)
            logits, maps = self._network.run(images, wanted)
            scores = self._score(logits, places)
            forward_s = perf_counter() - stacked
            for trace in traces:
                trace.add("forward", forward_s)
        except Exception as failure:
            error: RequestError = Internal(
                "the network failed on this picture; the server's log has the reason", unexpected=failure
            )
            if self._preprocessing.size is None:
                message = f"the network cannot take a picture of {width}×{height} pixels"
                error = BadImage(message, unexpected=failure)
            for job, index in places:
                job.results[index] = error
            return
        start = 0
        for (options, layers), alike in groupby(places, key=lambda place: (place[0].options, place[0].layers)):
            members = list(alike)
            rows = slice(start, start + len(members))
            start = rows.stop
            began = perf_counter()
            found = self._results(options, {name: maps[name][rows] for name in layers}, scores[rows])
            share_s = (perf_counter() - began) / len(members)
            for (job, index), result in zip(members, found, strict=True):
                job.results[index] = result
                job.trace.add("encode", share_s)

    def _score(
        self, logits: NDArray[np.float32] | None, places: list[tuple[Job, int]]
    ) -> list[tuple[ClassScore, ...] | RequestError]:
        """Return each picture's most probable classes."""
        if logits is None:
            return [()] * len(places)
        count = len(self._classes)
        # Row by row in Python: between two forward passes a call into torch or numpy is cold, and costs more than ten
        # classes do. A thousand classes take a tenth of a millisecond.
        rows = zip(logits.tolist(), places, strict=True)
        return [self._top(values, job.options.top_k or count) for values, (job, _) in rows]

    def _top(self, values: list[float], count: int) -> tuple[ClassScore, ...] | RequestError:
        """Return the most probable classes of one picture from its K logits; of equally probable ones the first."""
        if not math.isfinite(sum(values)):  # One value that is not finite makes the sum so; float32's cannot overflow.
            return BadImage("the scores are not finite; send values on the 0..1 scale")
        largest = max(values)
        shares = [math.exp(value - largest) for value in values]
        total = sum(shares)
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:count]
        return tuple(ClassScore(index, self._classes[index], shares[index] / total, values[index]) for index in best)

    def _results(
        self, options: Options, maps: dict[str, Cells], scores: list[tuple[ClassScore, ...] | RequestError]
    ) -> list[Result | RequestError]:
        """Return the results of pictures that ran together, about which the same was asked."""
        try:
            layers = [prepare(name, values, options) for name, values in maps.items()]
        except RequestError as error:
            return [score if isinstance(score, RequestError) else error for score in scores]
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
