"""The dashboards' pictures show what Prometheus answered, and no more."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.watching.promql import DASHBOARDS, ROOT


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "deploy/grafana/draw.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers:
    """Stands in for Prometheus: fifteen series for each query, silent for a while."""

    start, end, step = 1000.0, 1300.0, 5.0

    def ask(self, target: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer a panel's query."""
        metrics = [{"model": f"model-{n}", "le": str(n + 1), "instance": f"10.0.0.{n}:8082"} for n in range(15)]
        if target["instant"]:
            return [{"metric": metric, "value": [self.end, "1"]} for metric in metrics]
        values = [[self.start + 5 * n, str(n % 7)] for n in range(60) if not 20 < n < 30]
        return [{"metric": metric, "values": values} for metric in metrics]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_drawn_in_its_width_over_one_time(drawing: ModuleType, path: Path) -> None:
    figure = drawing.draw(json.loads(path.read_text()), Answers())
    figure.draw_without_rendering()
    times = [axes.get_xlim() for axes in figure.axes if axes.get_xlim()[0] > 0.001]
    assert len(times) > 10
    assert set(times) == {times[0]}
    legends = [legend for axes in figure.axes if (legend := axes.get_legend())]
    assert len(legends) > 10
    for legend in legends:
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert not legend.get_window_extent().overlaps(legend.axes.get_window_extent())
        assert len(legend.get_texts()) <= 12
    drawing.pyplot.close(figure)


def test_no_line_joins_the_points_on_the_two_sides_of_a_gap(drawing: ModuleType) -> None:
    values = [[0.0, "1"], [5.0, "1"], [30.0, "2"], [35.0, "2"]]
    broken = drawing._broken(values, 5.0)
    assert [point[0] for point in broken] == [0.0, 5.0, 10.0, 30.0, 35.0]
    assert np.isnan(float(broken[2][1]))
    assert drawing._broken(values[:2], 5.0) == values[:2]
