"""A prediction as a directory: manifest.json, maps.npz, and a PNG of grey tiles for each layer."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope import __version__
from convscope._tiles import encode_png, tile_grid

if TYPE_CHECKING:
    import os

    from convscope._prediction import Prediction

SCHEMA_VERSION = 1  # Of manifest.json: raised when a field changes its meaning or goes.


def save_prediction(prediction: Prediction, directory: str | os.PathLike[str]) -> Path:
    """Write a prediction into a new directory; leave none behind if that fails.

    Args:
        prediction: One with a result.
        directory: Must not exist; its parents are made.

    Returns:
        The directory.

    Raises:
        FileExistsError: It exists.
        OSError: It cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True)
    try:
        _write(prediction, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _write(prediction: Prediction, folder: Path) -> None:
    """Write the files; the manifest last, so that where it is, the rest is complete."""
    layers: dict[str, Any] = {}
    for name, cells in prediction.maps.items():
        grid = f"{_file_stem(name, len(layers))}.png" if cells.ndim == 3 and cells.size else None
        if grid is not None:
            (folder / grid).write_bytes(encode_png(tile_grid(cells)))
        layers[name] = {
            "shape": list(cells.shape),
            "dtype": cells.dtype.name,
            "channels": list(prediction.channels[name]),
            "grid": grid,
        }
    if layers:
        with zipfile.ZipFile(folder / "maps.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, cells in prediction.maps.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, cells, allow_pickle=False)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": prediction.model,
        "version": prediction.version,
        "engine": prediction.engine,
        "device": prediction.device,
        "request_id": prediction.request_id,
        "scores": [dataclasses.asdict(score) for score in prediction.top],
        "maps": "maps.npz" if layers else None,
        "layers": layers,
        "versions": {"convscope": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _file_stem(layer: str, position: int) -> str:
    """Return a file name for a layer: its own name where that is plain, else a plain one that no other layer has."""
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", layer)
    return layer if plain else f"{position}-" + re.sub(r"[^A-Za-z0-9_]", "_", layer)[:100]
