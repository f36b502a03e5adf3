"""deploy/kubernetes, held to the schemas of Kubernetes, to docker-compose.yml and to the server, without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from deploy.kubernetes import generate
from server.arguments import parse
from tests.kubernetes.manifests import (
    COMPOSE,
    KUBERNETES,
    MISSING,
    ROOT,
    Manifests,
    as_in_a_pod,
    find_kubectl,
    parse_bytes,
    parse_seconds,
    render,
    settings,
    write_overlay,
)

ENVOY = ROOT / "deploy/envoy"
COMPONENTS = sorted(path.parent.name for path in KUBERNETES.glob("components/*/kustomization.yaml"))
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
KUSTOMIZATIONS = sorted({*KUBERNETES.rglob("kustomization.yaml"), *(ROOT / "deploy").glob("*/kustomization.yaml")})
# What an operator may combine. An autoscaler goes by what `monitoring` records.
COMBINED = {
    "base": (),
    "gpu and monitoring": ("gpu", "monitoring"),
    "claim": ("monitoring", "archives-claim"),
    "image volume": ("monitoring", "archives-image"),
    "autoscaling": ("monitoring", "autoscaling"),
    "keda": ("monitoring", "keda"),
    "tracing": ("tracing",),
}
# The oldest Kubernetes that docs/kubernetes.md promises, and of the one component that asks for more.
OLDEST = {"image volume": "1.33.0"}
PAGE = (ROOT / "docs/kubernetes.md").read_text()
# Kubernetes itself has no schemas of these. KServe's: tests/kserve/test_kubernetes.py.
OF_THE_OPERATORS = ("monitoring.coreos.com/", "keda.sh/", "serving.kserve.io/")
SLOWEST_STOP_S = 10  # Java, workers and exporter, once nothing is in flight.


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    """Everything that can be rendered, by name."""
    if find_kubectl() is None:
        pytest.skip(MISSING)
    made = {name: render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
    for name, components in COMBINED.items():
        made[name] = render(write_overlay(tmp_path_factory.mktemp("overlay"), components))
    return {name: Manifests(text) for name, text in made.items()}


@pytest.fixture(scope="module", autouse=True)
def _schemas_read_once() -> Iterator[None]:
    """Read each of Kubernetes' schemas once: megabytes, which `validate` reads for every resource."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", cache(utils.schema_contents))
        yield


@pytest.fixture(scope="module")
def base(rendered: dict[str, Manifests]) -> Manifests:
    return rendered["base"]


@pytest.fixture(scope="module")
def watched(rendered: dict[str, Manifests]) -> Manifests:
    return rendered["monitoring"]


# ---------------------------------------------------------------- the files, unrendered


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(ROOT / "deploy")))
def test_a_kustomization_names_every_file_beside_it_and_no_other(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    named = {*found.get("resources", []), *found.get("components", [])}
    named |= {file for one in found.get("configMapGenerator", []) for file in one.get("files", [])}
    assert all((path.parent / name).exists() for name in named), named
    if path.is_relative_to(KUBERNETES):
        beside = {file.name for file in path.parent.glob("*.yaml")} - {"kustomization.yaml", "adapter-rule.yaml"}
        assert beside <= named


def test_the_gateway_gets_every_file_that_it_gets_from_compose() -> None:
    [made] = yaml.safe_load((ENVOY / "kustomization.yaml").read_text())["configMapGenerator"]
    assert set(made["files"]) == {path.name for path in ENVOY.iterdir() if path.is_file()} - {"kustomization.yaml"}


def test_every_dashboard_is_there() -> None:
    [made] = yaml.safe_load((ROOT / "deploy/grafana/kustomization.yaml").read_text())["configMapGenerator"]
    folder = ROOT / "deploy/grafana"
    assert {folder / name for name in made["files"]} == set(folder.glob("provisioning/dashboards/*.json"))


def test_generated_files_are_what_their_sources_make() -> None:
    for name, text in generate.make().items():
        written = (KUBERNETES / name).read_text()
        assert written == text, f"{name}: run `python deploy/kubernetes/generate.py`"


def test_the_rules_are_composes_to_the_letter() -> None:
    ours = yaml.safe_load_all((KUBERNETES / "components/monitoring/rules.yaml").read_text())
    groups = [group for resource in ours for group in resource["spec"]["groups"]]
    paths = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    theirs = [group for path in paths for group in yaml.safe_load(path.read_text())["groups"]]
    assert [group["rules"] for group in groups] == [group["rules"] for group in theirs]
    assert [group["interval"] for group in groups] == [group.get("interval", "15s") for group in theirs]


def test_a_job_is_scraped_as_compose_scrapes_it() -> None:
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    monitors = list(yaml.safe_load_all((KUBERNETES / "components/monitoring/monitors.yaml").read_text()))
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    found = {}
    for monitor in monitors:
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        [label] = endpoint["relabelings"]
        assert label["targetLabel"] == "job"
        assert endpoint["interval"] == configuration["global"]["scrape_interval"]
        found[label["replacement"]] = endpoint
    assert set(found) == set(jobs)
    [change] = found["gateway"]["metricRelabelings"]
    [wanted] = jobs["gateway"]["metric_relabel_configs"]
    assert change["sourceLabels"] == wanted["source_labels"]
    assert (change["regex"], change["targetLabel"], change["replacement"]) == (
        wanted["regex"],
        wanted["target_label"],
        wanted["replacement"],
    )


# ---------------------------------------------------------------- what kustomize makes of them


def test_every_component_is_tried() -> None:
    assert {name for names in COMBINED.values() for name in names} == set(COMPONENTS)


def test_kubernetes_old_and_new_takes_every_resource(rendered: dict[str, Manifests]) -> None:
    resources = {  # Most are the same in all.
        (version, str(resource)): resource
        for name, manifests in rendered.items()
        for version in (OLDEST.get(name, "1.25.0"), kubernetes_validate.latest_version())
        for resource in manifests.resources
        if not resource["apiVersion"].startswith(OF_THE_OPERATORS)
    }
    for (version, _), resource in resources.items():
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schemas_find_a_misspelt_field(base: Manifests) -> None:
    resource = base.get("Deployment", "torchserve")
    wrong = {**resource, "spec": {**resource["spec"], "minReadySecs": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", [*OVERLAYS, *COMBINED])
def test_a_container_runs_with_nothing_it_does_not_need(rendered: dict[str, Manifests], name: str) -> None:
    for place, container, pod in rendered[name].containers():
        own, shared = container["securityContext"], pod["securityContext"]
        assert shared["runAsNonRoot"], place
        assert shared["runAsUser"] > 0, place
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert not {"runAsUser", "runAsNonRoot", "seccompProfile", "privileged"} & own.keys(), place
        assert own["allowPrivilegeEscalation"] is False, place
        assert own["readOnlyRootFilesystem"] is True, place
        assert own["capabilities"] == {"drop": ["ALL"]}, place
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), place
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), place
        assert pod["automountServiceAccountToken"] is False, place
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & pod.keys(), place
        kinds = {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]}
        assert kinds <= {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret"}, place
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume), place


def test_no_resource_is_left_out_of_the_namespace(rendered: dict[str, Manifests]) -> None:
    for name, manifests in rendered.items():
        if name == "kserve":  # Its runtime belongs to the cluster, and the namespace is applied before.
            named = {one["kind"]: one["metadata"].get("namespace") for one in manifests.resources}
            assert named.pop("ClusterServingRuntime") is None
            assert set(named.values()) == {"convscope"}
            continue
        [namespace] = manifests.of("Namespace")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        others = [one for one in manifests.resources if one is not namespace]
        assert {one["metadata"]["namespace"] for one in others} == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("name", [*OVERLAYS, *COMBINED])
def test_no_secret_is_among_them(rendered: dict[str, Manifests], name: str) -> None:
    assert not rendered[name].of("Secret")


@pytest.mark.parametrize("service", ["torchserve", "gateway", "probe"])
def test_a_container_is_told_what_compose_tells_it(watched: Manifests, service: str) -> None:
    container, theirs = watched.container(service), COMPOSE["services"][service]
    assert container["image"] == theirs["image"]
    assert container.get("command") == theirs.get("entrypoint")
    own = [f"--key=/run/secrets/probe_key/{key_file()}"] if service == "probe" else []
    assert container["args"] == [as_in_a_pod(option) for option in theirs["command"]] + own
    used = set(re.findall(r"\$\((CONVSCOPE_\w+)\)", " ".join(container["args"])))
    data = watched.get("ConfigMap", "settings")["data"]
    assert used <= data.keys()
    assert [one["configMapRef"]["name"] for one in container["envFrom"]] == [
        watched.get("ConfigMap", "settings")["metadata"]["name"]
    ]


def signers_path() -> str:
    """Return where Compose mounts the file of the keys that sign archives; here it is a folder."""
    [path] = re.findall(r"\$\{CONVSCOPE_SIGNERS:\+([^}]+)\}", " ".join(COMPOSE["services"]["torchserve"]["command"]))
    return str(path)


def key_file() -> str:
    """Return the name of the probe's API key in its Secret: that of the file it is made from."""
    return Path(settings()["CONVSCOPE_PROBE_KEY"]).name


def test_settings_are_composes_with_its_defaults(watched: Manifests) -> None:
    data = watched.get("ConfigMap", "settings")["data"]
    # In Docker the gateway has the host's name on its network; here a Service has its own. And a node may be lost.
    own = {"CONVSCOPE_HOSTNAME": "gateway", "CONVSCOPE_REPLICAS": "2"}
    # A file of keys is off unless it is named; Compose has to mount something in its place.
    own["CONVSCOPE_SIGNERS"] = ""
    assert data == {name: settings()[name] for name in data} | own
    assert watched.get("Deployment", "torchserve")["spec"]["replicas"] == int(data["CONVSCOPE_REPLICAS"])


def test_on_the_gpu_a_replica_is_what_compose_makes_of_it(rendered: dict[str, Manifests]) -> None:
    container = rendered["gpu"].container("torchserve")
    theirs = yaml.safe_load((ROOT / "deploy/compose.gpu.yml").read_text())["services"]["torchserve"]
    assert container["image"] == theirs["image"]
    assert container["args"] == [as_in_a_pod(option) for option in theirs["command"]]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_users_are_those_of_the_images(watched: Manifests) -> None:
    [user] = set(re.findall(r"^USER (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.M))
    users = {"torchserve": user, "gateway": COMPOSE["services"]["gateway"]["user"], "probe": user}
    for name, wanted in users.items():
        context = watched.pod(name)["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == wanted


@pytest.mark.parametrize("service", ["torchserve", "gateway", "probe"])
def test_memory_and_scratch_space_are_composes(watched: Manifests, service: str) -> None:
    theirs = COMPOSE["services"][service]
    assert parse_bytes(watched.container(service)["resources"]["limits"]["memory"]) == parse_bytes(theirs["mem_limit"])
    [tmp] = [volume["emptyDir"] for volume in watched.pod(service)["volumes"] if volume["name"] == "tmp"]
    [mount] = theirs["tmpfs"]
    assert tmp["medium"] == "Memory"
    assert parse_bytes(tmp["sizeLimit"]) == parse_bytes(re.findall(r"size=(\w+)", mount)[0])


def test_a_replica_listens_where_the_server_does(base: Manifests) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    entry = yaml.safe_load(dockerfile.rpartition("ENTRYPOINT ")[2])
    server = parse(entry[entry.index("server") + 1 :])
    ports = base.ports("torchserve")
    assert ports == {
        "rest": server.rest_port,
        "grpc": server.grpc_port,
        "metrics": server.metrics_port,
        "ready": server.ready_port,
    }
    assert re.findall(r"^EXPOSE (.*)", dockerfile, re.M)[-1].split() == [str(port) for port in ports.values()]
    mounts = {mount["mountPath"] for mount in base.container("torchserve")["volumeMounts"]}
    assert mounts == {str(server.model_store), "/tmp", signers_path()}


def test_the_gateway_listens_where_envoy_does(base: Manifests) -> None:
    listeners = [
        yaml.safe_load((ENVOY / "tls.yaml").read_text())["resources"][0],
        yaml.safe_load((ENVOY / "bootstrap.yaml").read_text())["static_resources"]["listeners"][0],
    ]
    ports = {one["name"]: one["address"]["socket_address"]["port_value"] for one in listeners}
    assert base.ports("gateway") == ports
    [published] = base.get("Service", "gateway")["spec"]["ports"]
    assert published["port"] == ports[published["targetPort"]]


def test_the_gateway_finds_the_replicas_by_the_name_and_ports_of_its_configuration(base: Manifests) -> None:
    ports = base.ports("torchserve")
    service = base.get("Service", "replicas")
    for cluster in yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"]:
        [endpoints] = cluster["load_assignment"]["endpoints"]
        [endpoint] = endpoints["lb_endpoints"]
        address = endpoint["endpoint"]["address"]["socket_address"]
        assert address == {"address": service["metadata"]["name"], "port_value": ports[cluster["name"]]}
        assert endpoint["endpoint"]["health_check_config"]["port_value"] == ports["ready"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert {one["name"]: one["port"] for one in service["spec"]["ports"]}.items() <= ports.items()


def test_readiness_is_what_the_image_and_the_gateway_ask(base: Manifests) -> None:
    container = base.container("torchserve")
    script = (ROOT / "deploy/healthcheck.py").read_text()
    [cluster, *_] = yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"]
    for probe in (container["startupProbe"], container["readinessProbe"]):
        assert probe["httpGet"] == {"path": "/ready", "port": "ready"}
    assert cluster["health_checks"][0]["http_health_check"]["path"] == "/ready"
    assert f"PORT = {base.ports('torchserve')['ready']}" in script
    assert '"GET", "/ready"' in script
    assert "livenessProbe" not in container
    gateway = base.container("gateway")
    theirs = COMPOSE["services"]["gateway"]["healthcheck"]["test"]
    for probe in (gateway["startupProbe"], gateway["readinessProbe"]):
        assert ["CMD", *probe["exec"]["command"]] == theirs


def test_the_launcher_gives_up_before_the_kubelet_does(base: Manifests) -> None:
    probe = base.container("torchserve")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > parse([]).startup_timeout_s


def test_what_drains_has_the_time_for_it(base: Manifests) -> None:
    container, pod = base.container("torchserve"), base.pod("torchserve")
    server = parse([option for option in container["args"] if "$(" not in option])
    grace = pod["terminationGracePeriodSeconds"]
    assert grace == parse_seconds(COMPOSE["services"]["torchserve"]["stop_grace_period"])
    assert server.unready_s + server.drain_s + SLOWEST_STOP_S < grace
    assert "lifecycle" not in container
    # The gateway needs to see that a replica no longer is ready, three times over.
    [cluster, *_] = yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"]
    [check] = cluster["health_checks"]
    assert server.unready_s > 3 * (float(check["interval"][:-1]) + float(check["timeout"][:-1]))


def test_the_gateway_drains_after_it_has_left_the_service(base: Manifests) -> None:
    container, pod = base.container("gateway"), base.pod("gateway")
    [_, pause] = container["lifecycle"]["preStop"]["exec"]["command"]
    [drain] = re.findall(r"CONVSCOPE_GATEWAY_DRAIN_S:-(\d+)", (ENVOY / "start.sh").read_text())
    composes = parse_seconds(COMPOSE["services"]["gateway"]["stop_grace_period"])
    assert int(drain) < composes
    assert int(pause) + composes <= pod["terminationGracePeriodSeconds"]


def test_the_gateways_together_fill_no_replicas_queue(base: Manifests) -> None:
    clusters = yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"]
    most = sum(cluster["circuit_breakers"]["thresholds"][0]["max_requests"] for cluster in clusters)
    replicas, gateways = (base.get("Deployment", name)["spec"]["replicas"] for name in ("torchserve", "gateway"))
    assert gateways * most < 100 * replicas  # TorchServe queues 100 requests for a model.


@pytest.mark.parametrize("name", ["torchserve", "gateway"])
def test_a_node_may_be_drained_and_no_node_holds_all(base: Manifests, name: str) -> None:
    deployment, labels = base.get("Deployment", name), base.labels(name)
    assert deployment["spec"]["replicas"] > 1
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    budget = base.get("PodDisruptionBudget", name)["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    spread = base.pod(name)["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert all(one["labelSelector"]["matchLabels"] == labels for one in spread)


# ---------------------------------------------------------------- what the page says


def test_the_pages_kustomization_makes_what_it_says(rendered: dict[str, Manifests], tmp_path: Path) -> None:
    [example] = [one for one in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "components:" in one]
    (tmp_path / "production").mkdir()
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "production/kustomization.yaml").write_text(example)
    made = Manifests(render(tmp_path / "production"))
    assert len(made.resources) == len(rendered["monitoring"].resources)
    assert made.get("Deployment", "torchserve")["spec"]["replicas"] == 3
    assert made.get("Service", "gateway")["spec"]["type"] == "LoadBalancer"
    assert {image.partition("/")[0] for image in images(made)} == {"registry.example.com", "envoyproxy"}
    data = made.get("ConfigMap", "settings")["data"]
    wanted = {"CONVSCOPE_REPLICAS": "3", "CONVSCOPE_MODELS": "cifar,digits"}
    assert data == rendered["base"].get("ConfigMap", "settings")["data"] | wanted


def images(manifests: Manifests) -> set[str]:
    return {container["image"] for _, container, _ in manifests.containers()}


def test_the_page_has_every_component_and_setting(base: Manifests) -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.M)
    assert sorted(rows) == COMPONENTS
    assert all(f"`{name}`" in PAGE for name in base.get("ConfigMap", "settings")["data"])


def test_the_page_asks_for_the_room_that_pods_ask_for(base: Manifests) -> None:
    cores, memory = 0.0, 0
    for name in ("torchserve", "gateway"):
        asked = base.container(name)["resources"]["requests"]
        pods = base.get("Deployment", name)["spec"]["replicas"]
        cores += pods * (int(asked["cpu"][:-1]) / 1000 if asked["cpu"].endswith("m") else int(asked["cpu"]))
        memory += pods * parse_bytes(asked["memory"])
    assert f"{cores:g} free cores and {memory / 2**30:g} GiB" in PAGE


# ---------------------------------------------------------------- who reaches whom


def reaches(manifests: Manifests, source: dict[str, str], target: str, port: str) -> bool:
    """Tell whether pods with labels reach a port of a Deployment's pods by the policies on ingress."""
    policies = [
        policy["spec"]
        for policy in manifests.of("NetworkPolicy")
        if policy["spec"]["podSelector"]["matchLabels"].items() <= manifests.labels(target).items()
        and "Ingress" in policy["spec"]["policyTypes"]
    ]
    assert policies, f"nothing keeps anybody from {target}"
    for rule in (rule for policy in policies for rule in policy.get("ingress", [])):
        peers = [one for one in rule.get("from", []) if "namespaceSelector" not in one]
        named = any(one["podSelector"]["matchLabels"].items() <= source.items() for one in peers)
        if (named or "from" not in rule) and any(one["port"] == port for one in rule["ports"]):
            return True
    return False


def test_only_the_gateway_reaches_replicas(watched: Manifests) -> None:
    gateway, probe, stranger = watched.labels("gateway"), watched.labels("probe"), {"app": "stranger"}
    for port in ("rest", "grpc", "ready"):
        assert reaches(watched, gateway, "torchserve", port)
        for other in (probe, stranger, watched.labels("torchserve")):
            assert not reaches(watched, other, "torchserve", port)
    assert reaches(watched, stranger, "gateway", "public")
    for target in ("torchserve", "gateway", "probe"):
        assert not reaches(watched, stranger, target, "metrics")


def test_replicas_reach_nobody(base: Manifests) -> None:
    spec = base.get("NetworkPolicy", "torchserve")["spec"]
    assert "Egress" in spec["policyTypes"]
    assert not spec.get("egress")


def test_prometheus_reaches_every_port_with_metrics_and_no_other(watched: Manifests) -> None:
    [rule] = watched.get("NetworkPolicy", "metrics")["spec"]["ingress"]
    [peer] = rule["from"]
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert rule["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    selected = {}
    for monitor in watched.of("PodMonitor"):
        if "namespaceSelector" not in monitor["spec"]:
            labels = monitor["spec"]["selector"]["matchLabels"]
            [target] = [one for one in ("torchserve", "gateway", "probe") if labels == watched.labels(one)]
            [endpoint] = monitor["spec"]["podMetricsEndpoints"]
            selected[target] = watched.ports(target)[endpoint["port"]]
    theirs = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    assert selected == {"torchserve": 8082, "gateway": 9902, "probe": 8084}
    assert all(re.search(rf"\b{port}\b", theirs) for port in selected.values())


# ---------------------------------------------------------------- archives and autoscaling


def test_signers_are_a_config_map_of_the_operators_and_signatures_come_with_the_archives(base: Manifests) -> None:
    pod = base.pod("torchserve")
    [volume] = [one for one in pod["volumes"] if one["name"] == "signers"]
    assert volume["configMap"] == {"name": "signers", "optional": True}
    assert f"CONVSCOPE_SIGNERS={signers_path()}/keys" in PAGE
    assert "configmap signers --from-file=keys=" in PAGE
    [init] = pod["initContainers"]
    assert init["command"][-1] == "cp /models/*.mar* /archives/"
    assert re.findall(r"^COPY (\S+)", (KUBERNETES / "archives.Dockerfile").read_text(), re.M) == ["*.mar*"]


@pytest.mark.parametrize("name", ["claim", "image volume"])
def test_archives_come_from_elsewhere_for_replicas_and_probe_alike(rendered: dict[str, Manifests], name: str) -> None:
    sources = []
    for deployment in ("torchserve", "probe"):
        pod = rendered[name].pod(deployment)
        assert "initContainers" not in pod
        [volume] = [one for one in pod["volumes"] if one["name"] == "archives"]
        sources.append(volume)
        [mount] = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "archives"]
        assert mount["mountPath"] == "/models"
        assert mount["readOnly"]
    assert sources[0] == sources[1]


def test_the_image_volume_is_the_image_of_the_init_container(base: Manifests, rendered: dict[str, Manifests]) -> None:
    [init] = base.pod("torchserve")["initContainers"]
    [volume] = [one for one in rendered["image volume"].pod("torchserve")["volumes"] if one["name"] == "archives"]
    assert volume["image"]["reference"] == init["image"]


def test_both_autoscalers_go_by_the_same_load(rendered: dict[str, Manifests]) -> None:
    hpa = rendered["autoscaling"].get("HorizontalPodAutoscaler", "torchserve")["spec"]
    keda = rendered["keda"].get("ScaledObject", "torchserve")["spec"]
    [recorded] = [
        rule["record"]
        for group in rendered["monitoring"].get("PrometheusRule", "convscope-load")["spec"]["groups"]
        for rule in group["rules"]
    ]
    [adapted] = yaml.safe_load((KUBERNETES / "components/autoscaling/adapter-rule.yaml").read_text())["rules"]
    [metric] = hpa["metrics"]
    [trigger] = keda["triggers"]
    assert adapted["seriesQuery"].startswith(recorded + "{")
    assert adapted["name"]["as"] == metric["pods"]["metric"]["name"]
    assert f"{recorded}{{" in trigger["metadata"]["query"]
    assert metric["pods"]["target"]["averageValue"] == f"{1000 * float(trigger['metadata']['threshold']):.0f}m"
    wanted = int(rendered["base"].get("ConfigMap", "settings")["data"]["CONVSCOPE_REPLICAS"])
    assert hpa["minReplicas"] == keda["minReplicaCount"] == keda["fallback"]["replicas"] == wanted
    assert hpa["maxReplicas"] == keda["maxReplicaCount"]
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    for name in ("autoscaling", "keda"):
        assert "replicas" not in rendered[name].get("Deployment", "torchserve")["spec"]


def test_the_load_is_that_of_the_busiest_model(tmp_path: Path) -> None:
    from tests.watching.tools import MISSING as NO_PROMETHEUS
    from tests.watching.tools import find, promtool

    if find("promtool") is None:
        pytest.skip(NO_PROMETHEUS)
    rules = yaml.safe_load((KUBERNETES / "components/monitoring/load.yaml").read_text())["spec"]
    (tmp_path / "load.yml").write_text(yaml.safe_dump(rules))

    def series(name: str, model: str, values: str, more: str = "") -> dict[str, Any]:
        labels = f'namespace="convscope", pod="one", model="{model}", version="1"{more}'
        return {"series": f"{name}{{{labels}}}", "values": values}

    case = {
        "rule_files": ["load.yml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "5s",
                "input_series": [
                    # Two workers, of which REST keeps one busy for 3 s of 5 and gRPC for 1 s, and two requests wait.
                    series("convscope_handler_seconds_sum", "busy", "0+3x60", ', transport="rest"'),
                    series("convscope_handler_seconds_sum", "busy", "0+1x60", ', transport="grpc"'),
                    series("convscope_queue_requests", "busy", "2x60"),
                    series("convscope_workers_wanted", "busy", "2x60"),
                    # Nobody has asked for this one yet.
                    series("convscope_queue_requests", "idle", "0x60"),
                    series("convscope_workers_wanted", "idle", "1x60"),
                ],
                "promql_expr_test": [
                    {
                        "expr": rules["groups"][0]["rules"][0]["record"],
                        "eval_time": "4m",
                        "exp_samples": [
                            {
                                "labels": 'pod:convscope_requests_per_worker:rate1m{namespace="convscope", pod="one"}',
                                "value": (0.6 + 0.2 + 2) / 2,
                            }
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "case.yml").write_text(yaml.safe_dump(case))
    promtool("test", "rules", tmp_path / "case.yml")
