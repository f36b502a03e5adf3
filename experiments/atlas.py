"""The patch atlas: what every block of `deep` answers to most, beside its untrained twin.

For every channel the nine test pictures with its largest cells are found, one patch each. How many of the nine are of
one class is the channel's purity. The picture shows the purest channels of each block, chosen the same way in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from convscope import Client
from convscope_lens import cut_patch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.experiment import Figures, Result, Setting, grid, interval, markdown, shown
from experiments.learning import CLASSES, files, pixels

TOP = 9
CHANNELS, PATCHES = 3, 3  # Shown of each block and network.
BATCH = 20
MODELS = ("deep", "deep-untrained")


def run(setting: Setting) -> Result:
    """Find the strongest cells of every channel of every block."""
    chosen = files(setting.pictures, "test", setting.size(30, 2))
    labels = np.array([label for _, label in chosen])
    images = [pixels(path) for path, _ in chosen]
    figures: Figures = {"pictures": len(chosen), "top": min(TOP, len(chosen)), "layers": []}
    shown_tiles: dict[str, dict[str, list[Any]]] = {}
    with setting.client("deep", untrained=["deep"]) as client:
        layers = [layer.name for layer in client.model_card("deep").layers]
        layers = setting.size(layers, ["block1", "block7"])
        found = {model: _strongest(client, model, images, layers) for model in MODELS}
        for layer in layers:
            row: Figures = {"layer": layer, "channels": found["deep"][layer][0].shape[1]}
            for model in MODELS:
                purity, best = purities(found[model][layer][0], labels)
                row[model] = interval(purity)
                pure = np.argsort(-purity, kind="stable")[:CHANNELS]
                row[f"{model}_shown"] = [
                    {
                        "channel": int(channel),
                        "purity": int(purity[channel]),
                        "class": CLASSES[int(np.bincount(labels[best[channel]], minlength=10).argmax())],
                    }
                    for channel in pure
                ]
                cells = found[model][layer][1]
                shown_tiles.setdefault(layer, {})[model] = [
                    _tiles(client, model, layer, int(channel), best[channel], cells, images) for channel in pure
                ]
            figures["layers"].append(row)
    with setting.client("cifar", untrained=["cifar"]) as client:
        for model in ("cifar", "cifar-untrained"):
            strongest = _strongest(client, model, images, ["conv1", "conv2"])
            figures[model] = {layer: interval(purities(values, labels)[0]) for layer, (values, _) in strongest.items()}
    figures["chance"] = chance(labels, figures["top"])
    return Result(figures, _drawn(shown_tiles))


def purities(values: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each channel, how many of its strongest pictures are of one class, and which pictures these are.

    Args:
        values: Largest cell of each picture and channel, (N, C).
        labels: Class of each picture, (N,).

    Returns:
        (C,), 1 to 9; and (C, 9), indexes of pictures, strongest first.
    """
    best = np.argsort(-values, axis=0, kind="stable")[:TOP].T  # (C, 9)
    purity = np.array([np.bincount(labels[pictures]).max() for pictures in best])
    return purity, best


def chance(labels: NDArray[np.int64], top: int) -> float:
    """Return the purity of pictures that are drawn at random: the mean of 2,000 draws."""
    rng = np.random.default_rng(0)
    return round(float(np.mean([np.bincount(rng.choice(labels, top, replace=False)).max() for _ in range(2000)])), 2)


def _strongest(
    client: Client, model: str, images: list[NDArray[np.uint8]], layers: list[str]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return by layer the largest cell of each picture and channel, (N, C), and its place in the flat map, (N, C)."""
    values: dict[str, list[Any]] = {layer: [] for layer in layers}
    places: dict[str, list[Any]] = {layer: [] for layer in layers}
    for start in range(0, len(images), BATCH):
        for one in client.predict(images[start : start + BATCH], model=model, layers=layers, top_k=1):
            for layer in layers:
                cells = one.maps[layer].reshape(len(one.maps[layer]), -1)
                places[layer].append(cells.argmax(1))
                values[layer].append(cells.max(1))
    return {layer: (np.stack(values[layer]), np.stack(places[layer])) for layer in layers}


def _tiles(
    client: Client,
    model: str,
    layer: str,
    channel: int,
    best: NDArray[np.int64],
    cells: NDArray[np.int64],
    images: list[NDArray[np.uint8]],
) -> list[Any]:
    """Return the strongest patches of a channel, the picture of the strongest, and the channel's map of it."""
    card = client.model_card(model).layer(layer)
    patches = []
    for picture in best[:PATCHES]:
        cell = divmod(int(cells[picture, channel]), card.shape[2])
        image = images[picture].transpose(2, 0, 1).astype(np.float32) / 255
        patches.append(cut_patch(image, card, cell, channel=channel).pixels)
    heat = client.predict(images[best[0]], model=model, layers=layer, channels=[channel]).maps[layer][0]
    return [*patches, (images[best[0]], heat)]


def table(figures: Figures) -> str:
    """Return the table."""
    rows = []
    for row in figures["layers"]:
        classes = ", ".join(f"{one['class']} {one['purity']}" for one in row["deep_shown"])
        rows.append((row["layer"], row["channels"], *(shown(row[model], 1) for model in MODELS), classes))
    for layer in ("conv1", "conv2"):
        values = (figures[model][layer] for model in ("cifar", "cifar-untrained"))
        rows.append((f"`cifar`, {layer}", figures["cifar"][layer]["n"], *(shown(one, 1) for one in values), ""))
    rows.append(("pictures at random", "", figures["chance"], figures["chance"], ""))
    return markdown(("block", "channels", "purity, trained", "untrained", "purest channels, trained"), rows)


def _drawn(tiles: dict[str, dict[str, list[Any]]]) -> Figure:
    width = CHANNELS * (PATCHES + 1)
    picture, axes = grid(len(tiles), 2 * width + 1, width=0.46, height=0.5)
    for tile in axes[:, width]:
        tile.set_axis_off()
    for line, (layer, models) in zip(axes, tiles.items(), strict=True):
        line[0].set_ylabel(layer, fontsize=6)
        for side, model in enumerate(MODELS):
            for number, channel in enumerate(models[model]):
                place = side * (width + 1) + number * (PATCHES + 1)
                *patches, (image, heat) = channel
                for offset, patch in enumerate(patches):
                    line[place + offset].imshow(patch)
                tile = line[place + PATCHES]
                height, breadth = image.shape[:2]
                tile.imshow(image.mean(2), cmap="gray")
                extent = (-0.5, breadth - 0.5, height - 0.5, -0.5)
                tile.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest")
    axes[0, 0].set_title("trained", fontsize=7, loc="left")
    axes[0, width + 1].set_title("untrained", fontsize=7, loc="left")
    return picture
