"""Writes what the Prometheus operator reads, and KServe, from what Compose's Prometheus and our own pods read.

    python deploy/kubernetes/generate.py

Change deploy/prometheus or base/replicas.yaml and run this; never change `monitors.yaml` and `rules.yaml` in
`components/monitoring`, or `runtime.yaml` and `service.yaml` in `overlays/kserve`. A test holds them together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

PROMETHEUS = Path(__file__).parents[1] / "prometheus"
KUBERNETES = Path(__file__).parent
REPLICAS = KUBERNETES / "base/replicas.yaml"
HEAD = "# Made by deploy/kubernetes/generate.py from {}: change that.\n"
OURS = {"app.kubernetes.io/name": "convscope"}
# The services that watch are the cluster's own, with the labels and ports that the Prometheus operator gives them.
WATCHING = {"alertmanager": "web", "prometheus": "web"}
# Those of `python -m server.kserve`; KServe's Service leads to the first.
PORTS = {"http": 8085, "grpc": 8086}


def monitor(job: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the PodMonitor of a scrape job.

    Args:
        job: A scrape job of prometheus.yml.
        defaults: The section `global` of prometheus.yml.
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


def serving_runtime(deployment: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """Return KServe's runtime for the second host (`python -m server.kserve`).

    Args:
        deployment: That of our own replicas: its options, resources, restrictions and patience are the runtime's.
        settings: Of the base, which the options name.
    """
    pod = deployment["spec"]["template"]["spec"]
    [ours] = pod["containers"]
    ready = {**ours["startupProbe"], "httpGet": {"path": "/v2/health/ready", "port": "http"}}
    container = {
        "name": "kserve-container",  # KServe requires this name.
        "image": ours["image"].replace("/torchserve:", "/kserve:"),
        "args": ["--model-store=/mnt/models", *ours["args"]],  # Where KServe puts what storageUri names.
        "env": [{"name": name, "value": value} for name, value in settings.items() if ")" in " ".join(ours["args"])],
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in PORTS.items()],
        "startupProbe": ready,
        "readinessProbe": {**ours["readinessProbe"], "httpGet": ready["httpGet"]},
        "volumeMounts": [mount for mount in ours["volumeMounts"] if mount["name"] == "tmp"],
        "resources": ours["resources"],
        # A runtime says nothing of its pods: what theirs says is said here too.
        "securityContext": {**pod["securityContext"], **ours["securityContext"]},
    }
    spec = {
        "annotations": {"prometheus.kserve.io/port": str(PORTS["http"]), "prometheus.kserve.io/path": "/metrics"},
        "supportedModelFormats": [{"name": "convscope", "version": "1", "autoSelect": True}],
        "protocolVersions": ["v2", "grpc-v2"],
        "containers": [container],
        "tolerations": pod["tolerations"],
        "volumes": [volume for volume in pod["volumes"] if volume["name"] == "tmp"],
    }
    metadata = {"name": "convscope", "labels": OURS}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterServingRuntime",
        "metadata": metadata,
        "spec": spec,
    }


def inference_service(deployment: dict[str, Any]) -> dict[str, Any]:
    """Return KServe's service of the archives in the claim `archives`; argument as above."""
    pod = deployment["spec"]["template"]["spec"]
    predictor = {
        "minReplicas": deployment["spec"]["replicas"],
        **{
            key: pod[key]
            for key in ("automountServiceAccountToken", "enableServiceLinks", "terminationGracePeriodSeconds")
        },
        "securityContext": pod["securityContext"],
        "model": {
            "modelFormat": {"name": "convscope"},
            "runtime": "convscope",
            "protocolVersion": "v2",
            "storageUri": "pvc://archives",
        },
    }
    metadata = {
        "name": "convscope",
        "namespace": "convscope",
        "labels": OURS,
        # Deployments: its pods drain as ours do. Before KServe 0.16 its name was RawDeployment.
        "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


def make() -> dict[str, str]:
    """Return the content of each file by its path in this folder."""
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    defaults = configuration["global"]
    rules = sorted(path for pattern in configuration["rule_files"] for path in PROMETHEUS.glob(pattern))
    deployment = next(one for one in yaml.safe_load_all(REPLICAS.read_text()) if one["kind"] == "Deployment")
    [generator] = yaml.safe_load((REPLICAS.parent / "kustomization.yaml").read_text())["configMapGenerator"]
    settings = dict(literal.split("=", 1) for literal in generator["literals"])
    made = {
        "components/monitoring/monitors.yaml": [monitor(job, defaults) for job in configuration["scrape_configs"]],
        "components/monitoring/rules.yaml": [rule(path, defaults) for path in rules],
        "overlays/kserve/runtime.yaml": [serving_runtime(deployment, settings)],
        "overlays/kserve/service.yaml": [inference_service(deployment)],
    }
    sources = {"components": "deploy/prometheus", "overlays": "base/replicas.yaml"}
    return {path: HEAD.format(sources[path.split("/")[0]]) + dump(resources) for path, resources in made.items()}


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
        (KUBERNETES / file).write_text(content, encoding="utf-8")
