"""What a page shows of one picture: asked for at the service, and brought into plain values for the page's script.

A scene holds nothing but what JSON can, and knows nothing of HTML.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from convscope._exceptions import ProtocolError, RequestRejected
from convscope._pictures import encode_pictures

from convscope_lens._page.packing import number, pack_file, pack_heat, pack_map, pack_picture

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convscope._card import Layer, ModelCard
    from convscope._client import Client
    from convscope._pictures import Picture
    from convscope._prediction import Prediction
    from convscope._request import Method
    from convscope._timing import Timing

# A row a layer: the card's field and its heading. What a service does not say of any layer, and what is as usual in all
# of them, has no column.
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


def one_file(picture: Picture) -> bytes:
    """Return a picture as the file that is sent.

    Raises:
        OSError: A path cannot be read.
        TypeError: It is no picture.
        ValueError: An array is no picture's, or there are several.
    """
    files, many = encode_pictures(picture)
    if many:
        raise ValueError("a page shows one picture; this is several")
    return files[0]


def look(
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
    """Ask what a model sees in a picture, and why; return what a page shows of it.

    Args:
        client: Whom to ask.
        file: The picture.
        card: Of the model.
        model: The model's name.
        title: What the picture is called.
        max_cells: Cells of all maps together; where there would be more, each layer shows as many of its strongest
            channels as fit.
        layers: As in `Client.predict`.
        version: As in `Client.predict`.
        method: How scores are explained; None for not at all.
        target: Index of the class explained; None for the most probable one.
        request_id: Of the request for the maps.

    Returns:
        The scene: `title`, `model`, `picture`, `scores`, `layers`, `heat`, `geometry` and `timing`. `heat` is None
        where nothing was to be explained, or the service cannot and neither a target nor a method other than grad_cam
        was asked for; `picture` where it cannot be shown.

    Raises:
        ConvscopeError: The service refused, or did not answer.
        ValueError: An option is out of range.
    """
    names = {layers} if isinstance(layers, str) else set(layers)
    wanted = [layer for layer in card.layers if "all" in names or layer.name in names]
    most = min(max_cells, card.limits.max_reply_bytes * 9 // 10 or max_cells)
    seen = client.predict(
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
            "name": seen.model,
            "version": seen.version,
            "engine": seen.engine,
            "device": seen.device,
            "description": card.description,
            "parameters": card.parameters,
            "request": seen.request_id,
        },
        "picture": picture or pack_file(file, card.input),
        "scores": [score._asdict() | {"logit": number(score.logit)} for score in seen.top],
        "layers": _maps(seen, {layer.name: layer for layer in card.layers}),
        "heat": heat,
        "geometry": _geometry(card),
        "timing": None if seen.timing is None else _timing(seen.timing),
    }


def fitting_channels(layers: Iterable[Layer], max_cells: int) -> int | None:
    """Return how many channels of each layer fit; None if all do, or if their size is not known beforehand."""
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
    """Return the heat map, and the picture as the network saw it; None for what the service cannot give."""
    chosen = method is not None and (method != "grad_cam" or target is not None)  # Not what everybody gets.
    ways: tuple[Method, ...] = (method, "picture") if method and (card.classes or chosen) else ("picture",)
    for way in ways:
        try:
            found = client.explain(
                file, model=model, version=version, method=way, target=None if way == "picture" else target
            )
        except (RequestRejected, ProtocolError):  # The network does not suit the method, or the service is too old.
            if chosen:
                raise
            continue
        picture = pack_picture(found.picture)
        if way == "picture":
            return None, picture
        about = {"method": found.method, "layer": found.layer, "label": found.label}
        return about | pack_heat(found.heat), picture
    return None, None


def _maps(seen: Prediction, layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Pack the maps in the order of the forward pass."""
    found = []
    for name in sorted(seen.maps, key=list(layers).index):
        layer, cells = layers[name], seen.maps[name]
        if not cells.size:
            continue
        found.append(
            {
                "name": name,
                "of": layer.shape[0] if cells.ndim == 3 else 1,
                "field": layer.receptive_field,
                "start": layer.receptive_field_start,
                "stride": layer.stride,
                **pack_map(cells, seen.channels[name]),
            }
        )
    return found


def _geometry(card: ModelCard) -> dict[str, Any]:
    """Return the data-flow table: headings, and a row of text a layer."""
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
