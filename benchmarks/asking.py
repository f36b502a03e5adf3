"""Requests for each server, ready to send, and its replies, read into arrays."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from convscope._wire import convscope_pb2 as ours
from convscope._wire import inference_pb2 as torchserve

from benchmarks.load import Wire
from benchmarks.models import Model
from benchmarks.rivals.network import pack
from benchmarks.workloads import Asked

PROTOBUF, JSON, BINARY = "application/x-protobuf", "application/json", "application/octet-stream"


@dataclass(frozen=True)
class Place:
    """Where a server runs and what it serves.

    Attributes:
        model: The network.
        folder: For the server's own.
        workers: How many.
        rest: Port.
        grpc: Port.
        others: More ports.
        settings: Variables that our launcher gave its workers, for the floor.
    """

    model: Model
    folder: Path
    workers: int
    rest: int
    grpc: int
    others: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def post(place: Place, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Write a whole HTTP request."""
    lines = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{place.rest}"]
    lines += [f"{name}: {value}" for name, value in {**headers, "content-length": str(len(body))}.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def our_request(model: Model, asked: Asked, *, timing: bool = False) -> bytes:
    """Write a PredictRequest: all classes, since the rivals answer all."""
    request = ours.PredictRequest(pictures=model.files(asked), top_k=0)
    if asked.want != "scores":
        request.layers.append("all")
    if asked.want in ("float16", "uint8"):
        request.map_dtype = ours.FLOAT16 if asked.want == "float16" else ours.UINT8
    if asked.want == "pool":
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


def ask_ours(place: Place, asked: Asked, wire: Wire) -> bytes | None:
    """Ask our service."""
    return wrap(place, our_request(place.model, asked), wire)


def read_ours(model: Model, body: bytes, asked: Asked, wire: Wire) -> list[Any]:
    """Read our reply: of each picture the probabilities in the order of the classes, then its maps."""
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


def ask_binary(path: str, *, many: bool = False, media: str = BINARY) -> Callable[[Place, Asked, Wire], bytes | None]:
    """Make the function that asks a rival with `pack`ed pictures."""

    def ask(place: Place, asked: Asked, wire: Wire) -> bytes | None:
        if wire != "REST" or (asked.pictures > 1 and not many):
            return None
        return post(place, path, pack(asked.want, place.model.files(asked)), {"content-type": media})

    return ask


def ask_litserve(place: Place, asked: Asked, wire: Wire) -> bytes | None:
    """Ask LitServe: one picture, as base64 in JSON."""
    if wire != "REST" or asked.pictures > 1:
        return None
    body = {"image_data": base64.b64encode(place.model.files(asked)[0]).decode(), "want": asked.want}
    return post(place, "/predict", json.dumps(body).encode(), {"content-type": JSON})


def read_rival(model: Model, body: bytes, asked: Asked, wire: Wire) -> list[Any]:
    """Read a rival's reply."""
    return model.read(body, asked)


def card(place: Place) -> bytes:
    """Ask for the model card, which is the readiness probe."""
    return f"GET /predictions/{place.model.name} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
