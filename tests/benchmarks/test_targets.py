"""The targets are read from results by the rounds, and a reply is held to what eager torch answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import models
from benchmarks.models import Model, check
from benchmarks.photographs import photographs
from benchmarks.targets import TARGETS, markdown, measured
from benchmarks.workloads import STANDARD, Asked

KINDS = {"convscope": "ours", "FastAPI": "documented", "mosec": "documented", "floor, convscope": "floor"}
AHEAD = next(target for target in TARGETS if target.over == "documented" and target.network == "resnet50")


def rates(**servers: list[float]) -> dict[str, Any]:
    names = dict(zip(("ours", "fast", "mosec", "floor"), KINDS, strict=True))
    return {
        names[key]: {"rates": {str(number): rate for number, rate in enumerate(one)}} for key, one in servers.items()
    }


def test_the_best_rival_of_each_round_counts() -> None:
    summaries = rates(
        ours=[30.0, 30.0, 30.0], fast=[10.0, 20.0, 10.0], mosec=[15.0, 10.0, 10.0], floor=[31.0, 31.0, 31.0]
    )
    assert measured(AHEAD, summaries, KINDS) == [2.0, 1.5, 3.0]


def test_a_round_without_a_rival_does_not_count() -> None:
    assert measured(AHEAD, rates(ours=[30.0, 30.0], fast=[10.0]), KINDS) == [3.0]


@pytest.mark.parametrize(("rival", "verdict"), [(10.0, "met"), (40.0, "**missed**")])
def test_the_median_decides(rival: float, verdict: str) -> None:
    found = {
        "servers": {name: {"kind": kind} for name, kind in KINDS.items()},
        "summaries": {AHEAD.workload: rates(ours=[30.0] * 5, fast=[rival] * 5)},
        "circumstances": {"date": "2026-12-01"},
    }
    lines = markdown(lambda network: found if network == AHEAD.network else {}).splitlines()
    [line] = [line for line in lines if f"{AHEAD.network} | {AHEAD.workload} | convscope | best" in line]
    assert line.endswith(f"| 5 | 2026-12-01 | {verdict} |")
    assert any(line.endswith("not measured |") for line in lines)


def test_the_standard_set_measures_every_target() -> None:
    measures = {(part.name, workload.name): part.servers.split("|") for part in STANDARD for workload in part.workloads}
    for target in TARGETS:
        servers = measures[target.network, target.workload]
        assert target.over == "documented" or target.over in servers
        assert target.ours in servers


def test_photographs_are_the_same_every_time_and_as_cameras_write_them(tmp_path: Path) -> None:
    files = photographs("0.3 MP", tmp_path / "one")
    assert files == photographs("0.3 MP", tmp_path / "two")
    image = Image.open(io.BytesIO(files[0]))
    assert image.size == (640, 480)
    assert image.layer[1][1:3] == (1, 1)  # type: ignore[attr-defined]  # Chroma has one sample where light has 2×2.
    assert image.layer[0][1:3] == (2, 2)  # type: ignore[attr-defined]
    assert 80_000 < len(files[0]) < 130_000


def test_a_scaled_reply_may_be_off_by_two_levels_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact, moved = [np.zeros((1, 4), np.float32)], [np.full((1, 4), 0.5, np.float32)]
    monkeypatch.setattr(models, "expect", lambda model, asked, levels=0: moved if levels else exact)
    model = Model("x", tmp_path, tmp_path, {}, 4, {})
    asked = Asked("scores", 1, "3 MP")
    check([exact[0] + 0.4], model, asked, scaled=True)
    for value, scaled in ((0.6, True), (0.4, False)):
        with pytest.raises(AssertionError, match="off by"):
            check([exact[0] + value], model, asked, scaled=scaled)
