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
    [text] = re.findall(r'id="scene">(.*?)</script>', page, re.DOTALL)
    scene: dict[str, Any] = json.loads(text)
    return scene


def test_a_report_has_scores_maps_and_their_receptive_fields(client: Client) -> None:
    scene = look(client, "cat.png", "cifar")
    assert len(scene["scores"]) == 5
    seen = {layer["name"]: (len(layer["channels"]), layer["field"], layer["start"]) for layer in scene["layers"]}
    assert seen == {"conv1": (16, [3, 3], [-1, -1]), "conv2": (32, [8, 8], [-3, -3])}
    assert scene["timing"][-1][1] > 0


def test_a_network_of_any_size_without_classes_has_a_report(client: Client) -> None:
    scene = look(client, "square.png", "edges")
    assert scene["scores"] == []
    assert scene["heat"] is None
    [layer] = scene["layers"]
    assert layer["rows"] == scene["picture"]["rows"] or not scene["picture"]["exact"]


def test_a_report_has_a_heat_map_and_the_networks_own_picture(client: Client) -> None:
    scene = look(client, "cat.png", "cifar")
    assert (scene["heat"]["method"], scene["heat"]["layer"]) == ("grad_cam", "conv2")
    assert scene["heat"]["label"] == scene["scores"][0]["label"]
    assert (scene["picture"]["exact"], scene["picture"]["rows"]) == (True, 32)
