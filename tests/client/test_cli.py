"""The command line: what it prints, and with which exit status it ends."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import Client
from convscope._card import format_card
from convscope._cli import main
from convscope._wire import convscope_pb2 as wire
from convscope.commands import format_table
from convscope.testing import model_card

from tests.client.stand_in import LAYERS, StandIn, fetch_maps, run_network


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"cat")
    (tmp_path / "dog.jpg").write_bytes(b"dog")
    (tmp_path / "torn.png").write_bytes(b"bad")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_scores_are_shown_as_a_table(capsys, url: str, pictures: Path):
    status, out, err = run(capsys, "predict", "cat.png", "dog.jpg", "--model", "cifar", "--top-k", "2", "--url", url)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "cifar 1.0 (stand-in-1, cpu)"
    assert lines[2].split() == ["picture", "class", "index", "probability", "logit"]
    logits = fetch_maps(b"cat", (10,))
    best = int(logits.argmax())
    assert lines[3].split()[:4] == ["cat.png", "class", str(best), str(best)]
    assert lines[3].split()[5] == f"{logits.max():.3f}"
    assert lines[4].startswith("         ")
    assert lines[5].startswith("dog.jpg")
    assert len(lines) == 7
    assert len({len(line) for line in lines[2:]}) == 1


def test_how_pictures_were_converted_is_a_line(capsys, url: str, pictures: Path):
    names = [f"grey{number}.png" for number in range(5)]
    for name in names:
        Path(name).write_bytes(name.encode())
    options = ["--model", "cifar", "--top-k", "1", "--url", url]
    _, out, _ = run(capsys, "predict", "cat.png", *names[:2], *options)
    assert out.splitlines()[-1] == "converted (grey to RGB, cropped): grey0.png, grey1.png"
    _, out, _ = run(capsys, "predict", *names, *options)
    assert out.splitlines()[-1] == "converted (grey to RGB, cropped): 5 pictures"
    _, out, _ = run(capsys, "predict", "cat.png", names[0], "--json", *options)
    assert [result.get("notes") for result in json.loads(out)["results"]] == [None, ["grey to RGB", "cropped"]]
    _, out, _ = run(capsys, "predict", "cat.png", *options)
    assert "converted" not in out


def test_what_the_client_converts_is_noted_too(capsys, url: str, pictures: Path):
    image = pytest.importorskip("PIL.Image")
    frames = [image.new("RGB", (4, 5), colour) for colour in ("red", "blue")]
    frames[0].save("cat.gif", save_all=True, append_images=frames[1:])
    options = ["cat.gif", "--model", "cifar", "--url", url]
    for command in ("predict", "explain"):
        _, out, _ = run(capsys, command, *options)
        assert "converted (first frame only): cat.gif" in out.splitlines()
        _, out, _ = run(capsys, command, *options, "--json")
        [result] = json.loads(out)["results"]
        assert result["notes"] == ["first frame only"]


def test_maps_are_summed_up(capsys, url: str, pictures: Path):
    options = ["--model", "cifar", "--layers", "conv1, conv2", "--channels", "2,1", "--url", url]
    status, out, _ = run(capsys, "predict", "cat.png", *options)
    assert status == 0
    cells = fetch_maps(b"cat", LAYERS["conv1"])[[2, 1]]
    [row] = [line for line in out.splitlines() if "conv1" in line]
    assert row.split() == [
        "cat.png",
        "conv1",
        "2×6×5",
        "2",
        *(f"{n:.4g}" for n in (cells.min(), cells.mean(), cells.max())),
    ]


def test_every_option_reaches_the_server(capsys, stand_in: StandIn, pictures: Path):
    options = ["--model", "cifar", "--version", "2", "--layers", "all", "--top-k", "0"]
    options += ["--map-dtype", "uint8", "--pool", "2", "--channels", "2"]
    status, *_ = run(capsys, "predict", "cat.png", *options, "--url", stand_in.grpc_url)
    assert status == 0
    [(model, version, request)] = stand_in.requests
    assert (model, version) == ("cifar", "2")
    assert request == wire.PredictRequest(
        pictures=[b"cat"],
        layers=["all"],
        top_k=0,
        map_dtype=wire.UINT8,
        pool=2,
        channels=wire.ChannelSelection(strongest=2),
        request_id=request.request_id,
    )
    run(
        capsys,
        "predict",
        "cat.png",
        "--model",
        "cifar",
        "--layers",
        "all",
        "--channels",
        "2,",
        "--url",
        stand_in.grpc_url,
    )
    assert list(stand_in.requests[-1][2].channels.indexes) == [2]


EDITS = '[{"layer": "conv1", "operation": "scale", "value": 0.5, "channels": [3], "region": [0, 0, 2, 2]}]'


@pytest.mark.parametrize("as_file", [False, True])
def test_edits_reach_the_server_and_what_they_change_is_shown(
    capsys, url: str, stand_in: StandIn, pictures: Path, as_file: bool
):
    (pictures / "edits.json").write_text(EDITS)
    edits = ["--edits", "@edits.json" if as_file else EDITS, "--layers", "conv1", "--top-k", "1", "--compare"]
    status, out, err = run(capsys, "predict", "cat.png", "--model", "cifar", *edits, "--url", url)
    assert (status, err) == (0, "")
    request = stand_in.requests[-1][2]
    scale = wire.Edit(layer="conv1", operation="scale", value=[0.5], channels=[3], region=[0, 0, 2, 2])
    assert (list(request.edits), request.compare) == ([scale], True)
    (logits, maps), (before, maps_before) = run_network(b"cat", [scale]), run_network(b"cat")
    first, change = int(logits.argmax()), maps["conv1"] - maps_before["conv1"]
    largest = change.flat[np.abs(change).argmax()]
    scores, _, table = out.split("\n\n", 1)[1].partition("\n\n")
    heading, row, *_ = (re.split(" {2,}", line) for line in scores.splitlines())
    assert heading[3:] == ["probability", "logit", "probability change", "logit change"]
    assert [row[2], row[-1]] == [str(first), f"{logits[first] - before[first]:+.3f}"]
    heading, row = (re.split(" {2,}", line) for line in table.splitlines())
    assert [heading[-1], row[-1]] == ["largest change", f"{largest:+.4g}"]
    _, out, _ = run(capsys, "predict", "cat.png", "--model", "cifar", *edits, "--json", "--url", url)
    [result] = json.loads(out)["results"]
    assert result["change"]["top"][0]["index"] == first
    assert result["change"]["maps"] == {"conv1": {"largest": pytest.approx(largest)}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("zero", "not JSON: Expecting value"),
        ("{}", "must be a list of at least one operation"),
        ("[]", "must be a list of at least one operation"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"layer": "a"}]', "edits[0]: layer and operation are required"),
        ('[{"layer": "a", "operation": "zero", "channels": [-1]}]', "edits[0].channels must be at least 0"),
        ('[{"layer": "a", "operation": "scale", "value": NaN}]', "edits[0].value must be finite"),
        ('[{"layer": "a", "operation": "zero", "picture": 0}]', "cannot name a picture"),
        ('[{"layer": "a", "operation": "patch", "value": 1}]', "cannot name a picture"),
        ("@gone.json", "gone.json: No such file"),
        ("@cat.png", "cat.png: not JSON"),
    ],
)
def test_edits_that_are_none_are_rejected_by_the_name_of_the_option(
    capsys, url: str, stand_in: StandIn, pictures: Path, value: str, words: str
):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "cat.png", "--model", "cifar", "--edits", value, "--url", url])
    assert caught.value.code == 2
    complaint = capsys.readouterr().err
    assert "argument --edits: " in complaint
    assert words in complaint
    assert stand_in.requests == []


def test_a_picture_that_fails_shows_its_error_and_the_others_their_scores(capsys, url: str, pictures: Path):
    status, out, err = run(
        capsys, "predict", "cat.png", "torn.png", "gone.png", "dog.jpg", "--model", "cifar", "--url", url
    )
    assert (status, err) == (1, "")
    table, _, request = out.rstrip().rpartition("\n\n")
    assert re.fullmatch("request [0-9a-f]{32}", request)
    rows = {line.split()[0]: line for line in table.splitlines()[3:] if not line.startswith(" ")}
    assert list(rows) == ["cat.png", "torn.png", "gone.png", "dog.jpg"]
    assert "bad_image: not a picture" in rows["torn.png"]
    assert "unreadable: No such file" in rows["gone.png"]
    assert "class" in rows["cat.png"]
    assert "class" in rows["dog.jpg"]


def test_a_picture_that_fails_alone_ends_with_1(capsys, url: str, pictures: Path):
    for name in ("torn.png", "gone.png"):
        status, out, err = run(capsys, "predict", name, "--model", "cifar", "--url", url)
        assert (status, err) == (1, "")
        assert name in out


def test_json_holds_scores_errors_and_shapes(capsys, url: str, pictures: Path):
    options = ["--model", "cifar", "--layers", "conv2", "--top-k", "1", "--url", url, "--json"]
    status, out, _ = run(capsys, "predict", "cat.png", "torn.png", *options)
    assert status == 1
    response = json.loads(out)
    cat, torn = response["results"]
    assert (response["model"], response["version"], response["engine"], response["device"]) == (
        "cifar",
        "1.0",
        "stand-in-1",
        "cpu",
    )
    assert cat["picture"] == "cat.png"
    assert cat["top"][0].keys() == {"index", "label", "probability", "logit"}
    assert cat["maps"]["conv2"]["shape"] == [3, 2, 2]
    assert cat["maps"]["conv2"]["max"] == fetch_maps(b"cat", LAYERS["conv2"]).max()
    assert torn == {"picture": "torn.png", "error": {"code": "bad_image", "message": "not a picture: b'bad'"}}
    assert response["timing"] is None
    assert re.fullmatch("[0-9a-f]{32}", response["request_id"])


def test_the_request_goes_by_the_id_given_and_errors_name_it(capsys, url: str, stand_in: StandIn, pictures: Path):
    command = ["--request-id", "ticket-7", "--url", url]
    _, out, _ = run(capsys, "predict", "cat.png", "--model", "cifar", "--json", *command)
    assert json.loads(out)["request_id"] == "ticket-7"
    _, _, err = run(capsys, "predict", "cat.png", "--model", "missing", *command)
    assert err == "convscope: model_not_found: Model not found: missing (request ticket-7)\n"
    _, out, _ = run(capsys, "ready", "died", "--json", *command)
    assert json.loads(out)["error"]["request_id"] == "ticket-7"
    run(capsys, "card", "cifar", *command)
    assert len(stand_in.request_ids) >= 4  # A worker that died is asked again.
    assert set(stand_in.request_ids) == {"ticket-7"}


def test_where_the_time_went_is_a_table_and_an_object(capsys, url: str, pictures: Path):
    command = ["predict", "cat.png", "--model", "cifar", "--timing", "--url", url]
    _, out, _ = run(capsys, *command)
    rows = [line.rsplit(maxsplit=1) for line in out.rstrip().rpartition("\n\n")[2].splitlines()]
    assert [name for name, _ in rows] == [
        "time",
        *("read", "decode", "preprocess", "forward", "encode"),
        *("handler (2 in the batch)", "outside", "total"),
    ]
    assert [ms for _, ms in rows[:7]] == ["ms", "1.00", "2.00", "3.00", "4.00", "5.00", "16.00"]
    _, out, _ = run(capsys, *command, "--json")
    timing = json.loads(out)["timing"]
    assert timing["total_s"] - timing["handler_s"] == timing["outside_s"]
    assert timing["batch_requests"] == 2


def test_retries_can_be_switched_off(capsys, url: str, stand_in: StandIn, pictures: Path):
    stand_in.mishaps[:] = ["full", "full"]
    status, *_ = run(capsys, "predict", "cat.png", "--model", "cifar", "--retries", "0", "--url", url)
    assert (status, stand_in.mishaps) == (1, ["full"])


def test_save_writes_a_folder_for_each_picture(capsys, url: str, pictures: Path):
    (pictures / "more").mkdir()
    (pictures / "more" / "cat.jpg").write_bytes(b"other cat")
    (pictures / "cat[3].png").write_bytes(b"a third")
    np.save(pictures / "two.npy", np.zeros((2, 4, 4), np.uint8)[..., None])
    names = ["cat.png", "torn.png", "more/cat.jpg", "cat[3].png", "two.npy"]
    status, out, _ = run(
        capsys, "predict", *names, "--model", "cifar", "--layers", "all", "--save", "out", "--url", url
    )
    assert status == 1  # torn.png.
    assert sorted(path.name for path in (pictures / "out").iterdir()) == ["cat", "cat-2", "cat[3]", "two[0]", "two[1]"]
    with np.load(pictures / "out" / "cat-2" / "maps.npz") as maps:
        assert np.array_equal(maps["conv1"], fetch_maps(b"other cat", LAYERS["conv1"]))
    assert "saved out/cat-2" in out
    status, _, err = run(capsys, "predict", "cat.png", "--model", "cifar", "--save", "out", "--url", url)
    assert status == 1
    assert "exists" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "cat.png", "--model", "cifar", "--layers", "conv7"], "unknown_layer: no layer 'conv7'; there are"),
        (["predict", "cat.png", "--model", "missing"], "model_not_found: Model not found: missing"),
        (["card", "full"], "overloaded: "),
        (["ready", "missing"], "missing is not ready: model_not_found"),
        (["ready", "died"], "died is not ready: internal: Worker died."),
    ],
)
def test_an_error_is_one_line_and_ends_with_1(capsys, url: str, pictures: Path, arguments: list[str], words: str):
    status, out, err = run(capsys, *arguments, "--url", url)
    assert (status, out) == (1, "")
    assert err.startswith("convscope: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_server_that_is_not_there_is_one_line(capsys, pictures: Path):
    status, _, err = run(capsys, "predict", "cat.png", "--model", "cifar", "--url", "http://127.0.0.1:1")
    assert status == 1
    assert err.startswith("convscope: connect_error: connection to http://127.0.0.1:1 failed: ")


class Package:
    """An installed package that adds a command."""

    name = "draw"

    def load(self) -> Any:
        def add(commands: Any) -> argparse.ArgumentParser:
            parser: argparse.ArgumentParser = commands.add_parser(self.name, help="draws")
            parser.set_defaults(run=lambda client, options: print(client.url, options.version, options.json) or 5)
            return parser

        return add


def install(monkeypatch: pytest.MonkeyPatch, *packages: Package) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: {"convscope.commands": packages}[group])


def test_without_the_lens_its_commands_say_which_package_to_install(capsys, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    for command in (["report", "cat.png", "--model", "cifar"], ["ui"], ["probe"], ["filters"], ["strongest", "--help"]):
        status, out, err = run(capsys, *command)
        assert (status, out) == (2, "")
        assert err.startswith(f"convscope: {command[0]} is a command of the package convscope-lens, which is not inst")
        assert len(err.splitlines()) == 1


def test_a_package_adds_a_command_with_the_options_that_all_have(capsys, monkeypatch: pytest.MonkeyPatch, url: str):
    install(monkeypatch, Package())
    assert run(capsys, "draw", "--url", url, "--version", "2", "--json") == (5, f"{url} 2 True\n", "")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "draw" in capsys.readouterr().out


def test_a_package_that_cannot_be_loaded_breaks_no_other_command(capsys, monkeypatch: pytest.MonkeyPatch, url: str):
    class Broken(Package):
        name = "broken"

        def load(self) -> Any:
            raise ImportError("no module of that name")

    install(monkeypatch, Broken(), Package())
    assert run(capsys, "ready", "cifar", "--url", url) == (0, "cifar is ready\n", "")
    status, _, err = run(capsys, "draw", "--url", url)
    assert (status, err) == (5, "convscope: the command broken cannot be loaded: no module of that name\n")
    with pytest.raises(SystemExit):
        main(["broken"])
    assert "cannot be loaded: no module of that name" in capsys.readouterr().err


def test_no_package_replaces_a_command_of_the_clients_own(capsys, monkeypatch: pytest.MonkeyPatch, url: str):
    class Greedy(Package):
        name = "ready"

    install(monkeypatch, Greedy())
    assert run(capsys, "ready", "cifar", "--url", url) == (0, "cifar is ready\n", "")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "cannot be loaded" not in capsys.readouterr().err


def test_the_key_comes_from_the_environment(capsys, url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVSCOPE_API_KEY", "open-sesame")
    assert run(capsys, "ready", "cifar", "--url", url) == (0, "cifar is ready\n", "")
    assert stand_in.keys == ["open-sesame"]


def test_ready_in_json_says_why_not(capsys, url: str):
    assert json.loads(run(capsys, "ready", "cifar", "--url", url, "--json")[1])["ready"] is True
    status, out, err = run(capsys, "ready", "died", "--url", url, "--json")
    assert (status, err) == (1, "")
    error = {"code": "internal", "message": "Worker died.", "request_id": json.loads(out)["error"]["request_id"]}
    assert json.loads(out) == {"model": "died", "ready": False, "error": error}


def test_a_card_is_shown_with_its_layers(capsys, url: str):
    status, out, _ = run(capsys, "card", "cifar", "--url", url)
    assert status == 0
    assert "input          3 channels, 32×32" in out
    assert "accuracy       train –, test 75.00% (n = 10)" in out
    assert "network        somewhere:Network, 1,000 parameters, 12,345 multiply-adds per picture" in out
    operations, costs = (table.splitlines() for table in out.split("\n\n")[1:])
    assert [re.split("  +", line) for line in operations] == [
        [
            *("layer", "operation", "input", "output", "kernel", "op stride", "padding", "dilation", "groups"),
            *("receptive field", "stride", "field start"),
        ],
        ["conv1", "Conv2d", "8×6×5", "4×6×5", "3×3", "1×1", "1×1", "1×1", "2", "3×3", "1×1", "-1, -1"],
        ["conv2", "–", "–", "3×2×2", *"––––––––"],
    ]
    assert [re.split("  +", line) for line in costs] == [
        [
            *("layer", "node", "parameters", "dense parameters", "multiply-adds", "bytes (float32)", "float16"),
            "uint8",
        ],
        ["conv1", "relu1", "448", "28,920", "4,320", "480", "–", "120"],
        ["conv2", "conv2", "12", "–", "–", "–", "–", "–"],
    ]


def test_the_card_distinguishes_the_stride_of_an_operation_from_that_of_the_map(client: Client):
    card = client.model_card("cifar")
    layer = dataclasses.replace(card.layers[0], step=(2, 2), stride=(8, 8))
    table = format_card(dataclasses.replace(card, layers=(layer,))).split("\n\n")[1].splitlines()
    header, row = (re.split("  +", line) for line in table)
    assert row[header.index("stride")] == "8×8"
    assert row[header.index("op stride")] == "2×2"


def test_a_card_of_large_numbers_and_many_classes_fits_a_terminal(client: Client):
    card = client.model_card("cifar")
    layer = dataclasses.replace(
        card.layers[0],
        **dict.fromkeys(["input_shape", "shape"], (2048, 224, 224)),
        **dict.fromkeys(["parameters", "multiply_adds"], 10**10),
        dense_parameters=10**13,
        groups=1,
        receptive_field=(1688, 1688),
        receptive_field_start=(-828, -828),
        bytes=dict.fromkeys(["float32", "float16", "uint8"], 10**8),
    )
    large = dataclasses.replace(card, layers=(layer,), classes=("quite a long label",) * 1000)
    lines = format_card(large).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if line.startswith("classes        1,000: quite a long label")]
    assert len(lines) < 20


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({"interpolation": ""}, "not resized"),
        ({"antialias": False}, "resized to 32×32, bilinear without antialiasing; the aspect ratio is not kept"),
        ({"resize": (36,)}, "resized until the shorter side has 36 pixels, bilinear; then the middle 32×32"),
        ({"resize": (36,), "height": None}, "resized until the shorter side has 36 pixels, bilinear"),
        ({"resize": (36, 40)}, "resized to 36×40, bilinear; then the middle 32×32"),
        (
            {"resize": (36, 40), "fit": "cover"},
            "resized to at least 36×40, keeping the aspect ratio, bilinear; then the middle 32×32",
        ),
        (
            {"resize": (32, 32), "fit": "contain", "fill": (1, 2, 3)},
            "resized to at most 32×32, keeping the aspect ratio, bilinear; then the middle 32×32, padded with 1 2 3",
        ),
    ],
)
def test_a_card_says_how_pictures_are_resized(changes: dict[str, Any], recipe: str):
    card = model_card()
    shown = format_card(dataclasses.replace(card, input=dataclasses.replace(card.input, **changes)))
    assert f" pictures {recipe} normalisation " in " ".join(shown.split())


def test_a_card_in_json_is_the_whole_card(capsys, url: str):
    _, out, _ = run(capsys, "card", "cifar", "--version", "4", "--url", url, "--json")
    card = json.loads(out)
    assert card["version"] == "4"
    assert card["layers"][0]["receptive_field_start"] == [-1, -1]
    assert card["limits"]["max_images"] == 64


def test_what_comes_from_elsewhere_cannot_move_the_cursor(capsys, url: str, pictures: Path):
    (pictures / "\x1b[2Jcat.png").write_bytes(b"cat")
    _, out, _ = run(capsys, "predict", "\x1b[2Jcat.png", "--model", "cifar", "--url", url)
    assert "\x1b" not in out
    _, _, err = run(capsys, "predict", "cat.png", "--model", "cifar", "--layers", "\x1b[2J", "--url", url)
    assert err
    assert "\x1b" not in err


def test_a_table_lines_its_columns_up():
    table = format_table(
        ["name", "n"], [["a", "1"], ["ü", "22"], ["猫", "333"], ["long name", "an error, longer"]], right_aligned=[1]
    )
    assert table.splitlines()[1:4] == [
        "a                         1",
        "ü                        22",
        "猫                      333",
    ]
    assert format_table(["a", "b", "c"], [["x", "said in full"]]).splitlines() == ["a  b  c", "x  said in full"]


def test_without_a_command_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: convscope" in capsys.readouterr().err


def test_the_program_can_be_run(tmp_path: Path):
    command = [sys.executable, "-m", "convscope", "--version"]
    environment = {"PYTHONPATH": str(Path(convscope.__file__).parents[1])}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert ran.stdout == f"convscope {convscope.__version__}\n"
