"""Writes results to a new directory: arrays, pictures, and the manifest.json that describes them."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope._version import __version__
from convscope.pixels import COMPRESSION, encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA_VERSION = 1  # Version of manifest.json; incremented when a field changes its meaning or is removed.


def write_directory(
    directory: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, NDArray[np.float32]]],
    pictures: Mapping[str, NDArray[np.uint8]],
    *,
    overwrite: bool,
) -> Path:
    """Write a directory. It gets its name when it is complete.

    Args:
        directory: A path that does not exist yet, unless `overwrite`; its parents are created.
        manifest: Fields of manifest.json; the versions of the schema and of the software are added.
        arrays: The float32 arrays of each `.npz` file, by file name.
        pictures: (H, W) grey or (H, W, 3) RGB, uint8, by name of the PNG file.
        overwrite: Whether to replace an existing directory, if it has a manifest.json.

    Returns:
        The directory.

    Raises:
        FileExistsError: The directory exists, and is not to be replaced.
        OSError: It cannot be written.
    """
    folder = Path(directory)
    if folder.exists() and not (overwrite and (folder / "manifest.json").exists()):
        raise FileExistsError(f"{folder} already exists" + ", and holds no result" * overwrite)
    incomplete = folder.with_name(f".{folder.name}.{os.getpid()}")
    incomplete.mkdir(parents=True)
    try:
        for name, pixels in pictures.items():
            (incomplete / name).write_bytes(encode_png(pixels))
        for name, members in arrays.items():
            _write_npz(incomplete / name, members)
        versions = {"convscope": __version__, "numpy": np.__version__, "python": platform.python_version()}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest, "versions": versions}, indent=2)
        (incomplete / "manifest.json").write_text(text + "\n", "utf-8")
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        incomplete.rename(folder)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise
    return folder


def file_stem(layer: str, position: int) -> str:
    """Return a safe file name for a layer: its name if safe, else prefixed with its position."""
    safe = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", layer)
    return layer if safe else f"{position}-" + re.sub(r"[^A-Za-z0-9_]", "_", layer)[:100]


def _write_npz(path: Path, members: Mapping[str, NDArray[np.float32]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
