"""Writes what the Prometheus operator reads, from the configuration that Compose's Prometheus reads.

    python deploy/kubernetes/generate.py

Change deploy/prometheus and run this; never change `components/monitoring/monitors.yaml` and `rules.yaml`. A test holds
them together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

PROMETHEUS = Path(__file__).parents[1] / "prometheus"
MONITORING = Path(__file__).parent / "components/monitoring"
HEAD = "# Made by deploy/kubernetes/generate.py from deploy/prometheus: change that.\n"
OURS = {"app.kubernetes.io/name": "convscope"}
# The services that watch are the cluster's own, with the labels and ports that the Prometheus operator gives them.
WATCHING = {"alertmanager": "web", "prometheus": "web"}


def monitor(job: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the PodMonitor of a scrape job.

    Args:
        job: As in prometheus.yml.
        defaults: What stands there under `global`.
    """
    name = job["job_name"]
    endpoint = {
        "port": WATCHING.get(name, "metrics"),
        "interval": defaults["scrape_interval"],
        "scrapeTimeout": defaults["scrape_timeout"],
        "relabelings": [{"targetLabel": "job", "replacement": name}],
    }
    if changes := job.get("metric_relabel_configs"):
        endpoint["metricRelabelings"] = [{camel(key): value for key, value in one.items()} for one in changes]
    spec: dict[str, Any] = {"podMetricsEndpoints": [endpoint]}
    if name in WATCHING:
        spec["namespaceSelector"] = {"matchNames": ["monitoring"]}
        spec["selector"] = {"matchLabels": {"app.kubernetes.io/name": name}}
    else:
        spec["selector"] = {"matchLabels": {**OURS, "app.kubernetes.io/component": name}}
    return resource("PodMonitor", name, spec)


def rule(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the PrometheusRule of a file of rules."""
    groups = yaml.safe_load(path.read_text())["groups"]
    # Of a group without one the operator would make its own.
    return resource(
        "PrometheusRule",
        path.stem,
        {"groups": [{"interval": defaults["evaluation_interval"], **group} for group in groups]},
    )


def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a resource of the Prometheus operator."""
    metadata = {"name": f"convscope-{name}", "labels": OURS}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": metadata, "spec": spec}


def camel(name: str) -> str:
    """Return a name of Prometheus' configuration as the operator writes it."""
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


def make() -> dict[str, str]:
    """Return the content of each file by its name."""
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    defaults = configuration["global"]
    rules = sorted(path for pattern in configuration["rule_files"] for path in PROMETHEUS.glob(pattern))
    made = {
        "monitors.yaml": [monitor(job, defaults) for job in configuration["scrape_configs"]],
        "rules.yaml": [rule(path, defaults) for path in rules],
    }
    return {name: HEAD + dump(resources) for name, resources in made.items()}


def dump(resources: list[dict[str, Any]]) -> str:
    """Return resources as YAML, with long expressions as blocks."""
    text: str = yaml.dump_all(resources, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


if __name__ == "__main__":
    for file, content in make().items():
        (MONITORING / file).write_text(content, encoding="utf-8")
