"""Attention, a counter-example: a layer that looks everywhere at once, and what that costs.

The plain network of `reach`, whose cells see 7×7 pixels, is compared with one that has a 3×3 convolution and a single
self-attention layer with relative positions (on a picture whose edges meet). The task is that of `reach`, on smaller
pictures: d is at most 8 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.experiment import Figures, Result, Setting, markdown
from experiments.reach import PLAIN, Window, learn

SIDE = 16


class Attention(nn.Module):
    """Self-attention over all cells: each cell takes a weighted mean of all, weighted by content and by offset.

    Args:
        channels: Number of channels of the maps.
        side: Side of the maps; 0 for no positions at all.
    """

    which: Tensor

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(channels, channels) for _ in range(3))
        self.offsets = nn.Parameter(torch.randn(side * side)) if side else None
        if side:
            row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
            down, right = (place[None, :] - place[:, None] for place in (row, column))
            self.register_buffer("which", (down % side) * side + right % side)  # (cells, cells)

    def forward(self, cells: Tensor) -> Tensor:
        """Return (N, cells, C) of the same."""
        scores = self.queries(cells) @ self.keys(cells).transpose(1, 2) / math.sqrt(cells.shape[2])
        if self.offsets is not None:
            scores = scores + self.offsets[self.which]
        mixed: Tensor = scores.softmax(2) @ self.values(cells)
        return mixed


class Everywhere(nn.Module):
    """A 3×3 convolution, self-attention, one hidden layer in each cell; the sum of each channel decides."""

    def __init__(self, channels: int = 16, side: int = SIDE) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, padding_mode="circular", bias=False)
        self.attention = Attention(channels, side)
        self.hidden = nn.Linear(channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 2) of pictures (N, 1, side, side)."""
        cells = self.conv(images).flatten(2).transpose(1, 2)  # (N, side², C)
        cells = self.hidden(cells + self.attention(cells)).relu()
        logits: Tensor = self.fc(self.norm(cells.sum(1)))
        return logits


def run(setting: Setting) -> Result:
    """Train both, and compare the reach of a cell, the effect of order, and the cost of a larger picture."""
    tasks = []
    for distance in setting.size((2, 6, 7, 8), (8,)):
        found: dict[str, list[float]] = {"convolutions": [], "attention": []}
        for seed in range(setting.size(3, 1)):
            for name, values in found.items():
                torch.manual_seed(seed)
                model = Window(PLAIN) if name == "convolutions" else Everywhere()
                steps = setting.size(300, 20)
                values.append(round(learn(model, distance, seed, steps, SIDE, setting.size(500, 100)), 4))
        tasks.append({"distance": distance, **found})
    figures: Figures = {"tasks": tasks, "tested": setting.size(500, 100), "layers": _layers()}
    return Result(figures)


def _layers() -> list[Figures]:
    """Return facts of one untrained layer of each kind, 16 channels, on maps of 16×16 and 32×32 cells."""
    torch.manual_seed(0)
    channels, cells = 16, SIDE * SIDE
    conv = nn.Conv2d(channels, channels, 3, padding=1)

    def convolved(maps: Tensor) -> Tensor:
        made: Tensor = conv(torch.unflatten(maps.transpose(1, 2), 2, (SIDE, SIDE)))
        return made.flatten(2).transpose(1, 2)

    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "3×3 convolution": convolved,
        "attention, no positions": Attention(channels, 0),
    }
    maps = torch.randn(1, cells, channels, requires_grad=True)
    order = torch.randperm(cells)
    found = []
    for name, layer in layers.items():
        [slope] = torch.autograd.grad(layer(maps)[0, cells // 2 + SIDE // 2].sum(), maps)
        with torch.inference_mode():
            expected = layer(maps)[:, order]
            shuffled = float((layer(maps[:, order]) - expected).norm() / expected.norm())
        is_conv = name.startswith("3")
        found.append(
            {
                "layer": name,
                "cells_seen": int((slope[0].abs().sum(1) > 0).sum()),
                "of": cells,
                "shuffled": float(f"{shuffled:.2g}"),
                "multiply_adds": [
                    9 * channels**2 * side**2 if is_conv else 3 * channels**2 * side**2 + 2 * channels * side**4
                    for side in (16, 32)
                ],
            }
        )
    return found


def table(figures: Figures) -> str:
    """Return the tables."""
    rows = [
        (one["distance"], *(", ".join(f"{value:.2f}" for value in one[name]) for name in ("convolutions", "attention")))
        for one in figures["tasks"]
    ]
    layers = [
        (
            one["layer"],
            f"{one['cells_seen']} of {one['of']}",
            f"{one['shuffled']:g}",
            *(f"{count:,}" for count in one["multiply_adds"]),
        )
        for one in figures["layers"]
    ]
    head = ("layer of 16 channels", "a cell sees", "distance, cells shuffled", "multiply-adds, 16×16", "32×32")
    tasks = markdown(("d", "three 3×3 convolutions (7×7)", "one convolution, one attention"), rows)
    return "\n\n".join([tasks, markdown(head, layers)])
