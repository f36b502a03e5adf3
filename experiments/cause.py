"""Cause, not correlation: silence the channels most selective for a class, while the network runs.

A channel is selective for a class if its mean activation is larger for that class than for the others. That is a
correlation. Whether the network uses the channel is another question: the service sets its map to 0 (`edits`), and the
class's probability falls or does not. Channels are chosen on training pictures and tested on test pictures, beside as
many channels drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from convscope import Client, Edit
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.experiment import (
    Figures,
    Result,
    Setting,
    embeddings,
    interval,
    markdown,
    plot,
    predictions,
    shown,
)
from experiments.learning import CLASSES, files

MODEL = "deep"
SHARE = 0.1  # Share of a layer's channels that are silenced.
KINDS = {"own": "its own class", "others": "other classes", "random": "its own class, random channels"}


def run(setting: Setting) -> Result:
    """Silence channels of every block, for every class."""
    chosen = files(setting.pictures, "train", setting.size(50, 2))
    tested = files(setting.pictures, "test", setting.size(50, 2))
    layers = setting.size([f"block{number}" for number in range(1, 8)], ["block1", "block6"])
    classes = setting.size(range(10), range(2))
    draws = setting.size(2, 1)
    rng = np.random.default_rng(0)
    with setting.client(MODEL) as client:
        sizes = {layer.name: layer.shape[0] for layer in client.model_card(MODEL).layers}
        by_layer = embeddings(client, MODEL, [path for path, _ in chosen], layers)
        labels = np.array([label for _, label in chosen])
        paths = [path for path, _ in tested]
        before = dict(zip(paths, probabilities(client, paths), strict=True))
        rows = []
        for layer in layers:
            count = max(1, round(SHARE * sizes[layer]))
            changes: dict[str, list[float]] = {name: [] for name in KINDS}
            for index in classes:
                best = selective(by_layer[layer], labels == index)[:count]
                own = [path for path, label in tested if label == index]
                others = [(path, label) for path, label in tested if label != index]
                others = others[index % 9 :: max(1, len(others) // len(own))][: len(own)]
                seen = probabilities(client, [*own, *(path for path, _ in others)], layer, best)
                changes["own"] += [after[index] - before[path][index] for path, after in zip(own, seen, strict=False)]
                changes["others"] += [
                    after[label] - before[path][label]
                    for (path, label), after in zip(others, seen[len(own) :], strict=True)
                ]
                rest = np.setdiff1d(np.arange(sizes[layer]), best)
                picks = [rng.choice(rest, count, replace=False).tolist() for _ in range(draws)]
                drawn = [probabilities(client, own, layer, pick) for pick in picks]
                mean = np.mean(drawn, axis=0)
                changes["random"] += [after[index] - before[path][index] for path, after in zip(own, mean, strict=True)]
            contrast = np.subtract(changes["own"], changes["random"])
            rows.append(
                {"layer": layer, "channels": count, "of": sizes[layer], "difference": interval(contrast)}
                | {name: interval(values) for name, values in changes.items()}
            )
    figures: Figures = {
        "model": MODEL,
        "selection_pictures": len(chosen),
        "test_pictures": len(tested),
        "random_draws": draws,
        "layers": rows,
    }
    return Result(figures, _drawn(figures))


def selective(embeddings: NDArray[np.float64], of_class: NDArray[np.bool_]) -> list[int]:
    """Return channels, the most selective for a class first.

    Args:
        embeddings: Mean activations, (N, C).
        of_class: Whether each picture is of the class, (N,).

    Returns:
        Indexes by d' = (mean of the class - mean of the rest) / standard deviation over all, largest first.
    """
    spread = embeddings.std(0) + 1e-12
    ratio = (embeddings[of_class].mean(0) - embeddings[~of_class].mean(0)) / spread
    return [int(channel) for channel in np.argsort(-ratio, kind="stable")]


def probabilities(
    client: Client, paths: Sequence[Any], layer: str = "", silenced: Sequence[int] = ()
) -> NDArray[np.float64]:
    """Return the probability of each class, (N, K), with some channels of a layer set to 0."""
    found = np.zeros((len(paths), len(CLASSES)))
    edits = [Edit(layer=layer, operation="zero", channels=tuple(silenced))] if silenced else []
    for place, one in enumerate(predictions(client, paths, model=MODEL, top_k=0, edits=edits)):
        for score in one.top:
            found[place, score.index] = score.probability
    return found


def table(figures: Figures) -> str:
    """Return the table."""
    rows = [
        (f"{row['layer']} ({row['channels']} of {row['of']})", *(shown(row[name]) for name in (*KINDS, "difference")))
        for row in figures["layers"]
    ]
    return markdown(("silenced", *KINDS.values(), "selective minus random"), rows)


def _drawn(figures: Figures) -> Figure:
    picture, [axes] = plot(6, 3)
    places = np.arange(len(figures["layers"]))
    for name, colour in zip(KINDS, ("#d1642f", "#1f5fa8", "#888888"), strict=True):
        means = [row[name]["mean"] for row in figures["layers"]]
        ends = [[row[name]["mean"] - row[name]["low"] for row in figures["layers"]]]
        ends.append([row[name]["high"] - row[name]["mean"] for row in figures["layers"]])
        axes.errorbar(places, means, ends, fmt="o-", color=colour, label=KINDS[name], capsize=3, markersize=4)
    axes.set_xticks(places, [row["layer"] for row in figures["layers"]])
    axes.set_ylabel("change of the probability\nof the right class")
    axes.axhline(0, color="0.5", linewidth=1)
    axes.legend()
    return picture
