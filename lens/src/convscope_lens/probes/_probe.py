"""The result of a probe: arrays, a table, JSON and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from convscope.commands import format_table, printable
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve: TypeAlias = NDArray[np.float64]

_AXIS_LABELS = {"scores": "share", "energy": "share of the energy", "within": "share of the cells"}
_MARKERS = "osD^vP*X"  # Lines can be told apart without colour.


@dataclass(frozen=True)
class Probe:
    """The result of a probe.

    A value that is not defined is NaN, and a relative distance from a map of zeros is infinite; in JSON both are null.

    Attributes:
        name: `shift`, `rotate`, `scale`, `border`, `blur` or `shuffle`.
        model: Name of the model.
        version: Its version.
        pictures: Number of pictures.
        unit: What `steps` are, with their unit.
        steps: (S,): how much the pictures were changed.
        scores: Measure → (S,), 0..1: `agreement`, the share of changed pictures with the most probable class of the
            unchanged picture, and `probability`, the mean probability of that class. Empty for a model without classes.
        layers: Measure → layer → (S,). The function that made the probe documents its measures.
        facts: Single numbers besides, by name.
    """

    name: str
    model: str
    version: str
    pictures: int
    unit: str
    steps: Curve
    scores: Mapping[str, Curve]
    layers: Mapping[str, Mapping[str, Curve]]
    facts: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """Return the numbers as text: a table of the scores, one of the layers for each measure, and the facts."""
        count = f"{self.pictures} picture{'s' * (self.pictures != 1)}"
        parts = [printable(f"{self.name}: {self.model} {self.version}, {count}")]
        for title, curves in self._panels().items():
            rows = [
                [f"{step:g}", *(_number(curve[number]) for curve in curves.values())]
                for number, step in enumerate(self.steps)
            ]
            header = [self.unit, *curves]
            parts.append(f"{title}\n{format_table(header, rows, right=range(len(header)))}")
        if self.facts:
            parts.append("\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.facts.items()))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "probe": self.name,
            "model": self.model,
            "version": self.version,
            "pictures": self.pictures,
            "unit": self.unit,
            "steps": _json_list(self.steps),
            "scores": {name: _json_list(curve) for name, curve in self.scores.items()},
            "layers": {
                measure: {layer: _json_list(curve) for layer, curve in curves.items()}
                for measure, curves in self.layers.items()
            },
            "facts": {name: _json_number(value) for name, value in self.facts.items()},
        }

    def figure(self) -> Figure:
        """Draw scores and measures side by side over the steps, a line for each layer.

        Returns:
            A matplotlib figure, not registered with pyplot.
        """
        from convscope.figures import new_figure  # Imported late: numbers need no matplotlib.

        panels = self._panels()
        title = f"{self.name}: {self.model} {self.version}, n = {self.pictures}"
        figure = new_figure(title, width_inches=4.8 * len(panels), height_inches=3.8)
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (measure, curves) in zip(places, panels.items(), strict=True):
            for number, (name, curve) in enumerate(curves.items()):
                axes.plot(self.steps, curve, marker=_MARKERS[number % len(_MARKERS)], markersize=4, label=name)
            axes.set(title=measure, xlabel=self.unit, ylabel=_AXIS_LABELS.get(measure, "relative distance"))
            axes.set_ylim(bottom=0, top=1.02 if measure in ("scores", "within") else None)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        return figure

    def _panels(self) -> dict[str, Mapping[str, Curve]]:
        """Return the scores, if there are any, and the measures by title."""
        return ({"scores": self.scores} if self.scores else {}) | dict(self.layers)


def _number(value: float) -> str:
    """Format a value for a table: four digits, and rounding errors in scientific notation."""
    return "–" if math.isnan(value) else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json_list(curve: Curve) -> list[float | None]:
    return [_json_number(value) for value in curve.tolist()]
