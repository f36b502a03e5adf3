"""Formats: a reply as JSON, protobuf, npz or PNG. Tensors leave little-endian and in C order."""

from __future__ import annotations

import base64
import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers import media
from handlers.assembly import Piece, assemble
from handlers.errors import BadRequest, RequestError
from handlers.explanations.painting import paint
from handlers.maps import FeatureMap
from handlers.options import Options
from handlers.reply import Explanation, Identity, Reply, Result, Timing
from handlers.wire import convscope_pb2 as wire

_TILE_PIXELS = 64  # A tile of the PNG grid is enlarged by a whole factor to at least this.
_TILES_PER_ROW = 8
NO_PNG = "image/png shows one layer of one picture; name exactly one in layers"


@dataclass(frozen=True)
class Encoded:
    """A reply as bytes, but for its timing, which is known only when all replies of a batch are encoded.

    Attributes:
        pieces: The whole reply, one after the other; of an npz that waits for a timing, all members but the last. Maps
            are pieces of their own, not copied until they are sent.
        media_type: Its own.
        status: Of HTTP.
        values: What that last member, `reply`, says as JSON; None where the body is whole.
    """

    pieces: list[Piece]
    media_type: str
    status: int = 200
    values: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of the reply without a timing."""
        return sum(map(len, self.pieces if self.values is None else self.close()))

    def close(self, timing: Timing | None = None) -> list[Piece]:
        """Return the finished reply, with a timing where the format can carry one; PNG cannot."""
        extra = {} if timing is None else {"timing": vars(timing)}
        if self.values is not None:
            return [_add_member(b"".join(self.pieces), "reply", np.array(json.dumps(self.values | extra)))]
        if timing is not None and self.media_type == media.JSON:
            return [b"".join(self.pieces)[:-1] + b", " + json.dumps(extra).encode()[1:]]
        if timing is not None and self.media_type == media.PROTOBUF:  # Messages written in a row merge.
            return [*self.pieces, wire.PredictReply(timing=wire.Timing(**vars(timing))).SerializeToString()]
        return self.pieces


def encode(reply: Reply, media_type: str, *, awaits_timing: bool = False) -> Encoded:
    """Encode a reply.

    Args:
        reply: What to answer.
        media_type: One of `media`'s.
        awaits_timing: It will be closed with one.

    Returns:
        The reply; a refusal asked for as npz or PNG goes out as JSON.

    Raises:
        BadRequest: One PNG cannot show this reply.
    """
    if reply.refusal is not None and media_type in (media.NPZ, media.PNG):
        media_type = media.JSON
    if media_type == media.NPZ:
        encoded = Encoded([_to_npz(reply)], media_type, values=_to_values(reply, lambda _: None))
        return encoded if awaits_timing else Encoded(encoded.close(), media_type)
    return Encoded(_ENCODERS[media_type](reply), media_type, reply.refusal.status if reply.refusal else 200)


def to_json(reply: Reply) -> list[Piece]:
    """Encode as JSON; a tensor is `{dtype, shape, data}`, its cells base64."""
    return [json.dumps(_to_values(reply, _tensor_values), allow_nan=False).encode()]


def to_protobuf(reply: Reply) -> list[Piece]:
    """Encode as a serialized `convscope.v1.PredictReply`."""
    tail = wire.PredictReply(request_id=reply.request_id)
    if reply.refusal is not None:
        tail.error.code, tail.error.message = reply.refusal.code, reply.refusal.message
    return [_head(reply.identity), *assemble(reply.results), tail.SerializeToString()]


@lru_cache(maxsize=16)
def _head(identity: Identity) -> bytes:
    return wire.PredictReply(**vars(identity)).SerializeToString()


def _to_npz(reply: Reply) -> bytes:
    """Encode as a stored .npz without pickle: an array a layer, scores as arrays; `Encoded` adds the rest in `reply`.

    With one picture the names are `conv1`, `index`, `label`, `probability`, `logit`; with several each has the
    picture's number before it: `0/conv1`. A uint8 map brings `conv1.scale` and `conv1.offset`, a selection of channels
    `conv1.channels`.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for number, result in enumerate(reply.results):
        prefix = f"{number}/" if len(reply.results) > 1 else ""
        if isinstance(result, Result):
            arrays |= {prefix + name: array for name, array in _result_arrays(result).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def fits_png(pictures: Sequence[object], layers: Sequence[str], options: Options) -> bool:
    """Tell whether one PNG can show the reply to a request: one picture's explanation or layer, or why there is none.

    Args:
        pictures: Decoded ones, or the errors in their place.
        layers: Public names of the layers asked for.
        options: The caller's.
    """
    if len(pictures) != 1:
        return False
    is_one_layer = len(layers) == 1 and options.pool != 1
    return is_one_layer or options.explain is not None or isinstance(pictures[0], RequestError)


def to_png(reply: Reply) -> list[Piece]:
    """Draw one layer of one picture as a grid of grey tiles, one a channel, each scaled by its own least and largest.

    Where an explanation was asked for, draw that.

    Raises:
        BadRequest: The reply is not one picture with one layer of shape (C, h, w), or with an explanation.
    """
    result = reply.results[0] if len(reply.results) == 1 else None
    if isinstance(result, Result) and result.explanation is not None:
        return [_draw(Image.fromarray(_painted(result.explanation)))]
    if not isinstance(result, Result) or len(result.maps) != 1:
        raise BadRequest(NO_PNG)
    cells = result.maps[0].cells.astype(np.float32)
    if cells.ndim != 3:
        raise BadRequest("image/png shows maps of shape (C, h, w); leave out pool, or ask for at least 2")
    return [_draw(Image.fromarray(tile(cells)))]


def _draw(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _painted(explanation: Explanation) -> NDArray[np.uint8]:
    """Return an explanation as a picture (H, W, 3); it comes with the picture explained."""
    if explanation.picture is None:
        raise BadRequest("image/png shows an explanation over its picture, which is not there")
    picture = explanation.picture.values()
    size = picture.shape[1], picture.shape[2]
    if explanation.heat is None:
        return paint(None, size, picture)
    return paint(explanation.heat.values(), size, None if explanation.view == "heat" else picture)


def tile(cells: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay out maps as rows of grey tiles.

    Args:
        cells: (C, h, w), any range.

    Returns:
        Grey picture, uint8: up to eight tiles a row with one white pixel between, each tile enlarged by a whole factor.
    """
    count, height, width = cells.shape
    cells = cells.astype(np.float64)  # What is between two float32 may be more than float32 holds.
    least = cells.min(axis=(1, 2), keepdims=True)
    span = cells.max(axis=(1, 2), keepdims=True) - least
    grey = np.rint((cells - least) / np.where(span > 0, span, 1) * 255).astype(np.uint8)
    factor = max(1, -(-_TILE_PIXELS // max(height, width)))
    grey = grey.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = min(count, _TILES_PER_ROW)
    rows = -(-count // columns)
    step_y, step_x = height * factor + 1, width * factor + 1
    grid = np.full((rows * step_y - 1, columns * step_x - 1), 255, np.uint8)
    for number in range(count):
        y, x = number // columns * step_y, number % columns * step_x
        grid[y : y + step_y - 1, x : x + step_x - 1] = grey[number]
    return grid


_ENCODERS: dict[str, Callable[[Reply], list[Piece]]] = {
    media.JSON: to_json,
    media.PROTOBUF: to_protobuf,
    media.PNG: to_png,
}


def error_values(error: RequestError) -> dict[str, str]:
    """Return an error as it stands in JSON."""
    return {"code": error.code, "message": error.message}


def _to_values(reply: Reply, tensor: Callable[[FeatureMap], Any]) -> dict[str, Any]:
    values: dict[str, Any] = dict(vars(reply.identity))
    if reply.request_id:
        values["request_id"] = reply.request_id
    if reply.refusal is not None:
        values["error"] = error_values(reply.refusal)
    values["results"] = [
        {"error": error_values(result)}
        if isinstance(result, RequestError)
        else {
            "top": [score._asdict() for score in result.top],
            "maps": {feature_map.layer: tensor(feature_map) for feature_map in result.maps},
            **({} if result.explanation is None else {"explanation": _explanation_values(result.explanation, tensor)}),
        }
        for result in reply.results
    ]
    return values


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
    return values


def _tensor_values(feature_map: FeatureMap) -> dict[str, Any]:
    values: dict[str, Any] = {
        "dtype": feature_map.dtype,
        "shape": feature_map.cells.shape,
        "data": base64.b64encode(_little(feature_map.cells).data).decode("ascii"),
    }
    if feature_map.scale is not None and feature_map.offset is not None:
        values |= {"scale": feature_map.scale.tolist(), "offset": feature_map.offset.tolist()}
    if feature_map.channels is not None:
        values["channels"] = feature_map.channels
    return values


def _result_arrays(result: Result) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        "index": np.array([score.index for score in result.top], np.int64),
        "label": np.array([score.label for score in result.top], np.str_),
        "probability": np.array([score.probability for score in result.top], np.float32),
        "logit": np.array([score.logit for score in result.top], np.float32),
    }
    maps = [(feature_map.layer, feature_map) for feature_map in result.maps]
    if result.explanation is not None:
        found = (("/heat", result.explanation.heat), ("/picture", result.explanation.picture))
        maps += [(f"explanation{name}", item) for name, item in found if item is not None]
    for name, feature_map in maps:
        arrays[name] = feature_map.cells
        if feature_map.scale is not None and feature_map.offset is not None:
            arrays[f"{name}.scale"] = feature_map.scale
            arrays[f"{name}.offset"] = feature_map.offset
        if feature_map.channels is not None:
            arrays[f"{name}.channels"] = np.array(feature_map.channels, np.int64)
    return arrays


def _add_member(archive: bytes, name: str, array: NDArray[Any]) -> bytes:
    """Return the .npz with one more array."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as members, members.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _little(cells: NDArray[Any]) -> NDArray[Any]:
    return cells if sys.byteorder == "little" else cells.astype(cells.dtype.newbyteorder("<"))
