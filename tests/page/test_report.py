"""What the report's file holds, without a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sys
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
from convscope_lens._page.page_data import channels_that_fit, pack_heat, pack_kernels, pack_map, reduce_cells
from PIL import Image

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


def pixels(url: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


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
    assert set(parser.references) == {"data:,"}
    names = set(re.findall(r"https?://[^\"'`\s]*", page))
    assert all(name.startswith("http://www.w3.org/") for name in names)  # Namespaces of elements: nothing is fetched.
    assert not re.search(r"@import|url\(", page)


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
    service = Service(card, (ClassScore(0, HOSTILE, 1.0, 1.0),), notes=(HOSTILE,))
    page = report(service, make_picture(), model=HOSTILE, title=HOSTILE)
    plain = report(Service(), make_picture(), model="net")
    assert re.findall(r"<[a-z/!][^>]*>", page) == re.findall(r"<[a-z/!][^>]*>", plain)
    data = page_data_of(page)
    assert data["title"] == data["model"]["name"] == data["scores"][0]["label"] == data["notes"][0] == HOSTILE
    assert data["layers"][0]["name"] == data["geometry"]["rows"][0][0] == HOSTILE


def test_maps_come_strongest_first_and_to_half_a_step():
    cells = np.stack([np.linspace(low, low + 1, 12, dtype=np.float32).reshape(3, 4) for low in (0, 2, 1)])
    packed = pack_map(cells, [5, 6, 7])
    assert packed["channels"] == [6, 7, 5]
    raw = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).reshape(3, packed["rows"], packed["columns"])
    minimum, maximum = (np.array(packed[name])[:, None, None] for name in ("min", "max"))
    np.testing.assert_allclose(minimum + raw / 255 * (maximum - minimum), cells[[1, 2, 0]], atol=0.5 / 255 + 1e-5)


def test_maps_with_holes_are_packed():
    holes = np.array([[[np.nan, 1.0], [np.inf, 3.0]], [[np.nan] * 2] * 2], np.float32)
    packed = pack_map(holes, [0, 1])
    assert (packed["min"], packed["max"]) == ([1.0, None], [3.0, None])
    assert list(base64.b64decode(packed["values"])) == [0, 0, 0, 255, *[0] * 4]


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_numbers_without_places_keep_their_values(shape: tuple[int, ...]):
    packed = pack_map(np.array([-1.0, 3.0, np.nan], np.float32).reshape(shape), [7, 8, 9])
    channels = [1, 0, 2] if shape == (3,) else [8, 7, 9]
    assert (packed["channels"], packed["numbers"]) == (channels, [3.0, -1.0, None])
    assert (packed["cells"], packed["count"]) == ((1, 1), 3)


def test_a_map_without_negative_values_had_none_before_edits_either():
    def quantised(cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        low, high = cells.min(axis=(1, 2), keepdims=True), cells.max(axis=(1, 2), keepdims=True)
        step = (high - low) / 255
        return (low + step * np.rint((cells - low) / step)).astype(np.float32)

    before, moved = np.random.default_rng(0).normal(size=(2, 4, 9, 9)).astype(np.float32)
    before = np.maximum(before, 0)
    after = np.maximum(before + moved / 3, 0)
    packed = pack_map(quantised(after), range(4), quantised(after - before))
    assert (quantised(after) - quantised(after - before)).min() < 0
    assert [low for low, _ in packed["before"]] == [0] * 4
    assert [high for _, high in packed["before"]] == pytest.approx(
        before.max(axis=(1, 2))[packed["channels"]].tolist(), abs=0.02
    )


def test_heat_keeps_its_sign():
    packed = pack_heat(np.array([[[-2.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]], np.float32))
    assert list(base64.b64decode(packed["values"])) == [1, 128, 192]
    assert packed["max"] == 2.0
    assert set(base64.b64decode(pack_heat(np.zeros((1, 2, 2), np.float32))["values"])) == {128}


def test_the_page_data_has_scores_geometry_timing_and_an_explanation():
    data = look(Service(), title="it")
    assert [score["label"] for score in data["scores"]] == ["cat", "dog"]
    heat = data["heat"]
    assert (heat["method"], heat["layer"], heat["target"], heat["label"], heat["max"]) == (
        "grad_cam",
        "conv2",
        0,
        "cat",
        1,
    )
    assert (heat["rows"], heat["columns"], heat["receptive_field"], heat["stride"]) == (6, 6, [8, 8], [4, 4])
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
    assert data["geometry"]["rows"][0][1] == "1×32×32"  # Of this picture.


def test_an_array_is_shown_as_it_was_sent():
    grey = np.full((SIDE, SIDE), 7, np.uint8)
    picture = look(Service(explains=()), grey)["picture"]
    assert (picture["rows"], picture["columns"], picture["exact"]) == (SIDE, SIDE, False)
    assert np.all(pixels(picture["file"]) == 7)
    assert look(Service(explains=()), np.zeros((5, 5), np.uint8))["picture"] is None  # The service resized it.


def test_large_maps_are_cut_to_their_strongest_channels():
    big = [make_layer("a", (64, 112, 112)), make_layer("b", (512, 7, 7)), make_layer("c", (1000,))]
    shapes = [layer.shape for layer in big]
    assert channels_that_fit(shapes, 64 * 112 * 112 + 512 * 49) is None
    n = channels_that_fit(shapes, 1 << 19)
    assert n is not None
    assert n * 112 * 112 + n * 49 <= 1 << 19 < (n + 1) * (112 * 112 + 49)
    assert channels_that_fit(shapes, 1) == 1


def test_a_report_of_a_large_network_stays_below_three_megabytes():
    layers = tuple(make_layer(f"block{number}", (256, 56, 56)) for number in range(20))
    limits = replace(CARD.limits, max_reply_bytes=1 << 28)
    service = Service(replace(CARD, layers=layers, limits=limits))
    page = report(service, make_picture(), model="net")
    assert 1 << 20 < len(page) < 3_000_000
    assert service.asked[0]["map_dtype"] == "uint8"


def test_a_small_report_is_small():
    assert len(report(Service(), make_picture(), model="net")) < 110_000


def test_a_network_of_any_size_and_a_picture_of_12_megapixels_have_a_small_report_with_true_sizes():
    rows, columns = 3000, 4000
    costs = {"parameters": 20, "multiply_adds": 18432}
    layer = make_layer("conv1", (2, 32, 32), operation="Conv2d", kernel=(3, 3), input_shape=(1, 32, 32), **costs)
    limits = replace(CARD.limits, max_reply_bytes=1 << 28)
    card = replace(
        CARD, classes=(), input=replace(CARD.input, height=None, width=None, channels=1), layers=(layer,), limits=limits
    )

    class Large(Service):
        def predict(self, file: bytes, **options: Any) -> Any:
            prediction = super().predict(file, **options)
            prediction._maps["conv1"] = np.add.outer(np.arange(rows), np.zeros(columns)).astype(np.float32)[None]
            return prediction

        def explain(self, file: bytes, **options: Any) -> Any:
            explanation = super().explain(file, **options)
            explanation._picture = np.zeros((1, rows, columns), np.float32)
            return explanation

    page = report(Large(card, top=()), make_picture(), model="net")
    assert len(page) < 3_000_000
    data = page_data_of(page)
    [packed] = data["layers"]
    assert (packed["cells"], packed["block"], packed["rows"], packed["columns"]) == ([rows, columns], 25, 120, 160)
    assert (packed["min"], packed["max"]) == ([0], [rows - 1])
    assert (data["picture"]["rows"], data["picture"]["columns"]) == (rows, columns)
    row = dict(zip(data["geometry"]["headings"], data["geometry"]["rows"][0], strict=True))
    assert (row["output"], row["multiply-adds"], row["input"]) == (
        "2×3000×4000",
        f"{2 * 9 * rows * columns:,}",
        "1×any×any",
    )


def test_blocks_of_cells_have_the_mean_of_their_cells_also_at_the_edges():
    values = np.arange(35, dtype=np.float32).reshape(1, 5, 7)
    reduced, block = reduce_cells(values, 4)
    assert (block, reduced.shape) == (2, (1, 3, 4))
    assert reduced[0, 0, 0] == values[0, :2, :2].mean()
    assert reduced[0, 2, 3] == values[0, 4, 6]
    assert reduce_cells(values, 7) == (values, 1)


def test_kernels_are_packed_to_half_a_step_of_their_largest_weight():
    weights = np.linspace(-3, 2, 2 * 4 * 9, dtype=np.float32).reshape(2, 4, 3, 3)
    packed = pack_kernels(weights, [5, 6])
    raw = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).reshape(weights.shape).astype(np.float32)
    largest = np.array(packed["max"])[:, None, None, None]
    np.testing.assert_allclose((raw - 128) / 127 * largest, weights, atol=3 / 127 / 2 + 1e-5)


def test_the_page_says_what_feeds_what_past_layers_that_are_not_shown():
    assert [(one["layer"], one["fewest"], one["most"]) for one in look(Service())["layers"][1]["sources"]] == [
        ("conv1", 0, 2)
    ]
    data = look(Service(), layers=["head"])
    assert [(one["layer"], one["fewest"], one["most"]) for one in data["layers"][0]["sources"]] == [("", 2, 4)]
    assert [one["layer"] for one in data["score_sources"]] == ["head"]
    unknown = replace(CARD, layers=(make_layer("conv1", (2, 3, 3)),), sources=())
    assert not look(Service(unknown))["known_sources"]


def test_kernels_of_few_weights_are_in_the_report():
    layer = make_layer("conv1", (2, 3, 3), operation="Conv2d", kernel=(3, 3))
    small, large = (
        look(Service(replace(CARD, layers=(replace(layer, parameters=n),))))["layers"][0] for n in (56, 10**6)
    )
    assert small["kernels"]["shape"] == [3, 3, 3]
    assert sorted(small["kernels"]["channels"]) == [0, 1]
    assert (large["has_kernels"], large["kernels"]) == (True, None)
    assert small["operation"] == "3×3 convolution"


@pytest.mark.parametrize("method", ["grad_cam", "cam"])
def test_a_layer_of_one_cell_is_not_explained_and_the_way_out_is_named(method: str):
    card = replace(CARD, layers=(*CARD.layers, make_layer("pool", (4, 1, 1))))
    with pytest.raises(
        ValueError, match=r"pool has no more than one cell; choose conv1 or conv2, or a method .* occlusion"
    ):
        report(Service(card), make_picture(), model="net", method=method, layer="pool")


@pytest.mark.parametrize("method", ["occlusion", None])
def test_a_layer_that_the_method_does_not_use_is_rejected(method: Any):
    with pytest.raises(ValueError, match="layer is for grad_cam and cam"):
        report(Service(), make_picture(), model="net", method=method, layer="conv1")


def test_a_heat_map_of_one_cell_is_left_out_with_the_reason():
    class Single(Service):
        def explain(self, file: bytes, **options: Any) -> Any:
            explanation = super().explain(file, **options)
            explanation._heat = None if options["method"] == "picture" else np.ones((1, 1, 1), np.float32)
            return explanation

    data = look(Single())
    assert data["heat"] is None
    assert "try occlusion" in data["heat_note"]
    with pytest.raises(ValueError, match="try occlusion"):
        report(Single(), make_picture(), model="net", target=1)


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


def test_standard_input_is_a_picture_and_a_class_is_named_by_its_label(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cat.png").write_bytes(make_picture())
    shared = ["--model", "cifar", "--url", stand_in.rest_url]
    for number, pictures in enumerate((["-"], ["-", str(tmp_path / "cat.png")])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(make_picture())))
        out = tmp_path / f"out{number}"
        arguments = [
            *pictures,
            *shared,
            "--out",
            str(out / "index.html" if number == 0 else out),
            "--target",
            "Class 7",
        ]
        out.mkdir()
        assert main(["report", *arguments]) == 0
    entries = page_data_of((tmp_path / "out1/index.html").read_text("utf-8"))["index"]
    assert [entry["title"] for entry in entries] == ["standard input", "cat.png"]
    data = page_data_of((tmp_path / "out0/index.html").read_text("utf-8"))
    assert (data["heat"]["target"], data["heat"]["label"]) == (7, "class 7")


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


def test_many_pictures_get_a_page_each_and_an_index(stand_in: StandIn, tmp_path: Path, capsys: Any):
    (tmp_path / "in/deeper").mkdir(parents=True)
    (tmp_path / "in/b.png").write_bytes(make_picture())
    (tmp_path / "in/deeper/a.png").write_bytes(make_picture()[:-1] + b"x")
    (tmp_path / "in/bad.png").write_bytes(b"bad picture")
    (tmp_path / "in/notes.txt").write_text("not a picture")
    command = ["report", str(tmp_path / "in"), "--model", "cifar", "--url", stand_in.rest_url]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "bad_image: not a picture" in printed
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 'out/index.html'}"
    entries = page_data_of((tmp_path / "out/index.html").read_text("utf-8"))["index"]
    assert [entry["title"] for entry in entries] == ["b.png", "bad.png", "a.png"]
    assert [entry["page"] for entry in entries] == ["1-b.html", None, "3-a.html"]
    assert entries[0]["thumbnail"].startswith("data:image/png;base64,")
    for entry in (entries[0], entries[2]):
        shown = page_data_of((tmp_path / "out" / entry["page"]).read_text("utf-8"))
        assert (shown["title"], shown["scores"]) == (entry["title"], entry["scores"])
    assert entries[1]["error"].startswith("bad_image: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat.png", "cat.png", "--out", "cat.html"], "--out must be a folder for 2 pictures, not cat.html"),
        (["empty", "--out", "out"], "no picture found in empty"),
        (["cat.png", "cat.png", "--out", "out", "--request-id", "r-7"], "--request-id names one request"),
    ],
)
def test_what_cannot_be_many_reports_is_said_before_anything_is_sent(
    arguments: list[str], message: str, stand_in: StandIn, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(make_picture())
    Path("empty").mkdir()
    stand_in.requests.clear()
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments, "--model", "cifar", "--url", stand_in.rest_url])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not stand_in.requests
