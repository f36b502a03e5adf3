"""How throughput grows with the pictures of a request, with workers, and with the size of the maps; workers' memory.

Type: python -m benchmarks.growth --rounds 5

Our service alone, with one worker and with two, in turns. Writes `benchmarks/results/growth-<model>.md` and `.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import machine, models
from benchmarks.load import ROOT
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.summaries import keep, spread, summarise
from benchmarks.workloads import GROWTH, Workload

_OURS = [server for server in SERVERS if server.kind == "ours"]


def main() -> None:
    """Measure and write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar", choices=models.SAMPLES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    options = parser.parse_args()
    takes, sizes, memory = measure(options)
    kept, discarded = keep(takes)
    rates = {
        workload: {server: list(one["rates"].values()) for server, one in servers.items()}
        for workload, servers in summarise(kept).items()
    }
    out = options.out / f"growth-{options.model}"
    about = machine.circumstances()
    lines = [
        f"# How throughput grows: {options.model}",
        "",
        f"{time.strftime('%Y-%m-%d')}. {about['machine']}. Pictures a second through REST, median of {options.rounds} "
        f"rounds of {options.seconds:g} s with the least and the largest; {discarded} rounds of a workload discarded. "
        f"`c` callers, each with one request in flight. Two workers share the cores with each other and the load.",
        "",
        f"| workload | bytes of a reply | {' | '.join(server.name for server in _OURS)} |",
        "|---|---|" + "---|" * len(_OURS),
    ]
    for workload, servers in rates.items():
        cells = [spread(servers[server.name], "{:,.0f}") for server in _OURS]
        lines.append(f"| {workload} | {sizes[workload]:,} | {' | '.join(cells)} |")
    lines += ["", "Memory afterwards, MiB: a process's own, and with its share of what others use too.", ""]
    lines += ["| server | Java | each worker | all processes |", "|---|---|---|---|"]
    for server, processes in memory.items():
        kinds = [[one for one in processes if one["name"] == name] for name in ("java", "worker")]
        cells = [", ".join(f"{one['uss']:,.0f} / {one['pss']:,.0f}" for one in kind) for kind in kinds]
        cells.append(f"{sum(one['uss'] for one in processes):,.0f} / {sum(one['pss'] for one in processes):,.0f}")
        lines.append(f"| {server} | {' | '.join(cells)} |")
    options.out.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(rates, sizes, out.with_suffix(".png"))
    print(out.with_suffix(".md").read_text())


def measure(
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, list[dict[str, Any]]]]:
    """Return every measurement, the bytes of each workload's reply, and each server's processes with their memory."""
    work = ROOT / "out/bench"
    model = models.prepare(options.model, work)
    takes: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Running(server, model, work)) for server in _OURS]
        for one in running:
            one.warm_up(GROWTH)
        for number in range(options.rounds):
            for workload in GROWTH:
                for one in running[:: 1 if number % 2 else -1]:
                    takes.append({"round": number, **one.take(workload, options.seconds)})
        memory = {one.server.name: machine.memory_mib(one.process.pid) for one in running}
    sizes = {take["workload"]: take["body_bytes"] // max(1, len(take["latencies"])) for take in takes}
    return takes, sizes, memory


def draw(rates: dict[str, dict[str, list[float]]], sizes: dict[str, int], path: Path) -> None:
    """Draw pictures a second over the pictures of a request, and over the bytes of a reply."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = {"scores": "#1f77b4", "float16": "#d08770", "float32": "#5e8d5a"}
    styles = {server.name: style for server, style in zip(_OURS, ("-", "--"), strict=True)}
    for server, style in styles.items():
        for want, colour in colours.items():
            some = [one for one in GROWTH if one.callers == 2 and one.asked[0].want == want]
            curve(
                left, some, [one.asked[0].pictures for one in some], rates, server, f"{want}, {server}", colour, style
            )
        some = [one for one in GROWTH if one.callers == 8]
        curve(right, some, [sizes[one.name] for one in some], rates, server, server, "#1f77b4", style)
    for one in some:
        right.annotate(one.asked[0].want, (sizes[one.name], 0), fontsize=8, ha="center", va="bottom")
    left.set(xlabel="pictures in a request (two callers)", ylabel="pictures/s", xscale="log", ylim=(0, None))
    left.set_xscale("log", base=2)
    right.set(xlabel="bytes of a reply to one picture (eight callers)", xscale="log", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def curve(
    axis: Any,
    some: list[Workload],
    x: list[int],
    rates: dict[str, dict[str, list[float]]],
    server: str,
    label: str,
    colour: str,
    style: str,
) -> None:
    """Draw a line of medians with bars from the least to the largest."""
    found = [rates[one.name][server] for one in some]
    middles = [statistics.median(one) for one in found]
    reach = [
        [middle - min(one) for middle, one in zip(middles, found, strict=True)],
        [max(one) - middle for middle, one in zip(middles, found, strict=True)],
    ]
    axis.errorbar(x, middles, yerr=reach, label=label, color=colour, linestyle=style, marker="o", capsize=2)


if __name__ == "__main__":
    main()
