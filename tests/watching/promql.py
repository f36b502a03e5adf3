"""What the rules and the dashboards ask, and of which metrics: read from deploy/ and docs/operations.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules"
DASHBOARDS = sorted((ROOT / "deploy/grafana/provisioning/dashboards").glob("*.json"))
OPERATIONS = ROOT / "docs/operations.md"

OF_PROMETHEUS = {"up", "ALERTS"}
_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
_LABEL_LISTS = r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"


@dataclass(frozen=True)
class Metric:
    """A row of the table of docs/operations.md."""

    name: str
    kind: str
    labels: frozenset[str]

    @property
    def series(self) -> set[str]:
        """Names of its series."""
        suffixes = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return {f"{self.name}{suffix}" for suffix in suffixes}


@dataclass(frozen=True)
class Query:
    """One query of a panel or a rule.

    Attributes:
        where: Which panel or rule.
        text: PromQL, Grafana's variables replaced.
        legend: A panel's legend.
    """

    where: str
    text: str
    legend: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.where} {self.legend}".strip()


@cache
def documented() -> dict[str, Metric]:
    """Return the metrics of docs/operations.md by name."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*?) ?\|", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: Metric(name, kind, frozenset(filter(None, labels.split(", ")))) for name, kind, labels in rows}


@cache
def groups() -> list[dict[str, Any]]:
    """Return the groups of rules, read once: tests ask for them at every query."""
    return [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]


def rules() -> list[dict[str, Any]]:
    """Return every rule, recording and alerting."""
    return [rule for group in groups() for rule in group["rules"]]


@cache
def recorded() -> dict[str, list[str]]:
    """Return what the recording rules compute, by the name they give it."""
    found: dict[str, list[str]] = {}
    for rule in rules():
        if "record" in rule:
            found.setdefault(rule["record"], []).append(rule["expr"])
    return found


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alerting rules by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return every panel with the name of its dashboard; headings are none."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def panel_queries(window: str = "10m") -> list[Query]:
    """Return the panels' queries, about everything, over a window."""
    found = []
    for dashboard, panel in panels():
        for target in panel["targets"]:
            text = re.sub(r"\$(model|version|transport)", ".*", target["expr"]).replace("$__rate_interval", window)
            found.append(Query(f"{dashboard}: {panel['title']}", text, target["legendFormat"]))
    return found


def rule_queries() -> list[Query]:
    """Return what the recording rules ask."""
    return [Query(f"rule {name}", text) for name, texts in recorded().items() for text in texts]


def alert_queries() -> list[Query]:
    """Return what the alerting rules ask."""
    return [Query(f"alert {rule['alert']}", rule["expr"]) for rule in rules() if "alert" in rule]


def names(text: str) -> set[str]:
    """Return the names of the series that a query reads."""
    bare = re.sub(r'"[^"]*"', "", text)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(_LABEL_LISTS, " ", bare)
    found = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)(?!\s*\()\b(?!\s*\()", bare)
    return {name for name in found if name not in _WORDS}


def selectors(text: str) -> set[str]:
    """Return the selectors of a query, without their windows: `name{...}`."""
    found = set()
    for name in names(text):
        for labels in re.findall(rf"(?<![\w:]){re.escape(name)}(?![\w:])(\{{[^}}]*\}})?", text):
            found.add(name + labels)
    return found


def sources(text: str) -> set[str]:
    """Return the names of the scraped series behind a query, through all recording rules."""
    found: set[str] = set()
    ahead, seen, rules_by_name = names(text), set[str](), recorded()
    while ahead:
        name = ahead.pop()
        seen.add(name)
        if name in rules_by_name:
            ahead |= {other for rule in rules_by_name[name] for other in names(rule)} - seen
        else:
            found.add(name)
    return found


def needs(text: str, prefix: str) -> bool:
    """Tell whether a query reads a metric whose name starts so."""
    return any(name.startswith(prefix) for name in sources(text))
