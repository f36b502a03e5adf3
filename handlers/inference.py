"""Inference: all pictures of one call through the network, and each picture's result.

It knows pictures and options, and nothing of where they came from or how results travel. Axes: `N` batch, `C` channels,
`H, W` picture pixels, `K` classes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from handlers.activations import Maps, Network
from handlers.errors import BadImage, Internal, RequestError
from handlers.images import Picture, Preprocessing, stack
from handlers.maps import prepare
from handlers.options import Options
from handlers.reply import ClassScore, Result
from handlers.trace import Trace

ANY_SIZE = (32, 32)  # (H, W) of the warm-up picture of a network that takes any size.

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
        network: The loaded network.
        preprocessing: What it takes.
        classes: Labels by index; empty for a network without classes.
    """

    def __init__(self, network: Network, preprocessing: Preprocessing, classes: tuple[str, ...]) -> None:
        self._network = network
        self._preprocessing = preprocessing
        self._classes = classes
        height, width = preprocessing.size or ANY_SIZE
        self._black: Picture = np.zeros((height, width, preprocessing.channels), np.uint8)

    def warm_up(self, layers: frozenset[str] | None = None) -> Tensor | None:
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
        logits, _ = self._network.forward(stack([self._black], self._preprocessing), layers)
        if logits is not None and not torch.isfinite(logits).all():
            raise RuntimeError("the network's scores for a black picture are not finite; are its weights?")
        return logits

    def check_graph(self) -> None:
        """Run once with every map and once plain, so that workers start warm and the extracted graph is proven.

        Raises:
            RuntimeError: The graph scores something else than the network.
        """
        traced = self.warm_up(frozenset(self._network.layers))
        plain = self.warm_up()
        if traced is not None and plain is not None and not torch.allclose(traced, plain, rtol=1e-4, atol=1e-5):
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
        """Run pictures of one size in one forward pass; all of its time counts for every request in it."""
        traces = {job.trace for job, _ in places}
        wanted = frozenset(name for job, _ in places for name in job.layers)
        pictures = [job.pictures[index] for job, index in places]
        try:
            began = perf_counter()
            images = stack(pictures, self._preprocessing)  # type: ignore[arg-type]  # (N, C, H, W)
            stacked = perf_counter()
            for trace in traces:
                trace.add("preprocess", stacked - began)
            logits, maps = self._network.forward(images, wanted)
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
        for number, (job, index) in enumerate(places):
            job.trace.resume()
            try:
                job.results[index] = self._result(job, scores[number], maps, number)
            except RequestError as failure:
                job.results[index] = failure
            job.trace.lap("encode")

    def _score(
        self, logits: Tensor | None, places: list[tuple[Job, int]]
    ) -> list[tuple[ClassScore, ...] | RequestError]:
        """Return each picture's most probable classes."""
        if logits is None:
            return [()] * len(places)
        count = len(self._classes)
        wanted = [min(job.options.top_k or count, count) for job, _ in places]
        top = logits.topk(max(wanted), dim=1)  # (N, k)
        probabilities = logits.softmax(dim=1).gather(1, top.indices)
        finite = torch.isfinite(logits).all(dim=1)
        scores: list[tuple[ClassScore, ...] | RequestError] = []
        rows = (finite.tolist(), top.indices.tolist(), probabilities.tolist(), top.values.tolist())
        for k, fine, indexes, shares, values in zip(wanted, *rows, strict=True):
            if not fine:
                scores.append(BadImage("the scores are not finite; send values on the 0..1 scale"))
                continue
            found = zip(indexes[:k], shares, values, strict=False)
            scores.append(tuple(ClassScore(index, self._classes[index], share, value) for index, share, value in found))
        return scores

    def _result(
        self, job: Job, scores: tuple[ClassScore, ...] | RequestError, maps: Maps, number: int
    ) -> Result | RequestError:
        if isinstance(scores, RequestError):
            return scores
        return Result(scores, tuple(prepare(name, maps[name][number], job.options) for name in job.layers))
