"""`convscope predict` and `explain`: pictures are read, sent, saved, and shown whatever their names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import Prediction, _cli_results
from convscope._cli import main
from convscope._cli_results import PictureResult, format_predictions, predictions_json

from tests.client.stand_in import StandIn, fetch_maps
from tests.thorough import variants


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


def test_of_a_folder_files_alone_are_pictures(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    (folder / "pictures/page.png").mkdir(parents=True)
    (folder / "cat.png").rename(folder / "pictures/page.png/cat.png")
    (folder / "pictures/empty.png").mkdir()
    assert main(["predict", "pictures", "--model", "cifar", "--url", stand_in.rest_url, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == ["pictures/page.png/cat.png"]


def test_the_results_in_a_folder_of_pictures_are_left_out_however_it_is_spelled(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    arguments = ["predict", ".", "--model", "cifar", "--layers", "all", "--url", stand_in.rest_url, "--json"]
    arguments += ["--save", str(folder / "results"), "--overwrite"]
    for _ in range(2):
        assert main(arguments) == 0
        rows = json.loads(capsys.readouterr().out)["results"]
        assert [row["picture"] for row in rows] == ["cat.png", "ship.png"]


def test_large_files_are_sent_in_requests_that_the_server_takes(
    stand_in: StandIn, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli_results, "REQUEST_BYTES", 100)
    for name, size in zip(many, [60, 30, 10, 1, 99, 200, 5], strict=False):
        Path(name).write_bytes(b"x" * size)
    assert main(["predict", *many[:7], "--model", "cifar", "--url", stand_in.rest_url]) == 0
    assert [list(map(len, request.pictures)) for request in batches(stand_in)] == [[60, 30, 10], [1, 99], [200], [5]]


COMPARED = ["--compare", "--edits", '[{"layer": "conv2", "operation": "zero"}]']


@pytest.mark.parametrize(
    ("command", "requests"),
    [
        (["predict", "--layers", "conv1"], [5, 1]),
        (["predict", "--layers", "conv1", *COMPARED], [4, 2]),
        (["explain"], [1] * 6),  # Its heat and picture are up to 24,576 bytes.
    ],
)
def test_arrays_are_asked_for_in_requests_whose_replies_the_server_sends(
    stand_in: StandIn, many: list[str], command: list[str], requests: list[int]
) -> None:
    assert main([*command, *many[:6], "--model", "tight", "--url", stand_in.rest_url]) == 0
    assert [len(request.pictures) for request in batches(stand_in)] == requests


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
    with pytest.raises(SystemExit) as caught:
        main(["predict", *many, "--model", "cifar", "--url", stand_in.rest_url, "--request-id", "a"])
    assert caught.value.code == 2
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


def test_a_request_that_breaks_the_network_keeps_the_results_of_the_others(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str], folder: Path
) -> None:
    Path(many[3]).write_bytes(b"poison")
    command = ["predict", *many, "--model", "cifar", "--url", stand_in.rest_url, "--retries", "0"]
    assert main([*command, "--save", "out", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert "error" not in printed
    rows = printed["results"]
    assert [row["picture"] for row in rows if "error" in row] == many[:64]
    assert all((folder / row["saved"] / "manifest.json").exists() for row in rows if "error" not in row)


@pytest.mark.parametrize(
    ("command", "mishap"),
    variants(
        [("predict", "reset"), ("predict", "died"), ("predict", "full"), ("explain", "died")],
        [("explain", "reset"), ("explain", "full")],
    ),
)
def test_a_service_that_dies_in_the_middle_ends_the_command_which_shows_and_saves_what_it_has(
    capsys: pytest.CaptureFixture[str],
    stand_in: StandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    mishap: str,
) -> None:
    """It is no failure of the remaining pictures, and they are not sent."""
    take, code = stand_in.take, {"reset": "connect_error", "died": "internal", "full": "overloaded"}[mishap]
    saved_before: list[int] = []
    (folder / "pictures").mkdir()
    for number in range(100, 300):
        (folder / f"pictures/{number}.png").write_bytes(f"picture {number}".encode())

    def take_one(model: str, version: str, data: bytes, key: str | None) -> Any:
        reply = take(model, version, data, key)
        if stand_in.requests[-1][2].pictures:
            saved_before.append(len(list((folder / "out").iterdir())))
            stand_in.mishaps += [mishap] * 100
        return reply

    monkeypatch.setattr(stand_in, "take", take_one)
    arguments = [command, "pictures", "--model", "cifar", "--url", stand_in.rest_url, "--retries", "0"]
    arguments += ["--save", "out", "--skip-existing"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"convscope: {code}: ")
    assert printed.err.endswith("; 64 of 200 pictures were done before\n")
    assert printed.out.count("\npictures/") == printed.out.count("saved out/") == len(list(Path("out").iterdir())) == 64
    assert len(stand_in.mishaps) >= 98  # One more request, or also one for the card, to see whether the network runs.
    stand_in.mishaps.clear()

    assert main([*arguments, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert [row["picture"] for row in values["results"]] == [f"pictures/{number}.png" for number in range(100, 228)]
    assert not [row for row in values["results"] if "error" in row]
    assert values["error"]["code"] == code
    assert values["error"]["message"].endswith("; 128 of 200 pictures were done before")
    assert saved_before == [0, 64]


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_an_existing_folder_is_an_error_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path, command: str
) -> None:
    (folder / "out" / "cat").mkdir(parents=True)
    arguments = [command, "ship.png", "cat.png", "--model", "cifar", "--save", "out", "--url", stand_in.rest_url]
    assert main(arguments) == 1
    assert capsys.readouterr().err == "convscope: out/cat already exists; see --skip-existing and --overwrite\n"
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


@pytest.fixture
def tree(folder: Path) -> Path:
    """A folder of pictures, with files that are none."""
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/notes.txt", "sub/d.gif"):
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder / "tree"


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_a_folder_stands_for_the_pictures_in_it(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, tree: Path, command: str
) -> None:
    (tree / "sub" / "d.gif").unlink()
    assert main([command, "cat.png", "tree", "--model", "cifar", "--url", stand_in.rest_url, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == ["cat.png", "tree/a.JPG", "tree/b.png", "tree/sub/c.webp"]
    assert list(batches(stand_in)[0].pictures) == [b"cat", b"a.JPG", b"b.png", b"sub/c.webp"]


def test_links_and_folders_of_a_folder_are_what_they_point_to_and_paths_are_spelled_as_given(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, tree: Path
) -> None:
    """Pictures come in the order of their parts: what is in `b` comes before `b.png`. Links to folders lead nowhere."""
    (tree / "sub" / "d.gif").unlink()
    (tree / "b").mkdir()
    (tree / "b/link.png").symlink_to(tree / "b.png")
    (tree / "b/broken.png").symlink_to("nothing")
    (tree / "b/circle.png").symlink_to("circle.png")
    (tree / "around.png").symlink_to(tree)
    for given, prefix in (("tree", "tree/"), (".//tree/./", "tree/"), (str(tree), f"{tree}/")):
        assert main(["predict", given, "--model", "cifar", "--url", stand_in.rest_url, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["results"]
        expected = [f"{prefix}{name}" for name in ("a.JPG", "b/link.png", "b.png", "sub/c.webp")]
        assert [row["picture"] for row in rows] == expected


def test_results_in_a_folder_of_pictures_are_not_taken_for_pictures(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, tree: Path
) -> None:
    (tree / "sub" / "d.gif").unlink()
    command = ["predict", "tree", "--model", "cifar", "--layers", "all", "--save", "tree/out", "--skip-existing"]
    command += ["--url", stand_in.rest_url, "--json"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert len(batches(stand_in)) == 1
    assert sorted(path.name for path in (tree / "out").iterdir()) == ["a", "b", "c"]
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == ["tree/a.JPG", "tree/b.png", "tree/sub/c.webp"]


@pytest.mark.parametrize("several", [False, True])
def test_standard_input_is_a_picture(
    capsys: pytest.CaptureFixture[str],
    stand_in: StandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    several: bool,
) -> None:
    file = io.BytesIO(b"cat")
    if several:
        file = io.BytesIO()
        np.save(file, np.zeros((2, 4, 4, 1), np.uint8))
        file.seek(0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
    command = ["predict", "ship.png", "-", "--model", "cifar", "--url", stand_in.rest_url, "--save", "out", "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    names = ["-[0]", "-[1]"] if several else ["-"]
    assert [row["picture"] for row in rows] == ["ship.png", *names]
    assert sorted(path.name for path in Path("out").iterdir()) == ["ship", *("stdin" + name[1:] for name in names)]
    assert [len(request.pictures) for request in batches(stand_in)] == [1 + len(names)]


def manifests(folder: str = "out") -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in Path(folder).rglob("manifest.json")}


def test_a_manifest_names_the_source(stand_in: StandIn, folder: Path) -> None:
    Path("more").mkdir()
    Path("more/cat.png").write_bytes(b"other")
    for command, name in (("predict", "out"), ("explain", "why")):
        options = ["--model", "cifar", "--url", stand_in.rest_url, "--save", name]
        assert main([command, "cat.png", "more/cat.png", *options]) == 0
        sources = {place: manifest["source"] for place, manifest in manifests(name).items()}
        assert sources == {"cat": "cat.png", "cat-2": "more/cat.png"}


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str]
) -> None:
    command = ["--model", "cifar", "--url", stand_in.rest_url, "--save", "out", "--skip-existing", "--json"]
    assert main(["predict", *many[:5], *command]) == 0
    before = manifests()
    capsys.readouterr()
    assert main(["predict", *many, *command]) == 0
    assert [len(request.pictures) for request in batches(stand_in)] == [5, 64, 1]
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["picture"] for row in rows] == many
    assert [row.get("skipped", False) for row in rows] == [True] * 5 + [False] * 65
    assert rows[0] == {"picture": "0.png", "skipped": True, "saved": "out/0"}
    assert len(manifests()) == 70
    assert {name: manifests()[name] for name in before} == before
    assert main(["predict", *many, *command[:-1]]) == 0
    assert "\n0.png    skipped: out/0 exists\n" in capsys.readouterr().out
    assert len(batches(stand_in)) == 3


def test_results_are_overwritten_if_that_is_asked_for(stand_in: StandIn, folder: Path) -> None:
    command = ["predict", "cat.png", "--model", "cifar", "--url", stand_in.rest_url, "--save", "out", "--overwrite"]
    assert main([*command, "--layers", "all"]) == 0
    assert Path("out/cat/conv1.png").exists()
    assert main(command) == 0
    assert [path.name for path in Path("out/cat").iterdir()] == ["manifest.json"]
    assert [path.name for path in Path("out").iterdir()] == ["cat"]


@pytest.mark.parametrize("option", ["--overwrite", "--skip-existing"])
def test_a_folder_that_holds_no_result_is_never_touched(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path, option: str
) -> None:
    Path("out/cat").mkdir(parents=True)
    Path("out/cat/precious.txt").write_text("mine")
    command = ["predict", "ship.png", "cat.png", "--model", "cifar", "--url", stand_in.rest_url, "--save", "out"]
    assert main([*command, option]) == 1
    assert capsys.readouterr().err == "convscope: out/cat already exists, and holds no result\n"
    assert Path("out/cat/precious.txt").read_text() == "mine"
    assert not stand_in.requests


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["predict", "more/cat.png", "--model", "cifar"], "its source is cat.png, not more/cat.png"),
        (["predict", "cat.png", "--model", "older"], "its model is cifar, not older"),
        (["explain", "cat.png", "--model", "cifar"], "its method is None, not grad_cam"),
    ],
)
def test_the_result_of_something_else_is_not_taken_for_this_one(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path, command: list[str], words: str
) -> None:
    Path("more").mkdir()
    Path("more/cat.png").write_bytes(b"other")
    options = ["--url", stand_in.rest_url, "--save", "out", "--skip-existing"]
    assert main(["predict", "cat.png", "--model", "cifar", *options]) == 0
    assert main([*command, *options]) == 1
    assert capsys.readouterr().err == f"convscope: out/cat already exists, and {words}\n"


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, folder: Path
) -> None:
    for command in ("predict", "explain"):
        options = ["--model", "cifar", "--url", stand_in.rest_url, "--save", "cat.png/out"]
        assert main([command, "cat.png", *options]) == 1
        assert capsys.readouterr().err == "convscope: cannot write to cat.png/out: Not a directory\n"
    assert not stand_in.requests


def test_pictures_of_one_name_get_folders_of_their_own(stand_in: StandIn, folder: Path) -> None:
    names = ["cat.png", "more/cat.png", "cat-2.png", "less/cat.png"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(name.encode())
    assert main(["predict", *names, "--model", "cifar", "--url", stand_in.rest_url, "--save", "out"]) == 0
    sources = {place: manifest["source"] for place, manifest in manifests().items()}
    assert sources == dict(zip(["cat", "cat-2", "cat-2-2", "cat-3"], names, strict=True))


def test_progress_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", *many, "--model", "cifar", "--url", stand_in.rest_url]
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: self is sys.stderr, raising=False)
    assert main(command) == 0
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines == ["", "64 of 70 pictures", "70 of 70 pictures", ""]
