"""Draws the dashboards from a running Prometheus, panel for panel in their own layout, into docs/pictures/.

    python deploy/grafana/draw.py --url http://127.0.0.1:9090 --minutes 15

For documents and for machines without Grafana. Every variable is at All.
"""

from __future__ import annotations

import argparse
import io
import itertools
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
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
from PIL import Image

HERE = Path(__file__).parent
DASHBOARDS = HERE / "provisioning/dashboards"
PICTURES = HERE.parents[1] / "docs/pictures"
WINDOW = "1m"  # Grafana's smallest $__rate_interval.
COLUMN_IN, ROW_IN = 0.75, 0.42  # Inches of the dashboard's grid.
LEGEND_ROWS, LONGEST_NAME = 4, 34  # In a legend, which stands below its panel.
LONG_NAME = 24  # From here on a legend has two columns instead of three.
MOST_ROWS = 12  # Most rows of a table.
COLOURS = 256  # Size of a picture's palette: a quarter of the bytes.
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
    "Bps": FuncFormatter(_engineering("B/s")),
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
        url: URL of Prometheus.
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
        if not target["instant"]:
            found = [series | {"values": _broken(series["values"], self.step)} for series in found]
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
        below = 0.5 if short else 1.9  # Rows for the axis and the legend.
        place = (left + 0.045, top - height + below / rows, width - 0.055, height - (below + 1.2) / rows)
        axes = figure.add_axes((left + 0.01, *place[1:2], width - 0.02, place[3]) if short else place)
        axes.set_title(panel["title"], fontsize=10, loc="left", weight="bold")
        answers = [(target["legendFormat"], series) for target in panel["targets"] for series in source.ask(target)]
        _DRAWERS[panel["type"]](axes, panel, answers)
        if not short:
            axes.set_xlim(*_dates(np.array([source.start, source.end])))  # So that panels can be compared.
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with a palette."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def _lines(axes: Axes, panel: dict[str, Any], answers: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    drawn = [(_name(legend, series["metric"]), *_points(series)) for legend, series in answers]
    drawn = [line for line in drawn if np.isfinite(line[2]).any()]
    drawn = [line for line in drawn if np.nanmax(np.abs(line[2])) > 0] or drawn  # Zeros beside others hide them.
    drawn.sort(key=lambda line: -np.nanmax(line[2]))
    if defaults["custom"]["stacking"]["mode"] == "normal" and drawn:
        moments = np.unique(np.concatenate([times for _, times, _ in drawn]))
        layers = [np.interp(moments, times, np.nan_to_num(values), 0, 0) for _, times, values in drawn]
        axes.stackplot(_dates(moments), layers, labels=[name for name, _, _ in drawn], alpha=0.7)
    else:
        for number, (name, times, values) in enumerate(drawn):
            style = "-" if number < 10 else "--"  # There are ten colours.
            axes.plot(_dates(times), values, style, label=name, linewidth=1.2)
    _dress(axes, panel)
    if drawn:
        _legend(axes)
    else:
        _say(axes, "no data")
    low, high = axes.dataLim.intervaly
    top = 1.05 * high if drawn and high > 0 else 1
    axes.set_ylim(min(-0.03 * top, low), top)  # A line at 0 stands clear of the frame.


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, names)) >= LONG_NAME else 3
    most = LEGEND_ROWS * columns
    if len(names) > most:
        names = [*names[: most - 1], f"and {len(names) - most + 1} more"]
        handles = [*handles[: most - 1], Line2D([], [], linestyle="none")]
    axes.legend(
        handles,
        names,
        fontsize=7,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=columns,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        labelspacing=0.2,
        borderaxespad=0,
    )


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
    heads = [*columns, "value"]
    widths = [0.96 / len(heads)] * len(heads)
    shown = sorted(rows)[:MOST_ROWS]
    table = axes.table(
        shown, colLabels=heads, colWidths=widths, colLoc="left", cellLoc="left", loc="upper left", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    if len(rows) > MOST_ROWS:
        axes.set_title(f"and {len(rows) - MOST_ROWS} more", fontsize=8, loc="right", color="grey")


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
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_visible(False)
    axes.grid(alpha=0.2)


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="grey")


def _points(series: Series) -> tuple[Any, Any]:
    times, values = zip(*series["values"], strict=True)
    return np.array(times, float), np.array(values, float)


def _broken(values: list[list[Any]], step: float) -> list[list[Any]]:
    """Return the points with one of NaN in each gap, so that no line is drawn across it."""
    gaps = [
        [earlier[0] + step, "NaN"]
        for earlier, later in itertools.pairwise(values)
        if later[0] - earlier[0] > 1.5 * step
    ]
    return sorted(values + gaps, key=lambda point: float(point[0]))


def _dates(times: Any) -> Any:
    return date2num(times.astype("datetime64[s]"))


def _name(legend: str, labels: dict[str, str]) -> str:
    told = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)
    return textwrap.shorten(" ".join(told.split()), LONGEST_NAME) or "no name"


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
        picture = options.out / f"{path.stem}.png"
        save(figure, picture)
        print(picture)


if __name__ == "__main__":
    main()
