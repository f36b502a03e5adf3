"""Writes a prediction or an explanation into a directory: manifest.json, the arrays, and pictures."""

from __future__ import annotations

import json
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope import __version__
from convscope.pixels import encode_png, tile_grid

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from convscope._explanation import Explanation
    from convscope._prediction import Prediction

SCHEMA_VERSION = 1  # Of manifest.json: raised when a field changes its meaning or goes.


def save_prediction(prediction: Prediction, directory: str | os.PathLike[str]) -> Path:
    """Write a prediction into a new directory; leave none behind if that fails.

    Args:
        prediction: One with a result.
        directory: A path that does not exist yet; its parents are made.

    Returns:
        The directory.

    Raises:
        FileExistsError: It exists.
        OSError: It cannot be written.
    """
    with _new_folder(directory) as folder:
        _write(prediction, folder)
    return folder


def save_explanation(explanation: Explanation, directory: str | os.PathLike[str]) -> Path:
    """Write an explanation into a new directory; leave none behind if that fails.

    Args:
        explanation: One with heat and picture.
        directory: A path that does not exist yet; its parents are made.

    Returns:
        The directory.

    Raises:
        FileExistsError: It exists.
        OSError: It cannot be written.
    """
    arrays = {"heat": explanation.heat, "picture": explanation.picture}
    pictures = {"heat": explanation.heatmap(), "overlay": explanation.overlay()}
    with _new_folder(directory) as folder:
        for name, pixels in pictures.items():
            (folder / f"{name}.png").write_bytes(encode_png(pixels))
        _write_arrays(folder / "explanation.npz", arrays)
        manifest = {
            **_origin(explanation.prediction),
            "method": explanation.method,
            "layer": explanation.layer or None,
            "target": explanation.target,
            "label": explanation.label,
            "delta": explanation.delta,
            "arrays": "explanation.npz",
            "heat": "heat.png",
            "overlay": "overlay.png",
            "versions": _versions(),
        }
        _write_manifest(folder, manifest)
    return folder


@contextmanager
def _new_folder(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder; remove it again if what is done in the context fails."""
    folder = Path(directory)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
        _write_arrays(folder / "maps.npz", prediction.maps)
    manifest = {
        **_origin(prediction),
        "maps": "maps.npz" if layers else None,
        "layers": layers,
        "versions": _versions(),
    }
    _write_manifest(folder, manifest)


def _origin(prediction: Prediction) -> dict[str, Any]:
    """Return the first fields of every manifest: the model and the scores."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": prediction.model,
        "version": prediction.version,
        "engine": prediction.engine,
        "device": prediction.device,
        "request_id": prediction.request_id,
        "scores": [score._asdict() for score in prediction.top],
    }


def _versions() -> dict[str, str]:
    return {"convscope": __version__, "numpy": np.__version__, "python": platform.python_version()}


def _write_arrays(path: Path, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, cells in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, cells, allow_pickle=False)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _file_stem(layer: str, position: int) -> str:
    """Return a file name for a layer: its own name where that is plain, else a plain one that no other layer has."""
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", layer)
    return layer if plain else f"{position}-" + re.sub(r"[^A-Za-z0-9_]", "_", layer)[:100]
