"""`python -m training.archive` goes on working."""

import runpy
from pathlib import Path

import pytest


def test_the_former_name_of_the_archivers_command_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["training.archive", "--check", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("training.archive", run_name="__main__", alter_sys=True)
    assert stop.value.code == 1
    assert "holds no archive to check" in capsys.readouterr().err
