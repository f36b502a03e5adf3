"""A training trace: five epochs of `digits`, beside the figures of its document."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import Figures as Found
from experiments.experiment import Result, Setting, interval, markdown, plot, shown
from experiments.learning import Learner, digits
from handlers.networks import NETWORKS
from training.loop import Figures
from training.recipes import RECIPES

DOCUMENT = {"loss": (1.2, 0.8, 0.5, 0.3, 0.2), "accuracy": (0.55, 0.75, 0.85, 0.92, 0.95)}
"""What the document prints after epochs 1 to 5."""


def run(setting: Setting) -> Result:
    """Train `digits` for five epochs by its recipe, on pictures as they are."""
    corpus = digits(setting.size(4000, 200), setting.size(1000, 100))
    recipe = replace(RECIPES["digits"].unaugmented(), epochs=setting.size(5, 2))
    seeds = range(setting.size(3, 1))
    trained: dict[int, list[Figures]] = {epoch: [] for epoch in range(1, recipe.epochs + 1)}
    tested: dict[int, list[Figures]] = {epoch: [] for epoch in trained}
    right: dict[int, list[np.ndarray]] = {epoch: [] for epoch in trained}
    for seed in seeds:
        torch.manual_seed(seed)
        learner = Learner(NETWORKS["digits"](**{"classes": 10}), corpus, recipe, seed)

        def after(epoch: int, found: Figures, learner: Learner = learner) -> None:
            trained[epoch].append(found)
            tested[epoch].append(learner.measured())
            right[epoch].append(learner.right())

        learner.epochs(after)
    rows: list[Found] = []
    for epoch in trained:
        row: Found = {"epoch": epoch, "test_accuracy": interval(np.mean(right[epoch], axis=0))}
        for name, values in (
            ("loss", [one.loss for one in trained[epoch]]),
            ("accuracy", [one.accuracy for one in trained[epoch]]),
            ("test_loss", [one.loss for one in tested[epoch]]),
        ):
            row[name] = round(float(np.mean(values)), 3)
        rows.append(row)
    figures: Found = {
        "train_pictures": len(corpus.train),
        "test_pictures": len(corpus.test),
        "seeds": len(seeds),
        "document": DOCUMENT,
        "epochs": rows,
    }
    return Result(figures, _drawn(figures))


def table(figures: Found) -> str:
    """Return the table."""
    rows = []
    for one in figures["epochs"]:
        said = [f"{figures['document'][what][one['epoch'] - 1]:.2f}" for what in ("loss", "accuracy")]
        values = [f"{one[what]:.2f}" for what in ("loss", "accuracy", "test_loss")]
        rows.append((one["epoch"], *said, *values, shown(one["test_accuracy"])))
    head = ("epoch", "document: loss", "accuracy", "found: training loss", "accuracy", "test loss", "accuracy")
    return markdown(head, rows)


def _drawn(figures: Found) -> Figure:
    picture, [axes] = plot(4.5, 3)
    epochs = [row["epoch"] for row in figures["epochs"]]
    accuracy = {
        "training": [row["accuracy"] for row in figures["epochs"]],
        "test": [row["test_accuracy"]["mean"] for row in figures["epochs"]],
    }
    for (label, values), colour in zip(accuracy.items(), ("#1f5fa8", "#d1642f"), strict=True):
        axes.plot(epochs, values, "o-", color=colour, label=label, markersize=4)
    axes.plot(epochs, figures["document"]["accuracy"][: len(epochs)], "x--", color="0.4", label="document")
    axes.set_xticks(epochs)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy")
    axes.legend()
    return picture
