"""What a probe found, as arrays, as a table, as JSON and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope._table import format_table, printable
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """What one probe found.

    A value that is not defined is NaN, a relative distance from a map of zeros infinite; in JSON both are null.

    Attributes:
        name: `shift`, `rotate`, `scale`, `border`, `blur` or `shuffle`.
        model: Name of the model that answered.
        version: Its version.
        pictures: How many were probed.
        unit: What `steps` count in.
        steps: (S,): how far the pictures were changed.
        scores: Measure → (S,), 0..1: `agreement`, the share of changed pictures whose most probable class is still the
            unchanged picture's, and `probability`, the mean probability of that class. Empty for a model without
            classes.
        layers: Measure → layer → (S,). The probe's own function says what each measure is.
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
        tables = {"scores": self.scores} if self.scores else {}
        for title, curves in (tables | dict(self.layers)).items():
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
        """Return all of it in JSON's types."""
        return {
            "probe": self.name,
            "model": self.model,
            "version": self.version,
            "pictures": self.pictures,
            "unit": self.unit,
            "steps": _listed(self.steps),
            "scores": {name: _listed(curve) for name, curve in self.scores.items()},
            "layers": {
                measure: {layer: _listed(curve) for layer, curve in curves.items()}
                for measure, curves in self.layers.items()
            },
            "facts": {name: _plain(value) for name, value in self.facts.items()},
        }

    def figure(self) -> Figure:
        """Draw scores and measures over the steps, a line a layer.

        Returns:
            A matplotlib figure, not registered with pyplot.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
        """
        try:
            from convscope_lens.probes._figure import draw_probe
        except ImportError as error:
            raise ImportError(
                "figure() draws with matplotlib, which cannot be imported: pip install 'convscope[figure]'"
            ) from error
        return draw_probe(self)


def _number(value: float) -> str:
    """Return a value for a table: four digits, and rounding's remains as such."""
    return "–" if math.isnan(value) else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _listed(curve: Curve) -> list[float | None]:
    return [_plain(value) for value in curve.tolist()]
