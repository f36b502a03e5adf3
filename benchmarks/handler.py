"""What the handler costs in one process: CPU time a request, for this checkout and others, in alternation.

Type: python -m benchmarks.handler --model cifar --against ../main --rounds 15

Each checkout and engine runs in a process of its own, asked in turn for 50 ms of each workload; given are the least of
all rounds and the median of the rounds' medians, in microseconds of CPU time a request. Calls are as TorchServe makes
them, the request as protobuf; nothing of TorchServe runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLOAT16, UINT8 = 2, 3
WORKLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "scores": (1, {}),
    "maps float32": (1, {"layers": ["all"]}),
    "maps float16": (1, {"layers": ["all"], "map_dtype": FLOAT16}),
    "maps uint8": (1, {"layers": ["all"], "map_dtype": UINT8}),
    "32 pictures, scores": (32, {}),
    "32 pictures, maps float16": (32, {"layers": ["all"], "map_dtype": FLOAT16}),
    "32 pictures, maps uint8": (32, {"layers": ["all"], "map_dtype": UINT8}),
}
PICTURES = {"digits": "digit-3.png", "edges": "square.png"}


def work(checkout: Path, model: str, engine: str) -> None:
    """Response lines `[workload, seconds]` on standard input with the least and median time of a call."""
    sys.path.insert(0, str(checkout))
    from handlers.pipeline import Pipeline
    from handlers.settings import Settings
    from handlers.wire import convscope_pb2 as wire

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(checkout / "model_store" / f"{model}.mar") as archive:
            archive.extractall(folder)
        service = Pipeline.load(
            Path(folder),
            model=model,
            version="1.0",
            config={},
            batch_size=1,
            gpu=None,
            settings=Settings(engine=engine, max_response_bytes=2**28),
        )
    picture = (ROOT / "samples" / PICTURES.get(model, "cat.png")).read_bytes()
    rows = {}
    for name, (count, asked) in WORKLOADS.items():
        rows[name] = [
            {"request": bytearray(wire.PredictRequest(pictures=[picture] * count, **asked).SerializeToString())}
        ]
        reply = wire.PredictReply.FromString(service.respond(rows[name], [{}])[0].body)
        assert not reply.HasField("error"), reply.error
    print(json.dumps(reply.engine), flush=True)
    for line in sys.stdin:
        name, seconds = json.loads(line)
        times: list[float] = []
        while sum(times) < seconds:
            began = time.thread_time()
            service.respond(rows[name], [{}])
            times.append(time.thread_time() - began)
        print(json.dumps([min(times) * 1e6, statistics.median(times) * 1e6]), flush=True)


def start(checkout: Path, model: str, engine: str) -> subprocess.Popen[str]:
    """Start a worker on another checkout's handlers and this file."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--worker",
        str(checkout),
        "--model",
        model,
        "--engine",
        engine,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tempfile.gettempdir()
    )


def ask(worker: subprocess.Popen[str], name: str) -> list[float]:
    """Have a worker run one workload for a while."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps([name, 0.05]) + "\n")
    worker.stdin.flush()
    least, median = json.loads(worker.stdout.readline())
    return [least, median]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="DIR", help="other checkouts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.model, options.engine)
        return
    workers = {f"{path.resolve().name}": start(path.resolve(), options.model, "auto") for path in options.against}
    workers |= {f"here, {engine}": start(ROOT, options.model, engine) for engine in ("torch", "auto")}
    engines = [json.loads(worker.stdout.readline()) for worker in workers.values() if worker.stdout]
    found: dict[str, dict[str, list[list[float]]]] = {name: {who: [] for who in workers} for name in WORKLOADS}
    for number in range(options.rounds):
        for name in WORKLOADS:
            for who, worker in list(workers.items())[:: 1 if number % 2 else -1]:
                found[name][who].append(ask(worker, name))
    titles = [f"{who} ({engine})" for who, engine in zip(workers, engines, strict=True)]
    print(f"| {options.model} | " + " | ".join(titles) + " |\n|---|" + "---|" * len(workers))
    for name, times in found.items():
        cells = [
            f"{min(t[0] for t in one):,.0f} / {statistics.median(t[1] for t in one):,.0f}" for one in times.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for worker in workers.values():
        worker.communicate()


if __name__ == "__main__":
    main()
