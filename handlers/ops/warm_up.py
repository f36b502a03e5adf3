"""Warm-up: every kind of request once when a worker loads, so that no caller is the first to ask for it.

What is loaded, compiled or allocated on first use (decoders, encoders, the network's memory for a batch) costs a first
caller up to a hundred times a later one's time. A worker that TorchServe restarts warms up too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from handlers.api import media
from handlers.api.job import Parameters
from handlers.images.preprocessing import ANY_SIZE, Preprocessing
from handlers.wire import convscope_pb2 as wire

LONGEST_S = 1.0  # No further batch begins after this time: a large network's passes are alike.
_ROUNDS = 2  # Python specialises code once it has run a few times, and caches are filled by then.
_BATCH = 4

Batch = tuple[list[Parameters], list[Mapping[str, Any]]]
"""Parameters and properties of each request, as TorchServe passes them."""


def batches(preprocessing: Preprocessing, layers: tuple[str, ...], max_images: int) -> Iterator[Batch]:
    """Yield batches of every kind of request, the most frequent first, until time is up.

    Args:
        preprocessing: The network's preprocessing.
        layers: Public names of the published layers.
        max_images: Most pictures in one request.
    """
    deadline = perf_counter() + LONGEST_S
    for _ in range(_ROUNDS):
        for batch in _kinds(preprocessing, layers, max_images):
            if perf_counter() > deadline:
                return
            yield batch


def _kinds(preprocessing: Preprocessing, layers: tuple[str, ...], max_images: int) -> Iterator[Batch]:
    files = _files(preprocessing)
    message = wire.PredictRequest(pictures=files[:1])
    for dtype, pool in ((wire.FLOAT32, 0), (wire.UINT8, 0), (wire.FLOAT16, 0), (wire.FLOAT32, 1)):
        maps = wire.PredictRequest(pictures=files[:1], layers=["all"], map_dtype=dtype)
        if pool:
            maps.pool = pool
        for one in (message, maps):
            body = one.SerializeToString()
            yield [{"body": body}], [_headers("application/x-protobuf", media.PROTOBUF)]
            yield [{"request": body}], [{}]
        yield [{"request": maps.SerializeToString()}] * _BATCH, [{}] * _BATCH
    many = wire.PredictRequest(
        pictures=files[:1] * min(32, max_images), layers=["all"], map_dtype=wire.FLOAT16, timing=True
    )
    yield [{"request": many.SerializeToString()}], [{}]
    options = {"x-convscope-layers": "all", "x-convscope-channels": "1"}
    for accept in (media.JSON, media.NPZ):
        yield [{"body": files[0]}], [_headers("image/png", accept) | options]
    if layers:
        yield [{"body": files[0]}], [_headers("image/png", media.PNG) | {"x-convscope-layers": layers[0]}]
    for file in files:
        yield [{"data": file, "top_k": b"0"}], [_headers("multipart/form-data", media.JSON)]


def _headers(content_type: str, accept: str) -> dict[str, Any]:
    return {"content-type": content_type, "accept": accept, "content-length": "1", "host": "localhost"}


def _files(preprocessing: Preprocessing) -> list[bytes]:
    """Return a picture of the network's size and one of another size as PNG, JPEG and WebP, and as an array."""
    height, width = preprocessing.size or ANY_SIZE
    generator = np.random.default_rng(0)
    files: list[bytes] = []
    for shape in ((height, width), (height + 8, width + 8)):
        pixels = generator.integers(0, 256, (*shape, 3), np.uint8)
        for kind in ("png", "jpeg", "webp"):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind)
            files.append(file.getvalue())
    array = io.BytesIO()
    np.save(array, pixels[:height, :width, : preprocessing.channels])
    return [*files, array.getvalue()]
