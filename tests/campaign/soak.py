"""The soak: `predict_many` for an hour, over REST and gRPC in turns, good pictures and bad, every answer compared.

    .venv/bin/python -m tests.campaign.soak --minutes 60

It starts the service itself. Exit status 1 if an answer was wrong, out of order or missing, or a worker was restarted.
Results go to `out/soak/`: `summary.md`, `samples.csv`, `chart.png`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from convscope import BadImage, Client

from tests.campaign.cases import GOOD
from tests.campaign.load import SAMPLE_S
from tests.campaign.services import own_service
from tests.campaign.watch import MEBIBYTE
from tests.server.harness import ROOT

BATCH = 500  # Pictures of one call of predict_many.
BAD_SHARE = 0.02


def check(client: Client, model: str, chance: random.Random, expected: list[int], tally: Counter[str]) -> None:
    """Send one stream of pictures and compare every answer with the one that is known."""
    places = [chance.randrange(len(GOOD[model])) for _ in range(BATCH)]
    bad = {place for place in range(BATCH) if chance.random() < BAD_SHARE}
    pictures = [b"no picture" if place in bad else GOOD[model][number] for place, number in enumerate(places)]
    layers = chance.choice(((), ("conv1",), ("all",)))
    options = {"batch": chance.choice((1, 8, 32)), "concurrency": chance.choice((2, 8))}
    got = 0
    for place, answer in enumerate(client.predict_many(pictures, model=model, layers=layers, **options)):
        got += 1
        if place in bad:
            tally["bad rejected" if isinstance(answer.error, BadImage) else "bad answered"] += 1
        elif answer.error is not None:
            tally[f"failed: {type(answer.error).__name__}: {answer.error}"] += 1
        else:
            tally["right" if answer.top[0].index == expected[places[place]] else "wrong"] += 1
    tally["missing"] += BATCH - got


def main() -> int:
    """Run the soak and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.soak", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "out/soak")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tally: Counter[str] = Counter()
    chance, own = random.Random(given.seed), psutil.Process()
    with own_service(1) as (target, watch, _):
        before = watch.worker_ids()
        clients = [Client(url, deadline_s=60) for url in (target.rest, f"grpc://{target.grpc}")]
        expected = {
            model: [clients[0].predict(file, model=model).top[0].index for file in files]
            for model, files in GOOD.items()
        }
        started = last = time.monotonic()
        memory: list[tuple[float, float, int]] = []
        while time.monotonic() - started < given.minutes * 60:
            for client in clients:
                model = chance.choice(list(GOOD))
                check(client, model, chance, expected[model], tally)
            if time.monotonic() - last >= SAMPLE_S:
                last = time.monotonic()
                watch.look(tally.total())
                memory.append((last - started, own.memory_full_info().uss / MEBIBYTE, own.num_fds()))
        seconds = time.monotonic() - started
        after = watch.worker_ids()
        for client in clients:
            client.close()
    watch.write(given.out / "samples.csv")
    pictures = tally.total()
    watch.draw(given.out / "chart.png", f"{pictures:,} pictures by predict_many in {seconds / 60:.0f} minutes")
    quarter = max(1, len(memory) // 4)
    lines = [f"{pictures:,} pictures in {seconds / 60:.1f} minutes, {pictures / seconds:.0f}/s", str(dict(tally))]
    lines += [f"workers before {before}, after {after}"]
    for role, (early, late, descriptors, descriptors_late) in watch.growth().items():
        lines.append(
            f"{role}: {early:.0f} MiB in the second quarter, {late:.0f} in the last; "
            f"{descriptors:.0f}, {descriptors_late:.0f} descriptors"
        )
    lines.append(
        f"client: {memory[quarter][1]:.0f} MiB after the first quarter, {memory[-1][1]:.0f} at the end; "
        f"{memory[quarter][2]}, {memory[-1][2]} descriptors"
    )
    text = "\n".join(lines) + "\n"
    (given.out / "summary.md").write_text(text)
    print(text)
    good = {"right", "bad rejected"}
    wrong = {name: count for name, count in tally.items() if name not in good and count}
    return 1 if wrong or before != after else 0


if __name__ == "__main__":
    sys.exit(main())
