"""Before and after the ReLU: what it sets to 0, whether that was of use, and what two convolutions are without it.

Without a non-linearity between them, two convolutions are one with a larger kernel. That is computed for the weights of
the served `simple`. What it is worth is shown by trainings: `cifar` with its ReLU, without it, and without it and with
an average instead of the largest value in its pool, which makes the whole network linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from experiments import service
from experiments.experiment import Figures, Result, Setting, grid, interval, markdown, shown
from experiments.learning import INPUT, Learner, colour, files, pixels, recipe_of
from experiments.transfer import classify
from handlers.images.preprocessing import normalise
from handlers.networks import Cifar
from training.corpus import Corpus

TWINS = {
    "ReLU, largest of 2×2": (nn.ReLU, nn.MaxPool2d),
    "no ReLU, largest of 2×2": (nn.Identity, nn.MaxPool2d),
    "no ReLU, average of 2×2": (nn.Identity, nn.AvgPool2d),
}


def composed(first: nn.Conv2d, second: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return the kernel and the bias of the one convolution that equals two 3×3 convolutions without padding.

    Returns:
        (C_out, C_in, 5, 5) and (C_out,).
    """
    turned = first.weight.permute(1, 0, 2, 3)  # (C_in, C_middle, 3, 3): its kernels are the pictures here.
    kernel = conv2d(turned, second.weight.flip(2, 3), padding=2).permute(1, 0, 2, 3)
    assert first.bias is not None  # noqa: S101  # Both are convolutions of ours.
    assert second.bias is not None  # noqa: S101
    return kernel, second.bias + second.weight.sum((2, 3)) @ first.bias


@torch.no_grad()
def run(setting: Setting) -> Result:
    """Compose two convolutions, count what is below 0, and train the twins."""
    chosen = files(setting.pictures, "test", setting.size(100, 1))
    images = torch.stack([torch.from_numpy(pixels(path).copy()).permute(2, 0, 1) for path, _ in chosen])
    normal = normalise(images, INPUT)
    network: Any = service.trained(setting.store, "simple")
    first, second = network.conv1, network.conv2
    kernel, bias = composed(first, second)
    plain = conv2d(normal, first.weight, first.bias)  # Without padding, so that the border plays no part.
    expected = conv2d(normal, kernel, bias)
    figures: Figures = {
        "pictures": len(chosen),
        "kernel": list(kernel.shape),
        "weights": [first.weight.numel() + second.weight.numel(), kernel.numel()],
        "distance": {
            "without ReLU": _distance(conv2d(plain, second.weight, second.bias), expected),
            "with ReLU": _distance(conv2d(plain.relu(), second.weight, second.bias), expected),
        },
        "below_0": {},
    }
    before = {}
    for name in ("simple", "cifar"):
        twins: dict[str, Any] = {
            "trained": service.trained(setting.store, name),
            "untrained": service.first_weights(name),
        }
        for kind, model in twins.items():
            maps = model.conv1(normal)
            before[name, kind] = maps
            figures["below_0"][f"{name}, {kind}"] = interval((maps < 0).double().mean((1, 2, 3)).numpy())
    corpus = colour(setting.pictures, setting.size(100, 2), setting.size(100, 2))
    figures["parts"] = {
        "trained": _parts(service.trained(setting.store, "cifar"), corpus),
        "untrained": _parts(service.first_weights("cifar"), corpus),
    }
    with torch.enable_grad():
        figures["twins"] = _twins(setting, corpus)
    return Result(figures, _drawn(images[0], before["cifar", "trained"][0]))


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(f"{float((found - expected).norm() / expected.norm()):.2g}")


def _parts(model: Any, corpus: Corpus) -> Figures:
    """Return how well a linear classifier tells classes by what the first ReLU keeps, by what it drops, and by both.

    Maps are averaged to 4×4 cells.
    """

    def halves(images: Tensor) -> dict[str, np.ndarray]:
        before = model.conv1(normalise(images, INPUT))
        kept, dropped = (adaptive_avg_pool2d(part.relu(), 4).flatten(1).double().numpy() for part in (before, -before))
        return {"kept": kept, "dropped": dropped, "both": np.concatenate([kept, dropped], 1)}

    known, asked = halves(corpus.train.images), halves(corpus.test.images)
    labels, expected = corpus.train.labels.numpy(), corpus.test.labels.numpy()
    right = {name: (classify(known[name], labels, asked[name]) == expected).astype(float) for name in known}
    found: Figures = {name: interval(values) for name, values in right.items()}
    return found | {"dropped_minus_kept": interval(right["dropped"] - right["kept"])}


def _twins(setting: Setting, corpus: Corpus) -> list[Figures]:
    found = []
    right: dict[str, np.ndarray] = {}
    for name, (activation, pool) in TWINS.items():
        values = []
        for seed in range(setting.size(3, 1)):
            torch.manual_seed(seed)
            model = Cifar()
            model.relu1, model.pool1 = activation(), pool(2)  # type: ignore[assignment]
            learner = Learner(model, corpus, recipe_of(setting.size(4, 1), 0.001, 64), seed)
            learner.epochs()
            values.append(learner.right())
        right[name] = np.mean(values, axis=0)
        difference = interval(right[name] - right[next(iter(TWINS))])
        found.append({"twin": name, "seeds": len(values), "accuracy": interval(right[name]), "difference": difference})
    return found


def table(figures: Figures) -> str:
    """Return the tables."""
    distances = [(name, f"{value:g}") for name, value in figures["distance"].items()]
    below = [(name, shown(values)) for name, values in figures["below_0"].items()]
    parts = [
        (kind, *(shown(one[name], 3) for name in ("kept", "dropped", "both", "dropped_minus_kept")))
        for kind, one in figures["parts"].items()
    ]
    twins = [(one["twin"], shown(one["accuracy"], 3), shown(one["difference"], 3)) for one in figures["twins"]]
    return "\n\n".join(
        [
            markdown(("two convolutions of `simple`", "distance from the one composed convolution"), distances),
            markdown(("`conv1` before its ReLU", "share of cells below 0"), below),
            markdown(
                (
                    "`conv1` of `cifar`",
                    "accuracy by what the ReLU keeps",
                    "by what it drops",
                    "by both",
                    "drops - keeps",
                ),
                parts,
            ),
            markdown(("`cifar`, trained with", "accuracy", "minus the first"), twins),
        ]
    )


def _drawn(image: Tensor, before: Tensor) -> Figure:
    picture, tiles = grid(2, 9, height=0.75)
    for row, maps in enumerate((before, before.relu())):
        tiles[row, 0].imshow(image.permute(1, 2, 0).numpy())
        for place in range(8):
            largest = float(before[place].abs().max())
            tiles[row, place + 1].imshow(maps[place].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
    tiles[0, 0].set_ylabel("before", fontsize=8)
    tiles[1, 0].set_ylabel("after", fontsize=8)
    return picture
