"""`convscope report` against the real service, on both transports."""

from __future__ import annotations

import json
import re
from typing import Any

from convscope import Client
from convscope_lens import report

from tests.server.harness import ROOT


def look(client: Client, picture: str, model: str) -> dict[str, Any]:
    page = report(client, ROOT / "samples" / picture, model=model)
    [text] = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_a_report_has_scores_maps_and_their_receptive_fields(client: Client) -> None:
    data = look(client, "cat.png", "cifar")
    assert len(data["scores"]) == 5
    fields = {
        layer["name"]: (len(layer["channels"]), layer["receptive_field"], layer["receptive_field_start"])
        for layer in data["layers"]
    }
    assert fields == {"conv1": (16, [3, 3], [-1, -1]), "conv2": (32, [8, 8], [-3, -3])}
    assert data["timing"][-1][1] > 0


def test_a_network_of_any_size_without_classes_has_a_report(client: Client) -> None:
    data = look(client, "square.png", "edges")
    assert data["scores"] == []
    assert data["heat"] is None
    [layer] = data["layers"]
    assert layer["rows"] == data["picture"]["rows"] or not data["picture"]["exact"]


def test_a_report_has_a_heat_map_and_the_networks_own_picture(client: Client) -> None:
    data = look(client, "cat.png", "cifar")
    assert (data["heat"]["method"], data["heat"]["layer"]) == ("grad_cam", "conv2")
    assert data["heat"]["label"] == data["scores"][0]["label"]
    assert (data["picture"]["exact"], data["picture"]["rows"]) == (True, 32)
