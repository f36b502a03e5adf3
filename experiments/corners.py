"""Do the maps of `digits` highlight the edges and corners of a digit, as its document says?

A map highlights a place if its cells differ more from the map of a black picture there than elsewhere on the digit.
Where a digit has edges and corners is computed from the pixels: from the brightness gradients g of the four 2×2 squares
in a 3×3 window, by the eigenvalues of Σ g gᵀ. One is large at an edge; both are large at a corner.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from convscope import Client
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import nn

from experiments import service
from experiments.experiment import Figures, Result, Setting, interval, markdown, predictions, shown
from experiments.learning import digits
from training import data
from training.recipes import RECIPES
from training.run import Plan, Run, input_of

SHARE = 0.25  # Share of a digit's windows that count as its edges, and as its corners.
KINDS = ("trained", "untrained")
NAMES = {
    "edges": "the hand-set edge kernel (`edges`)",
    "brightness": "the mean of each 3×3 window",
    "trained": "`digits`",
    "untrained": "`digits`, untrained",
}


def run(setting: Setting) -> Result:
    """Compare the maps of trained and untrained networks at edges, at corners and everywhere on the digits."""
    images = list(digits(test=setting.size(1000, 20)).test.images[:, 0].numpy())
    seeds = range(setting.size(3, 1))
    twins = {f"digits-untrained-{seed}": service.first_weights("digits", seed) for seed in seeds}
    twins |= {f"digits-trained-{seed}": _trained(setting.store, seed) for seed in seeds}
    with setting.client("edges", twins=twins) as client:
        responses = {name: _responses(client, name, images) for name in (*twins, "edges")}
    responses["brightness"] = [sliding_window_view(image, (3, 3)).mean((2, 3))[None] / 255 for image in images]
    found = {name: _highlights(images, each) for name, each in responses.items()}
    for kind in KINDS:
        found[kind] = np.mean([found[f"digits-{kind}-{seed}"] for seed in seeds], axis=0)
    rows: dict[str, Figures] = {
        name: {where: interval(found[name][:, place]) for place, where in enumerate(("edges", "corners"))}
        for name in NAMES
    }
    difference = found["trained"] - found["untrained"]
    figures: Figures = {
        "pictures": len(images),
        "seeds": len(seeds),
        "rows": rows,
        "trained_minus_untrained": {
            where: interval(difference[:, place]) for place, where in enumerate(("edges", "corners"))
        },
    }
    return Result(figures)


def _trained(store: Path, seed: int) -> nn.Module:
    """Return `digits` as it is served (seed 0), or trained by the same recipe with another seed."""
    if not seed:
        return service.trained(store, "digits")
    training = Run(
        Plan("digits", RECIPES["digits"], seed), data.load("digits", input_of("digits")), torch.device("cpu")
    )
    while not training.done:
        training.advance()
    return training.model.eval()


def _responses(client: Client, model: str, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Return how far the maps of each picture are from those of a black one, (C, 26, 26), at least 0."""
    found = []
    [black] = client.predict([np.zeros_like(images[0])], model=model, layers="conv1")
    for one in predictions(client, images, model=model, layers="conv1"):
        response = abs(one.maps["conv1"] - black.maps["conv1"])
        border = (response.shape[1] - 26) // 2  # `edges` pads its pictures, `digits` does not.
        found.append(response[:, border : border + 26, border : border + 26])
    return found


def eigenvalues(image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the eigenvalues of Σ g gᵀ in each 3×3 window of a picture (H, W), each (H - 2, W - 2): larger, smaller."""
    squares = sliding_window_view(image / 255, (2, 2))  # (H - 1, W - 1, 2, 2)
    down = squares[:, :, 1].mean(2) - squares[:, :, 0].mean(2)
    right = squares[:, :, :, 1].mean(2) - squares[:, :, :, 0].mean(2)
    xx, xy, yy = (sliding_window_view(each, (2, 2)).sum((2, 3)) for each in (right**2, right * down, down**2))
    middle, reach = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    return middle + reach, middle - reach


def _highlights(images: list[NDArray[np.uint8]], responses: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the mean response at edges and at corners, divided by that on the whole digit; over channels, (N, 2)."""
    found = []
    for image, response in zip(images, responses, strict=True):
        larger, smaller = eigenvalues(image)
        is_digit = sliding_window_view(image, (3, 3)).any((2, 3))
        everywhere = response[:, is_digit].mean(1)
        row = []
        for strength in (larger - smaller, smaller):
            is_place = is_digit & (strength >= np.quantile(strength[is_digit], 1 - SHARE))
            row.append(float((response[:, is_place].mean(1) / everywhere).mean()))
        found.append(row)
    return np.array(found)


def table(figures: Figures) -> str:
    """Return the table."""
    rows = [
        (NAMES[name], *(shown(row[where]) for where in ("edges", "corners"))) for name, row in figures["rows"].items()
    ]
    minus = [shown(figures["trained_minus_untrained"][where]) for where in ("edges", "corners")]
    rows.append(("`digits`, trained minus untrained", *minus))
    return markdown(("maps", "at edges, times the digit's mean", "at corners"), rows)
