"""Measure what edits cost: one caller and one worker, requests without edits, with one and sixteen, and compared.

Type: python -m benchmarks.edits [--network cifar] [--requests 200]

The kinds of request take turns, so that what else the machine does meets all of them alike. Requests without edits run
on the engine that predicts, edits in torch: the difference holds both. The last kind is what the page of `convscope ui`
asks for. Processor time is that of the worker and of TorchServe's Java; it is counted in steps of 10 ms, so a mean of
many requests is given.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from convscope import Client, Edit

from benchmarks import machine, models
from benchmarks.large_reply import spent
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.workloads import Asked, closed

WARM_UP = 5  # The first request with edits waits for torch, and a JVM compiles the first ones.


def main() -> None:
    """Measure every kind of request in turns, and print the table with its circumstances."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="cifar", choices=models.NETWORKS)
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    options = parser.parse_args()
    photograph = "" if options.network == "cifar" else "0.3 MP"
    model = models.prepare(options.network, ROOT / "out/bench")
    [file] = model.files(Asked("scores", 1, photograph))
    ours = next(one for one in SERVERS if one.name == "convscope")
    with Running(ours, model, ROOT / "out/bench", 1) as running:
        running.warm_up([closed("scores", 1, 1, photograph)])
        with Client(f"http://127.0.0.1:{running.place.rest}") as client:
            kinds = requests(client.model_card(model.name).layers[0].name)
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for number in range(options.requests + WARM_UP):
                for kind, more in kinds.items():
                    took = spent(running, client.predict, file, model=model.name, **more)
                    if number >= WARM_UP:
                        found[kind].append(took)
    print(f"{options.network}, one worker; {options.requests} requests of each kind; ms")
    print(f"{machine.circumstances()}\n")
    print("| request | median | quartiles | processor, mean |\n|---|---|---|---|")
    for kind, takes in found.items():
        first, median, third = statistics.quantiles([took["wall"] for took in takes], n=4)
        processor = statistics.fmean(took["Python"] + took["Java"] for took in takes)
        print(f"| {kind} | {median:.1f} | {first:.1f} to {third:.1f} | {processor:.1f} |")


def requests(layer: str) -> dict[str, dict[str, Any]]:
    """Return the options of each kind of request; edits scale channels of a layer."""
    edits = [Edit(layer=layer, operation="scale", value=0.5, channels=[channel]) for channel in range(16)]
    page = {"layers": [layer], "map_dtype": "uint8", "channels": 16}
    return {
        "without edits": {},
        "one edit": {"edits": edits[:1]},
        "sixteen edits": {"edits": edits},
        "one edit, `compare`": {"edits": edits[:1], "compare": True},
        "sixteen edits, `compare`": {"edits": edits, "compare": True},
        "without edits, a map": page,
        "one edit, `compare`, a map": {**page, "edits": edits[:1], "compare": True},
    }


if __name__ == "__main__":
    main()
