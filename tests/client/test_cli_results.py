"""`convscope predict` and `explain`: pictures are read, sent, saved, and shown whatever their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import Prediction
from convscope._cli import main
from convscope._cli_results import PictureResult, format_predictions, predictions_json

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


def batches(stand_in: StandIn) -> list[Any]:
    """Return the requests with pictures."""
    return [request for *_, request in stand_in.requests if request.pictures]


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_more_pictures_than_the_model_accepts_are_sent_in_several_requests_in_order(
    capsys: pytest.CaptureFixture[str], url: str, stand_in: StandIn, many: list[str], command: str
) -> None:
    many[66:66] = ["gone.png"]
    assert main([command, *many, "--model", "cifar", "--url", url, "--json"]) == 1
    assert [len(request.pictures) for request in batches(stand_in)] == [64, 6]
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == many
    assert [row["picture"] for row in rows if "error" in row] == ["gone.png"]
    result = [row["top"][0]["index"] if command == "predict" else row["target"] for row in rows if "error" not in row]
    assert result == [int(fetch_maps(name.encode(), (10,)).argmax()) for name in many if name != "gone.png"]


@pytest.mark.parametrize("count", [2, 64])
def test_as_many_pictures_as_the_model_accepts_are_one_request(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str], count: int
) -> None:
    assert main(["predict", *many[:count], "--model", "cifar", "--url", stand_in.rest_url, "--request-id", "a"]) == 0
    assert [(len(request.pictures), request.request_id) for request in batches(stand_in)] == [(count, "a")]
    assert len(capsys.readouterr().out.splitlines()) == 3 + count * 5


def test_a_request_id_for_several_requests_is_rejected(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    assert main(["predict", *many, "--model", "cifar", "--url", stand_in.rest_url, "--request-id", "a"]) == 1
    assert "--request-id is for one request; these pictures need 2" in capsys.readouterr().err
    assert batches(stand_in) == []


def test_every_request_in_which_a_picture_failed_is_named(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    Path(many[1]).write_bytes(b"bad one")
    Path(many[69]).write_bytes(b"bad two")
    assert main(["predict", *many, "--model", "cifar", "--url", stand_in.rest_url]) == 1
    printed = capsys.readouterr().out.rstrip().rpartition("\n\n")[2].splitlines()
    assert printed == [f"request {request.request_id}" for request in batches(stand_in)]
    assert len(printed) == 2


def test_a_failed_request_keeps_the_results_of_the_others(
    capsys: pytest.CaptureFixture[str],
    stand_in: StandIn,
    many: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = stand_in.take
    saved_before: list[int] = []

    def take(model: str, version: str, data: bytes, request_id: str | None) -> Any:
        if b"69.png" in data:
            saved_before.append(len(list((folder / "out").iterdir())))
            raise ConnectionResetError
        return original(model, version, data, request_id)

    monkeypatch.setattr(stand_in, "take", take)
    command = ["predict", *many, "--model", "cifar", "--url", stand_in.rest_url, "--retries", "0"]
    assert main([*command, "--save", "out", "--json"]) == 1
    assert saved_before == [64]
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows if "error" in row] == many[64:]
    assert all((folder / row["saved"] / "manifest.json").exists() for row in rows if "error" not in row)


def test_the_error_is_raised_if_no_request_succeeds(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    assert main(["predict", many[0], "--model", "missing", "--url", stand_in.rest_url]) == 1
    assert capsys.readouterr().err.startswith("convscope: model_not_found: ")


def test_an_existing_folder_is_an_error_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    (folder / "out" / "cat").mkdir(parents=True)
    command = ["predict", "ship.png", "cat.png", "--model", "cifar", "--save", "out", "--url", stand_in.rest_url]
    assert main(command) == 1
    assert capsys.readouterr().err == "convscope: out/cat already exists\n"
    assert not stand_in.requests
    assert [path.name for path in (folder / "out").iterdir()] == ["cat"]


def test_an_empty_map_has_no_range() -> None:
    maps = {"none": np.zeros((4, 0, 0), np.float32), "some": np.ones((1, 1, 1), np.float32)}
    channels = {"none": (0, 1, 2, 3), "some": (0,)}
    prediction = Prediction(model="m", version="1", engine="e", device="cpu", maps=maps, channels=channels)
    rows = [PictureResult("cat.png", prediction)]
    lines = [line.split() for line in format_predictions(rows).splitlines()]
    assert ["cat.png", "none", "4×0×0", "4", "–", "–", "–"] in lines
    assert ["cat.png", "some", "1×1×1", "1", "1", "1", "1"] in lines
    assert predictions_json(rows)["results"][0]["maps"] == {
        "none": {"shape": [4, 0, 0], "channels": [0, 1, 2, 3], "min": None, "mean": None, "max": None},
        "some": {"shape": [1, 1, 1], "channels": [0], "min": 1.0, "mean": 1.0, "max": 1.0},
    }


def test_a_name_that_is_not_text_is_printed_as_a_table_and_in_json(
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
def test_a_reader_that_has_gone_ends_the_command_silently(
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
