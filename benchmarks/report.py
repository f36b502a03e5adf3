"""Writes the results as JSON, as Markdown and as a chart."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.summaries import MOST_STEAL, Summaries, Summary, keep, ratios, spread, summarise, table

_COLOURS = {"ours": "#1f77b4", "documented": "#999999", "tuned": "#d08770", "floor": "#dddddd"}


def write(found: dict[str, Any], out: Path) -> None:
    """Write `out`.json, `out`.md and `out`.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    kept, discarded = keep(found["takes"])
    found["discarded"] = discarded
    found["summaries"] = summaries = summarise(kept)
    plain = {name: value for name, value in found.items() if name != "takes"}
    out.with_suffix(".json").write_text(json.dumps(plain, indent=1))
    out.with_suffix(".md").write_text(markdown(found))
    draw(found, summaries, out.with_suffix(".png"))


def markdown(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"# {found['model']}", "", *_about(found)]
    for workload, summaries in found["summaries"].items():
        lines += [f"## {workload}", "", *_workload(summaries, found["servers"])]
    lines += ["## Start and memory", "", *_servers(found["servers"])]
    if stages := found["stages"]:
        names = list(next(iter(stages.values())))
        lines += ["## Stages of our service, one caller, median µs", ""]
        lines += table(
            ("request", *(name.removesuffix("_s") for name in names)),
            [[what, *(f"{seconds[name] * 1e6:,.0f}" for name in names)] for what, seconds in stages.items()],
        )
    if formats := found["formats"]:
        lines += ["## Bytes of a reply to one picture", ""]
        lines += table(
            ("reply", *next(iter(formats.values()))),
            [[want, *(f"{size:,}" for size in sizes.values())] for want, sizes in formats.items()],
        )
    return "\n".join(lines)


def _about(found: dict[str, Any]) -> list[str]:
    about = found["circumstances"]
    foreign = statistics.median(take["foreign"] for take in found["takes"])
    return [
        f"{about['date']}. {about['machine']}; {about['system']}. {about['workers']}, {about['pictures']}.",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".",
        "",
        f"{about['rounds']} rounds of {about['seconds']:g} s a measurement; {found['discarded']} rounds of a workload "
        f"discarded for steal above {MOST_STEAL:.0%}.",
        f"Processes that had no part in it took {foreign:.0%} of the cores in the median measurement.",
        "",
        "Rates are medians over the rounds with the least and the largest, in pictures a second. The ratio is ours to "
        "theirs within a round: above 1 we are faster. µs are processor time a request.",
        *(f"Left out: {name}. {reason}" for name, reason in found["left_out"].items()),
        "",
    ]


def _workload(summaries: dict[str, Summary], servers: dict[str, Any]) -> list[str]:
    ours = summaries.get("convscope")
    photographs = max(rate for one in summaries.values() for rate in one["rates"].values()) < 1000
    rows = []
    for name, summary in summaries.items():
        row = [f"**{name}**" if servers[name]["kind"] == "ours" else name]
        row += [spread(list(summary["rates"].values()), "{:,.1f}" if photographs else "{:,.0f}")]
        row += [spread(ratios(ours, summary)) if ours and ours is not summary else ""]
        row += [f"{summary['p50_ms']:.2f} / {summary['p99_ms']:.1f}"]
        row += [" + ".join(f"{value:,.0f} {program}" for program, value in summary["cpu_us"].items())]
        row += [f"{summary['load_cpu_us']:,.0f}", f"{summary['n']:,}"]
        row += [", ".join(f"{times}× {error}" for error, times in summary["errors"].items())]
        rows.append(row)
    return table(
        ("server", "pictures/s", "ours / theirs", "p50 / p99, ms", "server µs", "load µs", "n", "errors"), rows
    )


def _servers(servers: dict[str, Any]) -> list[str]:
    rows = []
    for name, one in servers.items():
        processes = one["memory_mib"]
        row = [name, f"{one['first_answer_s']:.1f}"]
        row += [f"{sum(process[kind] for process in processes):,.0f}" for kind in ("uss", "pss")]
        row += [", ".join(f"{process['name']} {process['uss']:,.0f}" for process in processes)]
        rows.append(row)
    return table(("server", "first answer, s", "USS, MiB", "PSS, MiB", "USS of each process"), rows)


def draw(found: dict[str, Any], summaries: Summaries, path: Path) -> None:
    """Draw a panel of bars a workload: the median rate, with the least and the largest."""
    panels = [workload for workload in summaries if "open" not in workload]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, workload in zip(axes.flat, panels, strict=False):
        rates = {name: list(one["rates"].values()) for name, one in summaries[workload].items()}
        names = sorted(rates, key=lambda name: statistics.median(rates[name]))
        middles = [statistics.median(rates[name]) for name in names]
        reach = [
            [middle - min(rates[name]) for middle, name in zip(middles, names, strict=True)],
            [max(rates[name]) - middle for middle, name in zip(middles, names, strict=True)],
        ]
        colours = [_COLOURS[found["servers"][name]["kind"]] for name in names]
        axis.barh(names, middles, xerr=reach, color=colours, ecolor="#444444", capsize=2)
        axis.set_title(workload, fontsize=10)
        axis.set_xlabel("pictures/s", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{found['model']}: {found['circumstances']['machine']}", fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)
