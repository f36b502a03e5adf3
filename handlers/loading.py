"""Loading: from an unpacked archive to a pipeline that has responded to every kind of request once."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from handlers.api import card
from handlers.api.limits import Limits
from handlers.images.preprocessing import ANY_SIZE, Preprocessing, noise
from handlers.network import archive as archives
from handlers.network.archive import VALUE, Archive
from handlers.network.engines.choice import choose
from handlers.network.engines.eager import Eager
from handlers.network.engines.engine import Engine
from handlers.network.geometry import blank, layer_geometry
from handlers.network.operations import count_multiply_adds
from handlers.network.predictor import Predictor
from handlers.ops.telemetry import Telemetry
from handlers.ops.warm_up import batches
from handlers.outputs.explainer import Explainer
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings


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
        model: Name it is served under.
        version: Of the archive.
        config: Content of model-config.yaml.
        batch_size: Most requests in one batch.
        gpu: Index of the GPU given to this worker, None for the CPU.
        settings: Those of the environment unless given.

    Raises:
        RuntimeError: The network fails on its first forward pass, or its graph computes something else.
    """
    began = perf_counter()
    settings = settings or Settings.from_environment()
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 maps are float32 on a GPU too; TF32 keeps 10 bits of 23.
    device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
    archive = archives.load(directory)
    eager = archive.eager(device)
    engine = choose(
        eager,
        archive.graph,
        noise(archive.preprocessing, 2),
        wanted=settings.engine,
        threads=settings.threads,
        precision=settings.precision,
    )
    if not isinstance(engine, Eager):
        torch.set_num_threads(1)  # torch then only converts maps: too little work for several threads.
    identity = Identity(model, version, engine.name, str(device))
    limits = Limits.of(config, batch_size=batch_size, max_response_bytes=settings.max_response_bytes)
    pipeline = assemble(
        archive,
        identity,
        limits,
        eager,
        engine,
        drain_file=settings.drain_file,
        starting_file=settings.starting_file,
        telemetry=Telemetry.of(
            identity,
            tuple(archive.layers),
            () if archive.scores == VALUE else archive.classes,  # Numbers have no most probable class to count.
            settings.metrics_dir,
            settings.log_requests_s,
        ),
        decode_threads=settings.threads,
        scaled_decoding=settings.scaled_decoding,
    )
    warm_up(pipeline, archive.preprocessing, tuple(archive.layers), limits.max_images)
    pipeline.telemetry.loaded(perf_counter() - began)
    # A collection that looks through torch's modules takes 0.16 s, so they are taken out of its sight.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # Otherwise triton's bindings report what was frozen as leaked, at exit.
    return pipeline


def assemble(
    archive: Archive,
    identity: Identity,
    limits: Limits,
    network: Eager,
    engine: Engine,
    *,
    drain_file: Path | None = None,
    starting_file: Path | None = None,
    telemetry: Telemetry | None = None,
    decode_threads: int = 1,
    scaled_decoding: bool = False,
) -> Pipeline:
    """Make the pipeline of a loaded archive.

    Args:
        archive: The loaded archive.
        identity: What serves it; what its scores mean is filled in.
        limits: In force.
        network: The archive's network in torch.
        engine: What predicts; it may be `network`.
        drain_file: As `Pipeline` takes it; None for no such file.
        starting_file: Likewise.
        telemetry: As `Pipeline` takes it; None to count and log nothing.
        decode_threads: As `Pipeline` takes it.
        scaled_decoding: Likewise.

    Raises:
        RuntimeError: The network fails on its first forward pass, or its graph computes something else.
    """
    preprocessing = archive.preprocessing
    identity = replace(identity, scores=archive.scores)
    shape = (preprocessing.channels, *(preprocessing.size or ANY_SIZE))
    geometry = layer_geometry(archive.module, archive.layers, shape, archive.layouts)
    multiply_adds = count_multiply_adds(archive.module, blank(archive.module, shape))
    explainer = Explainer(
        network, engine, preprocessing, archive.classes, geometry, has_gradients=archive.has_gradients
    )
    predictor = Predictor(
        engine,
        preprocessing,
        archive.classes,
        network.device,
        scores=archive.scores,
        gives_probabilities=archive.gives_probabilities,
    )
    predictor.check_maps_leave_scores_alone()
    return Pipeline(
        predictor,
        explainer,
        preprocessing,
        geometry,
        card.describe(archive, identity, limits, geometry, multiply_adds, explainer.available()),
        identity,
        limits,
        drain_file=drain_file,
        starting_file=starting_file,
        telemetry=telemetry or Telemetry(),
        decode_threads=decode_threads,
        scaled_decoding=scaled_decoding,
    )


def warm_up(pipeline: Pipeline, preprocessing: Preprocessing, layers: tuple[str, ...], max_images: int) -> None:
    """Respond to every kind of request once; nothing of it is counted or logged. For the arguments see `batches`."""
    for batch, properties in batches(preprocessing, layers, max_images):
        pipeline.respond(batch, properties, is_recorded=False)
