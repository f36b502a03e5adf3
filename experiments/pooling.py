"""Pooling: the largest value, the smallest, the average, a stride instead, or none; cost, accuracy and steadiness.

Five twins of `digits` that differ in what stands between the convolution and the fully connected layer. All have a ReLU
behind the convolution, which `digits` does not have: without it the largest value would be the only non-linearity of
its network. The pictures have black edges, so a moved digit is the same digit, and black comes in at the edge.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.experiment import Figures, Result, Setting, interval, markdown, plot, shown
from experiments.learning import Learner, digits, moved, recipe_of
from handlers.networks import Digits

KINDS = ("largest", "average", "smallest", "stride", "none")
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
MOVES = (1, 2, 3)


class Smallest(nn.MaxPool2d):
    """The smallest value of each window: what a pool keeps least."""

    def forward(self, maps: Tensor) -> Tensor:
        """Pool maps (N, C, h, w)."""
        pooled: Tensor = -super().forward(-maps)
        return pooled


def twin(kind: str) -> Digits:
    """Return `digits` with a ReLU and a pool: one of `KINDS`; `stride` is one of 2 in the convolution."""
    model = Digits()
    convolution = nn.Conv2d(1, 16, 3, stride=2) if kind == "stride" else model.conv1
    model.conv1 = nn.Sequential(convolution, nn.ReLU())  # type: ignore[assignment]
    pools = {"largest": model.pool1, "average": nn.AvgPool2d(2), "smallest": Smallest(2)}
    model.pool1 = pools.get(kind, nn.Identity())  # type: ignore[assignment]
    if kind == "none":
        model.fc = nn.Linear(16 * 26 * 26, 10)
    return model


def work(height: int, width: int, channels: int, filters: int, kernel: int = 3) -> int:
    """Return the multiply-adds of a convolution with a map of h×w: filters · channels · k² · h · w."""
    return filters * channels * kernel**2 * height * width


def cost(model: Digits, kind: str) -> Figures:
    """Return parameters and multiply-adds for one picture."""
    side = 13 if kind == "stride" else 26
    multiply_adds = work(side, side, 1, 16) + model.fc.in_features * 10
    return {"parameters": sum(one.numel() for one in model.parameters()), "multiply_adds": multiply_adds}


def run(setting: Setting) -> Result:
    """Train the twins, and move the test pictures."""
    corpus = digits(setting.size(1000, 100), setting.size(1000, 100))
    twins = []
    kept: dict[str, dict[int, np.ndarray]] = {}
    for kind in setting.size(KINDS, ("largest", "none")):
        right: list[np.ndarray] = []
        steady: dict[int, list[np.ndarray]] = {by: [] for by in MOVES}
        for seed in range(setting.size(3, 1)):
            torch.manual_seed(seed)
            model = twin(kind)
            learner = Learner(model, corpus, recipe_of(setting.size(5, 1), 0.003), seed)
            learner.epochs()
            answers = learner.answers(corpus.test.images)
            right.append((answers == corpus.test.labels).double().numpy())
            for by in MOVES:
                same = [
                    (learner.answers(moved(corpus.test.images, by * down, by * aside)) == answers).double().numpy()
                    for down, aside in DIRECTIONS
                ]
                steady[by].append(np.mean(same, axis=0))
        kept[kind] = {0: np.mean(right, axis=0)} | {by: np.mean(values, axis=0) for by, values in steady.items()}
        found: Figures = {"kind": kind, "seeds": len(right), **cost(model, kind), "accuracy": interval(kept[kind][0])}
        found["agreement"] = {str(by): interval(kept[kind][by]) for by in MOVES}
        twins.append(found)
    differences = {
        kind: {str(by): interval(values[by] - kept["none"][by]) for by in (0, *MOVES)}
        for kind, values in kept.items()
        if kind != "none"
    }
    largest_minus = {
        kind: interval(kept["largest"][0] - values[0]) for kind, values in kept.items() if kind != "largest"
    }
    second = {"pooled": work(16, 16, 16, 32), "not pooled": work(32, 32, 16, 32)}
    last = {"pooled": 32 * 16 * 16 * 10 + 10, "not pooled": 32 * 32 * 32 * 10 + 10}
    figures: Figures = {
        "test_pictures": len(corpus.test),
        "twins": twins,
        "minus_none": differences,
        "largest_minus": largest_minus,
        "cifar": {"conv2_multiply_adds": second, "fc_parameters": last},
    }
    return Result(figures, _drawn(figures))


def table(figures: Figures) -> str:
    """Return the tables."""
    rows = [
        (
            one["kind"],
            f"{one['parameters']:,}",
            f"{one['multiply_adds']:,}",
            shown(one["accuracy"], 3),
            *(shown(one["agreement"][str(by)]) for by in MOVES),
        )
        for one in figures["twins"]
    ]
    head = ("pool", "parameters", "multiply-adds", "accuracy", *(f"agreement, moved by {by}" for by in MOVES))
    minus = [
        (kind, *(shown(values[str(by)], 3) for by in (0, *MOVES))) for kind, values in figures["minus_none"].items()
    ]
    costs = [
        (name, *(f"{figures['cifar'][what][name]:,}" for what in ("conv2_multiply_adds", "fc_parameters")))
        for name in ("pooled", "not pooled")
    ]
    paired = markdown(("minus no pool", "accuracy", *(f"agreement, moved by {by}" for by in MOVES)), minus)
    better = [(kind, shown(values, 3)) for kind, values in figures["largest_minus"].items()]
    largest = markdown(("accuracy of the largest, minus", ""), better)
    cifar = markdown(("`cifar`", "multiply-adds of `conv2`", "parameters of `fc`"), costs)
    return "\n\n".join([markdown(head, rows), paired, largest, cifar])


def _drawn(figures: Figures) -> Figure:
    picture, [axes] = plot(5, 3)
    for one, colour in zip(figures["twins"], ("#1f5fa8", "#d1642f", "#8a4fa3", "#3a8f4d", "#888888"), strict=False):
        values = [one["accuracy"]["mean"]] + [one["agreement"][str(by)]["mean"] for by in MOVES]
        axes.plot(MOVES, values[1:], "o-", color=colour, label=one["kind"], markersize=4)
    axes.set_xticks(MOVES)
    axes.set_xlabel("digit moved by (pixels)")
    axes.set_ylabel("agreement")
    axes.legend(title="pool", fontsize=8)
    return picture
