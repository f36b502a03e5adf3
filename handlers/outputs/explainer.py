"""The explainer: completes what was asked for, checks its cost, and explains picture by picture.

Gradients come from the torch network, whichever engine predicts; occlusion only needs scores, so it runs on the engine.
The requests of a batch that ask for explanations share its time equally: a large one takes nothing from the others, but
all wait for it. Axes: `C` channels, `H, W` picture pixels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from handlers.api import media
from handlers.api.errors import BadImage, BadRequest, ImageTooLarge, Internal, RequestError, UnknownLayer
from handlers.api.job import Job
from handlers.api.limits import ITEM_BYTES
from handlers.api.options import (
    CAM,
    GRAD_CAM,
    INPUT_GRADIENT,
    INTEGRATED_GRADIENTS,
    METHODS,
    OCCLUSION,
    OF_GRADIENTS,
    PICTURE,
    Explain,
    Options,
)
from handlers.images.preprocessing import Picture, Preprocessing, noise, to_input
from handlers.network.engines.eager import Eager
from handlers.network.engines.engine import Engine
from handlers.network.geometry import LayerGeometry
from handlers.outputs import explanation_methods as methods
from handlers.outputs.maps import FeatureMap, prepare
from handlers.outputs.response import Explanation, Result

MAX_RUNS = 4096  # Of the network, for the explanations of one request.
MAX_SECONDS = 25.0  # For the explanations of one batch: clients wait for 30 s, and TorchServe kills a worker after 120.
MAX_PIXELS = 2**18  # Of a picture: gradients keep every map of the network, at 512×512 hundreds of MB.
DEFAULT_STEPS = 32  # ResNet-18 on one busy core: 15 s.

NO_GRADIENTS = (
    "this network gives no gradients: its forward pass runs without them, so there is no {method}; occlusion and "
    "picture need none"
)

_SAME = 1e-4  # How far a head may be from the linear one, as a share of the largest logit.


_Heat = TypeVar("_Heat")


class Explainer:
    """Explains the scores of a loaded network.

    Args:
        network: In torch, for gradients.
        engine: The engine that predicts.
        preprocessing: How pictures become its input.
        classes: Labels by index; empty for a network without classes, which has no score to explain.
        geometry: Of each published layer, in the order of the forward pass.
        has_gradients: Whether the scores have gradients with respect to the picture.
    """

    def __init__(
        self,
        network: Eager,
        engine: Engine,
        preprocessing: Preprocessing,
        classes: tuple[str, ...],
        geometry: Mapping[str, LayerGeometry],
        *,
        has_gradients: bool = True,
    ) -> None:
        self._network = network
        self._engine = engine
        self._preprocessing = preprocessing
        self._classes = classes
        self._shapes = {name: layer.shape for name, layer in geometry.items()}
        self._has_gradients = has_gradients
        self._heads: dict[str, Tensor | None] = {}
        self._mattering: dict[str, bool] = {}

    def settle(self, asked: Explain) -> Explain:
        """Fill in the layer, and check that this can be explained.

        Raises:
            BadRequest: There is no score, no gradient or no such class, or the method does not suit the network.
            UnknownLayer: The model does not publish the layer.
        """
        if asked.method == PICTURE:
            return asked
        if not self._classes:
            raise BadRequest("this model has no classes, so there is no score to explain; its maps can be asked for")
        if asked.method in OF_GRADIENTS and not self._has_gradients:
            raise BadRequest(NO_GRADIENTS.format(method=asked.method))
        if asked.target is not None and asked.target >= len(self._classes):
            raise BadRequest(f"explain.target is {asked.target}; the classes are 0 to {len(self._classes) - 1}")
        if asked.window is not None and asked.step is not None and asked.step > asked.window:
            raise BadRequest("explain.step must be at most explain.window, or pixels between would not be covered")
        if asked.method not in (GRAD_CAM, CAM):
            return replace(asked, layer="")
        layer = asked.layer or self._default_layer()
        if layer not in self._shapes:
            raise UnknownLayer.of(layer, self._shapes)
        if len(self._shapes[layer]) != 3:
            raise BadRequest(f"{asked.method} needs a map of shape (C, h, w); {layer} has {self._shapes[layer]}")
        if asked.method == CAM and self._head(layer) is None:
            raise BadRequest(
                f"cam needs a network that averages {layer} over its cells and ends in one linear layer, which this "
                "one does not; grad_cam does without"
            )
        return replace(asked, layer=layer)

    def available(self) -> list[str]:
        """Return the methods that suit the network; one that uses a layer may not suit every layer."""
        if not self._classes:
            return [PICTURE]
        maps = [name for name, shape in self._shapes.items() if len(shape) == 3]
        unfit = {*(() if self._has_gradients else OF_GRADIENTS), *(() if maps else (GRAD_CAM, CAM))}
        if maps and self._head(self._default_layer()) is None:
            unfit.add(CAM)
        return [method for method in METHODS if method not in unfit]

    def check_work(self, asked: Explain, pictures: Sequence[Picture | RequestError]) -> None:
        """Check that a request does not keep the worker for too long.

        Raises:
            BadRequest: More than `MAX_RUNS` runs of the network.
        """
        sizes = [picture.shape[:2] for picture in pictures if not isinstance(picture, RequestError)]
        runs = sum(self._runs(asked, *size) for size in sizes)
        if runs > MAX_RUNS:
            raise BadRequest(
                f"the explanations would take {runs:,} runs of the network, at most {MAX_RUNS:,} are done for a "
                "request; ask for a larger step or fewer steps, or send fewer pictures"
            )

    def estimate(self, asked: Explain, pictures: Sequence[Picture], options: Options) -> int:
        """Return about how many bytes the explanations of pictures take at least, before encoding."""
        size = 0
        for picture in pictures:
            if asked.method in (INPUT_GRADIENT, INTEGRATED_GRADIENTS):
                cells = picture.size
            elif asked.layer and self._preprocessing.size is not None:
                cells = math.prod(self._shapes[asked.layer][1:])
            else:
                cells = math.prod(picture.shape[:2]) if asked.method == OCCLUSION else 0
            size += cells * ITEM_BYTES[options.map_dtype] + picture.nbytes * asked.picture
        return size

    def run(self, jobs: Sequence[Job]) -> None:
        """Add the explanation to every result for which one was asked; an error replaces the result."""
        asking = [job for job in jobs if job.options.explain is not None]
        if not asking:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(self._network.threads)
        try:
            for job in asking:
                self._run(job, MAX_SECONDS / len(asking))
        finally:
            torch.set_num_threads(threads)

    def _run(self, job: Job, seconds: float) -> None:
        job.resume()
        ends = perf_counter() + seconds
        for index, (picture, result) in enumerate(zip(job.pictures, job.results, strict=True)):
            if isinstance(result, Result) and not isinstance(picture, RequestError):
                job.results[index] = self._attempt(job, picture, job.sizes[index], result, ends)
        job.lap("forward")

    def _attempt(
        self, job: Job, picture: Picture, original: tuple[int, int], result: Result, ends: float
    ) -> Result | RequestError:
        def check() -> None:
            if perf_counter() > ends:
                raise BadRequest(
                    f"the explanations took longer than the {MAX_SECONDS:g} s that those asked for together get; "
                    "ask for a larger step or fewer steps, or send fewer pictures"
                )

        try:
            check()
            explanation = self._explain(job, picture, result, check)
            placement = self._preprocessing.place(original, is_prepared=picture.dtype == np.float32)
            placed = replace(explanation, original_size=original, region=placement.region(original))
            return replace(result, explanation=placed)
        except RequestError as error:
            return error
        except Exception as failure:
            message = "the explanation failed on this picture; the server's log has the reason"
            return Internal(message, unexpected=failure)

    def _explain(self, job: Job, picture: Picture, result: Result, check: Callable[[], None]) -> Explanation:
        asked = job.options.explain
        assert asked is not None  # noqa: S101  # For the types; `run` saw to it.
        is_png = job.media_type == media.PNG
        shown = _shown(picture) if asked.picture or is_png else None
        if asked.method == PICTURE:
            return Explanation(PICTURE, "", None, "", None, None, shown, asked.view)
        height, width = picture.shape[:2]
        if height * width > MAX_PIXELS:
            raise ImageTooLarge(f"pictures of more than {MAX_PIXELS:,} pixels are not explained; send a smaller one")
        target = result.top[0].index if asked.target is None else asked.target
        image = torch.from_numpy(to_input([picture], self._preprocessing)).to(self._network.device)  # (1, C, H, W)
        with torch.inference_mode(False), torch.enable_grad():
            heat, delta = self._heat(asked, image, target, check)
        if self._preprocessing.bgr and len(heat) == 3:
            heat = heat.flip(0)  # In the order of the picture's channels.
        if not heat.isfinite().all():
            raise BadRequest(f"{asked.method} of this picture is not finite; occlusion may be")
        dtype = "float32" if is_png else job.options.map_dtype
        [cells] = prepare("explanation", heat.detach()[None].float().contiguous(), Options(map_dtype=dtype))
        if isinstance(cells, BadImage):
            raise cells
        return Explanation(asked.method, asked.layer, target, self._classes[target], cells, delta, shown, asked.view)

    def _heat(
        self, asked: Explain, image: Tensor, target: int, check: Callable[[], None]
    ) -> tuple[Tensor, float | None]:
        if asked.method == GRAD_CAM:
            logits, made = self._network.forward_with_gradients(image, frozenset([asked.layer]))
            heat = methods.grad_cam(
                made[asked.layer], logits, target, lambda values: self._network.to_maps(asked.layer, values)
            )
            if heat is None and logits.requires_grad:
                raise BadRequest(f"the scores do not depend on the map of {asked.layer}; ask for an earlier layer")
            return _found(heat, asked), None
        if asked.method == CAM:
            weight = self._head(asked.layer)
            assert weight is not None  # noqa: S101  # For the types; `settle` saw to it.
            _, maps = self._network.forward(image.cpu(), frozenset([asked.layer]))
            return methods.cam(maps[asked.layer], weight, target), None
        if asked.method == OCCLUSION:
            window, step = self._squares(asked, image.shape[2], image.shape[3])
            return methods.occlusion(self._score, image.cpu(), target, window, step, check), None
        if asked.method == INPUT_GRADIENT:
            return _found(methods.input_gradient(self._differentiable, image, target), asked), None
        steps = asked.steps or DEFAULT_STEPS
        return _found(methods.integrated_gradients(self._differentiable, image, target, steps, check), asked)

    def _score(self, images: Tensor) -> Tensor:
        logits, _ = self._engine.forward(images)
        assert logits is not None  # noqa: S101  # For the types; `settle` saw to it.
        return logits

    def _differentiable(self, images: Tensor) -> Tensor:
        return self._network.forward_with_gradients(images)[0]

    def _runs(self, asked: Explain, height: int, width: int) -> int:
        if height * width > MAX_PIXELS:
            return 0  # That picture gets an error of its own.
        if asked.method == INTEGRATED_GRADIENTS:
            return asked.steps or DEFAULT_STEPS
        if asked.method != OCCLUSION:
            return 1
        try:
            return methods.occlusion_runs(height, width, *self._squares(asked, height, width))
        except BadRequest:
            return 0  # That picture gets an error of its own.

    @staticmethod
    def _squares(asked: Explain, height: int, width: int) -> tuple[int, int]:
        """Return window and step for a picture: by default a quarter of its shorter side, and half of that: 49 runs."""
        least = min(height, width)
        window = asked.window or max(-(-least // 4), asked.step or 1)
        step = asked.step or max(1, window // 2)
        if window > least:
            raise BadRequest(f"explain.window is {window}, but the picture has {height}×{width} pixels")
        return window, step

    def _default_layer(self) -> str:
        maps = [name for name, shape in self._shapes.items() if len(shape) == 3]
        wide = [name for name in maps if min(self._shapes[name][1:]) > 1]
        if not maps:
            raise BadRequest("this model publishes no map of shape (C, h, w); occlusion and gradients do without")
        for name in reversed(wide):
            if name not in self._network.layouts or not self._has_gradients or self._scores_depend_on(name):
                return name
        return (wide or maps)[-1]

    def _scores_depend_on(self, layer: str) -> bool:
        """Tell whether the scores depend on a layer's map at all: a transformer's need not on its last patches."""
        if layer not in self._mattering:
            with torch.inference_mode(False), torch.enable_grad():
                image = noise(self._preprocessing).to(self._network.device)
                logits, made = self._network.forward_with_gradients(image, frozenset([layer]))
                values = made[layer]
                heat = methods.grad_cam(values, logits, 0, lambda part: self._network.to_maps(layer, part))
            self._mattering[layer] = heat is not None
        return self._mattering[layer]

    def _head(self, layer: str) -> Tensor | None:
        """Return the weight (K, C) that maps the mean over a layer's cells to the logits; None if there is none.

        A linear layer of that shape is tried on noise: what the network computes counts, not how it is written.
        """
        if layer not in self._heads:
            self._heads[layer] = None
            shape = len(self._classes), self._shapes[layer][0]
            linear = [part for part in self._network.module.modules() if isinstance(part, nn.Linear)]
            fitting = [part for part in linear if part.weight.shape == shape]
            if fitting:
                logits, maps = self._network.forward(noise(self._preprocessing, 2), frozenset([layer]))
                assert logits is not None  # noqa: S101  # For the types; `settle` saw to it.
                means = maps[layer].mean(dim=(2, 3))
                for part in fitting:
                    found = part(means.to(part.weight.device)).cpu()
                    if (found - logits).abs().max() <= _SAME * logits.abs().max():
                        self._heads[layer] = part.weight.detach()
        return self._heads[layer]


def _found(heat: _Heat | None, asked: Explain) -> _Heat:
    """Return the heat; a network of an older archive may turn out to have no gradients."""
    if heat is None:
        raise BadRequest(NO_GRADIENTS.format(method=asked.method))
    return heat


def _shown(picture: Picture) -> FeatureMap:
    """Return a picture (H, W, C) as a tensor (C, H, W) of values in 0..1, in the dtype it has."""
    cells = np.ascontiguousarray(picture.transpose(2, 0, 1))
    if cells.dtype != np.uint8:
        return FeatureMap("picture", cells)
    scale, offset = np.full(len(cells), 1 / 255, np.float32), np.zeros(len(cells), np.float32)
    return FeatureMap("picture", cells, scale, offset)
