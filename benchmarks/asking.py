"""Asking: each server's requests, ready for the wire, and its replies, read into arrays."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from convscope._wire import convscope_pb2 as ours
from convscope._wire import inference_pb2 as torchserve

from benchmarks.load import Wire
from benchmarks.models import Model
from benchmarks.rivals.network import pack

PROTOBUF, JSON = "application/x-protobuf", "application/json"


@dataclass(frozen=True)
class Place:
    """Where a server runs and what it serves."""

    model: Model
    folder: Path
    rest: int
    grpc: int
    others: tuple[int, ...] = ()


def post(place: Place, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Write a whole HTTP request."""
    lines = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{place.rest}"]
    lines += [f"{name}: {value}" for name, value in {**headers, "content-length": str(len(body))}.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def our_request(place: Place, want: str, pictures: int, *, timing: bool = False) -> bytes:
    """Write a PredictRequest: all classes, since the rivals answer all."""
    request = ours.PredictRequest(pictures=place.model.files(pictures), top_k=0)
    if want != "scores":
        request.layers.append("all")
    if want in ("float16", "uint8"):
        request.map_dtype = ours.FLOAT16 if want == "float16" else ours.UINT8
    if want == "pool":
        request.pool = 1
    if timing:
        request.timing = True
    return request.SerializeToString()


def wrap(place: Place, body: bytes, wire: Wire, accept: str = PROTOBUF) -> bytes:
    """Put a PredictRequest on a wire, with the headers that our client sends."""
    if wire == "gRPC":
        return torchserve.PredictionsRequest(model_name=place.model.name, input={"request": body}).SerializeToString()
    headers = {"accept": accept, "content-type": PROTOBUF, "user-agent": "convscope", "x-request-id": "0" * 32}
    return post(place, f"/predictions/{place.model.name}", body, headers)


def ask_ours(place: Place, want: str, pictures: int, wire: Wire) -> bytes | None:
    """Ask our service; `lists` is its JSON, whose maps are base64."""
    if want == "lists":
        return wrap(place, our_request(place, "float32", 1), "REST", JSON) if wire == "REST" else None
    return wrap(place, our_request(place, want, pictures), wire)


def read_ours(model: Model, body: bytes, want: str, pictures: int, wire: Wire) -> list[Any]:
    """Read our reply: of each picture the probabilities in the order of the classes, then its maps."""
    if want == "lists":
        result = json.loads(body)["results"][0]
        maps = [
            np.frombuffer(base64.b64decode(one["data"]), "<f4").reshape(1, *one["shape"])
            for one in result["maps"].values()
        ]
        return [_by_class([(top["index"], top["probability"]) for top in result["top"]]), *maps]
    if wire == "gRPC":
        body = torchserve.PredictionResponse.FromString(body).prediction
    reply = ours.PredictReply.FromString(body)
    assert not reply.HasField("error"), reply.error.message
    columns = []
    for result in reply.results:
        maps = [_values(one.tensor) for one in result.maps]
        columns.append([_by_class([(top.index, top.probability) for top in result.top]), *maps])
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def _by_class(scores: list[tuple[int, float]]) -> Any:
    return np.array([probability for _, probability in sorted(scores)], np.float32)[None]


def _values(tensor: ours.Tensor) -> Any:
    kind = {ours.FLOAT32: "<f4", ours.FLOAT16: "<f2", ours.UINT8: "u1"}[tensor.dtype]
    cells = np.frombuffer(tensor.data, kind).reshape(1, *tensor.shape).astype(np.float32)
    if tensor.dtype == ours.UINT8:
        cells = (
            cells * np.array(tensor.scale, np.float32)[:, None, None]
            + np.array(tensor.offset, np.float32)[:, None, None]
        )
    return cells


def ask_null(place: Place, want: str, pictures: int, wire: Wire) -> bytes | None:
    """Ask for as many bytes as our service's reply has, with a request as long as ours."""
    size = place.model.folder / f"reply-{want}-{pictures}.size"  # Written when our service was checked.
    if want == "lists" or not size.exists():
        return None
    return wrap(place, b"%012d" % int(size.read_text()) + our_request(place, want, pictures)[12:], wire)


def ask_binary(path: str, *, many: bool = False, lists: bool = True) -> Callable[[Place, str, int, Wire], bytes | None]:
    """Make the function that asks a rival with `pack`ed pictures; the path may hold {0} and {1}, by kind of reply."""

    def ask(place: Place, want: str, pictures: int, wire: Wire) -> bytes | None:
        if wire != "REST" or (pictures > 1 and not many) or (want == "lists" and not lists):
            return None
        where = path.format("lists" if want == "lists" else "predict", "lists" if want == "lists" else "bytes")
        body = pack("float32" if want == "lists" else want, place.model.files(pictures))
        return post(place, where, body, {"content-type": "application/octet-stream"})

    return ask


def ask_litserve(place: Place, want: str, pictures: int, wire: Wire) -> bytes | None:
    """Ask LitServe: one picture, as base64 in JSON."""
    if wire != "REST" or pictures > 1:
        return None
    body = {"image_data": base64.b64encode(place.model.pictures[0]).decode(), "want": want}
    return post(place, "/predict", json.dumps(body).encode(), {"content-type": JSON})


def read_rival(model: Model, body: bytes, want: str, pictures: int, wire: Wire) -> list[Any]:
    """Read a rival's reply: raw bytes, or `lists`."""
    if want != "lists":
        return model.read(body, want, pictures)
    said = json.loads(body)
    scores = np.array(list(said["scores"].values()), np.float32)[None]
    return [scores, *(np.array(values, np.float32)[None] for values in said["maps"].values())]


def card(place: Place) -> bytes:
    """Ask for the model card, which is the readiness probe."""
    return f"GET /predictions/{place.model.name} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
