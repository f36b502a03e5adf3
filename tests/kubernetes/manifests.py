"""The manifests as data: rendered by kustomize, and what docker-compose.yml says of the same things."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MISSING = "no kubectl with kustomize 5: neither in .tools nor on PATH (`make kubectl` fetches one)"

Resource = dict[str, Any]


@cache
def find_kubectl() -> str | None:
    """Return the path of a kubectl that renders our kustomizations, or None. That of an old cluster does not."""
    for path in (str(ROOT / ".tools/kubectl"), *(f"{folder}/kubectl" for folder in os.get_exec_path())):
        if shutil.which(path):
            said = subprocess.run([path, "version", "--client"], capture_output=True, text=True, check=False).stdout
            if re.search(r"^Kustomize Version: v5", said, re.M):
                return path
    return None


def render(folder: Path) -> str:
    """Return what a kustomization makes; raises AssertionError with kustomize's own words."""
    command = [find_kubectl() or "kubectl", "kustomize", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr, answer.stderr  # Warnings of fields that are going out of use.
    return answer.stdout


def write_overlay(folder: Path, components: tuple[str, ...] = (), **fields: Any) -> Path:
    """Write a kustomization over the base into a folder, as an operator would; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = Path(os.path.relpath(KUBERNETES, folder.resolve()))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "convscope",
        "resources": [str(ours / "base")],
        "components": [str(ours / "components" / name) for name in components],
        **fields,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


class Manifests:
    """Rendered resources.

    Args:
        text: As kustomize prints them.
    """

    def __init__(self, text: str) -> None:
        self.resources: list[Resource] = list(yaml.load_all(text, Loader=yaml.CSafeLoader))

    def of(self, kind: str) -> list[Resource]:
        """Return the resources of a kind."""
        return [one for one in self.resources if one["kind"] == kind]

    def get(self, kind: str, name: str) -> Resource:
        """Return one by its name; a generated one without the hash behind it."""
        [found] = [one for one in self.of(kind) if re.sub(r"-[a-z0-9]{10}$", "", one["metadata"]["name"]) == name]
        return found

    def pod(self, name: str) -> dict[str, Any]:
        """Return the specification of a Deployment's pods."""
        spec: dict[str, Any] = self.get("Deployment", name)["spec"]["template"]["spec"]
        return spec

    def labels(self, name: str) -> dict[str, str]:
        """Return the labels of a Deployment's pods."""
        labels: dict[str, str] = self.get("Deployment", name)["spec"]["template"]["metadata"]["labels"]
        return labels

    def container(self, name: str) -> dict[str, Any]:
        """Return the one container of a Deployment."""
        [container] = self.pod(name)["containers"]
        return dict(container)

    def containers(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield every container, those that prepare pods included: its name, itself, and its pod's specification."""
        for deployment in self.of("Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                yield f"{deployment['metadata']['name']}/{container['name']}", container, pod

    def ports(self, name: str) -> dict[str, int]:
        """Return the ports of a Deployment by their names."""
        return {port["name"]: port["containerPort"] for port in self.container(name).get("ports", [])}


def settings() -> dict[str, str]:
    """Return the settings of docker-compose.yml and their defaults."""
    return dict(re.findall(r"\$\{(CONVSCOPE_\w+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))


def as_in_a_pod(option: str) -> str:
    """Return an option of Compose as Kubernetes writes it: `$(NAME)` for `${NAME:-default}` and `${NAME:+path}`."""
    return re.sub(r"\$\{(CONVSCOPE_\w+):[-+][^}]*\}", r"$(\1)", option)


def parse_bytes(quantity: str) -> int:
    """Return a quantity of memory in bytes, as Kubernetes (`8Gi`) or Compose (`8g`) writes it."""
    found = re.fullmatch(r"(\d+)([kmg])i?", quantity.lower())
    assert found, quantity
    return int(found[1]) << {"k": 10, "m": 20, "g": 30}[found[2]]


def parse_seconds(duration: str) -> int:
    """Return Compose's duration in seconds."""
    found = re.fullmatch(r"(\d+)s", duration)
    assert found, duration
    return int(found[1])
