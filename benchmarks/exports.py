"""Measure the rate of `convscope export`, by format, beside that of `predict_many` with the same requests.

Type: python -m benchmarks.exports FOLDER [--url http://localhost:8080] [--model cifar] [--layers conv1,conv2]

It needs a running service. In each round the pictures are sent once with `predict_many`, which writes nothing, and once
with each format; each round begins with the next of these. The time of an export is that of the whole call: listing,
requests, parts, and the final result. Processor time is that of this process, all threads, without the service's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from convscope import Client
from convscope_lens import export

from benchmarks.summaries import spread

WAYS = ("predict_many", "features.parquet", "features", "features.zarr")


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://localhost:8080")
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--layers", default="conv1,conv2")
    parser.add_argument("--pool", type=int, default=1, help="0 for whole maps")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pictures = sorted(path for path in options.folder.rglob("*") if path.is_file())
    asked = {"model": options.model, "layers": options.layers.split(","), "pool": options.pool or None}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_us: dict[str, list[float]] = {way: [] for way in WAYS}  # Of a picture.
    with Client(options.url) as client, tempfile.TemporaryDirectory() as folder:
        for way in WAYS[1:]:  # Imports its package.
            export(client, pictures[0], Path(folder) / way, **asked)
        for number in range(options.rounds):
            for step in range(len(WAYS)):
                way = WAYS[(number + step) % len(WAYS)]
                began, used_s = time.perf_counter(), time.process_time()
                if way == "predict_many":
                    many = client.predict_many(pictures, concurrency=4, batch=8, top_k=1, **asked)
                    failed = sum(prediction.error is not None for prediction in many)
                else:
                    out = Path(folder) / f"{number}" / way
                    failed = export(client, options.folder, out, batch=8, **asked).failed
                rates[way].append(len(pictures) / (time.perf_counter() - began))
                processor_us[way].append((time.process_time() - used_s) / len(pictures) * 1e6)
                assert not failed, f"{failed} pictures failed"
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    head = f"{len(pictures):,} pictures, {options.rounds} rounds"
    print(f"| {head} | pictures a second | of `predict_many` in its round | processor time of a picture, µs |")
    print("|---|---|---|---|")
    for way, found in rates.items():
        ratios = [rate / reference for rate, reference in zip(found, rates["predict_many"], strict=True)]
        cells = [spread(found, "{:.0f}"), spread(ratios), spread(processor_us[way], "{:.0f}")]
        print(f"| {way} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
