"""The result of a probe: arrays, a table, JSON and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from convscope.commands import format_table, printable
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve: TypeAlias = NDArray[np.float64]

_AXIS_LABELS = {"scores": "share", "energy": "share of the energy", "interior_share": "share of the cells"}
_MARKERS = "osD^vP*X"  # Lines are distinguishable without colour.


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe.

    Undefined values are NaN, and a relative distance from a map of zeros is infinite; in JSON both are null.

    Attributes:
        name: `shift`, `rotate`, `scale`, `border`, `blur` or `shuffle`.
        model: Name of the model.
        version: Version of the model.
        picture_count: Number of pictures.
        step_label: Axis label of `steps`, with the unit.
        steps: (S,), float64: the amounts of change.
        scores: Measure → (S,), float64, 0..1: `agreement`, the share of changed pictures with the most probable class
            of the unchanged picture, and `probability`, the mean probability of that class. Empty for a model without
            classes.
        measures: Measure → layer → (S,), float64. The function of the probe documents its measures.
        totals: Single numbers, by name.
    """

    name: str
    model: str
    version: str
    picture_count: int
    step_label: str
    steps: Curve
    scores: Mapping[str, Curve]
    measures: Mapping[str, Mapping[str, Curve]]
    totals: Mapping[str, float] = field(default_factory=dict)

    def format_table(self) -> str:
        """Format the numbers as text: a table of the scores, one per measure, and the totals."""
        count = f"{self.picture_count} picture{'s' * (self.picture_count != 1)}"
        parts = [printable(f"{self.name}: {self.model} {self.version}, {count}")]
        for title, curves in self._panels().items():
            rows = [
                [f"{step:g}", *(_format_value(curve[index]) for curve in curves.values())]
                for index, step in enumerate(self.steps)
            ]
            header = [self.step_label, *curves]
            parts.append(f"{title}\n{format_table(header, rows, right_aligned=range(len(header)))}")
        if self.totals:
            parts.append("\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.totals.items()))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the tables."""
        return f"<pre>{escape(self.format_table())}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return {
            "probe": self.name,
            "model": self.model,
            "version": self.version,
            "picture_count": self.picture_count,
            "step_label": self.step_label,
            "steps": _json_list(self.steps),
            "scores": {name: _json_list(curve) for name, curve in self.scores.items()},
            "measures": {
                measure: {layer: _json_list(curve) for layer, curve in curves.items()}
                for measure, curves in self.measures.items()
            },
            "totals": {name: _json_number(value) for name, value in self.totals.items()},
        }

    def figure(self) -> Figure:
        """Draw scores and measures side by side over the steps, one line per layer.

        Returns:
            A matplotlib figure, not registered with pyplot.
        """
        from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.

        panels = self._panels()
        title = f"{self.name}: {self.model} {self.version}, n = {self.picture_count}"
        figure = new_figure(title, width_inches=4.8 * len(panels), height_inches=3.8)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (measure, curves) in zip(axes, panels.items(), strict=True):
            for index, (name, curve) in enumerate(curves.items()):
                ax.plot(self.steps, curve, marker=_MARKERS[index % len(_MARKERS)], markersize=4, label=name)
            ax.set(title=measure, xlabel=self.step_label, ylabel=_AXIS_LABELS.get(measure, "relative distance"))
            ax.set_ylim(bottom=0, top=1.02 if measure in ("scores", "interior_share") else None)
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small")
        return figure

    def _panels(self) -> dict[str, Mapping[str, Curve]]:
        """Return the scores, if there are any, and the measures, by title."""
        return ({"scores": self.scores} if self.scores else {}) | dict(self.measures)


def _format_value(value: float) -> str:
    """Format a value for a table: four decimals; tiny values, which are rounding errors, in scientific notation."""
    return "–" if math.isnan(value) else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json_list(curve: Curve) -> list[float | None]:
    return [_json_number(value) for value in curve.tolist()]
