"""The sub-commands that the lens adds: there, light to import, and strict about their options."""

from __future__ import annotations

import pytest
from convscope._cli import main

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
