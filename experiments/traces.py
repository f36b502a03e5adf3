"""Training traces: five epochs of `digits`, `simple` and `cifar`, beside the figures of the documents."""

from __future__ import annotations

from dataclasses import replace

import torch
from matplotlib.figure import Figure

from experiments.experiment import Figures as Found
from experiments.experiment import Result, Setting, markdown, plot
from experiments.learning import Learner, colour, digits
from handlers.networks import NETWORKS
from training.loop import Figures
from training.recipes import RECIPES

DOCUMENTS = {
    "digits": {"loss": (1.2, 0.8, 0.5, 0.3, 0.2), "accuracy": (0.55, 0.75, 0.85, 0.92, 0.95)},
    "cifar": {"loss": (1.85, 1.20, 0.85, 0.65, 0.50), "accuracy": (0.35, 0.55, 0.70, 0.78, 0.83)},
    "simple": {"loss": (0.45,), "accuracy": (0.85,)},
}
"""By network: what the documents print after epochs 1 to 5; of `simple` the end only."""


def run(setting: Setting) -> Result:
    """Train each network for five epochs by its recipe, on pictures as they are."""
    figures: Found = {}
    for name in setting.size(tuple(DOCUMENTS), ("digits",)):
        if name == "digits":
            corpus = digits(setting.size(4000, 200), setting.size(1000, 100))
        else:
            corpus = colour(setting.pictures, 500, 100)
        torch.manual_seed(0)
        recipe = replace(RECIPES[name].unaugmented(), epochs=setting.size(5, 2), decay=False)
        learner = Learner(NETWORKS[name](**{"classes": 10}), corpus, recipe, 0)
        rows: list[dict[str, float]] = []

        def after(epoch: int, found: Figures, rows: list[dict[str, float]] = rows, learner: Learner = learner) -> None:
            tested = learner.measured()
            values = {"loss": found.loss, "accuracy": found.accuracy, "test_loss": tested.loss}
            values["test_accuracy"] = tested.accuracy
            rows.append({"epoch": epoch} | {key: round(value, 3) for key, value in values.items()})

        learner.epochs(after)
        figures[name] = {
            "train_pictures": len(corpus.train),
            "test_pictures": len(corpus.test),
            "documents": DOCUMENTS[name],
            "epochs": rows,
        }
    return Result(figures, _drawn(figures))


def table(figures: Found) -> str:
    """Return the tables."""
    rows = []
    for name, found in figures.items():
        for one in found["epochs"]:
            place = one["epoch"] - 1 if len(found["documents"]["loss"]) > 1 else one["epoch"] - len(found["epochs"])
            said = ["–", "–"]
            if 0 <= place < len(found["documents"]["loss"]):
                said = [f"{found['documents'][what][place]:.2f}" for what in ("loss", "accuracy")]
            values = [f"{one[what]:.2f}" for what in ("loss", "accuracy", "test_loss", "test_accuracy")]
            rows.append((f"`{name}`", one["epoch"], *said, *values))
    head = ("network", "epoch", "document: loss", "accuracy", "found: training loss", "accuracy")
    return markdown((*head, "test loss", "accuracy"), rows)


def _drawn(figures: Found) -> Figure:
    picture, axes = plot(3 * len(figures), 2.7, len(figures))
    for one, (name, found) in zip(axes, figures.items(), strict=True):
        epochs = [row["epoch"] for row in found["epochs"]]
        for what, colour_, label in (("accuracy", "#1f5fa8", "training"), ("test_accuracy", "#d1642f", "test")):
            one.plot(epochs, [row[what] for row in found["epochs"]], "o-", color=colour_, label=label, markersize=4)
        said = found["documents"]["accuracy"]
        if len(said) == len(epochs):
            one.plot(epochs, said, "x--", color="0.4", label="document")
        else:
            one.plot(epochs[-1:], said[-1:], "x", color="0.4", label="document")
        one.set_title(name, fontsize=10)
        one.set_ylim(0, 1)
        one.set_xlabel("epoch")
        one.legend(fontsize=7)
    axes[0].set_ylabel("accuracy")
    return picture
