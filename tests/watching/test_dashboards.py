"""Dashboards: current, complete, and about metrics that there are."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.watching.promql import (
    DASHBOARDS,
    OF_PROMETHEUS,
    OPERATIONS,
    ROOT,
    alert_queries,
    documented,
    names,
    panel_queries,
    panels,
    recorded,
    rule_queries,
)
from tests.watching.tools import promtool

PROVISIONING = ROOT / "deploy/grafana/provisioning"
PANELS = list(panels())


def test_the_json_is_what_the_description_makes() -> None:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "deploy/grafana/dashboards.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.written()
    assert sorted(written) == DASHBOARDS
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, "python deploy/grafana/dashboards.py"


def test_every_panel_has_a_unit_a_description_and_legends() -> None:
    for dashboard, panel in PANELS:
        where = (dashboard, panel["title"])
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert len(panel["description"]) > 20, where
        assert panel["targets"], where
        for target in panel["targets"]:
            assert target["legendFormat"] or panel["type"] == "table", where


def test_operations_explain_every_panel() -> None:
    tables = OPERATIONS.read_text().partition("## Alerts")[0]
    cells = [cell for row in re.findall(r"^\| (.+?) \|", tables, re.MULTILINE) for cell in row.split("; ")]
    for dashboard, panel in PANELS:
        title, *details = panel["title"].split(", ")
        assert any(
            panel["title"] == cell or (cell.startswith(title) and all(detail in cell for detail in details))
            for cell in cells
        ), (dashboard, panel["title"])


def test_panels_read_only_metrics_that_there_are() -> None:
    known = {series for metric in documented().values() for series in metric.series} | OF_PROMETHEUS | set(recorded())
    for query in panel_queries():
        assert names(query.text) <= known, query


@pytest.mark.usefixtures("prometheus_installed")
def test_every_query_is_promql(tmp_path: Path) -> None:
    written = [{"record": f"query:{number}", "expr": query.text} for number, query in enumerate(panel_queries())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": written}]}, width=1000))
    assert f"{len(written)} rules found" in promtool("check", "rules", path)


def test_what_has_no_traffic_gives_no_row_of_nan() -> None:
    for query in panel_queries() + rule_queries():
        if "histogram_quantile" in query.text:
            assert query.text.endswith(">= 0"), query
        for divisor in re.findall(r"/ (?:(?:on|ignoring) [^/]*)?(sum[^/]*rate\(.*)", query.text):
            assert "> 0" in divisor, f"{query}: a share of nothing is NaN"


def test_every_documented_metric_is_shown_or_watched() -> None:
    asked = "".join(query.text for query in panel_queries() + rule_queries() + alert_queries())
    for metric in documented().values():
        assert any(series in asked for series in metric.series), metric.name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    taken = set()
    for panel in json.loads(path.read_text())["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }  # fmt: skip
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_offers_model_version_and_transport(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["model", "version", "transport"]
    assert all(variable["multi"] and variable["includeAll"] for variable in variables.values())
    used = set(re.findall(r"\$(\w+)", json.dumps([panel.get("targets") for panel in dashboard["panels"]])))
    assert used == {"model", "version", "transport", "__rate_interval"}


def test_every_data_source_named_is_provisioned() -> None:
    sources = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())["datasources"]
    named = set(re.findall(r'"uid": "(\w+)"', "".join(map(_sources, (panel for _, panel in PANELS)))))
    assert named == {source["uid"] for source in sources}


def test_grafana_is_given_the_dashboards() -> None:
    provider = yaml.safe_load((PROVISIONING / "dashboards/dashboards.yml").read_text())["providers"][0]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounts = compose["services"]["grafana"]["volumes"]
    mounted = {mount["target"]: mount["source"] for mount in mounts if isinstance(mount, dict)}
    (target,) = [place for place in mounted if provider["options"]["path"].startswith(place)]
    folder = ROOT / mounted[target] / Path(provider["options"]["path"]).relative_to(target)
    assert sorted(folder.glob("*.json")) == DASHBOARDS


def _sources(panel: dict[str, Any]) -> str:
    return json.dumps([panel["datasource"], *(target["datasource"] for target in panel["targets"])])
