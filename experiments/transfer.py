"""Transfer: what `deep` learned on photographs, used for handwritten digits.

The service gives the embeddings (`pool=4`) of a hundred labelled digits from every block; a linear classifier reads
them. Beside it: the same from the untrained twin, and the pixels themselves.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.experiment import Figures, Result, Setting, embeddings, interval, markdown, plot, shown
from experiments.learning import digits

POOL = 4


def classify(
    train: NDArray[np.float64], labels: NDArray[np.int64], test: NDArray[np.float64], classes: int = 10
) -> NDArray[np.int64]:
    """Return the classes of test vectors by ridge regression on one-hot labels.

    Features are brought to mean 0 and deviation 1 on the training vectors; λ is the number of features, so that no
    feature set is favoured by its size.
    """
    mean, spread = train.mean(0), train.std(0)
    known, asked = ((part - mean) / np.where(spread > 0, spread, 1) for part in (train, test))
    targets = np.eye(classes)[labels] - 1 / classes
    weights = np.linalg.solve(known @ known.T + known.shape[1] * np.eye(len(known)), targets)
    answers: NDArray[np.int64] = (asked @ (known.T @ weights)).argmax(1)
    return answers


def run(setting: Setting) -> Result:
    """Embed digits by both networks, and classify them."""
    corpus = digits(setting.size(100, 30), setting.size(1000, 20))
    pictures = [
        np.repeat(images.permute(0, 2, 3, 1).numpy(), 3, axis=3) for images in (corpus.train.images, corpus.test.images)
    ]
    labels, expected = corpus.train.labels.numpy(), corpus.test.labels.numpy()
    layers = setting.size([f"block{number}" for number in range(1, 8)], ["block1", "block4"])
    right = {}
    with setting.client("deep", untrained=["deep"]) as client:
        for name in ("deep", "deep-untrained"):
            train, test = (embeddings(client, name, list(some), layers, POOL) for some in pictures)
            right[name] = {layer: classify(train[layer], labels, test[layer]) == expected for layer in layers}
    flat = [some[:, :, :, 0].reshape(len(some), -1) / 255 for some in pictures]
    on_pixels = (classify(flat[0], labels, flat[1]) == expected).astype(float)
    figures: Figures = {
        "train_pictures": len(labels),
        "test_pictures": len(expected),
        "pixels": interval(on_pixels),
        "layers": [
            {
                "layer": layer,
                "trained": interval(right["deep"][layer].astype(float)),
                "untrained": interval(right["deep-untrained"][layer].astype(float)),
                "minus_untrained": interval(right["deep"][layer] - right["deep-untrained"][layer].astype(float)),
                "minus_pixels": interval(right["deep"][layer] - on_pixels),
            }
            for layer in layers
        ],
    }
    return Result(figures, _drawn(figures))


def table(figures: Figures) -> str:
    """Return the table."""
    names = ("trained", "untrained", "minus_untrained", "minus_pixels")
    rows: list[tuple[object, ...]] = [("pixels", shown(figures["pixels"], 3), "", "", "")]
    rows += [(one["layer"], *(shown(one[name], 3) for name in names)) for one in figures["layers"]]
    return markdown(("features", "trained", "untrained twin", "trained minus untrained", "trained minus pixels"), rows)


def _drawn(figures: Figures) -> Figure:
    picture, [axes] = plot(5.5, 3)
    places = np.arange(len(figures["layers"]))
    for name, colour in (("trained", "#1f5fa8"), ("untrained", "#d1642f")):
        means = [one[name]["mean"] for one in figures["layers"]]
        ends = [[abs(one[name]["mean"] - one[name][end]) for one in figures["layers"]] for end in ("low", "high")]
        axes.errorbar(places, means, ends, fmt="o-", color=colour, label=name, capsize=3, markersize=4)
    axes.axhline(figures["pixels"]["mean"], color="0.4", linestyle="--", label="pixels")
    axes.set_xticks(places, [one["layer"] for one in figures["layers"]])
    axes.set_ylabel("accuracy on digits")
    axes.legend(fontsize=8)
    return picture
