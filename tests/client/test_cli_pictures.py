"""Pictures on the command line: read, asked about, saved, and shown whatever their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from convscope import Prediction
from convscope._cli import main
from convscope._cli_pictures import PICTURES_PER_REQUEST, PictureResult, predictions_json, predictions_text

from handlers.images.decoding import DEFAULT_MAX_IMAGES
from tests.client.stand_in import StandIn, fetch_maps


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "ship"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def many(folder: Path) -> list[str]:
    names = [f"{number}.png" for number in range(70)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    return names


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_more_pictures_than_a_request_holds_go_in_several_and_stay_in_order(
    capsys: pytest.CaptureFixture[str], url: str, stand_in: StandIn, many: list[str], command: str
) -> None:
    many[66:66] = ["gone.png"]
    assert main([command, *many, "--model", "cifar", "--url", url, "--json"]) == 1
    assert [len(request.pictures) for *_, request in stand_in.requests] == [64, 6]
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == many
    assert [row["picture"] for row in rows if "error" in row] == ["gone.png"]
    seen = [row["top"][0]["index"] if command == "predict" else row["target"] for row in rows if "error" not in row]
    assert seen == [int(fetch_maps(name.encode(), (10,)).argmax()) for name in many if name != "gone.png"]


def test_as_many_pictures_as_a_service_takes_are_one_request(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    assert main(["predict", *many[:64], "--model", "cifar", "--url", stand_in.rest_url]) == 0
    assert [len(request.pictures) for *_, request in stand_in.requests] == [64]
    assert PICTURES_PER_REQUEST == DEFAULT_MAX_IMAGES
    assert len(capsys.readouterr().out.splitlines()) == 3 + 64 * 5


def test_every_request_in_which_a_picture_failed_is_named(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    Path(many[1]).write_bytes(b"bad one")
    Path(many[69]).write_bytes(b"bad two")
    assert main(["predict", *many, "--model", "cifar", "--url", stand_in.rest_url]) == 1
    told = capsys.readouterr().out.rstrip().rpartition("\n\n")[2].splitlines()
    assert told == [f"request {request.request_id}" for *_, request in stand_in.requests]
    assert len(told) == 2


def test_a_folder_that_exists_is_found_out_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    (folder / "out" / "cat").mkdir(parents=True)
    command = ["predict", "ship.png", "cat.png", "--model", "cifar", "--save", "out", "--url", stand_in.rest_url]
    assert main(command) == 1
    assert capsys.readouterr().err == "convscope: out/cat exists already: remove it, or save elsewhere\n"
    assert not stand_in.requests
    assert [path.name for path in (folder / "out").iterdir()] == ["cat"]


def test_a_map_without_cells_has_no_least_and_no_greatest() -> None:
    maps = {"none": np.zeros((4, 0, 0), np.float32), "some": np.ones((1, 1, 1), np.float32)}
    channels = {"none": (0, 1, 2, 3), "some": (0,)}
    found = Prediction(model="m", version="1", engine="e", device="cpu", maps=maps, channels=channels)
    rows = [PictureResult("cat.png", found)]
    lines = [line.split() for line in predictions_text(rows).splitlines()]
    assert ["cat.png", "none", "4×0×0", "4", "–", "–", "–"] in lines
    assert ["cat.png", "some", "1×1×1", "1", "1", "1", "1"] in lines
    assert predictions_json(rows)["results"][0]["maps"] == {
        "none": {"shape": [4, 0, 0], "channels": [0, 1, 2, 3], "min": None, "mean": None, "max": None},
        "some": {"shape": [1, 1, 1], "channels": [0], "min": 1.0, "mean": 1.0, "max": 1.0},
    }


def test_a_name_that_is_no_text_is_shown_and_told_to_programs(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Path(name).write_bytes(b"cat")
    command = ["predict", name, "ship.png", "--model", "cifar", "--url", stand_in.rest_url]
    assert main([*command, "--json"]) == 0  # What capsys reads is UTF-8 and strict.
    assert [row["picture"] for row in json.loads(capsys.readouterr().out)["results"]] == [name, "ship.png"]
    assert main([*command, "--save", "out"]) == 0
    out = capsys.readouterr().out
    assert "\ncaf?.png" in out
    assert "\nsaved out/caf?\n" in out


def test_letters_stay_letters_in_json(capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path) -> None:
    Path("猫.png").write_bytes(b"cat")
    assert main(["predict", "猫.png", "--model", "cifar", "--url", stand_in.rest_url, "--json"]) == 0
    assert "猫.png" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--help"], ["ready", "cifar"], ["predict", "--model", "cifar", "--top-k", "0"]])
def test_a_reader_that_has_gone_ends_the_command_without_a_word(
    stand_in: StandIn, many: list[str], command: list[str]
) -> None:
    options = [*(many if "predict" in command else []), "--url", stand_in.rest_url]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "convscope", *command, *(options if len(command) > 1 else [])],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # As a user has it: what is printed waits for a flush.
        )
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, b"")
