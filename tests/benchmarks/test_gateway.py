"""The gateway's benchmark: what of it needs no gateway that runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.envoy import Files, Gateway
from benchmarks.gateway import table
from benchmarks.gateway_settings import DOORS, SETTINGS
from benchmarks.wires import Door

DEPLOYED = Path(__file__).parents[2] / "deploy/envoy"
OTHER_THREADS = {"1 thread", "4 threads"}


@pytest.fixture
def files() -> Files:
    return {path.stem: yaml.safe_load(path.read_text()) for path in DEPLOYED.glob("*.yaml")}


def take(way: str, number: int, rate: float, p50_ms: float, n: int = 10, **errors: int) -> dict[str, Any]:
    return {
        **{"workload": "scores", "way": way, "round": number, "n": n, "rate": rate, "p50_ms": p50_ms},
        **{"p99_ms": 2 * p50_ms, "gateway_us": 100.0, "server_us": 200.0, "load_us": 30.0, "errors": errors},
    }


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_another_gateway_than_the_one_deployed(setting: Any, files: Files) -> None:
    deployed = copy.deepcopy(files)
    setting.edit(files)
    is_as_deployed = files == deployed and setting.threads == SETTINGS[0].threads
    assert is_as_deployed == (setting is SETTINGS[0])
    if setting.name in OTHER_THREADS:
        assert files == deployed, "one thing is changed at a time"


def test_a_door_is_the_deployed_gateway_in_the_clear_or_over_tls_with_keys_or_without(files: Files) -> None:
    deployed = copy.deepcopy(files)
    for setting in DOORS:
        setting.edit(files)
    assert files == deployed
    assert [(setting.door, setting.keys) for setting in DOORS] == [("plain", False), ("plain", True), ("tls", True)]


def test_a_ratio_is_that_of_a_round_and_a_rate_the_median() -> None:
    direct = [take("directly", number, rate, 1.0) for number, rate in enumerate((100.0, 200.0, 1000.0))]
    through = [take("Envoy", number, rate, 1.5, late=1) for number, rate in enumerate((50.0, 150.0, 600.0))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(direct + through).splitlines()]
    assert rows[0][:5] == ["asked", "way", "n", "requests/s", "rate to directly"]
    assert rows[2][:5] == ["scores", "directly", "30", "200", "1"]
    assert rows[3][:5] == ["scores", "Envoy", "30, 3 errors", "150", "0.60 (0.50–0.75)"]
    assert rows[3][5:9] == ["1.50", "+0.50 (+0.50–+0.50)", "3.00", "+1.00 (+1.00–+1.00)"]


@pytest.mark.parametrize("key", ["", "secret"])
def test_a_key_becomes_a_header_of_its_own(key: str) -> None:
    gateway = Gateway.__new__(Gateway)
    gateway.door = Door(key, "")
    message = b"POST /predictions/cifar HTTP/1.1\r\nhost: localhost\r\n\r\nbody"
    added = f"x-api-key: {key}\r\n".encode() if key else b""
    assert gateway.let_in(message) == message.replace(b"host:", added + b"host:")
