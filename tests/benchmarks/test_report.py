"""The benchmark's chart can be read, whatever the wall reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report import draw

SERVERS = {"convscope": {"kind": "ours"}, "FastAPI": {"kind": "documented"}, "TorchServe, null": {"kind": "wall"}}


def panel(monkeypatch: pytest.MonkeyPatch, path: Path, **rates: float) -> Any:
    """Draw one workload, and return its panel."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    found = {"servers": SERVERS, "model": "resnet18", "circumstances": {"machine": "2 cores"}}
    one = {name: {"rates": {0: rate, 1: rate * 1.1}} for name, rate in zip(SERVERS, rates.values(), strict=True)}
    draw(found, {"scores, c=1": one}, path)
    monkeypatch.undo()
    [figure] = figures
    [axis] = figure.axes
    plt.close(figure)
    return axis


def test_a_wall_far_ahead_is_cut_off_and_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axis = panel(monkeypatch, tmp_path / "chart.png", ours=20.0, theirs=10.0, wall=2000.0)
    assert axis.get_xlim() == pytest.approx((0, 24.2))
    assert [text.get_text() for text in axis.texts] == ["2,100 →"]
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_wall_within_reach_is_drawn_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axis = panel(monkeypatch, tmp_path / "chart.png", ours=20.0, theirs=10.0, wall=21.0)
    assert not axis.texts
    assert max(bar.get_width() for bar in axis.patches) == pytest.approx(22.05)
