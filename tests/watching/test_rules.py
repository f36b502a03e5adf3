"""Rules and alerts: sound, tested both ways, and each with words for the person it wakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.watching.promql import (
    OF_PROMETHEUS,
    OPERATIONS,
    ROOT,
    RULES,
    alerts,
    documented,
    groups,
    names,
    recorded,
    rules,
)
from tests.watching.tools import find, promtool

CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
GROUPS = [group["name"] for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]


@pytest.mark.usefixtures("prometheus_installed")
def test_promtool_finds_no_fault_with_the_configuration() -> None:
    said = promtool("check", "config", ROOT / "deploy/prometheus/prometheus.yml")
    assert said.count("SUCCESS") > len(list(RULES.glob("*.yml")))


@pytest.mark.usefixtures("prometheus_installed")
def test_promtool_finds_no_fault_with_the_rules() -> None:
    said = promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES.glob("*.yml"))
    assert sum(map(int, re.findall(r"(\d+) rules found", said))) == len(rules())


@cache
def cases(case: Path) -> list[dict[str, Any]]:
    """Return the tests of a file of cases, read once."""
    text = re.sub(r"values: (0x\d+)}", r'values: "\1"}', case.read_text())  # A hexadecimal number, to YAML 1.1.
    return yaml.safe_load(text)["tests"]


def asked_alerts(check: dict[str, Any]) -> Iterator[str]:
    """Return the alerts that a check of `promql_expr_test` asks for: all of them, unless it names some."""
    for pattern in re.finditer(r'ALERTS(?:\{alertname=~?"([^"]+)")?', check["expr"]):
        yield from (alert for alert in alerts() if re.fullmatch(pattern[1] or ".*", alert))


def needed(test: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of rules with only those that a test asks for, directly or through what these read.

    A test evaluates its rules up to a thousand times. One that asks for all alerts gets all rules.
    """
    checks = test.get("promql_expr_test", [])
    found = {alert for check in checks for alert in asked_alerts(check)}
    found |= {check["alertname"] for check in test.get("alert_rule_test", [])}
    if found == alerts().keys():
        return groups()
    ahead = {name for check in checks for name in names(check["expr"])} | found
    while ahead:
        found |= ahead
        here = [rule for rule in rules() if rule.get("alert", rule.get("record")) in ahead]
        ahead = {name for rule in here for name in names(rule["expr"])} - found
    chosen = [[rule for rule in group["rules"] if rule.get("alert", rule.get("record")) in found] for group in groups()]
    return [group | {"rules": rules} for group, rules in zip(groups(), chosen, strict=True) if rules]


def write_case(folder: Path, test: dict[str, Any], settings: dict[str, Any], rules: list[dict[str, Any]]) -> Path:
    """Write a test and the rules that it evaluates as promtool reads them; returns the test's file."""
    folder.mkdir()
    (folder / "rules.yml").write_text(json.dumps({"groups": rules}))  # JSON is YAML, and quick to write.
    (folder / "case.yaml").write_text(json.dumps(settings | {"rule_files": ["rules.yml"], "tests": [test]}))
    return folder / "case.yaml"


@pytest.mark.usefixtures("prometheus_installed")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_rules_compute_and_alerts_fire_as_told(case: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(case.read_text().partition("\ntests:")[0])
    files = [
        write_case(tmp_path / f"{number} {test['name']}", test, settings, needed(test))
        for number, test in enumerate(cases(case))
    ]
    promtool("test", "rules", *files)


def expectations(alert: str) -> list[bool]:
    """Return, for each check that names an alert, whether it is expected to fire for something."""
    found = []
    for path in CASES:
        for test in cases(path):
            for check in test.get("promql_expr_test", []):
                if alert in asked_alerts(check):
                    samples = [sample["labels"] for sample in check["exp_samples"]]
                    named = [labels for labels in samples if f'alertname="{alert}"' in labels]
                    found.append(bool(named or (samples and f'{{alertname="{alert}"' in check["expr"])))
            for check in test.get("alert_rule_test", []):
                if check["alertname"] == alert:
                    found.append(bool(check["exp_alerts"]))
    return found


def test_every_alert_is_seen_to_fire() -> None:
    assert [alert for alert in alerts() if True not in expectations(alert)] == []


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_cases_evaluate_every_group_in_the_order_rules_build_on_each_other(case: Path) -> None:
    assert sorted(yaml.safe_load(case.read_text())["group_eval_order"]) == sorted(GROUPS)


def test_every_recorded_series_is_read_by_somebody() -> None:
    dashboards = "".join(path.read_text() for path in (ROOT / "deploy/grafana").glob("*.yml"))
    readers = [rule["expr"] for rule in rules()] + [dashboards, OPERATIONS.read_text(encoding="utf-8")]
    for name in recorded():
        assert any(re.search(rf"(?<![\w:]){re.escape(name)}(?![\w:])", text) for text in readers), name


def test_rules_read_only_metrics_that_there_are() -> None:
    known = {series for metric in documented().values() for series in metric.series} | OF_PROMETHEUS | set(recorded())
    for rule in rules():
        assert names(rule["expr"]) <= known, rule.get("alert") or rule["record"]


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_says_what_it_means_and_what_to_do(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in ("page", "ticket") or alert == "Watchdog"
    for part in ("summary", "description", "action"):
        assert len(rule["annotations"][part]) > 20, part
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == str(OPERATIONS.relative_to(ROOT))
    assert anchor == alert.lower()
    section = re.search(rf"^### {alert}\n(.*?)(?=^#)", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section
    assert section[1].lower().startswith(rule["labels"]["severity"])
    assert "**First:**" in section[1]


def test_operations_describe_no_alert_that_is_gone() -> None:
    part = OPERATIONS.read_text(encoding="utf-8").partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (\w+)$", part, re.MULTILINE) == sorted(alerts(), key=list(alerts()).index)


@pytest.mark.parametrize("group", groups(), ids=lambda group: str(group["name"]))
def test_a_difference_is_of_series_recorded_at_the_same_moment(group: dict[str, Any]) -> None:
    """Groups are evaluated seconds apart: while traffic rises, two moments differ by requests that nobody sent."""
    here = {rule.get("record") for rule in group["rules"]}
    for rule in group["rules"]:
        for pair in re.findall(r"(\w+:[\w:]+) - (\w+:[\w:]+)", rule["expr"] if "record" in rule else ""):
            assert set(pair) <= here, rule["record"]


def read_by_pages() -> list[str]:
    """Return the recorded series that an alert of severity `page` depends on, through all recording rules."""
    ahead = {
        name for rule in rules() if rule.get("labels", {}).get("severity") == "page" for name in names(rule["expr"])
    }
    found = set[str]()
    while ahead:
        name = ahead.pop()
        if name in recorded() and name not in found:
            found.add(name)
            ahead |= {other for text in recorded()[name] for other in names(text)}
    return sorted(found - {"file:gateway_rejected:time"})  # There only once something was rejected.


def misspelt(groups: list[dict[str, Any]], *series: str) -> list[dict[str, Any]]:
    """Return groups of rules that record these series under another name."""
    return [
        group
        | {
            "rules": [
                rule | {"record": rule["record"] + "z"} if rule.get("record") in series else rule
                for rule in group["rules"]
            ]
        }
        for group in groups
    ]


@pytest.mark.usefixtures("prometheus_installed")
def test_a_misspelt_rule_that_pages_depend_on_is_a_page_itself(tmp_path: Path) -> None:
    calm, *_ = cases(Path(__file__).parent / "rules/calm.yaml")
    pages, files = read_by_pages(), []
    objectives = [name for name in pages if name.startswith("convscope:objective:")]
    for number, wrong in enumerate([objectives, *([name] for name in pages if name not in objectives)]):
        expression = (
            f'group by (rule) (ALERTS{{alertname="RulesMissing", rule=~"{"|".join(wrong)}", alertstate="firing"}})'
        )
        expected = [{"labels": f'{{rule="{name}"}}', "value": 1} for name in wrong]
        test = calm | {"promql_expr_test": [{"expr": expression, "eval_time": "6m", "exp_samples": expected}]}
        rules = misspelt(needed(test), *wrong)
        files.append(write_case(tmp_path / str(number), test, {"evaluation_interval": "30s"}, rules))
    assert files
    promtool("test", "rules", *files)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the configuration's own check on a copy of it."""
    path = f"{Path(find('promtool') or '').parent}:{os.environ['PATH']}"
    command = ["sh", str(folder / "check.sh")]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("prometheus_installed")
def test_the_check_before_a_reload_names_every_misspelt_rule(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RULES.parent, tmp_path / "prometheus"))
    for path in (folder / "rules").glob("*.yml"):
        path.write_text(re.sub(r'(record: *"?)([\w:]+)', r"\g<1>\g<2>z", path.read_text()))
    read = {name for rule in rules() for name in names(rule["expr"])} & set(recorded())
    answer = check(folder)
    assert answer.returncode == 1
    assert f"no rule records: {' '.join(sorted(read))}\n" in answer.stderr


@pytest.mark.usefixtures("prometheus_installed")
def test_the_check_before_a_reload_finds_what_is_no_promql(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RULES.parent, tmp_path / "prometheus"))
    (folder / "rules/alerts.yml").write_text("groups: [{name: a, rules: [{record: b, expr: 'sum('}]}]")
    assert check(folder).returncode == 1
    assert check(RULES.parent).returncode == 0


def test_no_label_of_an_alert_changes_while_an_incident_lasts() -> None:
    for alert, rule in alerts().items():
        assert "window" not in re.sub(r"\{[^}]*\}", "", rule["expr"]), alert
        assert "$value" not in str(rule["labels"]), alert
