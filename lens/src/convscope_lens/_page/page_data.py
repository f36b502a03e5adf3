"""Fetches what the page shows for one picture, as JSON types; arrays are base64 of uint8.

Maps and pictures are reduced to the size at which they are looked at: the mean of blocks of cells.
Axes: `C` channels, `H, W` picture pixels, `h, w` map cells.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from convscope import ProtocolError, RequestRejected, encode_pictures
from convscope.commands import LAYER_HEADINGS, STAGES

from convscope_lens._arrays import load_npy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from convscope import ClassScore, Client, Explanation, Input, Layer, ModelCard, Prediction, Source, Timing
    from convscope.typing import Method, Picture
    from numpy.typing import NDArray

MAP_SIDE = 160  # Cells on the longer side of a map that is shown; larger maps are reduced.
PICTURE_SIDE = 512  # Pixels on the longer side of the network's input, and of its heat map, likewise.
ORIGINAL_SIDE = 1024  # Of the picture that was sent.
THUMBNAIL_SIDE = 96
NUMBERS_SHOWN = 1024  # Of a layer without rows and columns, the largest.
KERNEL_VALUES = 40_000  # Of a layer whose kernels are stored in a report.
_DEFAULTS: dict[str, Any] = {"dilation": (1, 1), "groups": 1}


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
    layer: str | None = None,
    target: int | None = None,
    top_k: int = 5,
    by_default: bool = False,
    kernels: bool = False,
    edits: Sequence[Mapping[str, Any]] = (),
    request_id: str | None = None,
) -> dict[str, Any]:
    """Predict and explain a picture, and return the data of the page.

    Arguments that are not listed are those of `Client.predict` and `Client.explain`; `layer` is that of the heat map.

    * `title`: of the picture.
    * `max_values`: maximum number of values of all maps together, as they are shown. If there are more, each layer has
      as many of its strongest channels as fit.
    * `method`: of the heat map; None for none.
    * `by_default`: whether nobody asked for `method`: if it does not suit the network there is no heat map, and
      `heat_note` says why.
    * `kernels`: whether to include the kernels of layers with few weights.
    * `edits`: with them there is no heat map, since explanations are of the unedited network; scores and maps come with
      what the edits changed.
    * `request_id`: of the request for the maps.

    Returns:
        A dict of `title`, `model`, `picture`, `original`, `notes`, how the picture was converted, `scores`, `layers`,
        `heat`, `heat_note`, `geometry`, `timing` and `edits`, their number; with edits also `gone`, the scores that
        they removed. `picture` is None if it cannot be shown, `heat` if there is none.

    Raises:
        ConvscopeError: A request failed.
        TypeError: An edit has a field of the wrong type.
        ValueError: An option is out of range, or the explanation would be a single cell.
    """
    requested = card.select_layers(layers)
    if edits:
        method = layer = None
    _check_explained_layer(card, method, layer)
    explanation, note = _explain(
        client, file, card, model=model, version=version, method=method, layer=layer, target=target,
        by_default=by_default,
    )  # fmt: skip
    note = "There is no heat map: explanations are of the network without edits." if edits else note
    size = explanation.picture.shape[1:] if explanation is not None else None
    shapes = [_shape_for(one, card.input, size) for one in requested]
    reply_values = card.limits.max_reply_bytes * 9 // 10 // (2 if edits else 1)  # The changes come along.
    fitting = [
        channels_that_fit(shapes, reply_values or max_values),
        channels_that_fit([(shape[0], *_reduced(shape[1:])) for shape in shapes if len(shape) == 3], max_values),
    ]
    prediction = client.predict(
        file,
        model=model,
        version=version,
        layers=layers,
        map_dtype="uint8",
        channels=min((count for count in fitting if count is not None), default=None),
        top_k=top_k,
        timing=True,
        request_id=request_id,
        edits=edits,
        compare=bool(edits),
    )
    maps = _maps_of(prediction)
    for name, missing in _missing_channels(maps, edits, card).items():
        more = client.predict(
            file, model=model, version=version, layers=[name], map_dtype="uint8", channels=missing, top_k=1,
            edits=edits, compare=True,
        )  # fmt: skip
        maps[name] = maps[name].joined(_maps_of(more)[name])
    shown = set(maps)
    heat = None
    if explanation is not None and explanation.has_heat:
        heat = _heat(explanation, card)
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
        "picture": pack_file(file, card.input) if explanation is None else pack_picture(explanation.picture),
        "original": None if explanation is None or not card.input.resize else _pack_original(file, explanation),
        "notes": prediction.notes,
        **_scores(prediction),
        "class_count": len(card.classes),
        "known_sources": any(one.sources for one in card.layers),
        "score_sources": _sources(card.sources, card, shown),
        "layers": _pack_maps(maps, card, client if kernels else None, version),
        "heat": heat,
        "heat_note": note,
        "geometry": _layer_table(card, prediction),
        "timing": None if prediction.timing is None else _timing(prediction.timing),
        "edits": len(edits),
    }


def channels_that_fit(shapes: Iterable[tuple[int, ...]], max_values: int) -> int | None:
    """Return how many channels of each map (C, h, w) fit; None if all do."""
    maps = [shape for shape in shapes if len(shape) == 3]
    if sum(c * h * w for c, h, w in maps) <= max_values:
        return None
    maximum = max(c for c, _, _ in maps)
    return next((n for n in range(maximum - 1, 1, -1) if sum(min(n, c) * h * w for c, h, w in maps) <= max_values), 1)


def _shape_for(layer: Layer, input_spec: Input, size: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return a map's shape for a picture of a size: the card states it for 32×32 if the network takes any size."""
    if len(layer.shape) != 3 or input_spec.height is not None or size is None or layer.stride is None:
        return layer.shape
    return layer.shape[0], -(-size[0] // layer.stride[0]), -(-size[1] // layer.stride[1])


def _check_explained_layer(card: ModelCard, method: Method | None, layer: str | None) -> None:
    """Raise ValueError for a layer of one cell, whose heat map would be one colour, or one that is not used."""
    if layer is not None and method not in ("grad_cam", "cam"):
        raise ValueError(f"layer is for grad_cam and cam; {method or 'no method'} uses none")
    if layer is None or card.input.height is None:
        return
    shape = card.layer(layer).shape
    if len(shape) == 3 and math.prod(shape[1:]) > 1:
        return
    wide = [one.name for one in card.layers if len(one.shape) == 3 and math.prod(one.shape[1:]) > 1]
    way_out = f"choose {' or '.join(wide[-2:])}, or " if wide else "choose "
    raise ValueError(
        f"{method} shows where in a map a score comes from, and {layer} has no more than one cell; "
        f"{way_out}a method that works on pixels, such as occlusion"
    )


def _explain(
    client: Client,
    file: bytes,
    card: ModelCard,
    *,
    model: str,
    version: str | None,
    method: Method | None,
    layer: str | None,
    target: int | None,
    by_default: bool,
) -> tuple[Explanation | None, str]:
    """Return the explanation, at least with the network's input if the service gives it; and why there is no heat."""
    note = ""
    if method is not None and (card.classes or not by_default):
        try:
            explanation = client.explain(file, model=model, version=version, method=method, layer=layer, target=target)
        except (RequestRejected, ProtocolError) as error:  # It does not suit the network, or the service is too old.
            if not by_default:
                raise
            note = f"There is no heat map: {error.message}"
        else:
            if explanation.has_heat and explanation.heat.size > 1:
                return explanation, ""
            note = f"{explanation.layer} has no more than one cell, so {method} says nothing of places; try occlusion."
            if not by_default:
                raise ValueError(note)
    try:
        return client.explain(file, model=model, version=version, method="picture"), note
    except (RequestRejected, ProtocolError):
        return None, note


def _heat(explanation: Explanation, card: ModelCard) -> dict[str, Any]:
    """Pack a heat map with what its cells are: those of a layer, or pixels of the network's input."""
    layer = next((one for one in card.layers if one.name == explanation.layer), None)
    return {
        "method": explanation.method,
        "layer": explanation.layer,
        "target": explanation.target,
        "label": explanation.label,
        "delta": None if explanation.delta is None else round_to_6_digits(explanation.delta),
        **(_geometry(layer) if layer else dict.fromkeys(_GEOMETRY)),
        **pack_heat(explanation.heat),
    }


def _pack_original(file: bytes, explanation: Explanation) -> dict[str, Any] | None:
    """Pack the picture that was sent, with the part of it that the network saw; None if a page cannot show it."""
    url = thumbnail(file, ORIGINAL_SIDE)
    if url is None or explanation.original_size is None or explanation.region is None:
        return None
    rows, columns = explanation.original_size
    return {"rows": rows, "columns": columns, "region": explanation.region, "file": url}


def thumbnail(file: bytes, side: int = THUMBNAIL_SIDE) -> str | None:
    """Return a small version of a picture as a data URL; None if it is no picture that Pillow reads.

    Args:
        file: PNG, JPEG, WebP or .npy.
        side: Pixels on the longer side, at most.
    """
    try:
        image = _opened(file, side)
        image.thumbnail((side, side))
        image = _on_white(image)
    except Exception:  # Pillow raises many kinds for broken files; the service says what is wrong with them.
        return None
    return _data_url(image, lossy=max(image.size) > THUMBNAIL_SIDE)


def _opened(file: bytes, side: int | None = None) -> Any:
    """Return a picture file as an upright Pillow image; a large JPEG may be decoded to `side` pixels or more."""
    from PIL import Image, ImageOps

    array = load_npy(file)
    if array is not None:
        return Image.fromarray(_array_pixels(array))
    image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP"))
    if side is not None:
        image.draft(None, (side, side))
    return ImageOps.exif_transpose(image)


def _on_white(image: Any) -> Any:
    """Return a Pillow image in RGB or grey; transparent pixels are composited on white, as the service does."""
    from PIL import Image

    if image.mode in ("RGB", "L"):
        return image
    if image.mode == "P" or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _data_url(image: Any, *, lossy: bool) -> str:
    content, kind = io.BytesIO(), "jpeg" if lossy else "png"
    image.save(content, kind.upper(), **({"quality": 85} if lossy else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _array_pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the pixels of an array: (H, W) or (H, W, 3), uint8."""
    if array.ndim == 3 and array.shape[2] != 3:
        array = array[:, :, 0]
    return array if array.dtype == np.uint8 else _to_levels(array)


def _to_levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert values in 0..1 to levels 0..255."""
    levels: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    return levels


def _scores(prediction: Prediction) -> dict[str, Any]:
    """Return `scores`; after edits each with its `change`, and `gone`: label and change of those that edits removed."""
    scores = [_score(score) for score in prediction.top]
    if prediction.change is None:
        return {"scores": scores}
    changes = [_score(score) for score in prediction.change.top]
    return {
        "scores": [score | {"change": change} for score, change in zip(scores, changes, strict=False)],
        "gone": changes[len(scores) :],
    }


def _score(score: ClassScore) -> dict[str, Any]:
    """Convert a class's score, or a number that is none, to JSON types."""
    values: dict[str, Any] = score.as_values()
    figure = "logit" if score.value is None else "value"
    return values | {figure: round_to_6_digits(values[figure])}


_GEOMETRY = ("receptive_field", "receptive_field_start", "stride")


def _geometry(layer: Layer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _GEOMETRY}


class _Map(NamedTuple):
    """A layer's map: (C, h, w), or numbers without rows and columns; the channels' indexes; and what edits changed."""

    cells: NDArray[np.float32]
    channels: tuple[int, ...]
    change: NDArray[np.float32] | None

    def joined(self, other: _Map) -> _Map:
        """Return the map with the channels of another of the same layer; both have changes."""
        change = [one.change for one in (self, other) if one.change is not None]
        cells = np.concatenate([self.cells, other.cells])
        return _Map(cells, self.channels + other.channels, np.concatenate(change))


def _maps_of(prediction: Prediction) -> dict[str, _Map]:
    change = prediction.change
    return {
        name: _Map(cells, prediction.channels[name], None if change is None else change.maps[name])
        for name, cells in prediction.maps.items()
    }


def _missing_channels(
    maps: Mapping[str, _Map], edits: Sequence[Mapping[str, Any]], card: ModelCard
) -> dict[str, list[int]]:
    """Return the edited channels that were left out, by layer: one that is switched off is not among the strongest."""
    missing: dict[str, list[int]] = {}
    for edit in edits:
        name, channels = edit["layer"], edit.get("channels")
        if name in maps and isinstance(channels, list) and len(maps[name].channels) < card.layer(name).shape[0]:
            known = {*maps[name].channels, *missing.get(name, [])}
            new = [channel for channel in dict.fromkeys(channels) if channel not in known]
            if new:
                missing.setdefault(name, []).extend(new)
    return missing


def _pack_maps(
    maps: Mapping[str, _Map], card: ModelCard, client: Client | None, version: str | None
) -> list[dict[str, Any]]:
    """Pack the maps in the order of the forward pass; with a client, the kernels of layers with few weights too."""
    layers = {layer.name: layer for layer in card.layers}
    packed_maps = []
    for name in sorted(maps, key=list(layers).index):
        layer, feature_map = layers[name], maps[name].cells
        if not feature_map.size:
            continue
        packed = pack_map(feature_map, maps[name].channels, maps[name].change)
        kernels = None
        if client is not None and layer.operation == "Conv2d" and _count_weights(layer) <= KERNEL_VALUES:
            kernels = _kernels(client, card.model, name, version, packed["channels"])
        packed_maps.append(
            {
                "name": name,
                "channel_count": layer.shape[0] if layer.shape else 1,
                "operation": describe_operation(layer),
                "sources": _sources(layer.sources, card, set(maps)),
                "has_kernels": layer.operation == "Conv2d",
                "kernels": kernels,
                **_geometry(layer),
                **packed,
            }
        )
    return packed_maps


def _sources(sources: Sequence[Source], card: ModelCard, shown: set[str]) -> list[dict[str, Any]]:
    """Return what feeds a layer or the scores; a layer that is not shown is replaced by what feeds it."""
    found: dict[str, tuple[int, int]] = {}
    for source in sources:
        steps: list[dict[str, Any]] = [{"layer": source.layer, "fewest": 0, "most": 0}]
        if source.layer and source.layer not in shown:
            steps = _sources(card.layer(source.layer).sources, card, shown)
        for step in steps:
            fewest, most = step["fewest"] + source.fewest, step["most"] + source.most
            known = found.get(step["layer"], (fewest, most))
            found[step["layer"]] = min(fewest, known[0]), max(most, known[1])
    return [{"layer": layer, "fewest": fewest, "most": most} for layer, (fewest, most) in found.items()]


def _kernels(client: Client, model: str, layer: str, version: str | None, channels: list[int]) -> dict[str, Any] | None:
    """Return the kernels of some channels; None if the service does not give them."""
    try:
        return pack_kernels(client.filters(model, layer, version)[channels], channels)
    except (RequestRejected, ProtocolError):
        return None


def describe_operation(layer: Layer) -> str:
    """Return what makes a layer's map, such as `3×3 convolution, stride 2`; empty if the card does not say."""
    if not layer.operation.startswith("Conv"):
        return {"": "", "Linear": "linear"}.get(layer.operation, layer.operation)
    text = f"{_text('kernel', layer.kernel)} {'transposed ' * ('Transpose' in layer.operation)}convolution"
    if any(step != 1 for step in layer.step):
        text += f", step {layer.step[0] if len(set(layer.step)) == 1 else _text('step', layer.step)}"
    return text + (f", {layer.groups} groups" if layer.groups > 1 else "")


def _layer_table(card: ModelCard, prediction: Prediction) -> dict[str, Any]:
    """Return the table of layers for the picture shown: its headings, and a row of texts per layer.

    Columns without values, or with only default values, are omitted.
    """
    rows = []
    for layer in card.layers:
        row = dataclasses.asdict(layer) | {"bytes": layer.bytes.get("float32")}
        feature_map = prediction.maps.get(layer.name)
        if card.input.height is None and len(layer.shape) == 3:
            row |= _sizes_of_map(layer, feature_map)
        rows.append(row)
    keys = [key for key in LAYER_HEADINGS if any(row[key] not in (None, 0, (), "", _DEFAULTS.get(key)) for row in rows)]
    return {
        "headings": ["layer", *(LAYER_HEADINGS[key] for key in keys)],
        "rows": [[row["name"], *(_text(key, row[key]) for key in keys)] for row in rows],
    }


def _sizes_of_map(layer: Layer, feature_map: NDArray[np.float32] | None) -> dict[str, Any]:
    """Return what depends on the picture's size, for a network of any size; the card states it for a trial picture."""
    taken = (layer.input_shape[0], 0, 0) if len(layer.input_shape) == 3 else ()
    unknown = {"input_shape": taken, "dense_parameters": 0}
    if feature_map is None or feature_map.ndim != 3:
        return unknown | {"shape": (layer.shape[0], 0, 0), "multiply_adds": 0, "bytes": 0}
    shape = (layer.shape[0], *feature_map.shape[1:])
    # A convolution takes the same number for each cell that it makes; of several, each has cells of its own.
    per_cell = layer.multiply_adds / max(1, math.prod(layer.shape[1:]))
    exact = layer.operation == "Conv2d" and layer.parameters <= _count_weights(layer) + layer.shape[0]
    adds = round(per_cell * math.prod(shape[1:])) if exact else 0
    return unknown | {"shape": shape, "multiply_adds": adds, "bytes": 4 * math.prod(shape)}


def _count_weights(layer: Layer) -> int:
    """Return the number of weights of the convolution that makes a layer's map, at most."""
    if not layer.input_shape:
        return layer.parameters  # Those of all that is computed since the sources.
    return layer.shape[0] * layer.input_shape[0] // max(1, layer.groups) * math.prod(layer.kernel)


def _text(key: str, value: Any) -> str:
    if value is None or value in ((), "") or (value == 0 and key != "parameters"):
        return "–"
    if isinstance(value, tuple):
        if key in ("receptive_field_start", "padding"):
            return ", ".join(map(str, value))
        return "×".join(str(length or "any") for length in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _timing(timing: Timing) -> list[list[Any]]:
    return [[label, round_to_6_digits(1000 * getattr(timing, name))] for name, label in STAGES.items()]


def pack_map(
    feature_map: NDArray[np.float32], channels: Sequence[int], change: NDArray[np.float32] | None = None
) -> dict[str, Any]:
    """Pack a map, the channels with the largest mean first; after edits in the order that they had before.

    Args:
        feature_map: (C, h, w), or numbers without rows and columns; float32, any range.
        channels: The index of each channel.
        change: What edits changed, as `feature_map`; None without edits.

    Returns:
        `channels`, and `cells`, [h, w]. Of a map: `block`, the side of the blocks of cells that a value is the mean of;
        `rows` and `columns` of such blocks; `values`, base64 of uint8 in C order; and for each channel the `min` and
        `max` of its cells, which are 0 and 255 in `values`; None for a channel without a finite value. Of numbers,
        which maps of one cell are too: `numbers`, the largest, which are those of `channels`. With `change`, for each
        channel `change`, the difference that is farthest from 0, and of a map `before`, [min, max] before the edits.
    """
    if feature_map.ndim != 3 or feature_map.shape[1:] == (1, 1):
        return _pack_numbers(feature_map, channels if feature_map.ndim == 3 else range(feature_map.size), change)
    before = feature_map if change is None else feature_map - change
    means = np.where(np.isfinite(before), before, -np.inf).mean(axis=(1, 2), dtype=np.float64)
    order = np.argsort(-means, kind="stable")
    cells = feature_map.shape[1:]
    feature_map = feature_map[order]
    finite = np.isfinite(feature_map)
    minimum = np.where(finite, feature_map, np.inf).min(axis=(1, 2))
    maximum = np.where(finite, feature_map, -np.inf).max(axis=(1, 2))
    values, block = reduce_cells(np.where(finite, feature_map, np.nan), MAP_SIDE)
    with np.errstate(invalid="ignore"):
        span = np.where(maximum > minimum, maximum - minimum, 1)
        scaled = np.nan_to_num((values - minimum[:, None, None]) / span[:, None, None])
    packed = {
        "channels": [channels[position] for position in order],
        "cells": cells,
        "block": block,
        "rows": values.shape[1],
        "columns": values.shape[2],
        "values": _base64(np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)),
        "min": [round_to_6_digits(float(value)) for value in minimum],
        "max": [round_to_6_digits(float(value)) for value in maximum],
    }
    if change is not None:
        packed["change"] = [_largest(change[position]) for position in order]
        packed["before"] = [_ends_before(before[position], change[position]) for position in order]
    return packed


def _ends_before(before: NDArray[np.float32], change: NDArray[np.float32]) -> list[float | None]:
    """Return the least and the largest value of a channel before edits, which is known but for steps of uint8.

    A least value within them is 0: a map without negative values has other colours than one with them.
    """
    least, largest = float(before.min()), float(before.max())
    step = float(np.ptp(before + change) + np.ptp(change)) / 255
    return [0.0 if abs(least) <= step else round_to_6_digits(least), round_to_6_digits(largest)]


def _largest(change: NDArray[np.float32]) -> float | None:
    """Return the difference that is farthest from 0, with its sign."""
    return round_to_6_digits(float(change.flat[np.abs(change).argmax()]))


def _pack_numbers(
    values: NDArray[np.float32], channels: Sequence[int], change: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Pack numbers without rows and columns, the largest first."""
    flat = values.ravel()
    order = np.argsort(-np.where(np.isfinite(flat), flat, -np.inf), kind="stable")[:NUMBERS_SHOWN]
    packed = {
        "channels": [channels[position] for position in order],
        "cells": (1, 1),
        "count": flat.size,
        "numbers": [round_to_6_digits(float(flat[position])) for position in order],
    }
    if change is not None:
        packed["change"] = [_largest(change.ravel()[position]) for position in order]
    return packed


def _reduced(cells: tuple[int, ...]) -> tuple[int, ...]:
    block = max(1, -(-max(cells) // MAP_SIDE))
    return tuple(-(-length // block) for length in cells)


def reduce_cells(values: NDArray[np.float32], side: int) -> tuple[NDArray[np.float32], int]:
    """Reduce maps to the means of square blocks of cells.

    Args:
        values: (..., h, w), float32.
        side: Blocks on the longer side, at most.

    Returns:
        (..., ceil(h / block), ceil(w / block)), float32, and `block`, the side of a block in cells; 1 if `values` are
        small enough. The last row and column may be of smaller blocks.
    """
    rows, columns = values.shape[-2:]
    block = max(1, -(-max(rows, columns) // side))
    if block == 1:
        return values, 1
    tops, lefts = np.arange(0, rows, block), np.arange(0, columns, block)
    sums = np.add.reduceat(np.add.reduceat(values, tops, axis=-2, dtype=np.float64), lefts, axis=-1)
    counts = np.outer(np.diff(tops, append=rows), np.diff(lefts, append=columns))
    return (sums / counts).astype(np.float32), block


def pack_heat(heat: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a heat map.

    Args:
        heat: (C, h, w) or (h, w), float32, any range; the channels are summed.

    Returns:
        `cells`, [h, w]; `block`, `rows` and `columns` as in `pack_map`; `values`, base64 of uint8; and `max`:
        heat = (value - 128) / 127 · max.
    """
    flat = np.nan_to_num(heat.sum(axis=0) if heat.ndim == 3 else heat)
    cells = flat.shape
    flat, block = reduce_cells(flat, PICTURE_SIDE)
    maximum = float(np.abs(flat).max(initial=0.0))
    scaled = flat / maximum if maximum else np.zeros_like(flat)
    return {
        "cells": cells,
        "block": block,
        "rows": flat.shape[0],
        "columns": flat.shape[1],
        "values": _base64(np.rint(scaled * 127 + 128).astype(np.uint8)),
        "max": round_to_6_digits(maximum),
    }


def pack_kernels(filters: NDArray[np.float32], channels: Sequence[int]) -> dict[str, Any]:
    """Pack the kernels of some channels.

    Args:
        filters: (C, C_in, kernel height, kernel width), float32: those of `channels`.
        channels: Index of each in the layer.

    Returns:
        `channels`; `shape` of a channel's kernels, [C_in, height, width]; `values`, base64 of uint8; and `max` of each
        channel: weight = (value - 128) / 127 · max.
    """
    largest = np.abs(filters).max(axis=(1, 2, 3), initial=0.0)
    scaled = filters / np.where(largest > 0, largest, 1)[:, None, None, None]
    return {
        "channels": list(channels),
        "shape": filters.shape[1:],
        "values": _base64(np.rint(scaled * 127 + 128).astype(np.uint8)),
        "max": [round_to_6_digits(float(value)) for value in largest],
    }


def pack_picture(picture: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a network's input.

    Args:
        picture: (C, H, W), float32, 0..1.

    Returns:
        `rows`, `columns`, and `file`, a data URL of it, or of the means of blocks of pixels if it is large; `exact`,
        true.
    """
    image, block = _reduced_image(picture, PICTURE_SIDE)
    return {
        "rows": picture.shape[1],
        "columns": picture.shape[2],
        "file": _data_url(image, lossy=block > 1),
        "exact": True,
    }


def picture_url(picture: NDArray[np.float32], side: int) -> str:
    """Return a network's input, or a part of it, as the data URL of a small WebP file, exact up to 16 pixels a side.

    Args:
        picture: (C, H, W), float32, 0..1.
        side: Pixels on the longer side, at most.
    """
    image, _ = _reduced_image(picture, side)
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=max(image.size) <= 16, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _reduced_image(picture: NDArray[np.float32], side: int) -> tuple[Any, int]:
    """Return a picture as a Pillow image, and the side of the blocks of pixels whose means it shows."""
    from PIL import Image

    reduced, block = reduce_cells(picture[: 3 if len(picture) == 3 else 1], side)
    levels = np.moveaxis(_to_levels(reduced), 0, -1)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0]), block


def pack_file(file: bytes, input_spec: Input) -> dict[str, Any] | None:
    """Pack a picture file, resized to the network's input, where the service does not tell what the network saw.

    Args:
        file: PNG, JPEG, WebP or .npy.
        input_spec: The network's input.

    Returns:
        As `pack_picture`, but `exact` is false. None if the file cannot be read, or if the service crops it or resizes
        an array.
    """
    from PIL import Image

    if input_spec.resize:
        return None
    try:
        image = _on_white(_opened(file))
    except Exception:  # Pillow raises many kinds for broken files; the service says what is wrong with them.
        return None
    size = (input_spec.width or image.width, input_spec.height or image.height)
    if file.startswith(np.lib.format.MAGIC_PREFIX) and image.size != size:
        return None
    image = image.convert("L" if input_spec.channels == 1 else "RGB").resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) / 255
    return pack_picture(np.moveaxis(np.atleast_3d(pixels), -1, 0)) | {"exact": False}


def round_to_6_digits(value: float) -> float | None:
    """Round to six significant digits; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _base64(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode()
