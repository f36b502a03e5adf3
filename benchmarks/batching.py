"""What batchSize, maxBatchDelay and workers do to requests: the curves behind the rule in `training.survey`.

Type: python -m benchmarks.batching --rounds 5

One TorchServe serves the same archive under many names, each with other settings and workers of its own, so that all
share one warm JVM. The load goes from one to the next, in an order that turns from round to round; a ratio compares
within a round with the first setting (batchSize 1, one worker), and tables give the medians. A delay of 0, by which a
worker takes what waits and waits for nothing, but at most two requests, cannot be said in an archive; here it is said
in a snapshot, which TorchServe takes literally.
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
from collections.abc import Callable
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
STARTER = (
    "import sys; from pathlib import Path; from server import configuration; "
    "configuration.TEMPLATE = Path(sys.argv.pop(1)); from server.__main__ import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Setting:
    """One way to serve an archive: requests in a batch, milliseconds that one waits for others, worker processes."""

    batch: int
    delay_ms: int
    workers: int

    @property
    def name(self) -> str:
        """The model that is served so."""
        return f"b{self.batch}-d{self.delay_ms}-w{self.workers}"


SETTINGS = (
    *(Setting(1, 1, workers) for workers in (1, 2)),
    *(Setting(2, delay, workers) for delay in (0, 1) for workers in (1, 2)),
    *(Setting(batch, 1, workers) for batch in (4, 8) for workers in (1, 2)),
)


def main() -> int:
    """Measure, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archive", type=Path, default=ROOT / "model_store/cifar.mar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rest = free_port()
        command = [sys.executable, "-c", STARTER, str(write_template(folder, options.archive))]
        command += ["--model-store", str(folder / "store"), "--rest-port", str(rest), "--grpc-port", "0"]
        command += ["--metrics-port", "0", "--device", "cpu", "--work-dir", str(folder)]
        log = stack.enter_context((folder / "log").open("wb"))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "CONVSCOPE_THREADS"), "1")
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        for setting in SETTINGS:
            await_answer(server, f"http://127.0.0.1:{rest}/predictions/{setting.name}")
        report(options, server.pid, rest)
    return 0


def write_template(folder: Path, archive: Path) -> Path:
    """Write the archive once a setting, and a configuration that serves them so."""
    (folder / "store").mkdir()
    with zipfile.ZipFile(archive) as source:
        files = {name: source.read(name) for name in source.namelist()}
    manifest, config = json.loads(files["MAR-INF/MANIFEST.json"]), yaml.safe_load(files["model-config.yaml"])
    version = manifest["model"]["modelVersion"]
    models = {}
    for one in SETTINGS:
        manifest["model"]["modelName"] = one.name
        config |= {"batchSize": one.batch, "minWorkers": one.workers, "maxWorkers": one.workers}
        files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
        files["model-config.yaml"] = yaml.safe_dump(config).encode()
        with zipfile.ZipFile(folder / f"store/{one.name}.mar", "w") as copy:
            for name, content in files.items():
                copy.writestr(name, content)
        models[one.name] = {
            version: {
                "defaultVersion": True,
                "marName": f"{one.name}.mar",
                "minWorkers": one.workers,
                "maxWorkers": one.workers,
                "batchSize": one.batch,
                "maxBatchDelay": one.delay_ms,
                "responseTimeout": 120,
            }
        }
    snapshot = json.dumps({"name": "batching", "modelCount": len(models), "models": models})
    lines = (ROOT / "server/config.properties").read_text().splitlines()
    template = folder / "template.properties"
    template.write_text("\n".join([*lines, f"model_snapshot={snapshot}", ""]))
    return template


def report(options: argparse.Namespace, pid: int, port: int) -> None:
    """Measure every kind of request under every setting in turns, and print the rows."""
    picture = (ROOT / "samples/cat.png").read_bytes()
    loads = {
        (name, callers): build(port, message, [picture] * pictures, callers)
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
                before = sum(machine.cpu_s(pid).values())
                outcome = measure(load(setting, options.seconds))
                assert not outcome.errors, outcome.errors
                used = sum(machine.cpu_s(pid).values()) - before
                found.setdefault(key, {}).setdefault(setting, []).append(summarise(outcome, used))
    print("| asked | callers | " + " | ".join(setting.name for setting in SETTINGS) + " |")
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
    port: int, asked: wire.PredictRequest, pictures: list[bytes], callers: int
) -> Callable[[Setting, float], Load]:
    """Return a function that makes the load of a kind of request from a setting and its seconds."""
    request = wire.PredictRequest(pictures=pictures)
    request.MergeFrom(asked)
    body = request.SerializeToString()
    media = "application/x-protobuf"

    def load(setting: Setting, seconds: float) -> Load:
        head = (
            f"POST /predictions/{setting.name} HTTP/1.1\r\nhost: localhost\r\naccept: {media}\r\n"
            f"content-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return Load(("127.0.0.1", port), "REST", (Request(head.encode() + body),), callers, seconds)

    return load


if __name__ == "__main__":
    sys.exit(main())
