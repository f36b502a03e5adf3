"""Batch normalisation: the same network, recipe, pictures and seeds, with it and without."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from experiments.experiment import Figures, Result, Setting, interval, markdown, shown
from experiments.learning import Learner, colour, recipe_of
from handlers.networks import Cifar

RATES = (0.002, 0.02)  # The first is that of the recipe of `cifar`.
KINDS = {True: "with", False: "without"}


def twin(is_normalised: bool) -> Cifar:
    """Return `cifar`, with batch normalisation behind both convolutions or without."""
    model = Cifar()
    if is_normalised:
        model.conv1 = nn.Sequential(model.conv1, nn.BatchNorm2d(16))  # type: ignore[assignment]
        model.conv2 = nn.Sequential(model.conv2, nn.BatchNorm2d(32))  # type: ignore[assignment]
    return model


def run(setting: Setting) -> Result:
    """Train both twins at every learning rate."""
    corpus = colour(setting.pictures, setting.size(300, 2), setting.size(100, 2))
    rows = []
    for rate in setting.size(RATES, RATES[:1]):
        right: dict[str, list[np.ndarray]] = {name: [] for name in KINDS.values()}
        for is_normalised, name in KINDS.items():
            for seed in range(setting.size(3, 1)):
                torch.manual_seed(seed)
                learner = Learner(twin(is_normalised), corpus, recipe_of(setting.size(5, 1), rate, 64), seed)
                learner.epochs()
                right[name].append(learner.right())
        means = {name: np.mean(values, axis=0) for name, values in right.items()}
        row: Figures = {"rate": rate, "difference": interval(means["with"] - means["without"])}
        for name, values in right.items():
            row[name] = interval(means[name]) | {"seeds": [round(float(one.mean()), 3) for one in values]}
        rows.append(row)
    return Result({"train_pictures": len(corpus.train), "test_pictures": len(corpus.test), "rates": rows})


def table(figures: Figures) -> str:
    """Return the table."""
    rows = [
        (
            f"{one['rate']:g}",
            *(shown(one[name], 3) for name in ("with", "without", "difference")),
            *(", ".join(f"{value:.2f}" for value in one[name]["seeds"]) for name in ("with", "without")),
        )
        for one in figures["rates"]
    ]
    head = ("learning rate", "accuracy with batch normalisation", "without", "difference", "each seed, with", "without")
    return markdown(head, rows)
