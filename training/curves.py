"""Curves: a run's loss and accuracy over its epochs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.history import Epoch

_COLOURS = {"train": "#1f5fa8", "test": "#d1642f"}


def draw(history: Sequence[Epoch], path: Path, *, title: str) -> None:
    """Write a PNG with the loss on the left and the accuracy on the right, train and test in each.

    Args:
        history: At least one epoch.
        path: The file to write; an existing one is replaced.
        title: Title above both.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _draw(axes, history, what)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, history: Sequence[Epoch], what: str) -> None:
    epochs = [epoch.epoch for epoch in history]
    for half, colour in _COLOURS.items():
        values = [getattr(epoch, f"{half}_{what}") for epoch in history]
        label = "train, during the epoch" if half == "train" else "test, after the epoch"
        axes.plot(epochs, values, marker="o", markersize=4, color=colour, label=f"{label}: {values[-1]:.3f}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross-entropy loss" if what == "loss" else what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    if what == "loss":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
