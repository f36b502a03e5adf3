"""The patch atlas: what every block of `deep` answers to most, beside its untrained twin.

For every channel the nine test pictures with its largest cells are found, one patch each. How many of the nine are of
one class is the channel's purity. The picture shows the purest channels of each block, chosen the same way in both: the
patches, and where in each the cell looks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from convscope import Client, Layer
from convscope_lens import cut_patch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import nn

from experiments import service
from experiments.experiment import Figures, Result, Setting, interval, markdown, shown
from experiments.learning import CLASSES, files, pixels
from experiments.relu import NORMAL
from handlers.images.preprocessing import to_input
from handlers.network.engines.eager import Eager
from handlers.outputs.explanation_methods import occlusion

TOP = 9
CHANNELS, PATCHES = 3, 3  # Shown of each block and network.
BATCH = 20
MODELS = ("deep", "deep-untrained")
LAYERS = tuple(f"block{number}" for number in range(1, 8))
Tile = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A patch (h, w, 3) and its heat (h, w)."""


def run(setting: Setting) -> Result:
    """Find the strongest cells of every channel of every block."""
    chosen = files(setting.pictures, "test", setting.size(100, 2))
    all_labels = np.array([label for _, label in chosen])
    all_images = [pixels(path) for path, _ in chosen]
    labels, images = all_labels[::2], all_images[::2]  # Half of them for `deep`, which takes a hundred times the work.
    top = min(TOP, len(images))
    figures: Figures = {"pictures": {"deep": len(images), "cifar": len(all_images)}, "top": top, "layers": []}
    tiles: dict[str, dict[str, list[tuple[str, list[Tile]]]]] = {}
    looking = {"deep": Looking(service.trained(setting.store, "deep"))}
    looking["deep-untrained"] = Looking(service.first_weights("deep"))
    with setting.client("deep", untrained=["deep"]) as client:
        card = client.model_card("deep")
        layers = setting.size(list(LAYERS), ["block1", "block7"])
        found = {model: _strongest(client, model, images, layers) for model in MODELS}
        for layer in layers:
            row: Figures = {"layer": layer, "channels": card.layer(layer).shape[0]}
            for model in MODELS:
                values, cells = found[model][layer]
                purity, best = purities(values, labels)
                row[model] = interval(purity)
                pure = [int(channel) for channel in np.argsort(-purity, kind="stable")[:CHANNELS]]
                row[f"{model}_shown"] = []
                for channel in pure:
                    label = CLASSES[int(np.bincount(labels[best[channel]], minlength=10).argmax())]
                    row[f"{model}_shown"].append({"channel": channel, "purity": int(purity[channel]), "class": label})
                    made = _tiles(looking[model], card.layer(layer), channel, best[channel], cells, images)
                    title = f"{channel}: {label} {purity[channel]}"
                    tiles.setdefault(layer, {}).setdefault(model, []).append((title, made))
            figures["layers"].append(row)
    with setting.client("cifar", untrained=["cifar"]) as client:
        for model in ("cifar", "cifar-untrained"):
            strongest = _strongest(client, model, all_images, ["conv1", "conv2"])
            figures[model] = {
                layer: interval(purities(values, all_labels)[0]) for layer, (values, _) in strongest.items()
            }
    figures["chance"] = {"deep": chance(labels, top), "cifar": chance(all_labels, top)}
    fields = {layer.name: layer.receptive_field[0] for layer in card.layers if layer.receptive_field}
    return Result(figures, _drawn(tiles, fields))


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
    looking: Looking,
    layer: Layer,
    channel: int,
    best: NDArray[np.int64],
    cells: NDArray[np.int64],
    images: list[NDArray[np.uint8]],
) -> list[Tile]:
    """Return the strongest patches of a channel, and where in each its cell looks."""
    tiles = []
    for picture in best[:PATCHES]:
        cell = divmod(int(cells[picture, channel]), layer.shape[2])
        image = images[picture].transpose(2, 0, 1).astype(np.float32) / 255
        heat = looking.heat(layer, channel, cell, images[picture])
        patch, seen = (cut_patch(values, layer, cell, channel=channel).pixels for values in (image, heat))
        tiles.append((patch, seen[:, :, 0]))
    return tiles


class Looking:
    """Where in a picture a cell of a network looks: the service's occlusion, asked for a cell instead of a score.

    Args:
        module: The network, with the layers of `deep`.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = {name: f"{name}.relu" for name in LAYERS}
        self._engine = Eager(module, layers, has_scores=False)

    def heat(self, layer: Layer, channel: int, cell: tuple[int, int], image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return how much the cell falls if a square around each pixel is covered with the mean colour, (1, H, W).

        Args:
            layer: Of the model card.
            channel: Of the cell.
            cell: Row and column in the map.
            image: (H, W, 3).
        """
        field = min(layer.receptive_field[0], image.shape[0]) if layer.receptive_field else image.shape[0]
        window = max(1, field // 6)

        def cells(images: NDArray[np.float32]) -> NDArray[np.float32]:
            maps = self._engine.run(images, frozenset([layer.name]))[1][layer.name]
            return np.asarray(maps)[:, channel, cell[0], cell[1], None]

        return occlusion(cells, to_input([image], NORMAL), 0, window, window // 2 + 1, lambda: None)


def table(figures: Figures) -> str:
    """Return the table."""
    rows = []
    for row in figures["layers"]:
        classes = ", ".join(f"{one['class']} {one['purity']}" for one in row["deep_shown"])
        rows.append((row["layer"], row["channels"], *(shown(row[model], 1) for model in MODELS), classes))
    for layer in ("conv1", "conv2"):
        values = (figures[model][layer] for model in ("cifar", "cifar-untrained"))
        rows.append((f"`cifar`, {layer}", figures["cifar"][layer]["n"], *(shown(one, 1) for one in values), ""))
    for network in ("deep", "cifar"):
        name = f"`{network}`: {figures['pictures'][network]:,} pictures at random"
        rows.append((name, "", *[figures["chance"][network]] * 2, ""))
    return markdown(("block", "channels", "purity, trained", "untrained", "purest channels, trained"), rows)


def _drawn(tiles: dict[str, dict[str, list[tuple[str, list[Tile]]]]], fields: dict[str, int]) -> Figure:
    """Draw, for each block and network, the patches of each channel above where its cells look."""
    width = CHANNELS * (PATCHES + 1) - 1
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(2 * 0.46 * width + 1.4, 1.22 * len(tiles) + 0.3), layout=layout)
    axes = figure.subplots(2 * len(tiles), 2 * width + 1, squeeze=False)
    for tile in axes.flat:
        tile.set_axis_off()
    for line, (layer, models) in enumerate(tiles.items()):
        for side, model in enumerate(MODELS):
            for number, (title, channel) in enumerate(models[model]):
                place = side * (width + 1) + number * (PATCHES + 1)
                axes[2 * line, place].set_title(title, fontsize=6, loc="left", pad=2)
                for offset, (patch, heat) in enumerate(channel):
                    upper, lower = axes[2 * line : 2 * line + 2, place + offset]
                    upper.imshow(patch)
                    lower.imshow(patch.mean(2), cmap="gray", vmin=0, vmax=1)
                    largest = float(abs(heat).max()) or 1
                    lower.imshow(heat, cmap="bwr", vmin=-largest, vmax=largest, alpha=0.85 * abs(heat) / largest)
        words = f"{layer}\n{fields[layer]}×{fields[layer]}"
        axes[2 * line + 1, 0].annotate(
            words,
            (-0.3, 1),
            xycoords="axes fraction",
            fontsize=7,
            horizontalalignment="right",
            verticalalignment="center",
        )
    for place, words in ((0, "trained"), (width + 1, "untrained")):
        axes[0, place].annotate(words, (0, 1.5), xycoords="axes fraction", fontsize=9, weight="bold")
    return figure
