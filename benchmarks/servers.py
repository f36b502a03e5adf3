"""The servers: how each is started and asked, and its replies read into arrays. `SERVERS` is the one table of them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from convscope._reply import read_tensor
from convscope._wire import convscope_pb2 as ours
from convscope._wire import inference_pb2 as torchserve

from benchmarks.load import ROOT, Wire
from benchmarks.models import PYTHON, Model, write_archive
from benchmarks.rivals.network import pack
from benchmarks.workloads import Asked

PROTOBUF, JSON, BINARY = "application/x-protobuf", "application/json", "application/octet-stream"
CORES = len(os.sched_getaffinity(0))
JVM_S = 15.0  # On a busy pair of cores it compiles for more than ten seconds, and costs three times as much meanwhile.

Kind = Literal["ours", "documented", "tuned", "floor"]


@dataclass(frozen=True)
class Place:
    """Where a server runs and what it serves.

    Attributes:
        model: The network.
        folder: Folder for the server's own files.
        workers: Number of workers.
        rest: Port of REST.
        grpc: Port of gRPC.
        others: More ports.
        settings: For the floor: variables that our launcher gave its workers.
    """

    model: Model
    folder: Path
    workers: int
    rest: int
    grpc: int
    others: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A server under test.

    Attributes:
        name: Name in tables and for `--servers`.
        kind: `ours`; `documented`, a rival as its documentation advises; `tuned`, a rival with the fastest decoder and
            engine; `floor`, the work alone in one process.
        command: Returns the command that starts it; may write into its folder.
        ask: Returns a request's bytes on the wire; None if the server cannot handle it.
        read: Returns a reply's values: probabilities, then each map.
        environment: Variables added to ours.
        scaled: Whether it decodes JPEG files at a reduced scale.
        only: Names of the workloads that it takes part in, with * for anything.
        warm_up_s: Seconds of requests before the first round.
        probe: What to ask until it answers; None for a prediction.
    """

    name: str
    kind: Kind
    command: Callable[[Place], list[str]]
    ask: Callable[[Place, Asked, Wire], bytes | None]
    read: Callable[[Model, bytes, Asked, Wire], list[Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    scaled: bool = False
    only: str = "*"
    warm_up_s: float = 2.0
    probe: Callable[[Place], bytes] | None = None


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
        scores = [top.probability for top in sorted(result.top, key=lambda top: top.index)]
        columns.append([np.array(scores, np.float32), *(read_tensor(one.tensor) for one in result.maps)])
    return [np.stack(column) for column in zip(*columns, strict=True)]


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


_ONE_THREAD = {"CONVSCOPE_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _run(words: str, python: str = sys.executable) -> Callable[[Place], list[str]]:
    """Return the command of a module; {0.rest} and the like in its words stand for the attributes of the `Place`."""
    return lambda place: [python, "-m", *(word.format(place) for word in words.split())]


def _ours(name: str, options: str = "", *, workers: str = "{0.workers}", **more: Any) -> Server:
    store = "--model-store {0.model.archive.parent} --models {0.model.name} --work-dir {0.folder} --device cpu"
    ports = "--rest-port {0.rest} --grpc-port {0.grpc} --metrics-port {0.others[0]}"
    command = _run(f"server {store} {ports} --workers {workers} {options}", PYTHON)
    return Server(name, "ours", command, ask_ours, read_ours, warm_up_s=JVM_S, probe=card, **more)


def _start_stock(place: Place) -> list[str]:
    """Start TorchServe as `torchserve --start` does: its own JVM settings, logging and defaults."""
    handler = {"handler.py": (ROOT / "benchmarks/rivals/torchserve_stock.py").read_bytes()}
    store = place.folder / "store"
    store.mkdir(exist_ok=True)
    write_archive(store / "stock.mar", "stock", handler)
    ports = {
        "inference_address": f"http://127.0.0.1:{place.rest}",
        "management_address": f"http://127.0.0.1:{place.others[0]}",
        "metrics_address": f"http://127.0.0.1:{place.others[1]}",
        "grpc_inference_port": place.grpc,
        "grpc_management_port": place.others[2],
        "initial_worker_port": 10_000 + place.others[2] % 20_000,
        "default_workers_per_model": place.workers,
        "disable_token_authorization": "true",
        "max_response_size": 2**28,
        "load_models": "all",
    }
    config = place.folder / "config.properties"
    config.write_text("".join(f"{name}={value}\n" for name, value in ports.items()))
    command = [str(Path(PYTHON).parent / "torchserve"), "--start", "--foreground", "--ncs"]
    return [*command, "--model-store", str(store), "--ts-config", str(config)]


def _documented(name: str, command: Callable[[Place], list[str]], path: str = "/predict", **more: Any) -> Server:
    many, media = name.startswith("FastAPI"), "image/jpeg" if name == "KServe" else BINARY  # It parses BINARY as JSON.
    return Server(name, "documented", command, ask_binary(path, many=many, media=media), read_rival, **more)


def _tuned(name: str, command: Callable[[Place], list[str]], *, many: bool = False, batch: int = 1) -> Server:
    variables = {"BENCH_NETWORK": "tuned", "BENCH_BATCH": str(batch)}
    return Server(name, "tuned", command, ask_binary("/predict", many=many), read_rival, variables, scaled=True)


_MOSEC = _run("benchmarks.rivals.mosec --address 127.0.0.1 --port {0.rest} --timeout 60000")
_FASTAPI = "uvicorn benchmarks.rivals.fastapi:app --port {0.rest} --log-level warning --no-access-log --workers"
_TUNED_UVICORN = _FASTAPI.replace("fastapi", "tuned_uvicorn") + " {0.workers} --interface asgi3 --lifespan off"
_KSERVE = "benchmarks.rivals.kserve --http_port={0.rest} --workers={0.workers} --enable_grpc=false"
_SECOND_HOST = _run(
    "server.kserve --model-store {0.model.archive.parent} --models {0.model.name} --work-dir {0.folder} --device cpu "
    "--http-port {0.rest} --grpc-port {0.grpc} --workers {0.workers}",
    str(ROOT / ".venv-kserve/bin/python"),
)
_FLOOR = _run("benchmarks.floor {0.model.archive} {0.workers}", PYTHON)
_ALL_CORES = {"OMP_NUM_THREADS": str(CORES)}  # What torch takes by itself, as in a first example of any documentation.

OURS = _ours("convscope")
SERVERS = (
    OURS,
    _ours("convscope, one worker", workers="1", environment=_ONE_THREAD, only="scores, 0.3 MP, c=8"),
    _ours("convscope, one thread a worker", environment=_ONE_THREAD),
    _ours("convscope, one worker on all cores", workers="1"),
    _ours("convscope, scaled decoding", "--scaled-decoding", scaled=True, only="scores, [31]* MP, c=8"),
    Server("convscope on KServe", "ours", _SECOND_HOST, ask_ours, read_ours, probe=card),
    _documented("TorchServe", _start_stock, "/predictions/stock", warm_up_s=JVM_S),
    _documented("FastAPI", _run(f"{_FASTAPI} {{0.workers}}")),
    _documented("FastAPI, one process", _run(f"{_FASTAPI} 1"), environment=_ALL_CORES),
    *(
        Server(name, "documented", _run(f"benchmarks.rivals.litserve {{0.rest}} {batch}"), ask_litserve, read_rival)
        for name, batch in (("LitServe", 1), ("LitServe, batching", 32))
    ),
    _documented("mosec", _MOSEC),
    _documented("mosec, batching", _MOSEC, environment={"BENCH_BATCH": "32"}),
    _documented("BentoML", _run("bentoml serve benchmarks.rivals.bento:Classifier --host 127.0.0.1 --port {0.rest}")),
    _documented("Ray Serve", _run("benchmarks.rivals.ray_serve {0.rest} {0.folder}"), "/"),
    _documented("KServe", _run(_KSERVE), "/v1/models/network:predict"),
    _tuned("uvicorn, tuned", _run(_TUNED_UVICORN), many=True),
    _tuned("mosec, tuned", _MOSEC),
    _tuned("mosec, tuned, batching", _MOSEC, batch=32),
    Server("floor, convscope", "floor", _FLOOR, lambda *_: None, read_ours),
)


def environment(server: Server, place: Place) -> dict[str, str]:
    """Return a server's environment: a temporary folder of its own, and workers with one thread each.

    Where there is a worker a core, our launcher decides on its workers' threads. The floor gets the settings that the
    launcher gave its workers.
    """
    folder = place.folder / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client/src")])}
    variables |= {"TMPDIR": str(folder), "BENCH_MODEL": str(place.model.folder.resolve())}
    variables |= {"BENCH_WORKERS": str(place.workers), "BENTOML_HOME": str(place.folder / "bentoml")}
    variables |= {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}
    variables |= {"RAY_memory_monitor_refresh_ms": "0"}  # Ray does not kill its replicas when others fill the memory.
    if server.kind != "ours" or place.workers == 1:
        variables |= _ONE_THREAD
    if server.kind == "floor":
        variables |= place.settings
    return {**variables, **server.environment}


def clean(place: Place) -> None:
    """Remove the files that a server left."""
    shutil.rmtree(place.folder, ignore_errors=True)
