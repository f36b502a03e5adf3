"""What the report's file holds, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import ClassScore, Client, ModelNotFound, RequestRejected, UnknownLayer
from convscope._cli import main
from convscope_lens import report
from convscope_lens._page.page_data import channels_that_fit, pack_heat, pack_map

from tests.client.stand_in import StandIn, serve
from tests.page.service import CARD, HOSTILE, SIDE, Service, make_layer, make_picture


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with serve() as running:
        yield running


def page_data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def look(service: Any, picture: Any = None, **options: Any) -> dict[str, Any]:
    return page_data_of(report(service, make_picture() if picture is None else picture, model="net", **options))


def test_the_page_refers_to_nothing_but_itself():
    page = report(Service(), make_picture(), model="net")

    class References(HTMLParser):
        references: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.references += [str(value) for name, value in attributes if name in ("src", "href", "srcset", "action")]

    parser = References()
    parser.feed(page)
    assert set(parser.references) == {"#maps", "data:,"}
    assert not re.search(r"https?://|@import|url\(", page)


def test_only_the_pages_own_script_and_style_may_run():
    page = report(Service(), make_picture(), model="net")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy
    assert not re.search(r"<[^>]* (style|on\w+)=", page)


def test_no_text_of_others_gets_out_of_its_place():
    card = replace(CARD, description=HOSTILE, layers=(make_layer(HOSTILE, (2, 3, 3)),))
    page = report(Service(card, (ClassScore(0, HOSTILE, 1.0, 1.0),)), make_picture(), model=HOSTILE, title=HOSTILE)
    plain = report(Service(), make_picture(), model="net")
    assert re.findall(r"<[a-z/!][^>]*>", page) == re.findall(r"<[a-z/!][^>]*>", plain)
    data = page_data_of(page)
    assert data["title"] == data["model"]["name"] == data["scores"][0]["label"] == HOSTILE
    assert data["layers"][0]["name"] == data["geometry"]["rows"][0][0] == HOSTILE


def test_maps_come_strongest_first_and_to_half_a_step():
    cells = np.stack([np.linspace(low, low + 1, 12, dtype=np.float32).reshape(3, 4) for low in (0, 2, 1)])
    packed = pack_map(cells, [5, 6, 7])
    assert packed["channels"] == [6, 7, 5]
    raw = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).reshape(3, packed["rows"], packed["columns"])
    minimum, maximum = (np.array(packed[name])[:, None, None] for name in ("min", "max"))
    np.testing.assert_allclose(minimum + raw / 255 * (maximum - minimum), cells[[1, 2, 0]], atol=0.5 / 255 + 1e-5)


def test_maps_with_holes_and_maps_of_one_row_are_packed():
    holes = np.array([[[np.nan, 1.0], [np.inf, 3.0]], [[np.nan] * 2] * 2], np.float32)
    packed = pack_map(holes, [0, 1])
    assert (packed["min"], packed["max"]) == ([1.0, None], [3.0, None])
    vector = pack_map(np.array([1.0, 2.0, 3.0], np.float32), [0, 1, 2])
    assert (vector["rows"], vector["columns"], vector["channels"]) == (1, 3, [0])


def test_heat_keeps_its_sign():
    packed = pack_heat(np.array([[[-2.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]], np.float32))
    assert list(base64.b64decode(packed["values"])) == [1, 128, 192]
    assert packed["max"] == 2.0
    assert set(base64.b64decode(pack_heat(np.zeros((1, 2, 2), np.float32))["values"])) == {128}


def test_the_page_data_has_scores_geometry_timing_and_an_explanation():
    data = look(Service(), title="it")
    assert [score["label"] for score in data["scores"]] == ["cat", "dog"]
    assert data["heat"] | {"values": ""} == {
        "method": "grad_cam", "layer": "conv2", "label": "cat", "rows": 4, "columns": 4, "values": "", "max": 1.0
    }  # fmt: skip
    assert data["picture"]["exact"]
    assert data["geometry"]["headings"][:2] == ["layer", "output"]
    assert data["geometry"]["rows"][1][:4] == ["conv2", "4×6×6", "8×8", "4×4"]
    assert ["forward", 4.0] in data["timing"]
    assert ["outside", 4.0] in data["timing"]


@pytest.mark.parametrize("explains", [(), ("picture",)])
def test_where_the_service_cannot_explain_there_is_no_heat(explains: tuple[str, ...]):
    data = look(Service(explains=explains))
    assert data["heat"] is None
    assert data["picture"]["exact"] == bool(explains)


@pytest.mark.parametrize("chosen", [{"method": "occlusion"}, {"target": 0}])
@pytest.mark.parametrize("classes", [CARD.classes, ()])
def test_who_chooses_what_is_explained_hears_why_it_is_not(classes: tuple[str, ...], chosen: dict[str, Any]):
    service = Service(replace(CARD, classes=classes), explains=("picture",))
    with pytest.raises(RequestRejected, match="no gradients here"):
        report(service, make_picture(), model="net", **chosen)


def test_a_method_of_none_asks_for_no_heat():
    assert look(Service(), method=None)["heat"] is None


def test_a_network_without_classes_and_of_any_size_has_a_report():
    card = replace(
        CARD,
        classes=(),
        input=replace(CARD.input, height=None, width=None, channels=1),
        layers=(make_layer("conv1", (1, 0, 0)),),
    )
    data = look(Service(card, top=()))
    assert (data["scores"], data["heat"]) == ([], None)
    assert (data["layers"][0]["rows"], data["layers"][0]["columns"]) == (SIDE, SIDE)
    assert data["geometry"]["rows"][0][1] == "1×any×any"


def test_an_array_is_shown_as_it_was_sent():
    grey = np.full((SIDE, SIDE), 7, np.uint8)
    picture = look(Service(explains=()), grey)["picture"]
    assert (picture["rows"], picture["columns"], picture["channels"]) == (SIDE, SIDE, 1)
    assert set(base64.b64decode(picture["values"])) == {7}
    assert look(Service(explains=()), np.zeros((5, 5), np.uint8))["picture"] is None  # The service resized it.


def test_large_maps_are_cut_to_their_strongest_channels():
    big = [make_layer("a", (64, 112, 112)), make_layer("b", (512, 7, 7)), make_layer("c", (1000,))]
    assert channels_that_fit(big, 64 * 112 * 112 + 512 * 49) is None
    n = channels_that_fit(big, 1 << 19)
    assert n is not None
    assert n * 112 * 112 + n * 49 <= 1 << 19 < (n + 1) * (112 * 112 + 49)
    assert channels_that_fit(big, 1) == 1


def test_a_report_of_a_large_network_stays_below_ten_megabytes():
    layers = tuple(make_layer(f"block{number}", (256, 56, 56)) for number in range(20))
    limits = replace(CARD.limits, max_reply_bytes=1 << 28)
    service = Service(replace(CARD, layers=layers, limits=limits))
    page = report(service, make_picture(), model="net")
    assert 1 << 22 < len(page) < 10 << 20
    assert service.asked[0]["map_dtype"] == "uint8"


def test_a_small_report_is_small():
    assert len(report(Service(), make_picture(), model="net")) < 80_000


def test_several_pictures_have_no_report():
    with pytest.raises(ValueError, match="one picture"):
        report(Service(), np.zeros((2, 8, 8, 3), np.uint8), model="net")


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_the_command_writes_the_page(transport: str, stand_in: StandIn, tmp_path: Path, capsys: Any):
    picture, page = tmp_path / "cat.png", tmp_path / "cat.html"
    picture.write_bytes(make_picture())
    url = stand_in.rest_url if transport == "rest" else stand_in.grpc_url
    status = main(["report", str(picture), "--model", "cifar", "--out", str(page), "--url", url, "--request-id", "r-7"])
    assert status == 0
    assert f"wrote {page}" in capsys.readouterr().out
    data = page_data_of(page.read_text("utf-8"))
    assert (data["title"], data["model"]["request"]) == ("cat.png", "r-7")
    assert [layer["name"] for layer in data["layers"]] == ["conv1", "conv2"]


def test_the_command_says_why_there_is_no_explanation_if_one_was_requested(
    stand_in: StandIn, tmp_path: Path, capsys: Any
):
    (tmp_path / "cat.png").write_bytes(make_picture())
    page = tmp_path / "cat.html"
    command = ["report", str(tmp_path / "cat.png"), "--model", "older", "--out", str(page), "--url", stand_in.rest_url]
    for selected in (["--target", "3"], ["--method", "cam"]):
        assert main([*command, *selected]) == 1
        assert "protocol_error: the service does not support explanations" in capsys.readouterr().err
        assert not page.exists()
    assert main(command) == 0
    assert page_data_of(page.read_text("utf-8"))["heat"] is None


def test_a_file_whose_name_is_no_text_has_a_report(stand_in: StandIn, tmp_path: Path, capsys: Any):
    picture, page = tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / os.fsdecode(b"caf\xe9.html")
    picture.write_bytes(make_picture())
    assert main(["report", str(picture), "--model", "cifar", "--out", str(page), "--url", stand_in.rest_url]) == 0
    assert "caf?.html" in capsys.readouterr().out
    assert page_data_of(page.read_text("utf-8"))["title"] == "caf\N{REPLACEMENT CHARACTER}.png"


def test_what_the_service_rejects_is_raised_and_nothing_written(stand_in: StandIn, tmp_path: Path):
    with Client(stand_in.rest_url) as client:
        with pytest.raises(ModelNotFound):
            report(client, make_picture(), model="missing")
        with pytest.raises(UnknownLayer):
            report(client, make_picture(), model="cifar", layers=["conv9"])
    page = tmp_path / "page.html"
    (tmp_path / "cat.png").write_bytes(make_picture())
    arguments = [str(tmp_path / "cat.png"), "--model", "missing", "--out", str(page), "--url", stand_in.rest_url]
    assert main(["report", *arguments]) == 1
    assert not page.exists()
