"""Kernels and maps over epochs: what training changes, and what it does not.

`simple` learns on a part of CIFAR-10. After every epoch its first kernels, its maps of one picture and its accuracy are
kept. Beside it: the same network after a single step on four pictures, which is all that one of the documents does
before it shows "what the filters learned".
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.experiment import Figures, Result, Setting, grid, markdown
from experiments.learning import Learner, colour, recipe_of
from handlers.images.preprocessing import normalise
from handlers.networks import Simple
from training.corpus import Corpus

_ACROSS = torch.tensor([[-1.0, 0, 1]] * 3)
EDGES = torch.stack([_ACROSS, _ACROSS.T]).flatten(1) / 6**0.5  # An orthonormal pair: Prewitt's two edge kernels.
CHANCE = 2 / 9
"""Share of a random kernel's square that lies in two directions of nine."""


def edge_share(kernels: Tensor) -> float:
    """Return how much of the kernels is an edge: their mean share of Σ w² in the span of Prewitt's two kernels.

    Args:
        kernels: (C, 3, 3, 3). Their sum over colours is looked at: what a grey picture meets.
    """
    grey = kernels.sum(1).flatten(1)  # (C, 9)
    return round(float(((grey @ EDGES.T).square().sum(1) / grey.square().sum(1)).mean()), 3)


@torch.inference_mode()
def maps_of(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps of both layers of `simple`, after their ReLU."""
    first = model.relu1(model.conv1(images))
    return first, model.relu2(model.conv2(model.pool1(first)))


def one_batch(model: nn.Module, corpus: Corpus, learner: Learner, batch: int = 4) -> nn.Module:
    """Return a copy of the network after one step of Adam on a few pictures."""
    again = deepcopy(model).train()
    optimizer = torch.optim.Adam(again.parameters(), lr=0.001)
    places = torch.linspace(0, len(corpus.train) - 1, batch).long()
    images = normalise(corpus.train.images[places], learner.preprocessing)
    cross_entropy(again(images), corpus.train.labels[places]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return again.eval()


def run(setting: Setting) -> Result:
    """Train `simple` and keep what it is after every epoch."""
    corpus = colour(setting.pictures, setting.size(500, 2), setting.size(100, 2))
    runs = []
    for seed in range(setting.size(3, 1)):
        torch.manual_seed(seed)
        model = Simple()
        learner = Learner(model, corpus, recipe_of(setting.size(5, 1), 0.001, 64), seed)
        images = normalise(corpus.test.images, learner.preprocessing)
        states = [deepcopy(model).eval()]
        losses: list[float | None] = [None]

        def after(_epoch: int, found: Any, model: Simple = model, states: Any = states, losses: Any = losses) -> None:
            states.append(deepcopy(model).eval())
            losses.append(round(found.loss, 3))

        before = deepcopy(model)
        learner.epochs(after)
        runs.append((learner, images, states, losses, one_batch(before, corpus, learner)))
    figures: Figures = {"train_pictures": len(corpus.train), "test_pictures": len(corpus.test), "seeds": len(runs)}
    rows = []
    for epoch in range(len(runs[0][2])):
        found = [_state(learner, images, states[epoch], states[0]) for learner, images, states, _, _ in runs]
        losses = [run[3][epoch] for run in runs]
        known = [loss for loss in losses if loss is not None]
        loss = round(float(np.mean(known)), 3) if known else None
        rows.append({"epoch": epoch, "train_loss": loss} | _mean(found))
    figures["epochs"] = rows
    figures["one_batch_of_four"] = _mean([_state(one[0], one[1], one[4], one[2][0]) for one in runs])
    learner, images, states, _, _ = runs[0]
    return Result(figures, _drawn(corpus, learner, states))


@torch.inference_mode()
def _state(learner: Learner, images: Tensor, model: Any, first: Any) -> dict[str, float]:
    """Return what a network is, and how far it is from its first weights."""
    right = model(normalise(learner.corpus.test.images, learner.preprocessing)).argmax(1) == learner.corpus.test.labels
    found = {"test_accuracy": float(right.double().mean()), "edge_share": edge_share(model.conv1.weight.detach())}
    pairs = {"kernels": (model.conv1.weight.detach(), first.conv1.weight.detach())}
    for number, (now, was) in enumerate(zip(maps_of(model, images), maps_of(first, images), strict=True), 1):
        pairs[f"maps{number}"] = (now, was)
    return found | {name: float((now - was).norm() / was.norm()) for name, (now, was) in pairs.items()}


def _mean(found: list[dict[str, float]]) -> Figures:
    """Return means over the seeds, and the least and the largest of them."""
    values = {name: [one[name] for one in found] for name in found[0]}
    means = {name: round(float(np.mean(some)), 3) for name, some in values.items()}
    return means | {"seeds": {name: [round(min(some), 3), round(max(some), 3)] for name, some in values.items()}}


def table(figures: Figures) -> str:
    """Return the table."""
    moved = ("kernels moved", "maps 1 moved", "maps 2 moved")
    head = ("after epoch", "training loss", "test accuracy", *moved, "edge share")
    rows: list[tuple[object, ...]] = []
    batch = {"epoch": "one step, 4 pictures", "train_loss": None} | figures["one_batch_of_four"]
    for one in [figures["epochs"][0], batch, *figures["epochs"][1:]]:
        loss = "–" if one["train_loss"] is None else f"{one['train_loss']:.2f}"
        names = ("test_accuracy", "kernels", "maps1", "maps2", "edge_share")
        ends = {name: "{:.2f} to {:.2f}".format(*one["seeds"][name]) for name in names}
        rows.append((one["epoch"], loss, *(f"{one[name]:.2f} ({ends[name]})" for name in names)))
    return markdown(head, rows)


def _drawn(corpus: Corpus, learner: Learner, states: list[Any]) -> Figure:
    image = corpus.test.images[len(corpus.test) * 3 // 10 : len(corpus.test) * 3 // 10 + 1]  # A cat.
    picture, tiles = grid(len(states), 13)
    for epoch, model in enumerate(states):
        tiles[epoch, 0].imshow(image[0].permute(1, 2, 0).numpy())
        tiles[epoch, 0].set_ylabel(f"epoch {epoch}", fontsize=7)
        kernels = model.conv1.weight.detach()
        maps = maps_of(model, normalise(image, learner.preprocessing))[0][0]
        for place in range(6):
            kernel = kernels[place].permute(1, 2, 0)
            tiles[epoch, place + 1].imshow((kernel / (2 * kernel.abs().max()) + 0.5).clamp(0, 1).numpy())
            tiles[epoch, place + 7].imshow(maps[place].numpy(), cmap="gray")
    return picture
