"""Augmentation: what a network learns of angles and sizes from turned and scaled pictures, and what that costs.

`cifar` is trained by its recipe, which mirrors and shifts the pictures, and by the same recipe on pictures that are
also turned and scaled. The probes of the lens measure both on test pictures that are turned and scaled. Both are served
with the card of `cifar`, so with the mean and deviation of all 50,000 training pictures. By those of the 20,000 that
they learn from, no normalised value differs by more than 0.01.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from convscope import Client
from convscope_lens import probes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from experiments.experiment import Figures, Result, Setting, interval, markdown, plot, shown
from experiments.learning import Learner, colour
from handlers.networks import Cifar
from training.recipes import RECIPES

TURNED, SCALED = 45, 1.5  # In training: up to so many degrees either way, and by up to such a factor, up and down.
ANGLES, FACTORS = (15, 30, 45, 60, 90, 180), (0.5, 0.7, 1, 1.3, 1.5)
KINDS = {
    "recipe": RECIPES["cifar"],
    "turned": replace(RECIPES["cifar"], turn_deg=TURNED, scale=SCALED),
}
NAMES = {"recipe": "by the recipe", "turned": "also turned and scaled"}
SCORES = ("agreement", "accuracy")


def run(setting: Setting) -> Result:
    """Train both kinds, serve them in this process, and probe them."""
    corpus = colour(setting.pictures, setting.size(2000, 2), setting.size(800, 2))
    epochs, seeds = setting.size(5, 1), range(setting.size(3, 1))
    twins: dict[str, nn.Module] = {}
    upright: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, recipe in KINDS.items():
        for seed in seeds:
            torch.manual_seed(seed)
            learner = Learner(Cifar(), corpus, replace(recipe, epochs=epochs), seed)
            twins[f"cifar-{kind}-{seed}"] = learner.epochs()
            upright[kind].append(round(learner.measured().accuracy, 4))
    figures: Figures = {
        "train_pictures": len(corpus.train),
        "test_pictures": len(corpus.test),
        "epochs": epochs,
        "upright": upright,
        "rows": [],
    }
    with setting.client(twins=twins) as client:
        found = {name: _probed(client, name, setting) for name in twins}
    for change in next(iter(found.values())):
        row: Figures = {"change": change}
        for place, score in enumerate(SCORES):
            values = {kind: [found[f"cifar-{kind}-{seed}"][change][place] for seed in seeds] for kind in KINDS}
            means = {kind: np.mean(some, axis=0) for kind, some in values.items()}
            row[score] = {kind: interval(mean) for kind, mean in means.items()}
            row[score]["difference"] = interval(means["turned"] - means["recipe"])
            row[score]["seeds"] = {kind: [round(float(one.mean()), 4) for one in some] for kind, some in values.items()}
        figures["rows"].append(row)
    return Result(figures, _drawn(figures))


def _probed(client: Client, model: str, setting: Setting) -> dict[str, NDArray[np.float64]]:
    """Return by change whether each picture, turned or scaled, keeps its answer, and is right: (2, N), 0 or 1."""
    folder, limit = str(setting.pictures / "test"), setting.size(1000, 20)
    found: dict[str, NDArray[np.float64]] = {}
    for result, text in (
        (probes.rotate(client, folder, model=model, layers="none", angles=ANGLES, limit=limit), "turned by {:g}°"),
        (probes.scale(client, folder, model=model, layers="none", factors=FACTORS, limit=limit), "scaled by {:g}"),
    ):
        sums = np.stack([result.sums["scores"].sums[score] for score in SCORES])  # (2, N, S, 2)
        shares = sums[..., 0] / sums[..., 1]
        found |= {text.format(step): shares[:, :, place] for place, step in enumerate(result.steps)}
    return found


def table(figures: Figures) -> str:
    """Return the tables."""
    rows = [
        (row["change"], *(shown(row[score][name]) for score in SCORES for name in (*KINDS, "difference")))
        for row in figures["rows"]
    ]
    names = (*NAMES.values(), "difference")
    head = ("test pictures", *(f"{score}: {name}" for score in SCORES for name in names))
    upright = [
        (NAMES[kind], ", ".join(f"{value:.3f}" for value in values)) for kind, values in figures["upright"].items()
    ]
    trained = markdown(("`cifar`, trained", "accuracy on all upright test pictures, each seed"), upright)
    return "\n\n".join([markdown(head, rows), trained])


def _drawn(figures: Figures) -> Figure:
    picture, axes = plot(8, 3, 2)
    for one, word, label in zip(axes, ("turned", "scaled"), ("turned by (°)", "scaled by"), strict=True):
        rows = [row for row in figures["rows"] if row["change"].startswith(word)]
        steps = [float(row["change"].split()[-1].rstrip("°")) for row in rows]
        for (kind, name), ink in zip(NAMES.items(), ("#1f5fa8", "#d1642f"), strict=True):
            for values in zip(*(row["accuracy"]["seeds"][kind] for row in rows), strict=True):
                one.plot(steps, values, "o", color=ink, alpha=0.4, markersize=3)
            one.plot(steps, [row["accuracy"][kind]["mean"] for row in rows], "-", color=ink, label=name)
        one.axvspan(*((0, TURNED) if word == "turned" else (1 / SCALED, SCALED)), color="0.93", zorder=0)
        one.set_xlabel(label)
        one.set_ylabel("accuracy")
        one.set_ylim(0, 0.75)
    axes[0].legend(fontsize=8)
    return picture
