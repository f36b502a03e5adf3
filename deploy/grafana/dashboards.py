"""Writes the dashboards of `*.yml` beside it as the JSON that Grafana reads.

    python deploy/grafana/dashboards.py

Change the YAML and run this; never change the JSON in `provisioning/dashboards/`. A test holds the two together.

In a query MODEL and TRANSPORT stand for what the dashboard's variables choose, and RATE for Grafana's window.
`percentiles` stands for three queries, p50, p90 and p99 of a histogram: `of` its name, `where` labels, `by` one more
label, `scale` a factor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FOLDER = HERE / "provisioning/dashboards"
PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
HEIGHTS = {"stat": 4}
WORDS = {
    "MODEL": 'model=~"$model", version=~"$version"',
    "TRANSPORT": 'transport=~"$transport"',
    "RATE": "[$__rate_interval]",
}
VARIABLES = {
    "model": "label_values(convscope_model_info, model)",
    "version": 'label_values(convscope_model_info{model=~"$model"}, version)',
    "transport": "label_values(convscope_requests_total, transport)",
}
FORMATS = {"table": "table", "heatmap": "heatmap"}


def queries(panel: dict[str, Any]) -> dict[str, str]:
    """Return a panel's queries by legend, in PromQL with Grafana's variables."""
    found: dict[str, str] = dict(panel.get("queries", {}))
    if wanted := panel.get("percentiles"):
        by = f"{wanted['by']}, " if "by" in wanted else ""
        name = f"{{{{{wanted['by']}}}}} " if by else ""
        buckets = f"sum by ({by}le) (rate({wanted['of']}_bucket{{{wanted['where']}}}RATE))"
        for quantile in (0.5, 0.9, 0.99):
            # `>= 0` leaves out what had no traffic, which would be NaN.
            expression = f"histogram_quantile({quantile}, {buckets}) {wanted.get('scale', '')} >= 0"
            found[f"{name}p{100 * quantile:g}"] = re.sub(" +", " ", expression)
    words = re.compile("|".join(WORDS))
    return {legend: words.sub(lambda match: WORDS[match[0]], query).strip() for legend, query in found.items()}


def dashboard(described: dict[str, Any]) -> dict[str, Any]:
    """Return a dashboard as Grafana's JSON."""
    return {
        "uid": described["uid"],
        "title": described["title"],
        "description": described["description"],
        "tags": ["convscope"],
        "timezone": "browser",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "editable": False,
        "links": [
            {
                "type": "dashboards",
                "title": "convscope",
                "tags": ["convscope"],
                "asDropdown": False,
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "templating": {"list": [_variable(name, query) for name, query in VARIABLES.items()]},
        "panels": _laid_out(described["rows"]),
    }


def _laid_out(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the panels from left to right and from top to bottom, each row under its heading."""
    laid: list[dict[str, Any]] = []
    y = 0
    for heading, panels in rows.items():
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        row = {"type": "row", "title": heading, "collapsed": False, "panels": []}
        laid.append({"id": len(laid) + 1, **row, "gridPos": grid})
        x, y, tallest = 0, y + 1, 0
        for panel in panels:
            width, height = panel.get("width", 8), HEIGHTS.get(panel.get("kind", ""), 8)
            if x + width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            grid = {"x": x, "y": y, "w": width, "h": height}
            laid.append({"id": len(laid) + 1, **_panel(panel), "gridPos": grid})
            x, tallest = x + width, max(tallest, height)
        y += tallest
    return laid


def _panel(described: dict[str, Any]) -> dict[str, Any]:
    kind = described.get("kind", "timeseries")
    now = kind in ("stat", "table")
    field: dict[str, Any] = {"unit": described["unit"]}
    if kind == "timeseries":
        stacked = described.get("stacked", False)
        stacking = {"mode": "normal" if stacked else "none", "group": "A"}
        field |= {
            "min": 0,
            "custom": {"stacking": stacking, "fillOpacity": 30 if stacked else 0, "showPoints": "never"},
        }
    panel = {
        "type": kind,
        "title": described["title"],
        "description": described["description"],
        "datasource": PROMETHEUS,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": PROMETHEUS,
                "expr": query,
                "legendFormat": legend,
                "instant": now,
                "range": not now,
                "format": FORMATS.get(kind, "time_series"),
            }
            for number, (legend, query) in enumerate(queries(described).items())
        ],
        "fieldConfig": {"defaults": field, "overrides": []},
        "options": _options(kind, described["unit"]),
    }
    if kind == "table":
        panel["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True}}}]
    return panel


def _options(kind: str, unit: str) -> dict[str, Any]:
    if kind == "timeseries":
        legend = {
            "showLegend": True,
            "displayMode": "table",
            "placement": "bottom",
            "calcs": ["lastNotNull", "max"],
            "sortBy": "Max",
            "sortDesc": True,
        }
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "textMode": "value_and_name"}
    if kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": unit}}
    return {"showHeader": True}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": PROMETHEUS,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def written() -> dict[Path, str]:
    """Return the text of each dashboard's file by its path."""
    files = {}
    for path in sorted(HERE.glob("*.yml")):
        found = dashboard(yaml.safe_load(path.read_text(encoding="utf-8")))
        files[FOLDER / f"{path.stem}.json"] = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    return files


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
