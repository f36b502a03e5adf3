"""The sub-commands that the lens adds: there, light to import, and strict about their options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from convscope._cli import main
from convscope_lens import surveys

from tests.client.stand_in import StandIn
from tests.client.test_surface import HEAVY, modules_after

COMMANDS = ("report", "ui", "probe", "filters", "strongest", "survey", "export", "ablate", "patch")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: convscope {command}")
    assert "--url" in printed


def test_the_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed or f"\n    {command}\n" in printed for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "cat.png", "--model", "cifar"],
        ["ui", "--model", ","],
        ["ui", "--model", "cifar,.."],
        ["report", "cat.png", "--model", "..", "--out", "cat.html"],
        ["filters", ".."],
        ["probe", "shift", "cat.png", "--model", ".."],
        ["strongest", "cat.png", "--model", "..", "--layer", "conv1", "--channel", "0"],
        ["filters", "cifar", "--version", "1/2"],
        ["filters"],
        ["probe", "shift", "--model", "cifar"],
        ["strongest", "cat.png", "--model", "cifar", "--layer", "conv1", "--channel", "0", "--request-id", "ticket-7"],
        ["export", "cat.png", "--model", "cifar"],
        ["export", "cat.png", "--model", "cifar", "--out", "a.parquet", "--map-dtype", "uint8"],
        ["export", "cat.png", "--model", "cifar", "--out", "a.parquet", "--overwrite", "--skip-existing"],
        ["ablate", "cat.png", "--model", "cifar"],
        ["patch", "cat.png", "--model", "cifar"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_not_understood_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: convscope" in capsys.readouterr().err


def test_importing_the_commands_imports_neither_numpy_nor_matplotlib() -> None:
    loaded = modules_after("import convscope_lens._commands, convscope_lens._export.command")
    assert loaded.isdisjoint({*HEAVY, "numpy", "pyarrow", "httpcore", "httpx", "grpc"})


@pytest.mark.parametrize("mishap", ["reset", "died"])
@pytest.mark.parametrize(
    ("command", "answered", "so_far"),
    [
        (["survey", "--out", "out/page.html"], 1, "64 pictures were measured before; the folder has 100 files"),
        (["strongest", "--layer", "conv1", "--channel", "0"], 1, "64 pictures were measured before"),
        (["ablate", "--layer", "conv1"], 3, "3 of 100 pictures were measured before"),
        (["probe", "--layers", "none"], 1, "0 of 100 pictures were measured before"),
        (["report", "--out", "out"], 4, "1 of 100 pictures were done before"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_service_that_dies_in_the_middle_is_no_failure_of_pictures(
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    answered: int,
    so_far: str,
    mishap: str,
) -> None:
    """It ends the command, which says how far it came: the figures of the pictures so far would not be the folder's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(surveys, "CONCURRENCY", 1)
    (tmp_path / "pictures").mkdir()
    for number in range(100):
        (tmp_path / f"pictures/{number}.png").write_bytes(f"picture {number}".encode())
    take, requests = stand_in.take, iter(range(1, 10**6))

    def take_some(model: str, version: str, data: bytes, key: str | None) -> Any:
        reply = take(model, version, data, key)
        if stand_in.requests[-1][2].pictures and next(requests) == answered:
            stand_in.mishaps += [mishap] * 100
        return reply

    monkeypatch.setattr(stand_in, "take", take_some)
    kind = ["blur"] if command[0] == "probe" else []
    arguments = [command[0], *kind, "pictures", *command[1:], "--model", "cifar", "--url", stand_in.rest_url]
    assert main([*arguments, "--retries", "0"]) == 1
    printed = capsys.readouterr()
    code = {"reset": "connect_error", "died": "internal"}[mishap]
    assert printed.err.startswith(f"convscope: {code}: ")
    assert printed.err.endswith(f"; {so_far}\n")
    assert not list(tmp_path.glob("out/*.html")) or command[0] == "report"
    assert not (tmp_path / "out/index.html").exists()


def test_a_picture_that_breaks_the_network_is_its_own_failure(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service answers for other pictures, so it is not the service that fails."""
    for name in ("one", "poison", "two"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    arguments = ["--model", "cifar", "--layer", "conv1", "--url", stand_in.rest_url, "--retries", "0"]
    assert main(["ablate", str(tmp_path), *arguments]) == 1
    printed = capsys.readouterr().out
    assert "mean of 2 pictures" in printed
    assert f"{tmp_path / 'poison.png'}: internal: it was too much" in printed
