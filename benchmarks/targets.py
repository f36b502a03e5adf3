"""The targets of the service, and whether the last results meet them.

    python -m benchmarks.targets [--out FOLDER]    # reads FOLDER/NAME.json; `make bench` ends with it

Each is a ratio of pictures a second within a round: of ours to the best of those it is compared with, in that round.
The median of the rounds decides.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import ROOT
from benchmarks.summaries import Summary, spread, table

YARDSTICK = ROOT / "benchmarks/results/yardstick.json"
"""What ours had to `uvicorn, tuned` on 32×32 pictures before photographs were looked at: the ratios of each round."""


@dataclass(frozen=True)
class Target:
    """A ratio to reach.

    Attributes:
        number: Number of the target.
        network: Network of the results.
        workload: Workload of the results.
        over: A server's name, or a kind of server, the best of which counts.
        least: Least median that meets the target.
        ours: Name of our server.
    """

    number: int
    network: str
    workload: str
    over: str
    least: float
    ours: str = "convscope"


FLOOR = "floor, convscope"
TARGETS = (
    *(
        Target(1, network, f"scores, {size}, c=8", over, least)
        for network in ("resnet50", "mobilenet_v3_small")
        for size, ahead in (("3 MP", 1.5), ("12 MP", 3.0))
        for over, least in (("documented", ahead), (FLOOR, 0.9))
    ),
    *(
        Target(1, network, f"scores, {size}, c=8", "documented", least, "convscope, scaled decoding")
        for network in ("resnet50", "mobilenet_v3_small")
        for size, least in (("3 MP", 1.5), ("12 MP", 3.0))
    ),
    *(
        Target(2, network, f"scores, 0.3 MP, c={callers}", "documented", 1.0)
        for network, counts in (("mobilenet_v3_small", (1, 8, 32)), ("resnet50", (8,)), ("efficientnet_b0", (8,)))
        for callers in counts
    ),
    Target(3, "resnet50", "pool, 0.3 MP, 32 pictures, c=3", FLOOR, 0.9),
    Target(3, "mobilenet_v3_small", "pool, 3 MP, 32 pictures, c=3", FLOOR, 0.9),
    Target(4, "resnet50", "scores, 0.3 MP, c=8", "convscope, one worker", 1.7),
    *(Target(6, "cifar", name, "uvicorn, tuned", 0.9) for name in json.loads(YARDSTICK.read_text())["ratios"]),
)
MEANING = """1: photographs of 3 and 12 megapixels, one a request, are answered at 1.5 and 3 times the rate of the best
rival that is used as its documentation advises, and at 0.9 of that of our own handler in a loop of as many processes;
decoded whole, and the first once more with `--scaled-decoding`.
2: photographs of 640×480: faster than each such rival.
3: 32 photographs a request: 0.9 of the handler in a loop on all cores.
4: a worker on each of two cores: 1.7 times one worker.
6: 32×32 pictures: 0.9 of the ratio to `uvicorn, tuned` that was measured on {date}.
5, bfloat16, is not part of the standard set."""


def measured(target: Target, summaries: dict[str, Summary], kinds: dict[str, str]) -> list[float]:
    """Return the ratio of each round."""
    ours = summaries.get(target.ours, {"rates": {}})["rates"]
    others = [one["rates"] for name, one in summaries.items() if target.over in (name, kinds[name])]
    ratios = []
    for number, rate in ours.items():
        best = max((rates.get(number, 0.0) for rates in others), default=0.0)
        if best:
            ratios.append(rate / best)
    if target.number == 6:
        before = statistics.median(json.loads(YARDSTICK.read_text())["ratios"][target.workload])
        return [ratio / before for ratio in ratios]
    return ratios


def markdown(read: Callable[[str], dict[str, Any]]) -> str:
    """Lay out all targets; `read` gives a network's results, and {} where there are none."""
    rows = []
    for target in TARGETS:
        found = read(target.network)
        kinds = {name: server["kind"] for name, server in found.get("servers", {}).items()}
        ratios = measured(target, found.get("summaries", {}).get(target.workload, {}), kinds)
        median = statistics.median(ratios) if ratios else None
        verdict = "not measured" if median is None else "met" if median >= target.least else "**missed**"
        over = "best rival as documented" if target.over == "documented" else target.over
        row = [str(target.number), target.network, target.workload, target.ours, over, f"{target.least:g}"]
        rows.append([*row, spread(ratios), str(len(ratios)), found.get("circumstances", {}).get("date", ""), verdict])
    date = json.loads(YARDSTICK.read_text())["date"]
    compared = ("target", "network", "workload", "ours", "over", "at least")
    head = (*compared, "median (least–largest)", "rounds", "date", "verdict")
    return "\n".join(["# Targets", "", *MEANING.format(date=date).splitlines(), "", *table(head, rows)])


def write(folder: Path) -> str:
    """Write targets.md of the results in a folder, and return it."""

    def read(name: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    text = markdown(read)
    (folder / "targets.md").write_text(text)
    return text


def main() -> None:
    """Print the targets."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder with the results")
    print(write(parser.parse_args().out))


if __name__ == "__main__":
    main()
