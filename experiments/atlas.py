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
from numpy.typing import NDArray
from torch import nn

from experiments import service
from experiments.experiment import Figures, Result, Setting, interval, markdown, predictions, shown
from experiments.learning import CLASSES, INPUT, files, pixels
from handlers.images.preprocessing import to_input
from handlers.network.engines.torch_engine import TorchEngine
from handlers.outputs.explanation_methods import occlusion

TOP = 9
CHANNELS, PATCHES = 3, 3  # Number shown of each block and network.
BATCH = 20
MODELS = ("deep", "deep-untrained")
CIFAR = {"conv1": 16, "conv2": 32}  # Channels.
LAYERS = tuple(f"block{number}" for number in range(1, 8))
TILE, TITLE, GAP, LABEL = 0.5, 0.2, 0.12, 0.7  # Inches in the picture.
RED, BLUE = np.array([0.9, 0.1, 0.05]), np.array([0.1, 0.3, 0.95])
Tile = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A patch (h, w, 3) and its heat (h, w)."""


def run(setting: Setting) -> Result:
    """Find the strongest cells of every channel of every block."""
    chosen = files(setting.pictures, "test", setting.size(100, 2))
    all_labels = np.array([label for _, label in chosen])
    all_images = [pixels(path) for path, _ in chosen]
    labels, images = all_labels[::2], all_images[::2]  # Half of them for `deep`, which takes a hundred times the work.
    top = min(TOP, len(images))
    channels, patches = setting.size((CHANNELS, PATCHES), (1, 1))
    figures: Figures = {"pictures": {"deep": len(images), "cifar": len(all_images)}, "top": top, "layers": []}
    tiles: dict[str, dict[str, list[tuple[str, list[Tile]]]]] = {}
    looking = {"deep": Looking(service.trained(setting.store, "deep"))}
    looking["deep-untrained"] = Looking(service.first_weights("deep"))
    with setting.client("deep", untrained=["deep"]) as client:
        card = client.model_card("deep")
        layers = setting.size(list(LAYERS), ["block5", "block7"])
        found = {model: _strongest(client, model, images, layers) for model in MODELS}
        for layer in layers:
            row: Figures = {"layer": layer, "channels": card.layer(layer).shape[0]}
            for model in MODELS:
                values, cells = found[model][layer]
                purity, best = purities(values, labels)
                row[model] = interval(purity[purity > 0])
                pure = [int(channel) for channel in np.argsort(-purity, kind="stable")[:channels]]
                row[f"{model}_shown"] = []
                for channel in pure:
                    label = CLASSES[int(np.bincount(labels[best[channel]], minlength=10).argmax())]
                    row[f"{model}_shown"].append({"channel": channel, "purity": int(purity[channel]), "class": label})
                    strongest = best[channel, :patches]
                    made = _tiles(looking[model], card.layer(layer), channel, strongest, cells, images)
                    title = f"{channel}: {label} {purity[channel]}"
                    tiles.setdefault(layer, {}).setdefault(model, []).append((title, made))
            figures["layers"].append(row)
    with setting.client("cifar", untrained=["cifar"]) as client:
        for model in ("cifar", "cifar-untrained"):
            figures[model] = {}
            for layer, (values, _) in _strongest(client, model, all_images, list(CIFAR)).items():
                purity, _ = purities(values, all_labels)
                figures[model][layer] = interval(purity[purity > 0])
    figures["chance"] = {"deep": chance(labels, top), "cifar": chance(all_labels, top)}
    fields = {layer.name: layer.receptive_field[0] for layer in card.layers if layer.receptive_field}
    return Result(figures, _drawn(tiles, fields))


def purities(values: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each channel, how many of its strongest pictures are of one class, and which pictures these are.

    A channel that is at its least in one of these answers to too few pictures to have a purity: it gets 0.

    Args:
        values: Largest cell of each picture and channel, (N, C).
        labels: Class of each picture, (N,).

    Returns:
        (C,), 1 to 9, or 0; and (C, 9), indexes of pictures, strongest first.
    """
    best = np.argsort(-values, axis=0, kind="stable")[:TOP].T  # (C, 9)
    purity = np.array([np.bincount(labels[pictures]).max() for pictures in best])
    answers = values[best[:, -1], np.arange(len(best))] > values.min(0)
    return purity * answers, best


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
    for one in predictions(client, images, batch=BATCH, model=model, layers=layers, top_k=1):
        for layer in layers:
            cells = one.maps[layer].reshape(len(one.maps[layer]), -1)
            places[layer].append(cells.argmax(1))
            values[layer].append(cells.max(1))
    return {layer: (np.stack(values[layer]), np.stack(places[layer])) for layer in layers}


def _tiles(
    looking: Looking,
    layer: Layer,
    channel: int,
    pictures: NDArray[np.int64],
    cells: NDArray[np.int64],
    images: list[NDArray[np.uint8]],
) -> list[Tile]:
    """Return a channel's patches of some pictures, and where in each its cell looks."""
    tiles = []
    for picture in pictures:
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
        self._engine = TorchEngine(module, layers, has_scores=False)

    def heat(self, layer: Layer, channel: int, cell: tuple[int, int], image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return how much the cell falls if a square around each pixel is covered with the mean colour, (1, H, W).

        Args:
            layer: The layer, from the model card.
            channel: Channel of the cell.
            cell: Row and column in the map.
            image: (H, W, 3).
        """
        field = min(layer.receptive_field[0], image.shape[0]) if layer.receptive_field else image.shape[0]
        window = max(1, field // 6)

        def cells(images: NDArray[np.float32]) -> NDArray[np.float32]:
            maps = self._engine.run(images, frozenset([layer.name]))[1][layer.name]
            return np.asarray(maps)[:, channel, cell[0], cell[1], None]

        return occlusion(cells, to_input([image], INPUT), 0, window, window // 2 + 1, lambda: None)


def table(figures: Figures) -> str:
    """Return the table."""
    rows = []
    for row in figures["layers"]:
        classes = ", ".join(f"{one['class']} {one['purity']}" for one in row["deep_shown"])
        counts = [row["channels"], *(row[model]["n"] for model in MODELS)]
        rows.append((row["layer"], ", ".join(map(str, counts)), *(shown(row[model], 1) for model in MODELS), classes))
    for layer in CIFAR:
        values = [figures[model][layer] for model in ("cifar", "cifar-untrained")]
        counts = [CIFAR[layer], *(one["n"] for one in values)]
        rows.append((f"`cifar`, {layer}", ", ".join(map(str, counts)), *(shown(one, 1) for one in values), ""))
    for network in ("deep", "cifar"):
        name = f"`{network}`: {figures['pictures'][network]:,} pictures at random"
        rows.append((name, "", *[figures["chance"][network]] * 2, ""))
    return markdown(
        (
            "block",
            "channels: all, that answer trained, untrained",
            "purity, trained",
            "untrained",
            "purest channels, trained",
        ),
        rows,
    )


def _drawn(tiles: dict[str, dict[str, list[tuple[str, list[Tile]]]]], fields: dict[str, int]) -> Figure:
    """Draw, for each block and network, the patches of each channel above where its cells look."""
    group = PATCHES * TILE + GAP
    width = LABEL + len(MODELS) * (CHANNELS * group + GAP)
    height = TITLE + len(tiles) * (TITLE + 2 * TILE + GAP)
    figure = Figure(figsize=(width, height))

    def draw(pixels: NDArray[np.float32], x: float, y: float) -> None:
        axes = figure.add_axes((x / width, 1 - (y + TILE) / height, 0.95 * TILE / width, 0.95 * TILE / height))
        axes.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()

    for line, (layer, models) in enumerate(tiles.items()):
        y = 2 * TITLE + line * (TITLE + 2 * TILE + GAP)
        words = f"{layer}\n{fields[layer]}×{fields[layer]}"
        figure.text(GAP / 2 / width, 1 - (y + TILE) / height, words, fontsize=8, verticalalignment="center")
        for side, model in enumerate(MODELS):
            for number, (title, channel) in enumerate(models[model]):
                x = LABEL + side * (CHANNELS * group + GAP) + number * group
                if not line + number:
                    figure.text(x / width, 1 - 0.8 * TITLE / height, model.partition("-")[2] or "trained", fontsize=10)
                figure.text(x / width, 1 - (y - 0.05) / height, title, fontsize=7)
                for offset, (patch, heat) in enumerate(channel):
                    draw(patch, x + offset * TILE, y)
                    draw(tinted(patch, heat), x + offset * TILE, y + TILE)
    return figure


def tinted(patch: NDArray[np.float32], heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a patch (h, w, 3) in grey, red where the heat (h, w) is above 0 and blue where it is below."""
    strength = 0.9 * np.sqrt(abs(heat) / (abs(heat).max() or 1))[:, :, None]
    colours = np.where(heat[:, :, None] > 0, RED, BLUE)
    mixed: NDArray[np.float32] = (1 - strength) * patch.mean(2, keepdims=True) + strength * colours
    return mixed
