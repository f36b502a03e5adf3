"""Model cards: a served network's description, input and layers, as JSON or protobuf."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from handlers.api import media
from handlers.api.limits import ITEM_BYTES, Limits
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import Archive, Layer
from handlers.outputs.response import Identity, Response
from handlers.wire import convscope_pb2 as wire

_TRAINING_FIELDS = tuple(wire.Training.DESCRIPTOR.fields_by_name)


def describe(
    archive: Archive,
    identity: Identity,
    limits: Limits,
    explanations: Sequence[str],
    edits: Sequence[str],
) -> dict[str, Any]:
    """Build the card, with the field names of `convscope.v1.ModelCard`.

    Args:
        archive: The loaded archive.
        identity: The server's identity.
        limits: Limits of a request.
        explanations: The methods that a request may ask for.
        edits: The operations that a request may ask for.
    """
    preprocessing = archive.preprocessing
    training = {name: archive.card.get("training", {}).get(name) for name in _TRAINING_FIELDS}
    return {
        **vars(identity),
        "description": archive.card.get("description", ""),
        "architecture": archive.card["architecture"],
        "classes": list(archive.classes),
        "input": {
            "channels": preprocessing.channels,
            "height": preprocessing.height or 0,
            "width": preprocessing.width or 0,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            **_recipe(preprocessing),
        },
        "layers": [_layer(name, archive.layers[name], layer) for name, layer in archive.described.layers.items()],
        "parameters": archive.described.parameters,
        "training": {name: value for name, value in training.items() if value is not None},
        "limits": asdict(limits),
        "multiply_adds": archive.described.multiply_adds,
        "explanations": list(explanations),
        "edits": list(edits),
        "sources": list(archive.described.sources),
    }


def encode(card: Mapping[str, Any], media_type: str, request_id: str = "") -> Response:
    """Encode a card; npz and PNG are replaced by JSON, which is the card alone, without a request id."""
    if media_type == media.PROTOBUF:
        identity = {name: card[name] for name in Identity.__dataclass_fields__}
        known = {name: value for name, value in card.items() if value or name != "training"}  # Otherwise unset.
        message = wire.PredictReply(card=wire.ModelCard(**known), **identity, request_id=request_id)
        return Response([message.SerializeToString()], media_type)
    return Response([json.dumps(card, indent=2, ensure_ascii=False).encode() + b"\n"], media.JSON)


def _recipe(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return how a picture is resized to the network's size."""
    is_resized = preprocessing.size is not None or bool(preprocessing.resize)
    return {
        "resize": list(preprocessing.resize),
        "interpolation": preprocessing.interpolation if is_resized else "",
        "antialias": preprocessing.antialias and is_resized and preprocessing.interpolation != "nearest",
        "bgr": preprocessing.bgr,
        "fit": preprocessing.fit,
        "fill": list(preprocessing.fill),
    }


def _layer(name: str, module: str, layer: Layer) -> dict[str, Any]:
    cells = math.prod(layer.shape)
    sizes = {dtype: cells * size for dtype, size in ITEM_BYTES.items()}
    return {"name": name, "module": module, **layer.facts, "bytes": sizes}
