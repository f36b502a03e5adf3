"""What batchSize and workers do to requests, with TorchServe's own queue and the mended one (`server.mending`).

Type: python -m benchmarks.batching --rounds 5

Two servers, one mended and one not, serve the same archive under many names, each with other settings and workers of
its own, so that the settings of a server share one warm JVM. The load goes from one to the next, in an order that turns
from round to round; a ratio compares within a round with the first setting (TorchServe's own queue, batchSize 1), and
the table gives medians: ratio of requests a second (requests a second, median
latency, the server's processor time a request).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks import machine
from benchmarks.capacity import await_answer
from benchmarks.load import ROOT, Load, Outcome, Request, measure
from benchmarks.running import free_port
from handlers.wire import convscope_pb2 as wire

PICTURES = ("32 pictures, maps float16", wire.PredictRequest(layers=["all"], map_dtype=wire.FLOAT16))
ASKED: tuple[tuple[str, wire.PredictRequest, int, tuple[int, ...]], ...] = (
    ("scores", wire.PredictRequest(), 1, (1, 8, 32)),
    ("maps float32", wire.PredictRequest(layers=["all"]), 1, (1, 8, 32)),
    ("maps uint8", wire.PredictRequest(layers=["all"], map_dtype=wire.UINT8), 1, (8, 32)),
    (*PICTURES, 32, (1, 4, 8)),
)
OWN = (
    "import sys; from server import process; process.mend = lambda home, folder: False; "
    "from server.__main__ import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Setting:
    """One way to serve an archive: requests in a batch, worker processes, and whether TorchServe is mended."""

    batch: int
    workers: int
    mended: bool

    @property
    def model(self) -> str:
        """The name of the model that is served so."""
        return f"b{self.batch}-w{self.workers}"

    @property
    def title(self) -> str:
        """As in the table."""
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{'mended' if self.mended else 'own'}, {self.batch}{workers}"


SETTINGS = (
    *(Setting(batch, 1, mended=False) for batch in (1, 2, 4, 8)),
    *(Setting(batch, 1, mended=True) for batch in (1, 2, 4, 8, 16)),
    *(Setting(batch, 2, mended=True) for batch in (1, 8)),
)
Servers = dict[bool, tuple[subprocess.Popen[bytes], int]]


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archive", type=Path, default=ROOT / "model_store/cifar.mar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    with ExitStack() as stack:
        servers = {mended: start(stack, options.archive, mended=mended) for mended in (False, True)}
        for setting in SETTINGS:
            server, port = servers[setting.mended]
            await_answer(server, f"http://127.0.0.1:{port}/predictions/{setting.model}")
        report(options, servers)
    return 0


def start(stack: ExitStack, archive: Path, *, mended: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server of the archive under every setting; return it and its REST port."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_store(folder / "store", archive, [one for one in SETTINGS if one.mended == mended])
    rest = free_port()
    command = [sys.executable, "-m", "server"] if mended else [sys.executable, "-c", OWN]
    command += ["--model-store", str(folder / "store"), "--rest-port", str(rest), "--grpc-port", "0"]
    command += ["--metrics-port", "0", "--device", "cpu", "--work-dir", str(folder)]
    log = stack.enter_context((folder / "log").open("wb"))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "CONVSCOPE_THREADS"), "1")
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    return server, rest


def write_store(store: Path, archive: Path, settings: Sequence[Setting]) -> None:
    """Write the archive once a setting."""
    store.mkdir()
    with zipfile.ZipFile(archive) as source:
        files = {name: source.read(name) for name in source.namelist()}
    manifest, config = json.loads(files["MAR-INF/MANIFEST.json"]), yaml.safe_load(files["model-config.yaml"])
    for one in settings:
        manifest["model"]["modelName"] = one.model
        config |= {"batchSize": one.batch, "minWorkers": one.workers, "maxWorkers": one.workers}
        files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
        files["model-config.yaml"] = yaml.safe_dump(config).encode()
        with zipfile.ZipFile(store / f"{one.model}.mar", "w") as copy:
            for name, content in files.items():
                copy.writestr(name, content)


def report(options: argparse.Namespace, servers: Servers) -> None:
    """Measure every kind of request under every setting in turns, and print the rows."""
    picture = (ROOT / "samples/cat.png").read_bytes()
    loads = {
        (name, callers): build(servers, message, [picture] * pictures, callers)
        for name, message, pictures, every in ASKED
        for callers in every
    }
    for setting in SETTINGS:
        for load in loads.values():
            measure(load(setting, 0.5))
    found: dict[tuple[str, int], dict[Setting, list[tuple[float, float, float]]]] = {}
    for turn in range(options.rounds):
        order = SETTINGS[turn % len(SETTINGS) :] + SETTINGS[: turn % len(SETTINGS)]
        for key, load in loads.items():
            for setting in order:
                pid = servers[setting.mended][0].pid
                before = sum(machine.cpu_s(pid).values())
                outcome = measure(load(setting, options.seconds))
                assert not outcome.errors, outcome.errors
                used = sum(machine.cpu_s(pid).values()) - before
                found.setdefault(key, {}).setdefault(setting, []).append(summarise(outcome, used))
    print("| asked | callers | " + " | ".join(setting.title for setting in SETTINGS) + " |")
    print("|---|---|" + "---|" * len(SETTINGS))
    for (name, callers), settings in found.items():
        first = settings[SETTINGS[0]]
        cells = []
        for rounds in settings.values():
            ratio = statistics.median(one[0] / base[0] for one, base in zip(rounds, first, strict=True))
            rate, p50, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
            cells.append(f"{ratio:.2f} ({rate:,.0f}/s, {p50 * 1e3:.2f} ms, {cpu * 1e6:,.0f} µs)")
        print(f"| {name} | {callers} | " + " | ".join(cells) + " |")
    print(f"\n{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def summarise(outcome: Outcome, used_s: float) -> tuple[float, float, float]:
    """Return requests a second, the median latency, and processor seconds a request of the server."""
    count = len(outcome.latencies)
    return count / outcome.wall_s, statistics.median(outcome.latencies), used_s / count


def build(
    servers: Servers, asked: wire.PredictRequest, pictures: list[bytes], callers: int
) -> Callable[[Setting, float], Load]:
    """Return a function that makes the load of a kind of request from a setting and its seconds."""
    request = wire.PredictRequest(pictures=pictures)
    request.MergeFrom(asked)
    body = request.SerializeToString()
    media = "application/x-protobuf"

    def load(setting: Setting, seconds: float) -> Load:
        head = (
            f"POST /predictions/{setting.model} HTTP/1.1\r\nhost: localhost\r\naccept: {media}\r\n"
            f"content-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return Load(
            ("127.0.0.1", servers[setting.mended][1]), "REST", (Request(head.encode() + body),), callers, seconds
        )

    return load


if __name__ == "__main__":
    sys.exit(main())
