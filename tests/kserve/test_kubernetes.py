"""What deploy/kubernetes/overlays/kserve asks of KServe, held to the types of KServe's own package and to the server.

There is no schema of KServe's resources without a cluster; `kserve.models` is made from the same source.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes.client
import pytest
import yaml

from server.kserve.__main__ import parse

ROOT = Path(__file__).parents[2]
KSERVE = ROOT / "deploy/kubernetes/overlays/kserve"
PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object}


@pytest.fixture(scope="module")
def models() -> Any:
    """KServe's types without the rest of it, which claims the same names in protobuf as tritonclient."""
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    package = ModuleType("kserve")
    package.__path__ = list(spec.submodule_search_locations or ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kserve", package)
        yield importlib.import_module("kserve.models")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KSERVE / f"{name}.yaml").read_text())
    return found


def build(models: Any, value: Any, kind: str, place: str = "") -> Any:
    """Build one of the generated types; raises AssertionError for a field that it lacks, or of another type."""
    if kind.lower().startswith("list["):
        return [build(models, one, kind[5:-1], f"{place}[]") for one in value]
    if kind.lower().startswith(("dict(", "dict[")):
        return {key: build(models, one, kind[5:-1].split(", ")[1], f"{place}.{key}") for key, one in value.items()}
    if kind in PLAIN:
        assert isinstance(value, PLAIN[kind]), f"{place} is no {kind}"
        return value
    found = getattr(models, kind, None) or getattr(kubernetes.client, kind)
    names = {theirs: ours for ours, theirs in found.attribute_map.items()}
    assert value.keys() <= names.keys(), f"{place}: {kind} has no {value.keys() - names.keys()}"
    fields = {
        names[key]: build(models, one, found.openapi_types[names[key]], f"{place}.{key}") for key, one in value.items()
    }
    return found(**fields)  # Raises ValueError where one is missing.


def test_kserve_has_every_field_with_values_of_that_type(models: Any) -> None:
    runtime = build(models, read("runtime"), "V1alpha1ClusterServingRuntime")
    service = build(models, read("service"), "V1beta1InferenceService")
    assert (runtime.api_version, service.api_version) == ("serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1")
    wrong = read("service")
    wrong["spec"]["predictor"]["model"]["storageURI"] = "pvc://archives"
    with pytest.raises(AssertionError, match=r"V1beta1ModelSpec has no .*storageURI"):
        build(models, wrong, "V1beta1InferenceService")


def test_the_server_takes_the_runtimes_options_and_listens_where_it_says() -> None:
    [container] = read("runtime")["spec"]["containers"]
    values = {one["name"]: one["value"] for one in container["env"]}
    options = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], option) for option in container["args"]]
    settings = parse(options)
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": settings.rest_port, "grpc": settings.grpc_port}
    assert next(iter(ports)) == "http"  # KServe's Service leads to the first.
    assert settings.model_store == Path("/mnt/models")
    assert (settings.unready_s, settings.drain_s, settings.log_format) == (4, 30, "json")
    assert container["startupProbe"]["httpGet"] == container["readinessProbe"]["httpGet"]
    patience_s = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert patience_s > settings.startup_timeout_s
    grace_s = read("service")["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace_s > settings.unready_s + settings.drain_s


def test_the_service_asks_for_what_the_runtime_offers() -> None:
    runtime, predictor = read("runtime"), read("service")["spec"]["predictor"]
    [offered] = runtime["spec"]["supportedModelFormats"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert predictor["model"]["modelFormat"]["name"] == offered["name"]
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    [policy] = [read("policy")]
    assert policy["spec"]["podSelector"]["matchLabels"] == {
        "serving.kserve.io/inferenceservice": read("service")["metadata"]["name"]
    }


def test_the_pods_are_as_restricted_as_ours() -> None:
    [container] = read("runtime")["spec"]["containers"]
    own, pod = container["securityContext"], read("service")["spec"]["predictor"]["securityContext"]
    assert own["runAsNonRoot"] is pod["runAsNonRoot"] is True
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    [image] = re.findall(
        r"^# The second host: `docker build --target kserve -t (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.M
    )
    assert container["image"] == image
