"""Pictures as a network takes them: read, brought to its size and channels, on the 0..1 scale."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from convscope._card import Input

Image: TypeAlias = NDArray[np.float32]
Source: TypeAlias = str | os.PathLike[str] | NDArray[Any]

_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".npy"})


def expand(sources: Source | Iterable[Source], *, limit: int | None, seed: int) -> list[Source]:
    """List pictures, those of folders among them.

    Args:
        sources: A picture, a folder, or an iterable of them. A folder is every PNG, JPEG, WebP and .npy file in it and
            below, by name.
        limit: Take so many of them at random, in their order; None for all.
        seed: Of that choice.

    Raises:
        OSError: A path is not there.
        ValueError: There is no picture.
    """
    if isinstance(sources, str | os.PathLike) or (isinstance(sources, np.ndarray) and sources.ndim < 4):
        sources = [sources]
    found: list[Source] = []
    for source in sources:
        if isinstance(source, np.ndarray) or not Path(source).is_dir():
            found.append(source)
        else:
            found += sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in _ENDINGS)
    if not found:
        raise ValueError("there is no picture to probe with: no PNG, JPEG, WebP or .npy file")
    if limit is not None and limit < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), size=limit, replace=False)
        found = [found[index] for index in sorted(chosen.tolist())]
    return found


def read(sources: Iterable[Source], wanted: Input) -> Iterator[Image]:
    """Read pictures as the network takes them.

    Args:
        sources: Paths, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        wanted: What it takes. A file's picture is resized to it, bilinear with antialiasing: to at most one level
            of 255 from what the service makes of it.

    Yields:
        (H, W, C), float32, 0..1.

    Raises:
        ImportError: Pillow is not installed; says how to get it.
        OSError: A file cannot be read as a picture.
        ValueError: An array does not fit the network.
    """
    for source in sources:
        if not isinstance(source, np.ndarray) and Path(source).suffix.lower() == ".npy":
            source = np.load(source, allow_pickle=False)
        image = _from_array(source) if isinstance(source, np.ndarray) else _from_file(source, wanted)
        height, width, channels = image.shape
        if channels != wanted.channels or (wanted.height and (height, width) != (wanted.height, wanted.width)):
            size = f"{wanted.height}×{wanted.width}" if wanted.height else "any size"
            raise ValueError(
                f"the network takes {size} with {wanted.channels} channels; this array is {height}×{width} with "
                f"{channels}, and arrays are not resized here"
            )
        yield image


def _from_array(array: NDArray[Any]) -> Image:
    if array.dtype not in (np.uint8, np.float32) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"an array to probe with is (H, W) or (H, W, C) of uint8 or float32, not {array.shape} {array.dtype}"
        )
    image = array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array.astype(np.float32)
    return image if image.ndim == 3 else image[:, :, np.newaxis]


def _from_file(path: str | os.PathLike[str], wanted: Input) -> Image:
    try:
        from PIL import Image as Pillow
        from PIL import ImageOps
    except ImportError as error:
        raise ImportError(
            "probes read picture files with Pillow, which cannot be imported: pip install 'convscope[figure]'"
        ) from error
    with Pillow.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if wanted.channels == 1 else "RGB")
        if wanted.height and wanted.width:
            picture = picture.resize((wanted.width, wanted.height), Pillow.Resampling.BILINEAR)
        return _from_array(np.asarray(picture))
