"""Where our service's time and bytes go: per stage, as its own replies say, and per format."""

from __future__ import annotations

import statistics
import time
from typing import Any

from convscope._wire import convscope_pb2 as ours
from convscope._wire import inference_pb2 as torchserve

from benchmarks.asking import JSON, PROTOBUF, our_request, wrap
from benchmarks.running import Running, ask_on
from benchmarks.wires import Grpc, Http
from benchmarks.workloads import Asked

_ASKED = (Asked("scores"), Asked("float32"), Asked("uint8"), Asked("float16", 32))
_STAGES = ("read_s", "decode_s", "preprocess_s", "forward_s", "encode_s", "handler_s")


def measure(running: Running, count: int = 200) -> dict[str, dict[str, float]]:
    """Ask `count` times, one at a time, and return median seconds per stage.

    Empty where the service does not tell its times.

    `caller` is what the caller waited; `elsewhere` the part of it outside the handler, in TorchServe and on the wire.
    """
    found: dict[str, dict[str, float]] = {}
    for wire, connection in (("REST", Http), ("gRPC", Grpc)):
        port = running.place.rest if wire == "REST" else running.place.grpc
        caller: Any = connection(("127.0.0.1", port))
        for asked in _ASKED:
            message = wrap(running.place, our_request(running.place, asked.want, asked.pictures, timing=True), wire)  # type: ignore[arg-type]
            seen: dict[str, list[float]] = {name: [] for name in (*_STAGES, "caller", "elsewhere")}
            for _ in range(max(20, count // asked.pictures)):
                began = time.perf_counter()
                body = bytes(ask_on(caller, message).body)
                waited = time.perf_counter() - began
                if wire == "gRPC":
                    body = torchserve.PredictionResponse.FromString(body).prediction
                reply = ours.PredictReply.FromString(body)
                if not reply.HasField("timing"):
                    return {}
                timing = reply.timing
                for name in _STAGES:
                    seen[name].append(getattr(timing, name))
                seen["caller"].append(waited)
                seen["elsewhere"].append(waited - timing.handler_s)
            found[f"{asked.want}, {asked.pictures} pictures, {wire}"] = {
                name: statistics.median(values) for name, values in seen.items()
            }
        caller.socket.close()
    return found


def formats(running: Running) -> dict[str, dict[str, int]]:
    """Return the bytes of a reply to one picture, and those of its tensors alone.

    Tensors are the scores, the maps, and a uint8 map's scale and offset.
    """
    found = {}
    layers = running.place.model.layers.values()
    cells = sum(channels * height * width for channels, height, width in layers)
    channels = sum(shape[0] for shape in layers)
    own = {"scores": 0, "float32": 4 * cells, "float16": 2 * cells, "uint8": cells + 8 * channels, "pool": 4 * channels}
    for want, size in own.items():
        request = our_request(running.place, want, 1)
        bodies = {
            kind: len(running.ask(wrap(running.place, request, "REST", media), "REST").body)
            for kind, media in (("protobuf", PROTOBUF), ("json", JSON), ("npz", "application/x-npz"))
        }
        found[want] = {"tensors": size + 4 * running.place.model.classes, **bodies}
    return found
