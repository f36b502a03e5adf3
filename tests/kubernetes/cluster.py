"""deploy/kubernetes on a real cluster: the one that KUBECONFIG names, in a namespace of its own.

The tests know nothing of how the cluster is made. Commands of the shell tell them what only its owner can:

    CONVSCOPE_KUBERNETES_LOAD      brings images of this machine's Docker engine to the nodes; their names are appended
    CONVSCOPE_KUBERNETES_CONVERT   a filter that rewrites manifests for an older API; none by default
    CONVSCOPE_KUBERNETES_UNPLUG    cuts the node $NODE off; without it no node is lost
    CONVSCOPE_KUBERNETES_PLUG      puts it back
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from convscope import Client

from tests.docker.stack import engine_missing, make_secrets
from tests.docker.test_scenarios import publish
from tests.kubernetes.manifests import KUBERNETES, MISSING, ROOT, Manifests, find_kubectl, render, write_overlay

LOAD, CONVERT = "CONVSCOPE_KUBERNETES_LOAD", "CONVSCOPE_KUBERNETES_CONVERT"
UNPLUG, PLUG = "CONVSCOPE_KUBERNETES_UNPLUG", "CONVSCOPE_KUBERNETES_PLUG"
MODELS = ("cifar", "digits")
VERSIONS = ("1.0", "1.1")  # Of the archives' images: that of the model store, and the same under another version.
REPLICAS = 3
CONTAINER = "/spec/template/spec/containers/0"
# Envoy's admin interface listens inside the pod alone, and its image has no HTTP client.
ASK = (
    "exec 3<>/dev/tcp/127.0.0.1/9901; "
    "printf 'GET %s HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n' >&3; cat <&3"
)

Resource = dict[str, Any]


def cluster_missing() -> str | None:
    """Return why there is no cluster to test on; None if there is one."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names none"
    if shutil.which("kubectl") is None:
        return "no kubectl command"
    if not os.environ.get(LOAD):
        return f"{LOAD} names no command that brings images to the nodes"
    if find_kubectl() is None:
        return MISSING
    answer = subprocess.run(["kubectl", "get", "nodes"], capture_output=True, text=True, check=False)
    if answer.returncode:
        return f"`kubectl get nodes` fails: {answer.stderr.strip().splitlines()[-1:]}"
    if missing := engine_missing():
        return f"images cannot be built: {missing}"
    return None


class Cluster:
    """The service in a namespace of a cluster.

    Args:
        work: Folder for its secrets, archives and manifests.
    """

    def __init__(self, work: Path) -> None:
        self.namespace = f"convscope-test-{os.getpid()}"
        self._work, self._secrets = work, work / "secrets"
        nodes = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
        addresses = {
            node["metadata"]["name"]: one["address"]
            for node in nodes
            for one in node["status"]["addresses"]
            if one["type"] == "InternalIP"
        }
        # Callers come in through the first node; the last one is drained and lost.
        self.door, self.victim = addresses[min(addresses)], max(addresses)
        self.port = 0
        make_secrets(self._secrets, CONVSCOPE_HOSTNAME=self.door)
        self._key = (self._secrets / "api-key").read_text().strip()

    # ---------------------------------------------------------------- what is deployed

    def bring_images(self) -> None:
        """Build the images that are ours, pull Envoy's if it is not there, and bring all to the nodes."""
        _run("docker", "compose", "build", "torchserve", "probe")
        images = ["convscope/torchserve:0.1.0", "convscope/probe:0.1.0", self._envoy()]
        for version in VERSIONS:
            store = self._work / f"store-{version}"
            store.mkdir()
            for name in MODELS:
                shutil.copy(ROOT / "model_store" / f"{name}.mar", store)
            if version != VERSIONS[0]:
                publish(store / "cifar.mar", version)
            image = self.archives(version)
            _run("docker", "build", "-q", "-t", image, "-f", str(KUBERNETES / "archives.Dockerfile"), str(store))
            images.append(image)
        for image in images:
            _run(*shlex.split(os.environ[LOAD]), image)

    def _envoy(self) -> str:
        found = re.search(r"image: (envoyproxy/envoy:\S+)", (ROOT / "docker-compose.yml").read_text())
        assert found
        with contextlib.suppress(AssertionError):
            _run("docker", "image", "inspect", found[1])
            return found[1]
        _run("docker", "pull", "-q", found[1])
        return found[1]

    def archives(self, version: str) -> str:
        """Return the name of an image of archives."""
        return f"convscope/archives:{self.namespace}-{version}"

    def up(self) -> None:
        """Deploy, and wait until all replicas are ready."""
        self.kubectl("create", "namespace", self.namespace)
        pair = [f"--cert={self._secrets}/certificate/tls.crt", f"--key={self._secrets}/certificate/tls.key"]
        self.kubectl("create", "secret", "tls", "certificate", *pair)
        for name, file in (("api-keys", "api-keys/keys.yaml"), ("probe-key", "probe-key")):
            self.kubectl("create", "secret", "generic", name, f"--from-file={self._secrets / file}")
        small = {
            "cpu": "100m",
            "memory": "1Gi",
        }  # For clusters of small nodes, which have to hold the pods of lost ones.
        patches = {
            ("Deployment", "torchserve"): {"op": "add", "path": f"{CONTAINER}/resources/requests", "value": small},
            ("Service", "gateway"): {"op": "add", "path": "/spec/type", "value": "NodePort"},
        }
        overlay = write_overlay(
            self._work / "overlay",
            ("monitoring",),
            namespace=self.namespace,
            images=[{"name": "convscope/archives", "newTag": self.archives(VERSIONS[0]).partition(":")[2]}],
            replicas=[{"name": "torchserve", "count": REPLICAS}],
            patches=[
                {"target": {"kind": kind, "name": name}, "patch": json.dumps([patch])}
                for (kind, name), patch in patches.items()
            ],
        )
        # The Prometheus operator need not be there.
        ours = [one for one in Manifests(render(overlay)).resources if "coreos.com" not in one["apiVersion"]]
        manifests = yaml.safe_dump_all(ours)
        if convert := os.environ.get(CONVERT):
            manifests = _run("bash", "-c", convert, text=manifests)
        self.kubectl("apply", "-f", "-", text=manifests)
        self.wait_for_rollout("gateway")
        self.wait_for_rollout("torchserve")
        [port] = json.loads(self.kubectl("get", "service", "gateway", "-o", "json"))["spec"]["ports"]
        self.port = port["nodePort"]

    def down(self) -> None:
        """Remove everything."""
        self.kubectl("uncordon", self.victim)
        self.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--wait=false")
        with contextlib.suppress(AssertionError):  # They may not be there yet.
            _run("docker", "rmi", *(self.archives(version) for version in VERSIONS))

    # ---------------------------------------------------------------- asking

    def client(self, transport: str, **options: Any) -> Client:
        """Return a client of the gateway that does not retry; `transport` is `rest` or `grpc`."""
        scheme = {"rest": "https", "grpc": "grpcs"}[transport]
        certificate = self._secrets / "certificate/tls.crt"
        given: dict[str, Any] = {"api_key": self._key, "ca_file": certificate, "deadline_s": 30, "retries": 0}
        return Client(f"{scheme}://{self.door}:{self.port}", **given | options)

    def kubectl(self, *arguments: str, text: str | None = None, timeout_s: float | None = None) -> str:
        """Run kubectl in the namespace; return what it prints."""
        return _run("kubectl", "--namespace", self.namespace, *arguments, text=text, timeout_s=timeout_s)

    def wait_for_rollout(self, name: str) -> None:
        """Wait until a Deployment is as it should be."""
        self.kubectl("rollout", "status", f"deployment/{name}", "--timeout=600s")

    def pods(self, component: str, *, ready: bool = True) -> list[Resource]:
        """Return the pods of a component that stay, of which by default those that are ready."""
        selector = f"app.kubernetes.io/component={component}"
        found = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        staying = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        return [pod for pod in staying if is_ready(pod)] if ready else staying

    def balanced(self) -> int:
        """Return how many replicas the gateways send requests to, on the transport and at the gateway with fewest."""
        counts = []
        for pod in self.pods("gateway"):
            said = self.kubectl("exec", pod["metadata"]["name"], "--", "bash", "-c", ASK % "/clusters", timeout_s=20)
            healthy = re.findall(r"^(rest|grpc)::[\d.]+:\d+::health_flags::healthy", said, re.M)
            counts += [healthy.count("rest"), healthy.count("grpc")]
        return min(counts, default=0)

    def is_whole(self, replicas: int = REPLICAS) -> bool:
        """Tell whether there are so many replicas, none more on its way, all of them used by two gateways."""
        try:
            return (
                len(self.pods("torchserve")) == len(self.pods("torchserve", ready=False)) == replicas
                and len(self.pods("gateway")) == len(self.pods("gateway", ready=False)) == 2
                and self.balanced() == replicas
            )
        except (AssertionError, subprocess.TimeoutExpired):  # A pod that was listed is gone, or its node.
            return False

    def node_is_ready(self, node: str) -> bool:
        """Tell whether the cluster takes a node for ready."""
        return is_ready(json.loads(self.kubectl("get", "node", node, "-o", "json")))

    def switch(self, variable: str) -> None:
        """Run the command that a variable names on the last node."""
        _run("bash", "-c", os.environ[variable], NODE=self.victim)


def is_ready(resource: Resource) -> bool:
    """Tell whether a pod or a node says that it is ready."""
    conditions = {one["type"]: one["status"] for one in resource["status"].get("conditions", [])}
    return conditions.get("Ready") == "True"


def _run(*command: str, text: str | None = None, timeout_s: float | None = None, **environment: str) -> str:
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout
