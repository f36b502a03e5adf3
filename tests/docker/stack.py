"""The project of docker-compose.yml, started under a name of its own for the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convscope import Client

from tests.docker.receiver import RECEIVER_URL
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SERVICES = ("torchserve", "gateway", "probe", "prometheus", "alertmanager")  # Grafana is off unless asked for.
ALERTMANAGER = "prom/alertmanager:v0.25.0"

WORKER, JAVA = "model_service_worker", "org.pytorch.serve.ModelServer"
FIND = """
import os, sys
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        command = open(f"/proc/{pid}/cmdline").read()
    except OSError:
        continue
    if sys.argv[1] in command and pid != str(os.getpid()):
        print(pid)
"""


def engine_missing() -> str | None:
    """Return why there is no Docker engine with Compose to test on; None if there is one."""
    if shutil.which("docker") is None:
        return "no docker command"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            return f"`{' '.join(command)}` fails: {answer.stderr.strip().splitlines()[-1:]}"
    return None


def mark_docker(items: list[pytest.Item], timeout_s: float) -> None:
    """Mark tests as those that need Docker; skip them, with the reason, where there is no engine."""
    missing = engine_missing() if items else None
    for item in items:
        item.add_marker(pytest.mark.docker)
        item.add_marker(pytest.mark.timeout(timeout_s))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"no Docker engine: {missing}"))


def make_secrets(folder: Path, **settings: str) -> None:
    """Make a folder of secrets as `make secrets` does, under further settings."""
    command = [sys.executable, "-m", "deploy.commands", "--secrets", str(folder), "secrets"]
    subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True, capture_output=True)


class Stack:
    """The compose project of a test session.

    Args:
        work: Folder for its secrets, archives and the gateway's configuration, all of them copies to be changed.
        models: What its model store holds.
    """

    def __init__(self, work: Path, models: tuple[str, ...] = ("cifar", "digits")) -> None:
        self.port = free_port()
        self.store, self.configuration, self.secrets = work / "store", work / "envoy", work / "secrets"
        self.store.mkdir()
        for name in models:
            shutil.copy(ROOT / "model_store" / f"{name}.mar", self.store)
        shutil.copytree(ROOT / "deploy/envoy", self.configuration)
        # Slow senders get 5 s instead of 60, so that the test of them need not last a minute.
        self.reconfigure("http.yaml", "request_timeout: 60s", "request_timeout: 5s")
        make_secrets(self.secrets)
        self.ca_file = self.secrets / "certificate/tls.crt"
        self.key = (self.secrets / "api-key").read_text().strip()
        self.environment = os.environ | {
            "COMPOSE_PROJECT_NAME": f"convscope-test-{os.getpid()}-{'-'.join(models)}",
            "CONVSCOPE_PORT": f"127.0.0.1:{self.port}",
            "CONVSCOPE_MODELS": "",
            "CONVSCOPE_STORE": str(self.store),
            "CONVSCOPE_GATEWAY": str(self.configuration),
            "CONVSCOPE_CERTIFICATE": str(self.secrets / "certificate"),
            "CONVSCOPE_API_KEYS": str(self.secrets / "api-keys"),
            "CONVSCOPE_PROBE_KEY": str(self.secrets / "probe-key"),
            "CONVSCOPE_GRAFANA_PASSWORD": str(self.secrets / "grafana-password"),
            "CONVSCOPE_ALERT_WEBHOOK": RECEIVER_URL,
            "CONVSCOPE_WATCHDOG_WEBHOOK": f"{RECEIVER_URL}watchdog",
            "CONVSCOPE_SECRETS": str(self.secrets),
        }

    def compose(self, *arguments: str, **settings: str) -> str:
        """Run a `docker compose` command under further settings; return what it prints."""
        return self._run("docker", "compose", *arguments, **settings)

    def make(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run one of the operator's commands; return how it ended and what it printed, errors included."""
        return subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=ROOT,
            env=self.environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )

    def docker(self, *arguments: str) -> str:
        """Run a `docker` command; return what it prints."""
        return self._run("docker", *arguments)

    def log(self, container: str, since: float) -> str:
        """Return what a container has logged since a time, on either stream."""
        command = ["docker", "logs", "--since", f"{since:.3f}", container]
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
        return answer.stdout

    def up(self, replicas: int, services: tuple[str, ...] = SERVICES) -> None:
        """Start the services, or change the number of replicas, and wait until they are healthy."""
        self.environment["CONVSCOPE_REPLICAS"] = str(replicas)
        self.compose("up", "-d", "--wait", "--no-recreate", *services)
        wait_until(lambda: self.balanced() == replicas, 30)

    def build(self) -> None:
        """Build the project's images; and Alertmanager's from Debian's package, where no registry has it."""
        self.compose("build", "torchserve", "probe")
        commands = (["docker", "image", "inspect", ALERTMANAGER], ["docker", "pull", "-q", ALERTMANAGER])
        if not any(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands):
            file = ROOT / "tests/docker/images/alertmanager.Dockerfile"
            self.docker("build", "-q", "-t", ALERTMANAGER, "-f", str(file), str(file.parent))

    def down(self) -> None:
        """Remove everything."""
        self.compose("down", "-v", "-t", "2", "--remove-orphans")

    def client(self, transport: str, **options: Any) -> Client:
        """Return a client of the gateway that does not retry; `transport` is `rest` or `grpc`."""
        scheme = {"rest": "https", "grpc": "grpcs"}[transport]
        settings: dict[str, Any] = {
            "api_key": self.key,
            "ca_file": self.ca_file,
            "deadline_s": 30,
            "retries": 0,
        } | options
        return Client(f"{scheme}://localhost:{self.port}", **settings)

    def replicas(self) -> list[str]:
        """Return the ids of the running replicas."""
        return self.compose("ps", "-q", "torchserve").split()

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what Docker knows of the first container of a service."""
        container = self.compose("ps", "-q", service).split()[0]
        return dict(json.loads(self.docker("inspect", container))[0])

    def processes(self, replica: str, kind: str) -> list[str]:
        """Return the ids, inside a replica, of the processes of a kind (`WORKER`, `JAVA`)."""
        return sorted(self.docker("exec", replica, "python", "-c", FIND, kind).split())

    def healthy(self, replica: str) -> bool:
        """Ask a replica as the image's HEALTHCHECK does, now."""
        command = ["docker", "exec", replica, "python", "deploy/healthcheck.py"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def kill(self, replica: str, kind: str) -> None:
        """Kill -9 the processes of a kind in a replica."""
        code = f"import os; [os.kill(pid, 9) for pid in ({','.join(self.processes(replica, kind))},)]"
        self.docker("exec", replica, "python", "-c", code)

    def reconfigure(self, name: str, old: str, new: str) -> None:
        """Change the gateway's configuration as an editor does: a new file renamed over the old one."""
        path = self.configuration / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        replace(path, text.replace(old, new))

    def admin(self, path: str) -> str:
        """Ask the gateway's admin interface, from inside its container."""
        request = f"GET {path} HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n"
        script = f"exec 3<>/dev/tcp/127.0.0.1/9901; printf '{request}' >&3; cat <&3"
        return self.compose("exec", "-T", "gateway", "bash", "-c", script)

    def statistic(self, pattern: str) -> int:
        """Return the sum of the gateway's counters whose names match."""
        lines = re.findall(rf"^({pattern}): (\d+)\s*$", self.admin("/stats?usedonly"), re.MULTILINE)
        return sum(int(value) for *_, value in lines)

    def balanced(self) -> int:
        """Return how many replicas the gateway sends requests to, on the transport that has fewer."""
        healthy = re.findall(r"^(rest|grpc)::[\d.]+:\d+::health_flags::healthy", self.admin("/clusters"), re.MULTILINE)
        return min(healthy.count("rest"), healthy.count("grpc"))

    def _run(self, *command: str, **settings: str) -> str:
        answer = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | settings,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout


def replace(path: Path, text: str) -> None:
    """Rename a new file over a path."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.rename(path)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait until a condition holds; return how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not so within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - started
