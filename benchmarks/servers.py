"""The servers: how each is started, and which of `asking` it is asked with. `SERVERS` is the one table of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.asking import Place, ask_binary, ask_litserve, ask_null, ask_ours, card, read_ours, read_rival
from benchmarks.load import ROOT, Wire
from benchmarks.models import Model, null_archive, write_archive

PYTHON = str(ROOT / ".venv/bin/python") if (ROOT / ".venv").exists() else sys.executable  # Has torchserve, no rivals.
BENCH_BIN = Path(sys.executable).parent

JVM_S = 20.0  # Of a busy pair of cores it compiles for more than ten seconds, and costs three times as much meanwhile.

Kind = Literal["ours", "documented", "tuned", "wall", "floor"]


@dataclass(frozen=True)
class Server:
    """A server under test.

    Attributes:
        name: As in tables and for `--servers`.
        kind: `ours`; `documented`, a rival as its documentation advises; `tuned`, a rival with the fastest decoder and
            engine; `wall`, TorchServe with a handler that does nothing; `floor`, the work alone in one process.
        command: How to start it; may write into its folder.
        ask: A request's bytes on the wire for (place, want, pictures, wire); None where it cannot.
        read: A reply's values for (model, body, want, pictures, wire): probabilities, then each map; None where there
            are none.
        environment: Variables added to ours.
        warm_up_s: Seconds of requests before the first round.
        probe: What to ask until it answers; None for a prediction.
    """

    name: str
    kind: Kind
    command: Callable[[Place], list[str]]
    ask: Callable[[Place, str, int, Wire], bytes | None]
    read: Callable[[Model, bytes, str, int, Wire], list[Any] | None]
    environment: Mapping[str, str] = field(default_factory=dict)
    warm_up_s: float = 2.0
    probe: Callable[[Place], bytes] | None = None


def _start_ours(workers: int) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return _launch(place, place.model.archive.parent, workers)

    return command


def _start_null(place: Place) -> list[str]:
    null_archive(place.model, place.folder / "store")
    return _launch(place, place.folder / "store", 1)


def _launch(place: Place, store: Path, workers: int) -> list[str]:
    """Start our launcher, which also starts the null handler, so that all flags are the same."""
    ports = ["--rest-port", str(place.rest), "--grpc-port", str(place.grpc), "--metrics-port", str(place.others[0])]
    command = [PYTHON, "-m", "server", "--model-store", str(store), "--models", place.model.name, *ports]
    return [*command, "--workers", str(workers), "--device", "cpu", "--work-dir", str(place.folder)]


def _start_stock(place: Place) -> list[str]:
    """Start TorchServe as `torchserve --start` does: its own JVM settings, logging and defaults, one worker a model."""
    handler = {"handler.py": (ROOT / "benchmarks/rivals/torchserve_stock.py").read_bytes()}
    store = place.folder / "store"
    store.mkdir(exist_ok=True)
    for name in ("lists", "bytes"):
        write_archive(store / f"{name}.mar", name, handler)
    ports = {
        "inference_address": f"http://127.0.0.1:{place.rest}",
        "management_address": f"http://127.0.0.1:{place.others[0]}",
        "metrics_address": f"http://127.0.0.1:{place.others[1]}",
        "grpc_inference_port": place.grpc,
        "grpc_management_port": place.others[2],
        "initial_worker_port": 10_000 + place.others[2] % 20_000,
        "default_workers_per_model": 1,
        "disable_token_authorization": "true",
        "max_response_size": 2**28,
        "load_models": "all",
    }
    config = place.folder / "config.properties"
    config.write_text("".join(f"{name}={value}\n" for name, value in ports.items()))
    command = [str(Path(PYTHON).parent / "torchserve"), "--start", "--foreground", "--ncs"]
    return [*command, "--model-store", str(store), "--ts-config", str(config)]


def _uvicorn(app: str, *more: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        where = [f"benchmarks.rivals.{app}:app", "--port", str(place.rest), "--log-level", "warning", "--no-access-log"]
        return [str(BENCH_BIN / "uvicorn"), *where, *more]

    return command


def _start_mosec(place: Place) -> list[str]:
    return [sys.executable, "-m", "benchmarks.rivals.mosec", "--address", "127.0.0.1", "--port", str(place.rest)]


def _start_litserve(batch: int) -> Callable[[Place], list[str]]:
    return lambda place: [sys.executable, "-m", "benchmarks.rivals.litserve", str(place.rest), str(batch)]


def _start_bento(place: Place) -> list[str]:
    app = "benchmarks.rivals.bento:Classifier"
    return [str(BENCH_BIN / "bentoml"), "serve", app, "--host", "127.0.0.1", "--port", str(place.rest)]


def _floor(network: str) -> Server:
    return Server(
        f"floor, {network}",
        "floor",
        lambda place: [sys.executable, "-m", "benchmarks.floor", network, place.model.name],
        lambda *_: None,
        lambda *_: None,
    )


SERVERS = (
    Server("convscope", "ours", _start_ours(1), ask_ours, read_ours, warm_up_s=JVM_S, probe=card),
    Server("convscope, 2 workers", "ours", _start_ours(2), ask_ours, read_ours, warm_up_s=JVM_S, probe=card),
    Server("TorchServe, null", "wall", _start_null, ask_null, lambda *_: None, warm_up_s=JVM_S, probe=card),
    Server("TorchServe", "documented", _start_stock, ask_binary("/predictions/{1}"), read_rival, warm_up_s=JVM_S),
    Server("FastAPI", "documented", _uvicorn("fastapi"), ask_binary("/{0}"), read_rival),
    Server("LitServe", "documented", _start_litserve(1), ask_litserve, read_rival),
    Server("LitServe, batching", "documented", _start_litserve(32), ask_litserve, read_rival),
    Server("mosec", "documented", _start_mosec, ask_binary("/{0}"), read_rival),
    Server("mosec, batching", "documented", _start_mosec, ask_binary("/{0}"), read_rival, {"BENCH_BATCH": "32"}),
    Server("BentoML", "documented", _start_bento, ask_binary("/{0}"), read_rival),
    Server(
        "uvicorn, tuned",
        "tuned",
        _uvicorn("tuned_uvicorn", "--interface", "asgi3", "--lifespan", "off"),
        ask_binary("/{0}", many=True, lists=False),
        read_rival,
    ),
    Server(
        "mosec, tuned",
        "tuned",
        _start_mosec,
        ask_binary("/{0}", many=True, lists=False),
        read_rival,
        {"BENCH_NETWORK": "tuned"},
    ),
    Server(
        "mosec, tuned, batching",
        "tuned",
        _start_mosec,
        ask_binary("/{0}", lists=False),
        read_rival,
        {"BENCH_NETWORK": "tuned", "BENCH_BATCH": "32"},
    ),
    _floor("convscope"),
    _floor("tuned"),
)


def environment(server: Server, place: Place) -> dict[str, str]:
    """Return a server's environment: one thread a worker, a temporary folder of its own."""
    folder = place.folder / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "client/src")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),
        "BENCH_MODEL": str(place.model.folder.resolve()),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CONVSCOPE_THREADS": "1",
        "BENTOML_HOME": str(place.folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        **server.environment,
    }


def clean(place: Place) -> None:
    """Remove what a server left."""
    shutil.rmtree(place.folder, ignore_errors=True)
