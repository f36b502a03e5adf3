"""The example of docs/deployment.md: a share of the requests goes to a replica with other archives while it is up."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.stack import ROOT, replace, wait_until
from tests.docker.test_gateway import Gateway

ASKED = 400


def example() -> dict[str, Any]:
    """Return what the page says to put into a cluster."""
    page = (ROOT / "docs/deployment.md").read_text()
    [block] = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "canary" in block]
    found: dict[str, Any] = yaml.safe_load(block)
    return found


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    work = Path(tempfile.mkdtemp(prefix="convscope-canary-"))
    work.chmod(0o755)
    stack = Gateway(work)
    files = [
        "docker-compose.yml",
        "deploy/compose.canary.yml",
        "tests/docker/standins.yml",
        "tests/docker/standins.canary.yml",
    ]
    stack.environment |= {
        "COMPOSE_PROJECT_NAME": f"{stack.environment['COMPOSE_PROJECT_NAME']}canary",
        "COMPOSE_FILE": ":".join(str(ROOT / file) for file in files),
        "CONVSCOPE_CANARY_STORE": str(stack.store),
    }
    try:
        stack.up(2)
        stack.compose("up", "-d", "--wait", "--no-deps", "canary")
        yield stack
    finally:
        stack.down()
        shutil.rmtree(work)


def ask(gateway: Gateway) -> dict[str, int]:
    """Ask over both transports in turns; return how many of the requests of each the canary answered."""
    found = {"rest": 0, "grpc": 0}
    for _ in range(ASKED):
        response = gateway.rest("/predictions/any")
        assert response.status_code == 200
        found["rest"] += response.json()["replica"] == "canary"
        found["grpc"] += json.loads(gateway.rpc("any").prediction)["replica"] == "canary"
    return found


def test_the_canary_gets_its_share_while_it_is_ready_and_the_others_all_else(gateway: Gateway) -> None:
    assert ask(gateway) == {"rest": 0, "grpc": 0}
    clusters = yaml.safe_load((gateway.configuration / "clusters.yaml").read_text())
    for cluster, port in zip(clusters["resources"], (8080, 7070), strict=True):
        text = yaml.safe_dump(example()).replace("8080", str(port))
        changed = yaml.safe_load(text)
        changed["load_assignment"]["cluster_name"] = cluster["name"]
        assert changed.keys() <= cluster.keys()
        cluster |= changed
    replace(gateway.configuration / "clusters.yaml", yaml.safe_dump(clusters, sort_keys=False))
    ended = gateway.make("check-config")
    assert ended.returncode == 0, ended.stdout
    wait_until(lambda: gateway.balanced() == 3, 30)

    share = example()["load_assignment"]["endpoints"][1]["load_balancing_weight"] / 100
    for transport, count in ask(gateway).items():  # Five standard deviations of a fair coin.
        assert abs(count - share * ASKED) < 5 * (share * (1 - share) * ASKED) ** 0.5, transport

    gateway.compose("stop", "-t", "1", "canary")
    wait_until(lambda: gateway.balanced() == 2, 30)
    assert ask(gateway) == {"rest": 0, "grpc": 0}
