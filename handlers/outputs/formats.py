"""Formats: a response as JSON, protobuf, npz or PNG. Tensors are sent little-endian and in C order."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.api import media
from handlers.api.errors import RequestError
from handlers.outputs import png
from handlers.outputs.maps import FeatureMap, cell_bytes
from handlers.outputs.protobuf import encode_results
from handlers.outputs.response import Change, ClassScore, Explanation, Identity, Piece, Response, Result, Timing
from handlers.wire import convscope_pb2 as wire

Results = Sequence[Result | RequestError]


def encode(
    identity: Identity,
    results: Results,
    media_type: str,
    *,
    error: RequestError | None = None,
    request_id: str = "",
    edits: int = 0,
) -> Response:
    """Encode a response.

    Args:
        identity: The server's identity.
        results: One result per picture, in the order sent.
        media_type: A media type of `media`.
        error: The error of the whole request; None if a picture has a result.
        request_id: The request's id.
        edits: Number of edits done.

    Returns:
        The response; an error asked for as npz or PNG is sent as JSON.

    Raises:
        BadRequest: One PNG cannot show these results.
    """
    status = 200 if error is None else error.status
    if media_type == media.PROTOBUF:
        return _to_protobuf(identity, results, error, request_id, status, edits)
    if error is None and media_type == media.PNG:
        return Response([png.encode(results)], media.PNG)
    if error is None and media_type == media.NPZ:
        arrays, values = _arrays(results), _to_values(identity, results, error, request_id, edits, lambda _: None)

        def npz(**timing: Any) -> list[Piece]:
            return [_to_npz(arrays | {"reply": np.array(json.dumps(values | timing))})]

        return Response(npz(), media.NPZ, add_timing=lambda timing: npz(timing=timing))
    values = _to_values(identity, results, error, request_id, edits, _tensor_values)
    body = json.dumps(values, allow_nan=False).encode()

    def add_timing(timing: Timing) -> list[Piece]:
        return [body[:-1] + b", " + json.dumps({"timing": timing}).encode()[1:]]

    return Response([body], media.JSON, status, add_timing)


def _to_protobuf(
    identity: Identity, results: Results, error: RequestError | None, request_id: str, status: int, edits: int
) -> Response:
    pieces = [_head(identity), *encode_results(results)]  # Serialized messages that are concatenated merge.
    tail = wire.PredictReply(request_id=request_id, scores=identity.scores, edits=edits)
    if error is not None:
        tail.error.code, tail.error.message = error.code, error.message

    def add_timing(timing: Timing) -> list[Piece]:
        tail.timing.CopyFrom(wire.Timing(**timing))
        return [*pieces, tail.SerializeToString()]

    return Response([*pieces, tail.SerializeToString()], media.PROTOBUF, status, add_timing)


@lru_cache(maxsize=16)
def _head(identity: Identity) -> bytes:
    return wire.PredictReply(**vars(replace(identity, scores=""))).SerializeToString()  # That field comes later.


def _arrays(results: Results) -> dict[str, NDArray[Any]]:
    """Return the arrays of an npz: one per layer, scores as arrays, and everything else as JSON in `reply`.

    With one picture the names are `conv1`, `index`, `label`, `probability`, `logit`, or `value` instead of these two;
    with several each has the picture's number before it: `0/conv1`. A uint8 map brings `conv1.scale` and
    `conv1.offset`, a selection of channels `conv1.channels`. What edits changed has the same names behind `change/`.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for number, result in enumerate(results):
        prefix = f"{number}/" if len(results) > 1 else ""
        if isinstance(result, Result):
            arrays |= {prefix + name: array for name, array in _result_arrays(result).items()}
    return arrays


def _to_npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _error_values(error: RequestError) -> dict[str, str]:
    """Return an error as values for JSON."""
    return {"code": error.code, "message": error.message}


def _to_values(
    identity: Identity,
    results: Results,
    error: RequestError | None,
    request_id: str,
    edits: int,
    tensor: Callable[[FeatureMap], Any],
) -> dict[str, Any]:
    values: dict[str, Any] = {name: value for name, value in vars(identity).items() if value or name != "scores"}
    if request_id:
        values["request_id"] = request_id
    if edits:
        values["edits"] = edits
    if error is not None:
        values["error"] = _error_values(error)
    values["results"] = [
        {"error": _error_values(result)}
        if isinstance(result, RequestError)
        else {
            **_scores_and_maps(result, tensor),
            **({} if result.explanation is None else {"explanation": _explanation_values(result.explanation, tensor)}),
            **({} if result.change is None else {"change": _scores_and_maps(result.change, tensor)}),
            **({"notes": result.notes} if result.notes else {}),
        }
        for result in results
    ]
    return values


def _scores_and_maps(item: Result | Change, tensor: Callable[[FeatureMap], Any]) -> dict[str, Any]:
    return {
        "top": [_score_values(score) for score in item.top],
        "maps": {feature_map.layer: tensor(feature_map) for feature_map in item.maps},
    }


def _score_values(score: ClassScore) -> dict[str, Any]:
    return {name: value for name, value in score._asdict().items() if value is not None}


def _explanation_values(explanation: Explanation, tensor: Callable[[FeatureMap], Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"method": explanation.method}
    if explanation.layer:
        values["layer"] = explanation.layer
    if explanation.target is not None:
        values |= {"target": explanation.target, "label": explanation.label}
    if explanation.heat is not None:
        values["heat"] = tensor(explanation.heat)
    if explanation.delta is not None:
        values["delta"] = explanation.delta
    if explanation.picture is not None:
        values["picture"] = tensor(explanation.picture)
    return values | {"original_size": explanation.original_size, "region": explanation.region}


def _tensor_values(feature_map: FeatureMap) -> dict[str, Any]:
    values: dict[str, Any] = {
        "dtype": feature_map.dtype,
        "shape": feature_map.cells.shape,
        "data": base64.b64encode(cell_bytes(feature_map.cells)).decode("ascii"),
    }
    if feature_map.scale is not None and feature_map.offset is not None:
        values |= {"scale": feature_map.scale.tolist(), "offset": feature_map.offset.tolist()}
    if feature_map.channels is not None:
        values["channels"] = feature_map.channels
    return values


def _result_arrays(result: Result) -> dict[str, NDArray[Any]]:
    arrays = _score_arrays(result.top)
    maps = [(feature_map.layer, feature_map) for feature_map in result.maps]
    if result.explanation is not None:
        found = (("/heat", result.explanation.heat), ("/picture", result.explanation.picture))
        maps += [(f"explanation{name}", item) for name, item in found if item is not None]
    if result.change is not None:
        arrays |= {f"change/{name}": array for name, array in _score_arrays(result.change.top).items()}
        maps += [(f"change/{feature_map.layer}", feature_map) for feature_map in result.change.maps]
    for name, feature_map in maps:
        arrays[name] = feature_map.cells
        if feature_map.scale is not None and feature_map.offset is not None:
            arrays[f"{name}.scale"] = feature_map.scale
            arrays[f"{name}.offset"] = feature_map.offset
        if feature_map.channels is not None:
            arrays[f"{name}.channels"] = np.array(feature_map.channels, np.int64)
    return arrays


def _score_arrays(top: Sequence[ClassScore]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        "index": np.array([score.index for score in top], np.int64),
        "label": np.array([score.label for score in top], np.str_),
    }
    is_of_values = any(score.value is not None for score in top)
    for name in ("value",) if is_of_values else ("probability", "logit"):
        arrays[name] = np.array([getattr(score, name) for score in top], np.float32)
    return arrays
