"""The commands of docs/lessons.md that need nothing but the repository print what stands below them.

The others need CIFAR-10's pictures, or twins of the networks: `python docs/lessons.py check` runs all of them. Their
options are tested on stand-ins in tests/lens.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from convscope._cli import main

from docs import lessons
from tests.server.harness import ROOT, Launched

BLOCKS = [block for block in lessons.blocks() if not block.needs_pictures]


def test_some_need_nothing_else() -> None:
    assert len(BLOCKS) >= 12


@pytest.mark.parametrize("block", BLOCKS, ids=[block.code.strip().splitlines()[-1][:60] for block in BLOCKS])
def test_it_prints_what_the_text_says(
    server: Launched,
    block: lessons.Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{server.port('REST')}"
    if block.language == "python":
        exec(compile(block.code.replace(lessons.DEFAULT, url), "lessons.md", "exec"), {})
    else:
        assert main([*shlex.split(block.code)[1:], "--url", url]) == 0
    assert not lessons.differences(block.printed, lessons.without_saved(capsys.readouterr().out))
