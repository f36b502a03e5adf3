"""The result of a probe: arrays, a table, JSON and a figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope.commands import format_table, printable
from numpy.typing import NDArray

from convscope_lens.probes._statistics import CHANCE, Curve, Figures, interval, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convscope_lens.probes._session import ProbeSession, ScoreSums

SCORES, TOTALS, PICTURE = "scores", "totals", "picture"
_AXIS_LABELS = {
    SCORES: "share",
    "energy": "share of the energy",
    "interior_share": "share of the cells",
}
_MARKERS = "osD^vP*X"  # Lines are distinguishable without colour.
_WHOLE_STEPS = ("shift", "border", "shuffle", "pool")  # Between their steps nothing was measured: no line is drawn.


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe.

    Undefined values are NaN, and a relative distance from a map of zeros is infinite; in JSON both are null.

    Attributes:
        name: `shift`, `rotate`, `scale`, `border`, `pool`, `blur` or `shuffle`.
        model: Name of the model.
        version: Version of the model.
        picture_count: Number of pictures.
        step_label: Axis label of `steps`, with the unit.
        steps: (S,), float64: the amounts of change.
        scores: Measure → (S,), float64, 0..1: `agreement`, the share of changed pictures with the most probable class
            of the unchanged picture, and `probability`, the mean probability of that class. If every picture's folder
            is named as a class: `accuracy`, the share of changed pictures of which that class is the most probable,
            and `accuracy_change`, that less the accuracy on the unchanged pictures, -1..1. Empty for a model without
            classes.
        measures: Measure → layer → (S,), float64. The function of the probe documents its measures.
        totals: Single numbers, by name.
        intervals: `scores`, `totals` or a measure → name → (S, 2), float64: the ends of the 95 % interval, by bootstrap
            over the pictures; NaN for one picture. For `totals` (1, 2).
        baselines: Likewise, (S,): the same figure without what the probe asks for. Scores: by chance, if the answers
            were dealt out to the pictures at random. Distances: from the map of another picture.
        baseline_names: `scores`, `totals` or a measure → what its baseline is.
        note: How pictures were changed, in a sentence; may be empty.
        sums: `scores`, `totals` or a measure → `Figures`: the sums by picture behind the numbers; not in JSON.
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
    intervals: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    baseline_names: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    sums: Mapping[str, Figures] = field(default_factory=dict, repr=False, compare=False)

    def minus(self, other: ProbeResult) -> ProbeResult:
        """Return this result minus another model's, with the same pictures and steps.

        The intervals are paired: both models are resampled with the same pictures, so what makes a picture hard for
        both does not widen them.

        Args:
            other: The result of the same probe with the same pictures, steps and seed.

        Returns:
            The scores, and the measures of layers with the same names. Baselines are left out.

        Raises:
            ValueError: The other result is of another probe, or of other steps or pictures.
        """
        same = (self.name, self.picture_count, self.steps.tolist())
        if same != (other.name, other.picture_count, other.steps.tolist()):
            raise ValueError("results can be compared if they are of one probe with the same pictures and steps")
        values: dict[str, dict[str, Curve]] = {}
        intervals: dict[str, dict[str, NDArray[np.float64]]] = {}
        for kind, figures in self.sums.items():
            sums, others = figures.sums, other.sums[kind].sums if kind in other.sums else {}
            for name in (name for name in sums if name in others and name != PICTURE):
                difference = ratio(sums[name], root=figures.root) - ratio(others[name], root=figures.root)
                values.setdefault(kind, {})[name] = difference
                ends = interval(sums[name], root=figures.root, minus=others[name])
                intervals.setdefault(kind, {})[name] = ends
        return dataclasses.replace(
            self,
            model=f"{self.model} {self.version} − {other.model}",
            version=other.version,
            scores=values.get(SCORES, {}),
            measures={kind: curves for kind, curves in values.items() if kind not in (SCORES, TOTALS)},
            totals={name: float(curve[0]) for name, curve in values.get(TOTALS, {}).items()},
            intervals=intervals,
            baselines={},
            baseline_names={},
            sums={},
        )

    def format_table(self) -> str:
        """Format the numbers as text: a table of the scores, one per measure, and the totals.

        A figure is followed by ± half the width of its 95 % interval and, in parentheses, by its baseline.
        """
        count = f"{self.picture_count} picture{'s' * (self.picture_count != 1)}"
        head = [f"{self.name}: {self.model} {self.version}, {count}"]
        head += [self.note] if self.note else []
        head += ["figure ±half of its 95 % interval (baseline)"] if self.baselines else []
        parts = ["\n".join(map(printable, head))]
        for kind, curves in self._panels().items():
            rows = [
                [f"{step:g}", *(self._format_figure(kind, name, index, curve) for name, curve in curves.items())]
                for index, step in enumerate(self.steps)
            ]
            header = [self.step_label, *(name.replace("_", " ") if kind == SCORES else name for name in curves)]
            parts.append(f"{self._title(kind)}\n{format_table(header, rows, right_aligned=range(len(header)))}")
        if self.totals:
            lines = []
            for name, value in self.totals.items():
                text = self._format_figure(TOTALS, name, 0, np.array([value]))
                lines.append(f"{name.replace('_', ' ')}: {f'{value:g}' if isinstance(value, int) else text}")
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def _title(self, kind: str) -> str:
        baseline = self.baseline_names.get(kind)
        return f"{kind.replace('_', ' ')} ({baseline})" if baseline else kind.replace("_", " ")

    def _format_figure(self, kind: str, name: str, index: int, curve: Curve) -> str:
        """Format a figure: its value, half of its interval if it has one, and its baseline if there is one."""
        text = _format_value(curve[index])
        ends = self.intervals.get(kind, {}).get(name)
        if ends is not None and math.isfinite(float(ends[index].sum())):
            text += f" ±{_format_value((ends[index, 1] - ends[index, 0]) / 2)}"
        baseline = self.baselines.get(kind, {}).get(name)
        if baseline is not None and math.isfinite(baseline[index]) and not math.isnan(curve[index]):
            text += f" ({_format_value(baseline[index])})"
        return text

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
            "measures": _json_curves(self.measures),
            "totals": {name: _json_number(value) for name, value in self.totals.items()},
            "intervals": _json_curves(self.intervals),
            "baselines": _json_curves(self.baselines),
            "baseline_names": dict(self.baseline_names),
            "note": self.note,
        }

    def figure(self) -> Figure:
        """Draw scores and measures side by side over the steps: a marker for each measured figure.

        Bars are 95 % intervals, and dotted lines baselines. Figures are joined only where what lies between two steps
        could be measured too, as between two angles.

        Returns:
            A matplotlib figure, not registered with pyplot.
        """
        from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.

        panels = self._panels()
        title = f"{self.name}: {self.model} {self.version}, n = {self.picture_count}"
        figure = new_figure(title, width_inches=4.8 * len(panels), height_inches=3.8)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        line = "none" if self.name in _WHOLE_STEPS else "-"
        for ax, (kind, curves) in zip(axes, panels.items(), strict=True):
            for index, (name, curve) in enumerate(curves.items()):
                ends = self.intervals.get(kind, {}).get(name)
                reach = None if ends is None else np.abs(ends.T - curve)
                if reach is not None and not np.isfinite(reach).any():
                    reach = None
                marker, label = _MARKERS[index % len(_MARKERS)], name.replace("_", " ")
                drawn = ax.errorbar(
                    self.steps, curve, reach, marker=marker, markersize=4, linestyle=line, linewidth=0.9, label=label
                )
                baseline = self.baselines.get(kind, {}).get(name)
                if baseline is not None:
                    ax.plot(self.steps, baseline, color=drawn.lines[0].get_color(), linestyle=":", linewidth=1)
            ax.set(title=self._title(kind), xlabel=self.step_label)
            ax.set_ylabel(_AXIS_LABELS.get(kind, "relative distance"))
            if not any((curve < 0).any() for curve in curves.values()):
                ax.set_ylim(bottom=0, top=1.02 if kind in (SCORES, "interior_share") else None)
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small")
        return figure

    def _panels(self) -> dict[str, Mapping[str, Curve]]:
        """Return the scores, if there are any, and the measures, by title."""
        return ({SCORES: self.scores} if self.scores else {}) | dict(self.measures)


def make_result(
    name: str,
    session: ProbeSession,
    step_label: str,
    steps: Curve,
    *,
    scores: ScoreSums | None = None,
    controls: Mapping[str, ScoreSums] | None = None,
    measures: Mapping[str, Figures],
    totals: Mapping[str, Figures] | None = None,
    counts: Mapping[str, int] | None = None,
    note: str = "",
) -> ProbeResult:
    """Return a result: figures, intervals and baselines from the sums by picture.

    `scores` and `measures` are by step. Of the `controls`, scores of control pictures by step, `agreement` and
    `accuracy` are added, as in `<name>_agreement`. `totals` are figures of one step; `counts` are more totals, whole
    numbers.
    """
    kinds: dict[str, Figures] = {}
    single: dict[str, Figures] = dict(totals or {})
    if scores is not None and (sums := scores.sums()):
        chance = dict(scores.chance())
        for control, control_scores in (controls or {}).items():
            control_sums, control_chance = control_scores.sums(), control_scores.chance()
            for score in ("agreement", "accuracy"):
                if score in control_sums:
                    sums[f"{control}_{score}"] = control_sums[score]
                    chance[f"{control}_{score}"] = control_chance[score]
        kinds[SCORES] = Figures(sums, False, CHANCE, {score: chance[score] for score in sums if score in chance})
        if (unchanged := scores.unchanged_sums()) is not None:
            single["unchanged"] = Figures({"accuracy_unchanged": unchanged[:, :1]}, False)
    kinds |= {kind: figures for kind, figures in measures.items() if figures.sums}
    if single:
        kinds[TOTALS] = Figures(
            {name: sums for figures in single.values() for name, sums in figures.sums.items()},
            False,
            next((figures.baseline for figures in single.values() if figures.baseline), ""),
            {name: curve for figures in single.values() for name, curve in figures.baselines.items()},
        )
    values = {
        kind: {curve: ratio(sums, root=figures.root) for curve, sums in figures.sums.items()}
        for kind, figures in kinds.items()
    }
    intervals = {
        kind: {curve: interval(sums, root=figures.root, seed=session.seed) for curve, sums in figures.sums.items()}
        for kind, figures in kinds.items()
        if figures.varies
    }
    return ProbeResult(
        name,
        session.model,
        session.card.version,
        session.picture_count,
        step_label,
        np.asarray(steps, float),
        values.get(SCORES, {}),
        {kind: curves for kind, curves in values.items() if kind not in (SCORES, TOTALS)},
        {name: float(curve[0]) for name, curve in values.get(TOTALS, {}).items()} | dict(counts or {}),
        intervals,
        {kind: figures.baselines for kind, figures in kinds.items() if figures.baselines},
        {kind: figures.baseline for kind, figures in kinds.items() if figures.baseline},
        note,
        kinds,
    )


def _format_value(value: float) -> str:
    """Format a value for a table: three decimals; tiny values, which are rounding errors, in scientific notation."""
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.0e}" if abs(value) < 5e-4 else f"{value:.3f}"


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json_list(values: NDArray[np.float64]) -> list[Any]:
    """Return nested lists, with None for what is not finite."""
    return [_json_list(value) if np.ndim(value) else _json_number(float(value)) for value in values]


def _json_curves(curves: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, dict[str, list[Any]]]:
    return {kind: {name: _json_list(curve) for name, curve in by_name.items()} for kind, by_name in curves.items()}
