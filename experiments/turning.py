"""A layer that follows turns by 90°, beside one that does not.

A p4 convolution (Cohen and Welling, "Group Equivariant Convolutional Networks", ICML 2016) applies each kernel in four
orientations. If the picture turns by 90°, its maps turn too and change places in their groups of four, exactly. The
largest of each group does not depend on the turn. The plain network has as many weights in its second convolution.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import conv2d

from experiments.experiment import Figures, Result, Setting, grid, interval, markdown, shown
from experiments.learning import Learner, digits, recipe_of
from training.corpus import Corpus, Split

TURNS = (0, 1, 2, 3)  # Times 90°, counter-clockwise.


class Lift(nn.Module):
    """The first p4 layer: each 3×3 kernel in four orientations, (N, C, H, W) to (N, filters, 4, h, w)."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(9 * channels)
        self.weight = nn.Parameter(torch.empty(filters, channels, 3, 3).uniform_(-bound, bound))

    def forward(self, images: Tensor) -> Tensor:
        """Filter pictures."""
        kernels = torch.stack([self.weight.rot90(turn, (2, 3)) for turn in TURNS], 1)  # (filters, 4, C, 3, 3)
        return torch.unflatten(conv2d(images, kernels.flatten(0, 1)), 1, (-1, 4))


class Turning(nn.Module):
    """A further p4 layer, (N, C, 4, h, w) to (N, filters, 4, h - 2, w - 2): a kernel sees all four orientations.

    Turning the kernel by 90° turns its windows and moves each of them on to the next orientation.
    """

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(36 * channels)
        self.weight = nn.Parameter(torch.empty(filters, channels, 4, 3, 3).uniform_(-bound, bound))

    def forward(self, maps: Tensor) -> Tensor:
        """Filter maps."""
        turned = [self.weight.rot90(turn, (3, 4)).roll(turn, 2) for turn in TURNS]
        kernels = torch.stack(turned, 1).flatten(2, 3).flatten(0, 1)  # (filters·4, C·4, 3, 3)
        return torch.unflatten(conv2d(maps.flatten(1, 2), kernels), 1, (-1, 4))


class Turned(nn.Module):
    """Two p4 layers, the largest of the four orientations, the mean over places, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.turning = Lift(1, 8), Turning(8, 16)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) of pictures (N, 1, 28, 28)."""
        first = self.lift(images).relu()  # (N, 8, 4, 26, 26)
        pooled = self.pool(first.flatten(1, 2)).unflatten(1, (8, 4))  # (N, 8, 4, 13, 13)
        second = self.turning(pooled).relu()  # (N, 16, 4, 11, 11)
        logits: Tensor = self.fc(self.norm(second.amax(2).mean((2, 3))))
        return logits


class Plain(nn.Module):
    """The same with plain convolutions: 16, then 32 filters, and as many weights in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, bias=False), nn.Conv2d(16, 32, 3, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm1d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) of pictures (N, 1, 28, 28)."""
        second = self.second(self.pool(self.first(images).relu())).relu()  # (N, 32, 11, 11)
        logits: Tensor = self.fc(self.norm(second.mean((2, 3))))
        return logits


def run(setting: Setting) -> Result:
    """Train both on upright digits, the plain one also on turned digits, and turn the test pictures."""
    corpus = digits(setting.size(1000, 60), setting.size(1000, 100))
    count = len(corpus.train) // 4
    parts = [corpus.train.images[turn * count : (turn + 1) * count].rot90(turn, (2, 3)) for turn in TURNS]
    labels = corpus.train.labels[: 4 * count]
    also_turned = Corpus(corpus.name, corpus.classes, Split(torch.cat(parts), labels), corpus.test)
    kinds = {
        "p4, upright digits": (Turned, corpus),
        "plain, upright digits": (Plain, corpus),
        "plain, turned digits": (Plain, also_turned),
    }
    networks = []
    right: dict[str, dict[int, np.ndarray]] = {}
    for name, (made, pictures) in kinds.items():
        found: dict[int, list[np.ndarray]] = {turn: [] for turn in TURNS}
        change = []
        for seed in range(setting.size(3, 1)):
            torch.manual_seed(seed)
            learner = Learner(made(), pictures, recipe_of(setting.size(6, 1), 0.01), seed)
            model = learner.epochs()
            for turn in TURNS:
                found[turn].append(learner.right(corpus.test.images.rot90(turn, (2, 3))))
            change.append(_change(model, corpus.test.images[:100].float() / 255))
        right[name] = {turn: np.mean(values, axis=0) for turn, values in found.items()}
        networks.append(
            {
                "network": name,
                "seeds": len(change),
                "parameters": sum(weights.numel() for weights in model.parameters()),
                "logits_change": float(f"{np.mean(change):.1g}"),
                "accuracy": {str(90 * turn): interval(values) for turn, values in right[name].items()},
            }
        )
    figures: Figures = {"train_pictures": len(corpus.train), "test_pictures": len(corpus.test), "networks": networks}
    first, second, *_ = right.values()
    figures["p4_minus_plain"] = {str(90 * turn): interval(first[turn] - second[turn]) for turn in TURNS}
    torch.manual_seed(0)
    figures["layer"] = layer_follows(corpus.test.images[:50].float() / 255)
    return Result(figures, _drawn(corpus.test.images[0:1].float() / 255))


@torch.inference_mode()
def _change(model: nn.Module, images: Tensor) -> float:
    """Return how far the logits change when pictures turn by 90°, relative to the logits."""
    before = model(images)
    return float((model(images.rot90(1, (2, 3))) - before).norm() / before.norm())


@torch.inference_mode()
def layer_follows(images: Tensor) -> Figures:
    """Return relative distances between the maps of turned pictures, turned back, and those of the pictures.

    Channel by channel a p4 layer looks as lost as any other: its maps have changed places. With the places that its
    structure says, nothing is left of the difference. `plain` has no such places.
    """
    lift, plain = Lift(1, 8), nn.Conv2d(1, 32, 3, bias=False)
    maps, turned = (lift(some) for some in (images, images.rot90(1, (2, 3))))
    back = turned.rot90(-1, (3, 4))
    was, now = plain(images), plain(images.rot90(1, (2, 3))).rot90(-1, (2, 3))
    distances = {
        "p4, channel by channel": (back, maps),
        "p4, each channel with the one that takes its place": (back.roll(-1, 2), maps),
        "plain, channel by channel": (now, was),
    }
    return {name: float(f"{float((a - b).norm() / b.norm()):.2g}") for name, (a, b) in distances.items()}


def table(figures: Figures) -> str:
    """Return the tables."""
    rows = [
        (
            one["network"],
            f"{one['parameters']:,}",
            *(shown(values) for values in one["accuracy"].values()),
            f"{one['logits_change']:g}",
        )
        for one in figures["networks"]
    ]
    head = ("network", "parameters", *(f"accuracy at {90 * turn}°" for turn in TURNS), "change of the logits at 90°")
    layers = [(name, f"{value:g}") for name, value in figures["layer"].items()]
    alone = markdown(("one untrained layer, pictures turned by 90°", "distance"), layers)
    return "\n\n".join([markdown(head, rows), alone])


@torch.inference_mode()
def _drawn(image: Tensor) -> Figure:
    torch.manual_seed(0)
    lift = Lift(1, 8)
    picture, tiles = grid(2, 5, width=1.0, height=1.0)
    for row, one in enumerate((image, image.rot90(1, (2, 3)))):
        tiles[row, 0].imshow(one[0, 0].numpy(), cmap="gray")
        for turn in TURNS:
            tiles[row, turn + 1].imshow(lift(one)[0, 1, turn].numpy(), cmap="RdBu_r")
            if not row:
                tiles[row, turn + 1].set_title(f"kernel at {90 * turn}°", fontsize=7)
    return picture
