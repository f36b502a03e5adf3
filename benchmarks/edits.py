"""Measure what edits cost a worker: a request without edits, with one and sixteen, and compared.

Type: OMP_NUM_THREADS=1 python -m benchmarks.edits [--model cifar] [--requests 200]

The archive's handler answers in this process, one request of one picture at a time. The kinds of request take turns, so
that other load on the machine affects all of them alike. Requests without edits run on the engine that predicts, those
with edits in torch: the difference includes both. The last two kinds are the requests of the page of `convscope ui`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.load import ROOT
from handlers.loading import load
from handlers.wire.convscope_pb2 import UINT8, Edit, PredictReply, PredictRequest

WARM_UP = 3  # The first request with edits builds the network in torch.


def main() -> None:
    """Measure every kind of request in turns, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar", help="an archive of model_store/ that takes samples/cat.png")
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(ROOT / f"model_store/{options.model}.mar") as archive:
            archive.extractall(folder)
        service = load(Path(folder), model=options.model, version="1", config={}, batch_size=1, gpu=None)
        [described] = service.respond([{"request": PredictRequest(describe=True).SerializeToString()}], [{}])
        card = PredictReply.FromString(described.body).card
        kinds = requests(card.layers[0].name)
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(options.requests + WARM_UP):
            for kind, body in kinds.items():
                used, began = time.process_time(), time.perf_counter()
                [reply] = service.respond([{"request": body}], [{}])
                took = time.process_time() - used, time.perf_counter() - began
                assert not PredictReply.FromString(reply.body).HasField("error")
                if number >= WARM_UP:
                    found[kind].append(took)
    print(f"{options.model}, {card.engine}, {options.requests} requests of each kind; ms")
    print(f"{machine.circumstances()}\n")
    print("| request | processor | elapsed |\n|---|---|---|")
    for kind, takes in found.items():
        print(f"| {kind} | {' | '.join(cell(times) for times in zip(*takes, strict=True))} |")


def requests(layer: str) -> dict[str, bytes]:
    """Return each kind of request, serialised; edits scale channels of a layer."""
    picture = (ROOT / "samples/cat.png").read_bytes()
    edits = [Edit(layer=layer, operation="scale", value=[0.5], channels=[channel]) for channel in range(16)]
    one: dict[str, Any] = {"edits": edits[:1]}
    page: dict[str, Any] = {"layers": ["all"], "map_dtype": UINT8}
    kinds: dict[str, dict[str, Any]] = {
        "without edits": {},
        "one edit": one,
        "sixteen edits": {"edits": edits},
        "one edit, `compare`": {**one, "compare": True},
        "sixteen edits, `compare`": {"edits": edits, "compare": True},
        "all maps as uint8": page,
        "the same, one edit, `compare`": {**page, **one, "compare": True},
    }
    return {kind: PredictRequest(pictures=[picture], **more).SerializeToString() for kind, more in kinds.items()}


def cell(seconds: tuple[float, ...]) -> str:
    """Write the median in milliseconds, with the quartiles."""
    first, median, third = (1000 * cut for cut in statistics.quantiles(seconds, n=4))
    return f"{median:.1f} ({first:.1f}–{third:.1f})"


if __name__ == "__main__":
    main()
