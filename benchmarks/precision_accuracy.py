"""Accuracy by precision: an archive's network in float32 and in bfloat16, on pictures with known classes.

    python -m benchmarks.precision_accuracy model_store/deep.mar build/cifar10/test

The folder holds `<class>/*.jpg`, its classes in alphabetical order those of the archive, or files `..._<number>.jpg`
whose number is the class. Every picture goes the archive's own way, eight in a pass. `agree` counts the pictures whose
most probable class is that of torch in float32. The changes are the largest of any picture: of a score or of a cell, as
a share of the largest value that torch has for these eight in the scores or in that layer's maps. An engine is measured
even if the service would reject it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers.images.decoding import decode
from handlers.images.preprocessing import noise, to_input
from handlers.network import archive as archives
from handlers.network.engines.engine import Engine
from handlers.network.engines.onnx import Session
from handlers.network.engines.openvino import Compiled

BATCH = 8


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--most", type=int, default=10_000, help="pictures, evenly spaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(options.archive).extractall(folder)
        sys.path.insert(0, folder)
        archive = archives.load(Path(folder))
        files, labels = pictures(options.pictures, options.most)
        eager, trial = archive.eager("cpu"), noise(archive.preprocessing, 2)
        assert archive.graph is not None, "the archive has no graph"
        known: dict[str, Any] = {"has_scores": True, "layouts": archive.layouts}
        engines = [
            eager,
            Session(archive.graph, archive.layers, **known),
            Compiled(archive.graph, archive.layers, trial, **known),
            eager.copy(torch.bfloat16),
            Compiled(archive.graph, archive.layers, trial, precision="bfloat16", **known),
        ]
        print(table(options.archive.stem, archive, engines, files, labels))


def table(
    network: str, archive: archives.Archive, engines: Sequence[Engine], files: Sequence[Path], labels: Sequence[int]
) -> str:
    """Run every picture through every engine, and return a table of how they differ from the first engine."""
    first: list[list[int]] = [[] for _ in engines]
    changes = np.zeros((len(engines), 2))  # Of scores, of maps.
    for start in range(0, len(files), BATCH):
        read = [decode(file.read_bytes(), archive.preprocessing)[0] for file in files[start : start + BATCH]]
        images = to_input(read, archive.preprocessing)
        found = [engine.run(images, frozenset(engine.layers)) for engine in engines]
        expected_scores, expected_maps = found[0]
        for number, (scores, maps) in enumerate(found):
            first[number] += scores.argmax(1).tolist()
            off = max((_change(maps[name], expected_maps[name]) for name in maps), default=0.0)
            changes[number] = np.maximum(changes[number], (_change(scores, expected_scores), off))
    rows = ["| network | pictures | engine | right | agree | scores change | maps change |", "|---" * 7 + "|"]
    for engine, classes, (off_scores, off_maps) in zip(engines, first, changes, strict=True):
        right, agree = np.mean(np.equal(classes, labels)), np.mean(np.equal(classes, first[0]))
        rows.append(
            f"| {network} | {len(files):,} | {engine.name} | {right:.2%} | {agree:.2%} "
            f"| {off_scores:.1e} | {off_maps:.1e} |"
        )
    return "\n".join(rows)


def pictures(folder: Path, most: int) -> tuple[list[Path], list[int]]:
    """Return the files of a folder, at most about so many and evenly spaced, and the number of each one's class."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = sorted(folder.glob("*/*.jpg" if classes else "*_*.jpg"))
    step = max(1, len(files) // most)
    files = files[::step]
    if classes:
        return files, [classes.index(file.parent.name) for file in files]
    return files, [int(file.stem.rpartition("_")[2]) for file in files]


def _change(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main()
