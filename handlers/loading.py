"""Loading: from an unpacked archive to a warmed-up pipeline."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from handlers import optional_torch
from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.network import archive as archives
from handlers.network.archive import VALUE
from handlers.network.engines.choice import choose
from handlers.ops.telemetry import Telemetry
from handlers.ops.warm_up import batches
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings

if TYPE_CHECKING:
    from handlers.network.engines.torch_engine import TorchEngine


def load(
    directory: Path,
    *,
    model: str,
    version: str,
    config: Mapping[str, Any],
    batch_size: int,
    gpu: int | None,
    settings: Settings | None = None,
) -> Pipeline:
    """Load an unpacked archive onto its device, and warm it up.

    Args:
        directory: The archive's folder.
        model: The model's name.
        version: The archive's version.
        config: Content of model-config.yaml.
        batch_size: Most requests in one batch.
        gpu: Index of the GPU given to this worker, None for the CPU.
        settings: The worker's settings; read from the environment unless given.

    Raises:
        RuntimeError: The network fails on its first forward pass, or its graph computes something else.
    """
    began = perf_counter()
    settings = settings or Settings.from_environment()
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    archive = archives.load(directory)
    _use_threads(1)  # Unless it predicts, torch only converts maps: too little work for several threads.

    @cache
    def network() -> TorchEngine:
        """Build the network in torch, for all threads of a forward pass."""
        import torch

        torch.set_num_threads(settings.threads)
        try:
            return archive.eager(device)
        finally:
            torch.set_num_threads(1)
            _freeze()

    engine = choose(
        archive, network, device=device, wanted=settings.engine, threads=settings.threads, precision=settings.precision
    )
    if engine.name.startswith("torch-"):
        _use_threads(settings.threads)
    identity = Identity(model, version, engine.name, device)
    limits = Limits.of(config, batch_size=batch_size, max_response_bytes=settings.max_response_bytes)
    layers = tuple(archive.layers)
    classes = () if archive.scores == VALUE else archive.classes  # Numbers have no most probable class to count.
    telemetry = Telemetry.of(identity, layers, classes, settings)
    pipeline = Pipeline(archive, identity, limits, network, engine, settings, telemetry)
    warm_up(pipeline, archive.preprocessing, layers, limits.max_images)
    pipeline.telemetry.loaded(perf_counter() - began)
    _freeze()
    return pipeline


def warm_up(pipeline: Pipeline, preprocessing: Preprocessing, layers: tuple[str, ...], max_images: int) -> None:
    """Respond to every kind of request once; without counting or logging. For the arguments see `batches`."""
    for batch, properties in batches(preprocessing, layers, max_images):
        pipeline.respond(batch, properties, is_recorded=False)


def _use_threads(count: int) -> None:
    """Let torch, if it is imported, compute with `count` threads."""
    torch = optional_torch.imported()
    if torch is not None:
        torch.set_num_threads(count)


def _freeze() -> None:
    """Exclude loaded objects from garbage collection: a collection over torch's modules takes 0.16 s."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # Otherwise triton's bindings report what was frozen as leaked, at exit.
