"""A training trace: five epochs of `digits`, beside the figures of its document."""

from __future__ import annotations

from dataclasses import replace

import torch
from matplotlib.figure import Figure

from experiments.experiment import Figures as Found
from experiments.experiment import Result, Setting, markdown, plot
from experiments.learning import Learner, digits
from handlers.networks import NETWORKS
from training.loop import Figures
from training.recipes import RECIPES

DOCUMENT = {"loss": (1.2, 0.8, 0.5, 0.3, 0.2), "accuracy": (0.55, 0.75, 0.85, 0.92, 0.95)}
"""What the document prints after epochs 1 to 5."""


def run(setting: Setting) -> Result:
    """Train `digits` for five epochs by its recipe, on pictures as they are."""
    corpus = digits(setting.size(4000, 200), setting.size(1000, 100))
    torch.manual_seed(0)
    recipe = replace(RECIPES["digits"].unaugmented(), epochs=setting.size(5, 2))
    learner = Learner(NETWORKS["digits"](**{"classes": 10}), corpus, recipe, 0)
    rows: list[dict[str, float]] = []

    def after(epoch: int, found: Figures) -> None:
        tested = learner.measured()
        values = {"loss": found.loss, "accuracy": found.accuracy, "test_loss": tested.loss}
        values["test_accuracy"] = tested.accuracy
        rows.append({"epoch": epoch} | {key: round(value, 3) for key, value in values.items()})

    learner.epochs(after)
    figures: Found = {
        "train_pictures": len(corpus.train),
        "test_pictures": len(corpus.test),
        "document": DOCUMENT,
        "epochs": rows,
    }
    return Result(figures, _drawn(figures))


def table(figures: Found) -> str:
    """Return the table."""
    rows = []
    for one in figures["epochs"]:
        said = [f"{figures['document'][what][one['epoch'] - 1]:.2f}" for what in ("loss", "accuracy")]
        values = [f"{one[what]:.2f}" for what in ("loss", "accuracy", "test_loss", "test_accuracy")]
        rows.append((one["epoch"], *said, *values))
    head = ("epoch", "document: loss", "accuracy", "found: training loss", "accuracy", "test loss", "accuracy")
    return markdown(head, rows)


def _drawn(figures: Found) -> Figure:
    picture, [axes] = plot(4.5, 3)
    epochs = [row["epoch"] for row in figures["epochs"]]
    for what, blue, label in (("accuracy", "#1f5fa8", "training"), ("test_accuracy", "#d1642f", "test")):
        axes.plot(epochs, [row[what] for row in figures["epochs"]], "o-", color=blue, label=label, markersize=4)
    axes.plot(epochs, figures["document"]["accuracy"][: len(epochs)], "x--", color="0.4", label="document")
    axes.set_xticks(epochs)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy")
    axes.legend()
    return picture
