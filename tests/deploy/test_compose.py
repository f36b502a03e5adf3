"""The compose files beside each other, and beside what is written about them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


def replica(path: Path) -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load(path.read_text())["services"]["torchserve"]
    return service


def test_on_the_gpu_a_replica_is_told_the_same_but_for_the_device() -> None:
    plain, gpu = (replica(path)["command"] for path in (COMPOSE, ROOT / "deploy/compose.gpu.yml"))
    assert gpu == ["--device=cuda" if option == "--device=cpu" else option for option in plain]


def test_every_setting_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(CONVSCOPE_\w+)` \| (.*?) \|", (ROOT / "docs/deployment.md").read_text(), re.M))
    settings = dict(re.findall(r"\$\{(CONVSCOPE_\w+):-([^}]*)\}", COMPOSE.read_text()))
    assert set(rows) == set(settings)
    words = {"CONVSCOPE_MODELS": "all", "CONVSCOPE_CPUS": "no limit"}
    without = ("CONVSCOPE_ALERT_WEBHOOK", "CONVSCOPE_WATCHDOG_WEBHOOK", "CONVSCOPE_SIGNERS", "CONVSCOPE_TORCH_INDEX")
    words |= dict.fromkeys(without, "none")
    assert rows == {name: words.get(name, f"`{default}`") for name, default in settings.items()}


def test_what_the_gateway_keeps_free_is_documented_as_it_is_set() -> None:
    manager = yaml.safe_load((ROOT / "deploy/envoy/bootstrap.yaml").read_text())["overload_manager"]
    heap = manager["resource_monitors"][0]["typed_config"]["max_heap_size_bytes"] / 2**30
    [trigger] = manager["actions"][0]["triggers"]
    share = trigger["threshold"]["value"]
    assert f"above {share:g} of {heap:g} GiB" in (ROOT / "docs/deployment.md").read_text()
