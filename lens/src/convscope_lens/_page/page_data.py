"""Fetches what the page shows for one picture, as JSON types; arrays are base64 of uint8."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope import ProtocolError, RequestRejected, encode_pictures
from convscope.commands import LAYER_HEADINGS, STAGES
from convscope.pixels import grey_tiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convscope import ClassScore, Client, Explanation, Input, Layer, ModelCard, Prediction, Timing
    from convscope.typing import Method, Picture
    from numpy.typing import NDArray

_DEFAULTS: dict[str, Any] = {"dilation": (1, 1), "groups": 1}
_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def encode_one_picture(picture: Picture) -> bytes:
    """Encode a picture as the file that is sent.

    Raises:
        OSError: A path cannot be read.
        TypeError: The argument is not a picture.
        ValueError: An array does not have the shape or dtype of a picture, or there are several pictures.
    """
    files, is_list = encode_pictures(picture)
    if is_list:
        raise ValueError(f"expected one picture, got {len(files)}")
    return files[0]


def fetch_page_data(
    client: Client,
    file: bytes,
    card: ModelCard,
    *,
    model: str,
    title: str,
    max_values: int,
    layers: str | Iterable[str] = "all",
    version: str | None = None,
    method: Method | None = "grad_cam",
    target: int | None = None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """Predict and explain a picture, and return the data of the page.

    Args:
        client: An open client.
        file: The picture.
        card: The model card.
        model: Name of the model.
        title: Title of the picture.
        max_values: Maximum number of values of all maps together. If there are more, each layer has as many of its
            strongest channels as fit.
        layers: As in `Client.predict`.
        version: As in `Client.predict`.
        method: Method of the heat map; None for none.
        target: Index of the class to explain; None for the most probable one.
        request_id: Id of the request for the maps.

    Returns:
        A dict of `title`, `model`, `picture`, `scores`, `layers`, `heat`, `geometry` and `timing`. `picture` is None if
        it cannot be shown. `heat` is None without a method, or if the model does not support Grad-CAM, the default.

    Raises:
        ConvscopeError: A request failed.
        ValueError: An option is out of range.
    """
    names = {layers} if isinstance(layers, str) else set(layers)
    requested = [layer for layer in card.layers if "all" in names or layer.name in names]
    max_values = min(max_values, card.limits.max_reply_bytes * 9 // 10 or max_values)
    prediction = client.predict(
        file,
        model=model,
        version=version,
        layers=layers,
        map_dtype="uint8",
        channels=channels_that_fit(requested, max_values),
        timing=True,
        request_id=request_id,
    )
    heat, picture, original = _explain(client, file, card, model=model, version=version, method=method, target=target)
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
        "original": original,
        "scores": [_score(score) for score in prediction.top],
        "layers": _maps(prediction, {layer.name: layer for layer in card.layers}),
        "heat": heat,
        "geometry": _layer_table(card),
        "timing": None if prediction.timing is None else _timing(prediction.timing),
    }


def channels_that_fit(layers: Iterable[Layer], max_values: int) -> int | None:
    """Return how many channels of each layer fit; None if all do, or if their sizes are not known beforehand."""
    shapes = [layer.shape for layer in layers if len(layer.shape) == 3]
    if sum(c * h * w for c, h, w in shapes) <= max_values:
        return None
    maximum = max(c for c, _, _ in shapes)
    return next((n for n in range(maximum - 1, 1, -1) if sum(min(n, c) * h * w for c, h, w in shapes) <= max_values), 1)


def _explain(
    client: Client,
    file: bytes,
    card: ModelCard,
    *,
    model: str,
    version: str | None,
    method: Method | None,
    target: int | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any] | None]:
    """Return heat map, network's input, and the picture that it is a part of; None for what is not there."""
    explicit = method is not None and (method != "grad_cam" or target is not None)  # Requested explicitly.
    methods: tuple[Method, ...] = (method, "picture") if method and (card.classes or explicit) else ("picture",)
    for tried in methods:
        try:
            explanation = client.explain(
                file, model=model, version=version, method=tried, target=None if tried == "picture" else target
            )
        except (RequestRejected, ProtocolError):  # The method does not suit the network, or the service is too old.
            if explicit:
                raise
            continue
        picture = pack_picture(explanation.picture)
        original = _pack_original(file, explanation) if card.input.resize else None
        if not explanation.has_heat:
            return None, picture, original
        info = {"method": explanation.method, "layer": explanation.layer, "label": explanation.label}
        return info | pack_heat(explanation.heat), picture, original
    return None, None, None


def _pack_original(file: bytes, explanation: Explanation) -> dict[str, Any] | None:
    """Pack the picture that was sent, with the part of it that the network saw; None if a page cannot show it."""
    url = _data_url(file)
    if url is None or explanation.original_size is None or explanation.region is None:
        return None
    rows, columns = explanation.original_size
    return {"rows": rows, "columns": columns, "region": explanation.region, "file": url}


def _data_url(file: bytes) -> str | None:
    media_type = next((value for magic, value in _MEDIA_TYPES.items() if file.startswith(magic)), None)
    return None if media_type is None else f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def _score(score: ClassScore) -> dict[str, Any]:
    """Convert a class's score, or a number that is none, to JSON types."""
    values: dict[str, Any] = score.as_values()
    figure = "logit" if score.value is None else "value"
    return values | {figure: round_to_6_digits(values[figure])}


def _maps(prediction: Prediction, layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Pack the maps in the order of the forward pass."""
    maps = []
    for name in sorted(prediction.maps, key=list(layers).index):
        layer, feature_map = layers[name], prediction.maps[name]
        if not feature_map.size:
            continue
        maps.append(
            {
                "name": name,
                "channel_count": layer.shape[0] if feature_map.ndim == 3 else 1,
                "receptive_field": layer.receptive_field,
                "receptive_field_start": layer.receptive_field_start,
                "stride": layer.stride,
                **pack_map(feature_map, prediction.channels[name]),
            }
        )
    return maps


def _layer_table(card: ModelCard) -> dict[str, Any]:
    """Return the table of layers: its headings, and a row of texts per layer.

    Columns without values, or with only default values, are omitted.
    """
    rows = [dataclasses.asdict(layer) | {"bytes": layer.bytes.get("float32")} for layer in card.layers]
    keys = [key for key in LAYER_HEADINGS if any(row[key] not in (None, 0, (), "", _DEFAULTS.get(key)) for row in rows)]
    return {
        "headings": ["layer", *(LAYER_HEADINGS[key] for key in keys)],
        "rows": [[row["name"], *(_text(key, row[key]) for key in keys)] for row in rows],
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
    return [[label, round_to_6_digits(1000 * getattr(timing, name))] for name, label in STAGES.items()]


def pack_map(feature_map: NDArray[np.float32], channels: Sequence[int]) -> dict[str, Any]:
    """Pack a map, the channels with the largest mean first.

    Args:
        feature_map: (C, h, w), or (C,), which becomes one row of C cells; float32, any range.
        channels: The index of each channel.

    Returns:
        `channels`; `rows` and `columns` of a channel; `values`, base64 of uint8 in C order; and for each channel the
        `min` and `max`, which are 0 and 255 in `values`; None for a channel without a finite value.
    """
    if feature_map.ndim != 3:
        feature_map, channels = feature_map.reshape(1, 1, -1), [0]
    means = np.where(np.isfinite(feature_map), feature_map, -np.inf).mean(axis=(1, 2), dtype=np.float64)
    order = np.argsort(-means, kind="stable")
    feature_map = feature_map[order]
    flat = np.where(np.isfinite(feature_map), feature_map, np.nan).reshape(len(feature_map), -1)
    finite = [channel[~np.isnan(channel)] for channel in flat]
    return {
        "channels": [channels[position] for position in order],
        "rows": feature_map.shape[1],
        "columns": feature_map.shape[2],
        "values": _base64(grey_tiles(feature_map)),
        "min": [round_to_6_digits(channel.min()) if channel.size else None for channel in finite],
        "max": [round_to_6_digits(channel.max()) if channel.size else None for channel in finite],
    }


def pack_heat(heat: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a heat map.

    Args:
        heat: (C, h, w) or (h, w), float32, any range; the channels are summed.

    Returns:
        `rows`, `columns`, `values`, base64 of uint8, and `max`: heat = (value - 128) / 127 · max.
    """
    flat = np.nan_to_num(heat.sum(axis=0) if heat.ndim == 3 else heat)
    maximum = float(np.abs(flat).max(initial=0.0))
    scaled = flat / maximum if maximum else np.zeros_like(flat)
    return {
        "rows": flat.shape[0],
        "columns": flat.shape[1],
        "values": _base64(np.rint(scaled * 127 + 128).astype(np.uint8)),
        "max": round_to_6_digits(maximum),
    }


def pack_picture(picture: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a network's input.

    Args:
        picture: (C, H, W), float32, 0..1.

    Returns:
        `rows`, `columns`, `channels` (1 or 3) and `values`, base64 of uint8 in C order; `exact`, true.
    """
    visible = picture[: 3 if len(picture) == 3 else 1]
    pixels = np.rint(np.clip(np.nan_to_num(visible), 0, 1) * 255).astype(np.uint8)
    channels, rows, columns = pixels.shape
    return {"rows": rows, "columns": columns, "channels": channels, "values": _base64(pixels), "exact": True}


def pack_file(file: bytes, input_spec: Input) -> dict[str, Any] | None:
    """Pack a picture file, which the page resizes to the network's input.

    Args:
        file: PNG, JPEG, WebP or .npy.
        input_spec: The network's input.

    Returns:
        As `pack_picture`, but with `file`, a data URL, instead of `values`; `rows` and `columns` None for a network of
        any size; and `exact` false. A .npy array of the network's size is packed as `values`. None for other arrays,
        and for other types of files.
    """
    if file.startswith(np.lib.format.MAGIC_PREFIX):
        array = np.load(io.BytesIO(file), allow_pickle=False)
        scale = 255 if array.dtype == np.uint8 else 1
        planes = array[np.newaxis] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        resized = input_spec.height is not None and planes.shape[1:] != (input_spec.height, input_spec.width)
        return None if resized or input_spec.resize else pack_picture(planes.astype(np.float32) / scale)
    url = _data_url(file)
    if url is None or input_spec.resize:  # The page does not crop.
        return None
    return {
        "rows": input_spec.height,
        "columns": input_spec.width,
        "channels": input_spec.channels,
        "file": url,
        "exact": False,
    }


def round_to_6_digits(value: float) -> float | None:
    """Round to six significant digits; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _base64(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode()
