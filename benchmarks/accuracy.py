"""Accuracy of an archive's network by recipe and by precision, on pictures with known classes.

    python -m benchmarks.accuracy model_store/deep.mar build/cifar10/test

The folder holds `<class>/*.jpg`, its classes in alphabetical order those of the archive, or files `..._<number>.jpg`
whose number is the class. Every picture goes the archive's own way, eight in a pass; where that is a recipe, torch is
also given the pictures squashed. `agree` counts the pictures whose most probable class is that of torch in float32. The
changes are the largest of any picture: of a score or of a cell, as a share of the largest value that torch has for
these eight in the scores or in that layer's maps. An engine is measured even if the service would reject it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers.images.decoding import decode
from handlers.images.preprocessing import noise, to_input
from handlers.network import archive as archives
from handlers.network.engines import Engine
from handlers.network.engines.onnx import OnnxEngine
from handlers.network.engines.openvino import OpenVinoEngine

BATCH = 8


def main() -> None:
    """Run every picture every way, and print a table of how the ways differ from the first one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--most", type=int, default=10_000, help="pictures, evenly spaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, labels = pictures(options.pictures, options.most)
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(options.archive).extractall(folder)
        sys.path.insert(0, folder)
        archive = archives.load(Path(folder))
        assert archive.graph is not None, "the archive has no graph"
        recipe, eager = archive.preprocessing, archive.eager("cpu")
        squashed = replace(recipe, resize=(), fit="", fill=(), interpolation="bilinear", antialias=True)
        graph, trial = (archive.graph, archive.layers), noise(recipe, 2)
        known: dict[str, Any] = {"has_scores": True, "layouts": archive.layouts}
        engines: list[Engine] = [
            eager,
            OnnxEngine(*graph, **known),
            OpenVinoEngine(*graph, trial, **known),
            eager.copy(torch.bfloat16),
            OpenVinoEngine(*graph, trial, precision="bfloat16", **known),
        ]
        ways = [(engine.name, engine, recipe) for engine in engines]
        if squashed != recipe:
            ways.append((f"{eager.name}, squashed", eager, squashed))
        first: list[list[int]] = [[] for _ in ways]  # Of each way, the most probable class of each picture.
        changes = np.zeros((len(ways), 2))  # Of scores, of maps.
        for start in range(0, len(files), BATCH):
            data = [file.read_bytes() for file in files[start : start + BATCH]]
            images = {each: to_input([decode(one, each)[0] for one in data], each) for *_, each in ways}
            found = [engine.run(images[each], frozenset(engine.layers)) for _, engine, each in ways]
            expected_scores, expected_maps = found[0]
            for number, (scores, maps) in enumerate(found):
                first[number] += scores.argmax(1).tolist()
                off = max((_change(maps[name], expected_maps[name]) for name in maps), default=0.0)
                changes[number] = np.maximum(changes[number], (_change(scores, expected_scores), off))
    print("| network | pictures | engine | right | agree | scores change | maps change |\n" + "|---" * 7 + "|")
    for (name, *_), classes, (off_scores, off_maps) in zip(ways, first, changes, strict=True):
        right, agree = np.mean(np.equal(classes, labels)), np.mean(np.equal(classes, first[0]))
        row = f"{right:.2%} | {agree:.2%} | {off_scores:.1e} | {off_maps:.1e}"
        print(f"| {options.archive.stem} | {len(files):,} | {name} | {row} |")


def pictures(folder: Path, most: int) -> tuple[list[Path], list[int]]:
    """Return the files of a folder, at most about so many and evenly spaced, and the number of each one's class."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = sorted(folder.glob("*/*.jpg" if classes else "*_*.jpg"))
    files = files[:: max(1, len(files) // most)]
    if classes:
        return files, [classes.index(file.parent.name) for file in files]
    return files, [int(file.stem.rpartition("_")[2]) for file in files]


def _change(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main()
