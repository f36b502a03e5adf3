"""Draws the dashboards from a running Prometheus, panel for panel in their own layout, into docs/pictures/.

    python deploy/grafana/draw.py --url http://127.0.0.1:9090 --minutes 15

For documents and for machines without Grafana. Every variable is at All.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

HERE = Path(__file__).parent
DASHBOARDS = HERE / "provisioning/dashboards"
PICTURES = HERE.parents[1] / "docs/pictures"
WINDOW = "1m"  # Grafana's smallest $__rate_interval.
COLUMN_IN, ROW_IN = 0.75, 0.42  # Inches of the dashboard's grid.
MOST_LINES = 9  # In a legend.
LONGEST_S = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def _engineering(unit: str) -> Any:
    form = EngFormatter(unit, sep=" ")
    return lambda value, _=None: form.format_eng(float(f"{value:.3g}"))


def _seconds(value: float, _: int | None = None) -> str:
    for unit, length in LONGEST_S:
        if abs(value) >= 2 * length:
            return f"{value / length:.3g} {unit}"
    return str(_engineering("s")(value))


UNITS: dict[str, Any] = {
    "s": FuncFormatter(_seconds),
    "bytes": FuncFormatter(_engineering("B")),
    "percentunit": FuncFormatter(lambda value, _: f"{100 * value:.3g} %"),
    "percent": FuncFormatter(lambda value, _: f"{value:.3g} %"),
    "reqps": FuncFormatter(lambda value, _: f"{value:.3g}/s"),
    "cps": FuncFormatter(lambda value, _: f"{value:.3g}/s"),
    "short": FuncFormatter(lambda value, _: f"{value:.4g}"),
}

Series = dict[str, Any]


class Source:
    """A Prometheus and the time to show.

    Args:
        url: Its address.
        minutes: How far to look back.
    """

    def __init__(self, url: str, minutes: float) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.end = time.time()
        self.start = self.end - 60 * minutes
        self.step = max(5.0, (self.end - self.start) / 180)

    def ask(self, target: dict[str, Any]) -> list[Series]:
        """Return the series of a panel's query."""
        query = re.sub(r"\$(model|version|transport)", ".*", target["expr"]).replace("$__rate_interval", WINDOW)
        parameters: dict[str, str | float] = {"query": query, "time": self.end}
        if not target["instant"]:
            parameters = {"query": query, "start": self.start, "end": self.end, "step": self.step}
        path = "query" if target["instant"] else "query_range"
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise SystemExit(f"{query}: {answer}")
        found: list[Series] = answer["data"]["result"]
        return found


def draw(dashboard: dict[str, Any], source: Source) -> Figure:
    """Return a dashboard as a figure."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 1
    figure = pyplot.figure(figsize=(24 * COLUMN_IN, rows * ROW_IN), facecolor="white")
    figure.text(0.01, 1 - 0.5 / rows, dashboard["title"], fontsize=15, weight="bold", va="center")
    for panel in panels:
        grid = panel["gridPos"]
        left, top = grid["x"] / 24, 1 - (grid["y"] + 1) / rows
        if panel["type"] == "row":
            figure.text(0.01, top - 0.5 / rows, panel["title"], fontsize=13, color="tab:blue", va="center")
            continue
        width, height = grid["w"] / 24, grid["h"] / rows
        short = panel["type"] in ("stat", "table")
        place = (left + 0.04, top - height + 0.5 / rows, width - 0.05, height - 1.7 / rows)
        axes = figure.add_axes((left + 0.01, *place[1:2], width - 0.02, place[3]) if short else place)
        axes.set_title(panel["title"], fontsize=9, loc="left", weight="bold")
        answers = [(target["legendFormat"], series) for target in panel["targets"] for series in source.ask(target)]
        _DRAWERS[panel["type"]](axes, panel, answers)
    return figure


def _lines(axes: Axes, panel: dict[str, Any], answers: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    drawn = [(_name(legend, series["metric"]), *_points(series)) for legend, series in answers]
    drawn = [line for line in drawn if np.isfinite(line[2]).any()]
    drawn = [line for line in drawn if np.nanmax(np.abs(line[2])) > 0] or drawn[
        :MOST_LINES
    ]  # Zeros beside others hide them.
    drawn.sort(key=lambda line: -np.nanmax(line[2]))
    if defaults["custom"]["stacking"]["mode"] == "normal" and drawn:
        moments = np.unique(np.concatenate([times for _, times, _ in drawn]))
        layers = [np.interp(moments, times, np.nan_to_num(values), 0, 0) for _, times, values in drawn]
        axes.stackplot(_dates(moments), layers, labels=[name for name, _, _ in drawn], alpha=0.7)
    else:
        for name, times, values in drawn:
            axes.plot(_dates(times), values, label=name, linewidth=1)
    _dress(axes, panel)
    if drawn:
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[:MOST_LINES], names[:MOST_LINES], fontsize=6, loc="upper left", framealpha=0.7)
    else:
        _say(axes, "no data")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(0, low), 1.05 * high if drawn and high > 0 else 1)


def _stat(axes: Axes, panel: dict[str, Any], answers: list[tuple[str, Series]]) -> None:
    axes.axis("off")
    form = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    values = [(_name(legend, series["metric"]), float(series["value"][1])) for legend, series in answers]
    told = [
        f"{form(value, None)}\n{name}" if len(values) == 1 else f"{form(value, None)} {name}" for name, value in values
    ]
    axes.text(0.5, 0.45, "\n".join(told) or "no data", ha="center", va="center", fontsize=14 if len(told) < 2 else 9)


def _table(axes: Axes, panel: dict[str, Any], answers: list[tuple[str, Series]]) -> None:
    axes.axis("off")
    form = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    columns = sorted({label for _, series in answers for label in series["metric"]})
    rows = [
        [series["metric"].get(c, "") for c in columns] + [form(float(series["value"][1]), None)]
        for _, series in answers
    ]
    if not rows:
        _say(axes, "nothing")
        return
    table = axes.table(
        sorted(rows)[:12], colLabels=[*columns, "value"], loc="upper left", cellLoc="left", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)


def _heatmap(axes: Axes, panel: dict[str, Any], answers: list[tuple[str, Series]]) -> None:
    found = sorted((float(series["metric"]["le"]), *_points(series)) for _, series in answers)
    bounds = [bound for bound, _, _ in found if math.isfinite(bound)]
    if not bounds:
        _say(axes, "no data")
        return
    times = np.unique(np.concatenate([points for _, points, _ in found]))
    cumulative = [np.interp(times, points, values) for bound, points, values in found if math.isfinite(bound)]
    counts = np.diff(np.array([np.zeros_like(times), *cumulative]), axis=0)  # (buckets, moments)
    counts[counts <= 0] = np.nan
    edges = [min(bounds[0] / 2, bounds[0]), *bounds]
    moments = np.append(times, times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1))
    axes.pcolormesh(_dates(moments), edges, counts, cmap="viridis")
    if bounds[-1] / bounds[0] > 100:
        axes.set_yscale("log")
    _dress(axes, panel)


_DRAWERS = {"timeseries": _lines, "stat": _stat, "table": _table, "heatmap": _heatmap}


def _dress(axes: Axes, panel: dict[str, Any]) -> None:
    axes.yaxis.set_major_formatter(UNITS[panel["fieldConfig"]["defaults"]["unit"]])
    axes.xaxis_date()
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.tick_params(labelsize=6)
    axes.xaxis.get_offset_text().set_visible(False)
    axes.grid(alpha=0.2)


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="grey")


def _points(series: Series) -> tuple[Any, Any]:
    times, values = zip(*series["values"], strict=True)
    return np.array(times, float), np.array(values, float)


def _dates(times: Any) -> Any:
    return date2num(times.astype("datetime64[s]"))


def _name(legend: str, labels: dict[str, str]) -> str:
    told = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)
    return textwrap.shorten(" ".join(told.split()), 40)


def main() -> None:
    """Draw every dashboard."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from a running Prometheus.")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--minutes", type=float, default=15, help="how far to look back")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source = Source(options.url, options.minutes)
    for path in sorted(DASHBOARDS.glob("*.json")):
        figure = draw(json.loads(path.read_text(encoding="utf-8")), source)
        figure.savefig(options.out / f"{path.stem}.png", dpi=80)
        print(options.out / f"{path.stem}.png")


if __name__ == "__main__":
    main()
