"""Arrays and numbers as a page's script takes them: cells of one byte as base64, numbers that JSON can hold."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope._tiles import grey_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope._card import Input
    from numpy.typing import NDArray

_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_NPY_MAGIC = b"\x93NUMPY"


def pack_map(cells: NDArray[np.float32], channels: Sequence[int]) -> dict[str, Any]:
    """Pack a map, its channels of largest mean first.

    Args:
        cells: (C, h, w), or (C,), which becomes one row of C cells; float32, any range.
        channels: The number of each channel.

    Returns:
        `channels`; `rows` and `columns` of a channel; `cells`, base64 of uint8 in C order; and of each channel the
        `least` and `greatest` value, which 0 and 255 stand for; None for a channel without a finite value.
    """
    if cells.ndim != 3:
        cells, channels = cells.reshape(1, 1, -1), [0]
    means = np.where(np.isfinite(cells), cells, -np.inf).mean(axis=(1, 2), dtype=np.float64)
    order = np.argsort(-means, kind="stable")
    cells = cells[order]
    flat = np.where(np.isfinite(cells), cells, np.nan).reshape(len(cells), -1)
    known = [channel[~np.isnan(channel)] for channel in flat]
    return {
        "channels": [channels[position] for position in order],
        "rows": cells.shape[1],
        "columns": cells.shape[2],
        "cells": _base64(grey_tiles(cells)),
        "least": [number(channel.min()) if channel.size else None for channel in known],
        "greatest": [number(channel.max()) if channel.size else None for channel in known],
    }


def pack_heat(heat: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a heat map.

    Args:
        heat: (C, h, w) or (h, w), any range; of several channels the sum is shown.

    Returns:
        `rows`, `columns`, `cells`, base64 of uint8, and `greatest`: value = (cell - 128) / 127 · greatest.
    """
    flat = np.nan_to_num(heat.sum(axis=0) if heat.ndim == 3 else heat)
    greatest = float(np.abs(flat).max(initial=0.0))
    scaled = flat / greatest if greatest else np.zeros_like(flat)
    return {
        "rows": flat.shape[0],
        "columns": flat.shape[1],
        "cells": _base64(np.rint(scaled * 127 + 128).astype(np.uint8)),
        "greatest": number(greatest),
    }


def pack_picture(picture: NDArray[np.float32]) -> dict[str, Any]:
    """Pack a picture as a network saw it.

    Args:
        picture: (C, H, W), values in 0..1.

    Returns:
        `rows`, `columns`, `channels` (1 or 3) and `cells`, base64 of uint8 in C order; `exact`, true.
    """
    shown = picture[: 3 if len(picture) == 3 else 1]
    pixels = np.rint(np.clip(np.nan_to_num(shown), 0, 1) * 255).astype(np.uint8)
    channels, rows, columns = pixels.shape
    return {"rows": rows, "columns": columns, "channels": channels, "cells": _base64(pixels), "exact": True}


def pack_file(file: bytes, takes: Input) -> dict[str, Any] | None:
    """Pack a picture file for a page that has to bring it to the network's size itself.

    Args:
        file: PNG, JPEG, WebP or .npy.
        takes: What the network takes.

    Returns:
        As `pack_picture`, but with `file`, a data URL, in place of `cells`, `rows` and `columns` None for a network of
        any size, and `exact` false. An array of the network's size becomes `cells`; None for others, and for files
        of another kind.
    """
    if file.startswith(_NPY_MAGIC):
        array = np.load(io.BytesIO(file), allow_pickle=False)
        scale = 255 if array.dtype == np.uint8 else 1
        planes = array[np.newaxis] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        resized = takes.height is not None and planes.shape[1:] != (takes.height, takes.width)
        return None if resized else pack_picture(planes.astype(np.float32) / scale)
    kind = next((kind for magic, kind in _MEDIA_TYPES.items() if file.startswith(magic)), None)
    if kind is None:
        return None
    return {
        "rows": takes.height,
        "columns": takes.width,
        "channels": takes.channels,
        "file": f"data:{kind};base64,{base64.b64encode(file).decode()}",
        "exact": False,
    }


def number(value: float) -> float | None:
    """Return a number of six digits; None if JSON has none for it."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _base64(cells: NDArray[np.uint8]) -> str:
    return base64.b64encode(cells.tobytes()).decode()
