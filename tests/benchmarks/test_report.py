"""The benchmark's chart shows the medians of the rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report import draw


def test_bars_are_medians_and_the_fastest_is_above(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    kinds = {"convscope": {"kind": "ours"}, "FastAPI": {"kind": "documented"}}
    found = {"servers": kinds, "model": "resnet18", "circumstances": {"machine": "2 cores"}}
    rates = {"convscope": {0: 20.0, 1: 22.0, 2: 30.0}, "FastAPI": {0: 9.0, 1: 10.0, 2: 11.0}}
    draw(found, {"scores, c=1": {name: {"rates": one} for name, one in rates.items()}}, tmp_path / "chart.png")
    [figure] = figures
    monkeypatch.undo()
    [axis] = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [10.0, 22.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["FastAPI", "convscope"]
    plt.close(figure)
    assert (tmp_path / "chart.png").stat().st_size > 1000
