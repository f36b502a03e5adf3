"""The data that the page shows of one picture: fetched from the service, as plain values for the page's script.

A scene is a dictionary of JSON types. Arrays are packed as base64 of uint8.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope import ProtocolError, RequestRejected, encode_pictures
from convscope.pixels import grey_tiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convscope import Client, Input, Layer, ModelCard, Prediction, Timing
    from convscope.typing import Method, Picture
    from numpy.typing import NDArray

# Columns of the geometry table: the field of the model card and the heading. A column is left out if the service does
# not know it for any layer, or if all layers have the usual value.
_GEOMETRY = {
    "operation": "operation",
    "input_shape": "takes",
    "kernel": "kernel",
    "step": "step",
    "padding": "padding",
    "dilation": "dilation",
    "groups": "groups",
    "shape": "makes",
    "receptive_field": "a cell sees",
    "stride": "cells apart",
    "receptive_field_start": "cell 0, 0 from",
    "parameters": "parameters",
    "dense_parameters": "if fully connected",
    "multiply_adds": "multiply-adds",
    "bytes": "bytes, float32",
}
_USUAL: dict[str, Any] = {"dilation": (1, 1), "groups": 1}
_STAGES = {
    "read_s": "read the request",
    "decode_s": "decode the picture",
    "preprocess_s": "normalise",
    "forward_s": "run the network",
    "encode_s": "write the reply",
    "handler_s": "all of the worker",
    "outside_s": "network and queue",
    "total_s": "in all",
}

_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_NPY_MAGIC = b"\x93NUMPY"


def read_picture(picture: Picture) -> bytes:
    """Return a picture as the bytes of the file that is sent.

    Raises:
        OSError: A path cannot be read.
        TypeError: It is not a picture.
        ValueError: An array does not have the shape or dtype of a picture, or there are several pictures.
    """
    files, many = encode_pictures(picture)
    if many:
        raise ValueError("a page shows one picture; this is several")
    return files[0]


def fetch_scene(
    client: Client,
    file: bytes,
    card: ModelCard,
    *,
    model: str,
    title: str,
    max_cells: int,
    layers: str | Iterable[str] = "all",
    version: str | None = None,
    method: Method | None = "grad_cam",
    target: int | None = None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """Predict and explain a picture, and return what the page shows of it.

    Args:
        client: A connected client.
        file: The picture.
        card: The model's card.
        model: The model's name.
        title: Title of the picture.
        max_cells: Cells of all maps together. Where there would be more, each layer has as many of its strongest
            channels as fit.
        layers: As in `Client.predict`.
        version: As in `Client.predict`.
        method: How scores are explained; None for no explanation.
        target: Index of the class to explain; None for the most probable one.
        request_id: Id of the request for the maps.

    Returns:
        The scene: `title`, `model`, `picture`, `scores`, `layers`, `heat`, `geometry` and `timing`. `picture` is None
        if it cannot be shown. `heat` is None if no method was given, or if the service cannot explain and neither a
        target nor a method other than grad_cam was given.

    Raises:
        ConvscopeError: The service rejected a request, or did not respond.
        ValueError: An option is out of range.
    """
    names = {layers} if isinstance(layers, str) else set(layers)
    wanted = [layer for layer in card.layers if "all" in names or layer.name in names]
    most = min(max_cells, card.limits.max_reply_bytes * 9 // 10 or max_cells)
    prediction = client.predict(
        file,
        model=model,
        version=version,
        layers=layers,
        map_dtype="uint8",
        channels=fitting_channels(wanted, most),
        timing=True,
        request_id=request_id,
    )
    heat, picture = _explain(client, file, card, model=model, version=version, method=method, target=target)
    return {
        "title": title,
        "model": {
            "name": prediction.model,
            "version": prediction.version,
            "engine": prediction.engine,
            "device": prediction.device,
            "description": card.description,
            "parameters": card.parameters,
            "request": prediction.request_id,
        },
        "picture": picture or pack_file(file, card.input),
        "scores": [score._asdict() | {"logit": number(score.logit)} for score in prediction.top],
        "layers": _maps(prediction, {layer.name: layer for layer in card.layers}),
        "heat": heat,
        "geometry": _geometry(card),
        "timing": None if prediction.timing is None else _timing(prediction.timing),
    }


def fitting_channels(layers: Iterable[Layer], max_cells: int) -> int | None:
    """Return how many channels of each layer fit; None if all do, or if their sizes are not known beforehand."""
    shapes = [layer.shape for layer in layers if len(layer.shape) == 3]
    if sum(c * h * w for c, h, w in shapes) <= max_cells:
        return None
    most = max(c for c, _, _ in shapes)
    return next((n for n in range(most - 1, 1, -1) if sum(min(n, c) * h * w for c, h, w in shapes) <= max_cells), 1)


def _explain(
    client: Client,
    file: bytes,
    card: ModelCard,
    *,
    model: str,
    version: str | None,
    method: Method | None,
    target: int | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the heat map, and the network's input; None for what the service cannot give."""
    chosen = method is not None and (method != "grad_cam" or target is not None)  # By the caller, not by default.
    methods: tuple[Method, ...] = (method, "picture") if method and (card.classes or chosen) else ("picture",)
    for one in methods:
        try:
            found = client.explain(
                file, model=model, version=version, method=one, target=None if one == "picture" else target
            )
        except (RequestRejected, ProtocolError):  # The method does not suit the network, or the service is too old.
            if chosen:
                raise
            continue
        picture = pack_picture(found.picture)
        if one == "picture":
            return None, picture
        about = {"method": found.method, "layer": found.layer, "label": found.label}
        return about | pack_heat(found.heat), picture
    return None, None


def _maps(prediction: Prediction, layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Pack the maps in the order of the forward pass."""
    found = []
    for name in sorted(prediction.maps, key=list(layers).index):
        layer, cells = layers[name], prediction.maps[name]
        if not cells.size:
            continue
        found.append(
            {
                "name": name,
                "of": layer.shape[0] if cells.ndim == 3 else 1,
                "field": layer.receptive_field,
                "start": layer.receptive_field_start,
                "stride": layer.stride,
                **pack_map(cells, prediction.channels[name]),
            }
        )
    return found


def _geometry(card: ModelCard) -> dict[str, Any]:
    """Return the geometry table: its headings, and a row of text for each layer."""
    rows = [dataclasses.asdict(layer) | {"bytes": layer.bytes.get("float32")} for layer in card.layers]
    keys = [key for key in _GEOMETRY if any(row.get(key) not in (None, 0, (), "", _USUAL.get(key)) for row in rows)]
    return {
        "headings": ["layer", *(_GEOMETRY[key] for key in keys)],
        "rows": [[row["name"], *(_text(key, row.get(key)) for key in keys)] for row in rows],
    }


def _text(key: str, value: Any) -> str:
    if value is None or value in ((), "") or (value == 0 and key in ("groups", "bytes")):
        return "–"
    if isinstance(value, tuple):
        if key in ("receptive_field_start", "padding"):
            return ", ".join(map(str, value))
        return "×".join(str(length or "any") for length in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _timing(timing: Timing) -> list[list[Any]]:
    return [[name, number(1000 * getattr(timing, key))] for key, name in _STAGES.items()]


def pack_map(cells: NDArray[np.float32], channels: Sequence[int]) -> dict[str, Any]:
    """Pack a map, the channels with the largest mean first.

    Args:
        cells: (C, h, w), or (C,), which becomes one row of C cells; float32, any range.
        channels: The number of each channel.

    Returns:
        `channels`; `rows` and `columns` of a channel; `cells`, base64 of uint8 in C order; and for each channel the
        `least` and `greatest` value, which are 0 and 255 in `cells`; None for a channel without a finite value.
    """
    if cells.ndim != 3:
        cells, channels = cells.reshape(1, 1, -1), [0]
    means = np.where(np.isfinite(cells), cells, -np.inf).mean(axis=(1, 2), dtype=np.float64)
    order = np.argsort(-means, kind="stable")
    cells = cells[order]
    flat = np.where(np.isfinite(cells), cells, np.nan).reshape(len(cells), -1)
    known = [channel[~np.isnan(channel)] for channel in flat]
    return {
        "channels": [channels[position] for position in order],
        "rows": cells.shape[1],
        "columns": cells.shape[2],
        "cells": _base64(grey_tiles(cells)),
        "least": [number(channel.min()) if channel.size else None for channel in known],
        "greatest": [number(channel.max()) if channel.size else None for channel in known],
    }


def pack_heat(heat: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a heat map.

    Args:
        heat: (C, h, w) or (h, w), any range; the sum over the channels is shown.

    Returns:
        `rows`, `columns`, `cells`, base64 of uint8, and `greatest`: value = (cell - 128) / 127 · greatest.
    """
    flat = np.nan_to_num(heat.sum(axis=0) if heat.ndim == 3 else heat)
    greatest = float(np.abs(flat).max(initial=0.0))
    scaled = flat / greatest if greatest else np.zeros_like(flat)
    return {
        "rows": flat.shape[0],
        "columns": flat.shape[1],
        "cells": _base64(np.rint(scaled * 127 + 128).astype(np.uint8)),
        "greatest": number(greatest),
    }


def pack_picture(picture: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a network's input.

    Args:
        picture: (C, H, W), 0..1.

    Returns:
        `rows`, `columns`, `channels` (1 or 3) and `cells`, base64 of uint8 in C order; `exact`, true.
    """
    shown = picture[: 3 if len(picture) == 3 else 1]
    pixels = np.rint(np.clip(np.nan_to_num(shown), 0, 1) * 255).astype(np.uint8)
    channels, rows, columns = pixels.shape
    return {"rows": rows, "columns": columns, "channels": channels, "cells": _base64(pixels), "exact": True}


def pack_file(file: bytes, takes: Input) -> dict[str, Any] | None:
    """Pack a picture file, which the page has to resize to the network's input itself.

    Args:
        file: PNG, JPEG, WebP or .npy.
        takes: The network's input.

    Returns:
        As `pack_picture`, but with `file`, a data URL, instead of `cells`; `rows` and `columns` None for a network of
        any size; and `exact` false. A .npy array of the network's size is packed as `cells`. None for other arrays, and
        for files of another type.
    """
    if file.startswith(_NPY_MAGIC):
        array = np.load(io.BytesIO(file), allow_pickle=False)
        scale = 255 if array.dtype == np.uint8 else 1
        planes = array[np.newaxis] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        resized = takes.height is not None and planes.shape[1:] != (takes.height, takes.width)
        return None if resized else pack_picture(planes.astype(np.float32) / scale)
    kind = next((kind for magic, kind in _MEDIA_TYPES.items() if file.startswith(magic)), None)
    if kind is None:
        return None
    return {
        "rows": takes.height,
        "columns": takes.width,
        "channels": takes.channels,
        "file": f"data:{kind};base64,{base64.b64encode(file).decode()}",
        "exact": False,
    }


def number(value: float) -> float | None:
    """Return a number of six digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _base64(cells: NDArray[np.uint8]) -> str:
    return base64.b64encode(cells.tobytes()).decode()
