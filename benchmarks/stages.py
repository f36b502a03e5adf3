"""Measures the time of each stage of the service, from the timing in its replies, and the bytes of each format."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from convscope._wire import convscope_pb2 as ours

from benchmarks.running import Running, ask_on
from benchmarks.servers import JSON, PROTOBUF, our_request, wrap
from benchmarks.wires import Http
from benchmarks.workloads import Asked, Workload

_STAGES = ("read_s", "decode_s", "preprocess_s", "forward_s", "encode_s", "handler_s")


def measure(running: Running, workloads: Iterable[Workload], seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """Send each kind of request, one at a time over REST, and return median seconds per stage.

    `caller` is what the caller waited; `elsewhere` the part of it outside the handler, in TorchServe and on the wire.
    """
    found: dict[str, dict[str, float]] = {}
    caller = Http(("127.0.0.1", running.place.rest))
    caller.socket.settimeout(60)
    for asked in dict.fromkeys(workload.asked for workload in workloads):
        message = wrap(running.place, our_request(running.place.model, asked, timing=True), "REST")
        seen: dict[str, list[float]] = {name: [] for name in (*_STAGES, "caller", "elsewhere")}
        end = time.perf_counter() + seconds
        while len(seen["caller"]) < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            reply = ours.PredictReply.FromString(bytes(ask_on(caller, message).body))
            waited = time.perf_counter() - began
            for name in _STAGES:
                seen[name].append(getattr(reply.timing, name))
            seen["caller"].append(waited)
            seen["elsewhere"].append(waited - reply.timing.handler_s)
        name = f"{asked.want}, {asked.photograph or '32×32'}, {asked.pictures} pictures"
        found[name] = {stage: statistics.median(values) for stage, values in seen.items()}
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
    photograph = next(iter(running.place.model.pictures))
    for want, size in own.items():
        request = our_request(running.place.model, Asked(want, 1, photograph))
        bodies = {
            kind: len(running.ask(wrap(running.place, request, "REST", media), "REST").body)
            for kind, media in (("protobuf", PROTOBUF), ("json", JSON), ("npz", "application/x-npz"))
        }
        found[want] = {"tensors": size + 4 * running.place.model.classes, **bodies}
    return found
