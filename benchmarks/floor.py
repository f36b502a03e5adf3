"""The floor: decode, forward pass and encoding in one loop of one process, without a server or a wire.

    python -m benchmarks.floor convscope|tuned MODEL    # answers lines of JSON: {"want", "pictures", "seconds"}

`convscope` is our handler's own code, from a request's bytes to a reply's; `tuned` is the network of the tuned rivals.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.load import ROOT

Ask = Callable[[], object]


def _ours(model: str, folder: Path) -> Callable[[str, int], Ask]:
    import yaml

    from benchmarks.asking import Place, our_request
    from benchmarks.models import SAMPLES, Model, picture
    from handlers.loading import load
    from handlers.settings import Settings

    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    environment = {**os.environ, "CONVSCOPE_THREADS": "1", "CONVSCOPE_MAX_RESPONSE_BYTES": str(2**28)}
    service = load(
        folder,
        model=model,
        version="1.0",
        config=config,
        batch_size=1,
        gpu=None,
        settings=Settings.from_environment(environment),
    )
    pictures = tuple(picture(model, sample) for sample in SAMPLES[model])
    place = Place(Model(model, folder, folder, pictures, 0, {}), folder, 0, 0)

    def prepare(want: str, count: int) -> Ask:
        body = our_request(place, want, count)
        return lambda: service.respond([{"request": body}], [{}])

    return prepare


def _tuned(model: str, folder: Path) -> Callable[[str, int], Ask]:
    from benchmarks.models import SAMPLES, picture
    from benchmarks.rivals.network import Tuned, encode

    network = Tuned(folder)
    pictures = [picture(model, sample) for sample in SAMPLES[model]]

    def prepare(want: str, count: int) -> Ask:
        files = [pictures[index % len(pictures)] for index in range(count)]
        return lambda: encode(network.respond(files, want))

    return prepare


def main() -> None:
    """Response one line for each line read."""
    network, model = sys.argv[1:]
    folder = Path(os.environ.get("BENCH_MODEL", ROOT / "out/bench" / model))
    prepare = (_ours if network == "convscope" else _tuned)(model, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        ask = prepare(said["want"], said["pictures"])
        ask()
        latencies = []
        began = now = time.perf_counter()
        while now < began + said["seconds"]:
            ask()
            before, now = now, time.perf_counter()
            latencies.append(now - before)
        print(json.dumps({"latencies": latencies, "wall_s": now - began}), flush=True)


if __name__ == "__main__":
    main()
