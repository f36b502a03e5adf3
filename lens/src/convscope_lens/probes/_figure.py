"""A probe as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convscope._figure import MapFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convscope_lens.probes._probe import Probe

# All other measures are relative distances.
_QUANTITIES = {"scores": "share", "energy": "share of the energy", "within": "share of the cells"}
_MARKS = "osD^vP*X"  # So that lines are told apart without colour.


def draw_probe(probe: Probe) -> Figure:
    """Draw scores and measures side by side over the probe's steps.

    Args:
        probe: What was found.

    Returns:
        The figure.
    """
    panels = ({"scores": probe.scores} if probe.scores else {}) | dict(probe.layers)
    figure = MapFigure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    figure.suptitle(f"{probe.name}: {probe.model} {probe.version}, n = {probe.pictures}")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            axes.plot(probe.steps, curve, marker=_MARKS[number % len(_MARKS)], markersize=4, label=name)
        axes.set(title=title, xlabel=probe.unit, ylabel=_QUANTITIES.get(title, "relative distance"))
        axes.set_ylim(bottom=0, top=1.02 if title in ("scores", "within") else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
