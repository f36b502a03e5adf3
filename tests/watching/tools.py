"""promtool, and a Prometheus for one test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.ports import free_port
from tests.server.harness import poll
from tests.watching.promql import ROOT, RULES

FETCHED = ROOT / ".tools/prometheus/usr/bin"
MISSING = "no Prometheus: neither on PATH nor in .tools (`make prometheus` fetches Debian's)"

SELDOM = {"GOGC": "400"}  # Collecting garbage so is a fifth less of the processor's time.

Sample = tuple[dict[str, str], float]


def find(name: str) -> str | None:
    """Return the path of `prometheus` or `promtool`, or None."""
    return shutil.which(name) or shutil.which(name, path=str(FETCHED))


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """Run promtool and return what it says; raises AssertionError if it finds fault."""
    command = [find("promtool") or "promtool", *map(str, arguments)]
    answer = subprocess.run(command, input=text, env=os.environ | SELDOM, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stdout}{answer.stderr}"
    return answer.stdout + answer.stderr


class Prometheus:
    """A running Prometheus.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def ready(self) -> bool:
        """Tell whether it answers questions."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, text: str) -> list[Sample]:
        """Ask for the value now; raises AssertionError with Prometheus' own words."""
        found = self._get("/api/v1/query", {"query": text})["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in found]

    def value(self, text: str) -> float:
        """Ask for a single value; nothing counts as 0."""
        found = self.query(text)
        assert len(found) <= 1, f"{text}: {found}"
        return found[0][1] if found else 0.0

    def kinds(self) -> dict[str, str]:
        """Return the type of every scraped metric by its name."""
        return {name: entries[0]["type"] for name, entries in self._get("/api/v1/metadata", {}).items()}

    def alerts(self) -> list[dict[str, Any]]:
        """Return the pending and firing alerts."""
        return list(self._get("/api/v1/alerts", {})["alerts"])

    def unwell(self) -> list[str]:
        """Return the rules that cannot be evaluated, with the reason."""
        groups = self._get("/api/v1/rules", {})["groups"]
        return [f"{rule['name']}: {rule['lastError']}" for g in groups for rule in g["rules"] if rule.get("lastError")]

    def close(self) -> None:
        """Close the connections to it."""
        self._client.close()

    def _get(self, path: str, parameters: dict[str, str]) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]


@contextmanager
def watching(work: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Run Prometheus with the project's configuration on one replica; gateway, probe and Alertmanager are not there.

    It scrapes and evaluates every second, and no alert waits before it fires.
    """
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    configuration["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    port = free_port()
    addresses = {"torchserve": f"127.0.0.1:{metrics_port}", "prometheus": f"127.0.0.1:{port}"}
    configuration["scrape_configs"] = [
        {
            "job_name": job["job_name"],
            "static_configs": [{"targets": [addresses.get(job["job_name"]) or f"127.0.0.1:{free_port()}"]}],
        }
        for job in configuration["scrape_configs"]
    ]
    (work / "rules").mkdir(parents=True)
    (work / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    for path in RULES.glob("*.yml"):
        groups = yaml.safe_load(path.read_text())
        for group in groups["groups"]:
            group.pop("interval", None)
            for rule in group["rules"]:
                rule.pop("for", None)
        (work / "rules" / path.name).write_text(yaml.safe_dump(groups, width=1000))
    command = [
        find("prometheus") or "prometheus",
        f"--config.file={work / 'prometheus.yml'}",
        f"--storage.tsdb.path={work / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | SELDOM, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        poll(lambda: prometheus.ready() or process.poll() is not None, 60)
        assert process.poll() is None, (work / "log").read_text()
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(60)
