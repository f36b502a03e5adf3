"""A folder of pictures, and a service that answers maps which tests can compute themselves."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from convscope import BadImage, ClassScore, Client, Explanation, Layer, ModelCard, Prediction
from convscope.pixels import encode_png
from convscope.testing import FakeTransport, Request, model_card, prediction
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
Change = Callable[[dict[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]
CLASSES = ("ant", "bee", "zebra")
FOLLOWER, DEAD, SIGNED = 3, 4, 5  # Channels of `conv`: active for zebras only, dead, and with negative values.


def make_card(**limits: int) -> ModelCard:
    """Return the card: padded 3×3 cells, and a layer without places."""
    card = model_card(layers={"conv": (6, SIDE, SIDE), "head": (3,)}, classes=CLASSES, input_shape=(3, SIDE, SIDE))
    geometry = {"stride": (1, 1), "receptive_field": (3, 3), "receptive_field_start": (-1, -1)}
    conv, head = card.layers
    layers: tuple[Layer, ...] = (dataclasses.replace(conv, **geometry), head)  # type: ignore[arg-type]
    return dataclasses.replace(card, layers=layers, limits=dataclasses.replace(card.limits, **limits), scores="softmax")


def make_maps(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return what the network makes of a picture (H, W, 3): the colours, zebras, nothing, and negative values."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32) / 255, 2, 0)
    zebra = np.where(blue.mean() > 0.75, blue, 0)
    conv = np.stack([red, np.maximum(green - 0.5, 0), np.maximum(red - green, 0), zebra, 0 * red, red - 1])
    return {"conv": conv, "head": np.array([red.mean(), green.mean(), -blue.mean()], np.float32)}


def answer(request: Request, card: ModelCard, change: Change) -> Any:
    """Answer a request, with maps that `change` has changed; a file that is no picture fails."""
    if request.method == "model_card":
        return card
    results: list[Prediction | Explanation] = []
    for file in request.pictures:
        try:
            read = np.load if file.startswith(b"\x93NUMPY") else Image.open
            pixels = np.asarray(read(io.BytesIO(file)))
        except OSError:
            results.append(prediction(error=BadImage("not a picture")))
            continue
        maps = change(make_maps(pixels))
        if request.method == "explain":
            picture = np.moveaxis(pixels, 2, 0) / np.float32(255)
            results.append(Explanation(prediction({"ant": 1.0}), method="picture", picture=picture.astype(np.float32)))
        else:
            label = "zebra" if maps["conv"][FOLLOWER].any() else "ant"
            score = ClassScore(CLASSES.index(label), label, 0.9, 2.0)
            about = {"model": "fake", "version": "1.0", "engine": "fake", "device": "cpu", "scores": "softmax"}
            maps = {name: maps[name] for name in request.layers}
            results.append(Prediction(**about, top=[score], maps=maps))
    return results


def make_client(card: ModelCard | None = None, change: Change = lambda maps: maps) -> tuple[Client, FakeTransport]:
    """Return a client of the service, and the transport that records its requests."""
    card = card or make_card()
    transport = FakeTransport(lambda request: answer(request, card, change))
    return Client("http://fake", transport=transport), transport


def make_pixels(number: int, *, zebra: bool) -> NDArray[np.uint8]:
    """Return a random picture (H, W, 3); zebras are blue."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:, :, 2] = 255 if zebra else pixels[:, :, 2] // 2
    return pixels


def animate(folder: Path, count: int) -> None:
    """Write animated GIF files of two frames."""
    for number in range(count):
        first, second = (Image.fromarray(make_pixels(seed, zebra=False)) for seed in (number, count + number))
        first.save(folder / f"{number}.gif", save_all=True, append_images=[second])


def write_folder(folder: Path, per_class: int = 8, classes: tuple[str, ...] = CLASSES) -> dict[str, NDArray[np.uint8]]:
    """Write pictures in a subfolder for each class; return the pixels by path, in the order of the paths."""
    written = {}
    for index, label in enumerate(classes):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            path = folder / label / f"{number:03}.png"
            pixels = make_pixels(1000 * index + number, zebra=label == "zebra")
            path.write_bytes(encode_png(pixels))
            written[str(path)] = pixels
    return dict(sorted(written.items()))
