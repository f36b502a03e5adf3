"""What `docker inspect` says of the running containers, and what is inside the image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.docker.stack import ROOT, SERVICES, Stack

USERS = {
    "torchserve": "10001:10001",
    "gateway": "101:101",
    "probe": "10001:10001",
    "prometheus": "65534:65534",
    "alertmanager": "65534:65534",
}


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_runs_with_nothing_it_does_not_need(stack: Stack, service: str) -> None:
    facts = stack.inspect(service)
    host = facts["HostConfig"]
    assert facts["Config"]["User"] == USERS[service]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert all(not mount["RW"] for mount in facts["Mounts"] if mount["Type"] == "bind")
    assert facts["State"]["Health"]["Status"] == "healthy"


def test_only_the_gateway_publishes_a_port(stack: Stack) -> None:
    published = {}
    for service in SERVICES:
        ports = stack.inspect(service)["NetworkSettings"]["Ports"]
        published[service] = {port: bindings for port, bindings in ports.items() if bindings}
    assert list(published.pop("gateway")) == ["8443/tcp"]
    assert not any(published.values())


def test_the_replicas_and_prometheus_have_no_way_out(stack: Stack) -> None:
    for service in ("torchserve", "prometheus"):
        for network in stack.inspect(service)["NetworkSettings"]["Networks"]:
            assert stack.docker("network", "inspect", "-f", "{{.Internal}}", network).strip() == "true"


def test_grafana_is_published_on_this_machine_only(stack: Stack) -> None:
    grafana = json.loads(stack.compose("--profile", "grafana", "config", "--format", "json"))["services"]["grafana"]
    assert [port["host_ip"] for port in grafana["ports"]] == ["127.0.0.1"]
    assert grafana["read_only"]
    assert grafana["cap_drop"] == ["ALL"]


def test_nothing_but_grafana_needs_grafanas_image(stack: Stack) -> None:
    assert "grafana" not in json.loads(stack.compose("config", "--format", "json"))["services"]


def test_prometheus_has_a_way_out_for_an_alertmanager_elsewhere_only_if_asked(stack: Stack) -> None:
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose.alertmanager.yml")
    asked = json.loads(stack.compose(*files, "config", "--format", "json"))
    assert "alertmanager" not in asked["services"]
    assert set(asked["services"]["prometheus"]["networks"]) == {"outward", "watching"}
    assert not asked["networks"]["outward"].get("internal")


def test_the_launcher_is_process_1(stack: Stack) -> None:
    command = stack.docker("exec", stack.replicas()[0], "python", "-c", "print(open('/proc/1/cmdline').read())")
    assert command.split("\0")[:3] == ["python", "-m", "server"]


def test_the_root_cannot_be_written(stack: Stack) -> None:
    places = ["/", "/srv/convscope", "/models", "/opt/convscope", "/var"]
    code = f"import os; print([place for place in {places} if os.access(place, os.W_OK)])"
    assert stack.docker("exec", stack.replicas()[0], "python", "-c", code).strip() == "[]"


def test_the_image_holds_no_compiler_no_cache_no_secret_no_archive(stack: Stack) -> None:
    code = """
import glob, shutil
tools = ("gcc", "cc", "g++", "make", "pip", "pip3", "git", "curl", "wget", "nvcc")
print([tool for tool in tools if shutil.which(tool)]
      + glob.glob("/root/.cache/*") + glob.glob("/var/lib/apt/lists/*") + glob.glob("/models/*")
      + glob.glob("/opt/convscope/**/pip", recursive=True) + glob.glob("/srv/**/*.pem", recursive=True)
      + glob.glob("/run/secrets/*"))
"""
    image = stack.inspect("torchserve")["Config"]["Image"]
    assert stack.docker("run", "--rm", "--entrypoint", "python", image, "-c", code).strip() == "[]"
    history = stack.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert stack.key not in history


def test_a_change_of_code_rebuilds_the_last_layer_alone(stack: Stack, tmp_path: Path) -> None:
    for folder in ("server", "deploy", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "server/changed.txt").write_text("a change")
    changed = f"{stack.environment['COMPOSE_PROJECT_NAME']}:changed"
    service = {"image": changed, "build": {"context": str(tmp_path), "dockerfile": "deploy/Dockerfile"}}
    (tmp_path / "changed.json").write_text(json.dumps({"services": {"torchserve": service}}))
    stack.compose("-f", "docker-compose.yml", "-f", str(tmp_path / "changed.json"), "build", "torchserve")
    try:
        before, after = (layers(stack, name) for name in (stack.inspect("torchserve")["Image"], changed))
    finally:
        stack.docker("rmi", changed)
    assert len(before) == len(after)
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def layers(stack: Stack, image: str) -> list[str]:
    return list(json.loads(stack.docker("inspect", "-f", "{{json .RootFS.Layers}}", image)))


def test_a_gpu_that_is_not_there_is_refused(stack: Stack) -> None:
    image = stack.inspect("torchserve")["Config"]["Image"]
    said = stack.docker(
        "run",
        "--rm",
        "--entrypoint",
        "sh",
        "-v",
        f"{stack.store}:/models:ro",
        image,
        "-c",
        "python -m server --model-store /models --device cuda 2>&1; echo status $?",
    )
    assert "no GPU to serve on" in said
    assert "status 1" in said


def test_a_folder_from_which_java_cannot_load_a_library_is_refused(stack: Stack) -> None:
    image = stack.inspect("torchserve")["Config"]["Image"]
    run = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "sh", "-v", f"{stack.store}:/models:ro"]
    said = stack.docker(*run, image, "-c", "python -m server --model-store /models 2>&1; echo status $?")
    assert "(mounted noexec)" in said
    assert "--tmpfs /tmp:exec" in said
    assert "status 1" in said


def test_the_gpu_override_asks_for_the_device(stack: Stack) -> None:
    text = stack.compose("-f", "docker-compose.yml", "-f", "deploy/compose.gpu.yml", "config", "--format", "json")
    service = json.loads(text)["services"]["torchserve"]
    assert "--device=cuda" in service["command"]
    assert "--device=cpu" not in service["command"]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "utility" in device["capabilities"]  # nvidia-smi, by which TorchServe finds GPUs.
    assert service["build"]["args"]["DEVICE"] == "cuda"
