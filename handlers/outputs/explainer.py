"""The explainer: fills in a request's defaults, checks its cost, and explains picture by picture.

Gradients come from the network in torch, whichever engine predicts. It is built for the first request that needs it,
which then waits seconds, and not at all where torch is not installed. Everything else runs on the engine.
The requests of a batch that ask for explanations share its time equally: a large one takes nothing from the others, but
all wait for it. Axes: `C` channels, `H, W` picture pixels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from handlers import optional_torch
from handlers.api import media
from handlers.api.errors import BadImage, BadRequest, ImageTooLarge, Internal, RequestError, UnknownLayer
from handlers.api.job import Job
from handlers.api.limits import ITEM_BYTES
from handlers.api.options import (
    CAM,
    GRAD_CAM,
    INPUT_GRADIENT,
    INTEGRATED_GRADIENTS,
    OCCLUSION,
    OF_GRADIENTS,
    PICTURE,
    Explain,
    Options,
)
from handlers.images.preprocessing import Picture, to_input
from handlers.network.archive import Archive
from handlers.network.engines import Engine
from handlers.network.engines.reference import host
from handlers.outputs import explanation_methods as methods
from handlers.outputs.maps import FeatureMap, prepare
from handlers.outputs.response import Explanation, Result

if TYPE_CHECKING:
    from torch import Tensor

    from handlers.network.engines.torch_engine import TorchEngine

MAX_RUNS = 4096  # Runs of the network for the explanations of one request.
MAX_SECONDS = 25.0  # For the explanations of one batch: clients wait for 30 s, and TorchServe kills a worker after 120.
MAX_PIXELS = 2**18  # Per picture: gradients keep every map of the network, at 512×512 hundreds of MB.
DEFAULT_STEPS = 32  # ResNet-18 on one busy core: 15 s.

NO_GRADIENTS = (
    "this network gives no gradients: its forward pass runs without them, so there is no {method}; occlusion and "
    "picture need none"
)
NO_TORCH = "this server has no torch, so there is no {method}; the card lists the methods that need none"

_Heat = TypeVar("_Heat")


class Explainer:
    """Explains the scores of a loaded network.

    Args:
        archive: The served archive.
        network: Builds the network in torch, on its device, or returns it if already built.
        engine: The engine that predicts.
    """

    def __init__(self, archive: Archive, network: Callable[[], TorchEngine], engine: Engine) -> None:
        self._archive = archive
        self._network = network
        self._engine = engine
        self._preprocessing = archive.preprocessing
        self._classes = archive.classes
        self._shapes = {name: layer.shape for name, layer in archive.described.layers.items()}
        self._has_torch = optional_torch.is_installed()

    def settle(self, asked: Explain) -> Explain:
        """Fill in the layer, and check that the explanation is possible.

        Raises:
            BadRequest: There is no score, no gradient or no such class, or the method does not suit the network.
            UnknownLayer: The model does not publish the layer.
        """
        if asked.method == PICTURE:
            return asked
        if not self._classes:
            raise BadRequest("this model has no classes, so there is no score to explain; its maps can be asked for")
        if asked.method in OF_GRADIENTS and not self._archive.has_gradients:
            raise BadRequest(NO_GRADIENTS.format(method=asked.method))
        if asked.method in OF_GRADIENTS and not self._has_torch:
            raise BadRequest(NO_TORCH.format(method=asked.method))
        if asked.target is not None and asked.target >= len(self._classes):
            raise BadRequest(f"explain.target is {asked.target}; the classes are 0 to {len(self._classes) - 1}")
        if asked.window is not None and asked.step is not None and asked.step > asked.window:
            raise BadRequest("explain.step must be at most explain.window, or pixels between would not be covered")
        if asked.method not in (GRAD_CAM, CAM):
            return replace(asked, layer="")
        layer = asked.layer or self._archive.described.default_layer
        if not layer:
            raise BadRequest("this model publishes no map of shape (C, h, w); occlusion and gradients do without")
        if layer not in self._shapes:
            raise UnknownLayer.of(layer, self._shapes)
        if len(self._shapes[layer]) != 3:
            raise BadRequest(f"{asked.method} needs a map of shape (C, h, w); {layer} has {self._shapes[layer]}")
        if asked.method == CAM and layer not in self._archive.described.heads:
            raise BadRequest(
                f"cam needs a network that averages {layer} over its cells and ends in one linear layer, which this "
                "one does not; grad_cam does without"
            )
        return replace(asked, layer=layer)

    def available(self) -> list[str]:
        """Return the methods that suit the network and can run; a method that uses a layer may not suit every layer."""
        found = self._archive.described.explanations
        return [method for method in found if self._has_torch or method not in OF_GRADIENTS]

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
        """Add the explanation to every result of jobs that ask for one; an error replaces the result."""
        for job in jobs:
            job.resume()
            ends = perf_counter() + MAX_SECONDS / len(jobs)
            for index, (picture, result) in enumerate(zip(job.pictures, job.results, strict=True)):
                if isinstance(result, Result) and not isinstance(picture, RequestError):
                    job.results[index] = self._attempt(job, picture, job.sizes[index], result, ends)
            job.lap("forward", "explain")

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
        image = to_input([picture], self._preprocessing)  # (1, C, H, W)
        heat, delta = self._heat(asked, image, target, check)
        if self._preprocessing.bgr and len(heat) == 3:
            heat = heat[::-1]  # In the order of the picture's channels.
        if not np.isfinite(heat).all():
            raise BadRequest(f"{asked.method} is not finite for this picture; try occlusion")
        dtype = "float32" if is_png else job.options.map_dtype
        [cells] = prepare("explanation", np.ascontiguousarray(heat[None], np.float32), Options(map_dtype=dtype))
        if isinstance(cells, BadImage):
            raise cells
        return Explanation(asked.method, asked.layer, target, self._classes[target], cells, delta, shown, asked.view)

    def _heat(
        self, asked: Explain, image: NDArray[np.float32], target: int, check: Callable[[], None]
    ) -> tuple[NDArray[np.float32], float | None]:
        if asked.method in OF_GRADIENTS:
            network = self._network()
            import torch

            with network.all_threads(), torch.inference_mode(False), torch.enable_grad():
                heat, delta = self._heat_by_gradients(network, asked, image, target, check)
                return heat.detach().float().cpu().numpy(), delta
        if asked.method == CAM:
            _, maps = self._engine.run(image, frozenset([asked.layer]))
            weight = self._archive.tensor(self._archive.described.heads[asked.layer])
            return methods.cam(host(maps[asked.layer]), weight, target), None
        window, step = self._squares(asked, image.shape[2], image.shape[3])
        return methods.occlusion(self._score, image, target, window, step, check), None

    def _heat_by_gradients(
        self, network: TorchEngine, asked: Explain, image: NDArray[np.float32], target: int, check: Callable[[], None]
    ) -> tuple[Tensor, float | None]:
        import torch

        from handlers.outputs import gradient_methods

        def score(images: Tensor) -> Tensor:
            return network.forward_with_gradients(images)[0]

        picture = torch.from_numpy(image).to(network.device)
        if asked.method == GRAD_CAM:
            logits, made = network.forward_with_gradients(picture, frozenset([asked.layer]))
            heat = gradient_methods.grad_cam(
                made[asked.layer], logits, target, lambda values: network.to_maps(asked.layer, values)
            )
            if heat is None and logits.requires_grad:
                raise BadRequest(f"the scores do not depend on the map of {asked.layer}; ask for an earlier layer")
            return _found(heat, asked), None
        if asked.method == INPUT_GRADIENT:
            return _found(gradient_methods.input_gradient(score, picture, target), asked), None
        steps = asked.steps or DEFAULT_STEPS
        return _found(gradient_methods.integrated_gradients(score, picture, target, steps, check), asked)

    def _score(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits, _ = self._engine.run(images)
        assert logits is not None  # noqa: S101  # For the types; `settle` saw to it.
        return logits

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
        """Return window and step for a picture: by default a quarter and an eighth of its shorter side: 49 runs."""
        least = min(height, width)
        window = asked.window or max(-(-least // 4), asked.step or 1)
        step = asked.step or max(1, window // 2)
        if window > least:
            raise BadRequest(f"explain.window is {window}, but the picture has {height}×{width} pixels")
        return window, step


def _found(heat: _Heat | None, asked: Explain) -> _Heat:
    """Return the heat; a network may have gradients for some pictures only."""
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
