"""What sharing weights saves, and what it generalises: a convolution beside its locally connected twin.

The twin has the same windows at the same places, but weights of their own at each place. Two tasks:

* *bars*: is a bar horizontal or vertical? All training pictures have it in the left half; half of the test pictures in
  the right one. The mean over all places decides.
* *digits*: the network `digits`, with few and many training pictures; a fully connected layer decides.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

from experiments.experiment import Figures, Result, Setting, interval, markdown, shown
from experiments.learning import Learner, digits, recipe_of
from handlers.networks import Digits

SIDE, BAR = 16, 5


class Local(nn.Module):
    """A 3×3 layer like `nn.Conv2d` that shares nothing: each place has weights and biases of its own.

    Args:
        channels: Number of channels of the input.
        filters: Number of channels of the output.
        size: (h, w) of the output.
        padding: Cells of zeros at each edge.
    """

    def __init__(self, channels: int, filters: int, size: tuple[int, int], padding: int = 0) -> None:
        super().__init__()
        self.size, self.padding = size, padding
        bound = 1 / math.sqrt(9 * channels)  # As nn.Conv2d draws its first weights and biases.
        places = size[0] * size[1]
        self.weight = nn.Parameter(torch.empty(places, 9 * channels, filters).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(filters, places).uniform_(-bound, bound))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, filters, h, w) of (N, C, H, W)."""
        windows = unfold(maps, 3, padding=self.padding).permute(2, 0, 1)  # (places, N, 9·C)
        summed = torch.bmm(windows, self.weight).permute(1, 2, 0) + self.bias  # (N, filters, places)
        return summed.reshape(len(maps), -1, *self.size)


class Bars(nn.Module):
    """Eight 3×3 filters, shared or not, ReLU, and the mean over all places."""

    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 8, 3, padding=1) if is_shared else Local(1, 8, (SIDE, SIDE), padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 2) of pictures (N, 1, 16, 16)."""
        logits: Tensor = self.fc(self.norm(self.filters(images).relu().mean((2, 3))))
        return logits


def draw(count: int, half: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pictures of one bar each, with noise of deviation 0.1: (N, 1, 16, 16); and 1 for a vertical one, (N,)."""
    is_vertical = torch.randint(0, 2, (count,), generator=generator)
    middle = SIDE // 4 if half == "left" else 3 * SIDE // 4
    rows = torch.randint(BAR // 2, SIDE - BAR // 2, (count,), generator=generator)
    columns = middle - 1 + torch.randint(0, 3, (count,), generator=generator)
    along, numbers = torch.arange(BAR) - BAR // 2, torch.arange(count)[:, None]
    down = along * is_vertical[:, None]
    images = 0.1 * torch.randn((count, 1, SIDE, SIDE), generator=generator)
    images[numbers, 0, rows[:, None] + down, columns[:, None] + along * (1 - is_vertical[:, None])] += 1
    return images, is_vertical


def run(setting: Setting) -> Result:
    """Train shared and unshared twins on both tasks."""
    figures: Figures = {"bars": _bars(setting), "digits": _digits(setting)}
    return Result(figures)


def _bars(setting: Setting) -> list[Figures]:
    found = []
    for is_shared in (True, False):
        accuracies: dict[str, list[float]] = {"left": [], "right": []}
        for seed in range(setting.size(3, 1)):
            torch.manual_seed(seed)
            model = Bars(is_shared)
            generator = torch.Generator().manual_seed(seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(setting.size(200, 60)):
                images, labels = draw(64, "left", generator)
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            model.eval()
            for half, values in accuracies.items():
                images, labels = draw(1000, half, torch.Generator().manual_seed(10_000 + seed))
                with torch.inference_mode():
                    values.append(round(float((model(images).argmax(1) == labels).double().mean()), 4))
        parameters = sum(weights.numel() for weights in model.filters.parameters())
        found.append({"is_shared": is_shared, "parameters": parameters, "tested": 1000, **accuracies})
    return found


def network(is_shared: bool) -> nn.Module:
    """Return `digits`, or its twin whose convolution shares nothing."""
    model = Digits()
    if not is_shared:
        model.conv1 = Local(1, 16, (26, 26))  # type: ignore[assignment]
    return model


def _digits(setting: Setting) -> list[Figures]:
    found = []
    for count in setting.size((50, 500), (50,)):
        corpus = digits(count, setting.size(1000, 200))
        steps = setting.size(200, 20)
        right: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for is_shared, values in right.items():
            for seed in range(setting.size(3, 1)):
                torch.manual_seed(seed)
                recipe = recipe_of(max(1, steps * 32 // count), 0.003)
                learner = Learner(network(is_shared), corpus, recipe, seed)
                learner.epochs()
                values.append(learner.right())
        shared, unshared = (np.mean(values, axis=0) for values in right.values())
        found.append(
            {
                "train_pictures": count,
                "seeds": len(right[True]),
                "shared": interval(shared),
                "unshared": interval(unshared),
                "difference": interval(shared - unshared),
            }
        )
    return found


def table(figures: Figures) -> str:
    """Return the tables."""
    bars = [
        (
            "shared" if one["is_shared"] else "own weights at each place",
            f"{one['parameters']:,}",
            *(", ".join(f"{value:.2f}" for value in one[half]) for half in ("left", "right")),
        )
        for one in figures["bars"]
    ]
    numbers = [
        (f"{one['train_pictures']:,}", *(shown(one[name], 3) for name in ("shared", "unshared", "difference")))
        for one in figures["digits"]
    ]
    return "\n\n".join(
        [
            markdown(("bars: 3×3 filters", "parameters", "left, where learned", "right, never shown"), bars),
            markdown(("digits: training pictures", "shared", "own weights at each place", "difference"), numbers),
        ]
    )
