"""Encodes the pictures that callers pass (paths, bytes, PIL images, arrays) as files for a request.

Encoded files are not decoded here; the service validates them. PIL is used only if the caller passes one of its images.
"""

from __future__ import annotations

import io
import math
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

# The mode in which a PIL image is written; the 16-bit ones and P are handled below, and any other becomes RGB.
_PNG_MODES = {"1": "1", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}
_MODES_WITH_TRANSPARENT_COLOUR = ("1", "L", "P", "RGB", "I", "I;16", "I;16B", "I;16L", "I;16N")

# A picture that is not an array: one array may be several pictures.
EncodablePicture: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image"
Picture: TypeAlias = "EncodablePicture | NDArray[Any]"


class EncodedPictures(NamedTuple):
    """Picture files in order, and whether the caller passed several pictures."""

    files: list[bytes]
    is_list: bool


def encode_pictures(pictures: Picture | Iterable[Picture]) -> EncodedPictures:
    """Encode one picture or several as picture files.

    Args:
        pictures: A picture, or an iterable of them. A picture is a path, the bytes of a file, a PIL image, or an array
            (H, W) or (H, W, C), uint8 0..255 or float32 0..1. An array (N, H, W, C), or a .npy file of one, is N
            pictures.

    Returns:
        One file per picture, and whether `pictures` may be several.

    Raises:
        OSError: A path cannot be read.
        TypeError: An argument is not a picture.
        ValueError: An array does not have the shape or dtype of a picture, or a PIL image cannot be written as PNG.
    """
    if isinstance(pictures, bytes | bytearray | memoryview | np.ndarray | str | os.PathLike) or _is_pil(pictures):
        return _encode(pictures)
    # Iterating a file yields lines, iterating a mapping keys: reject both.
    if not isinstance(pictures, Iterable) or isinstance(pictures, Mapping) or hasattr(pictures, "read"):
        raise TypeError(_not_a_picture(pictures))
    return EncodedPictures([file for picture in pictures for file in _encode(picture).files], is_list=True)


def is_one_picture(value: object) -> bool:
    """Return whether a value is a single picture rather than an iterable of pictures."""
    if isinstance(value, np.ndarray):
        return value.ndim < 4
    return isinstance(value, str | bytes | bytearray | memoryview | os.PathLike) or _is_pil(value)


def _is_pil(value: object) -> bool:
    """Return whether a value is a PIL image. If it is one, PIL has been imported."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _encode(picture: Any) -> EncodedPictures:
    """Encode one argument, which may be an array of several pictures."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return _encode_file(bytes(picture))
    if isinstance(picture, np.ndarray):
        return _encode_array(picture)
    if isinstance(picture, str | os.PathLike):
        return _encode_file(Path(picture).read_bytes())
    if _is_pil(picture):
        return EncodedPictures([_encode_pil(picture)], is_list=False)
    raise TypeError(_not_a_picture(picture))


def _not_a_picture(value: object) -> str:
    name = f"{type(value).__module__}.{type(value).__name__}"
    return f"expected a path, bytes, a PIL image or a numpy array, not {name}"


def _encode_array(array: NDArray[Any]) -> EncodedPictures:
    """Encode an array as .npy files, one per picture.

    Args:
        array: (H, W), (H, W, C) or (N, H, W, C), uint8 0..255 or float32 0..1 of any byte order.

    Returns:
        One file, or N.

    Raises:
        ValueError: The array has another shape or dtype, or masked elements.
    """
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError("the array has masked elements; use .filled(value)")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.float32):
        raise ValueError(
            f"picture arrays must be uint8 (0..255) or float32 (0..1), not {array.dtype};"
            " convert with .astype() (values are not rescaled)"
        )
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(f"picture arrays must be (H, W), (H, W, C) or (N, H, W, C), not {array.shape}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if array.ndim < 4:
        return EncodedPictures([_write_npy(array)], is_list=False)
    return EncodedPictures([_write_npy(picture) for picture in array], is_list=True)


def _write_npy(array: NDArray[Any]) -> bytes:
    """Return an array as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def _encode_file(data: bytes) -> EncodedPictures:
    """Return a file as it is; a .npy file of several pictures as one file per picture."""
    array = _read_4d_npy(data) if data.startswith(np.lib.format.MAGIC_PREFIX) else None
    return EncodedPictures([data], is_list=False) if array is None else _encode_array(array)


def _read_4d_npy(data: bytes) -> NDArray[Any] | None:
    """Return the array of a valid 4-D .npy file, else None; the service reports invalid files."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception:  # A malformed header can raise almost anything.
        return None
    is_4d = len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)  # Excludes bool.
    is_picture = is_4d and dtype.newbyteorder("=") in (np.uint8, np.float32)
    if not is_picture or len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        return None
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _encode_pil(picture: Image) -> bytes:
    """Encode the pixels of a PIL image as PNG, rotated according to EXIF; other metadata is dropped.

    Raises:
        ValueError: PNG cannot hold its pixels.
    """
    mode = picture.mode
    if mode == "F":
        raise ValueError("PIL images of mode F have no defined range; send numpy.asarray(picture) as float32 in 0..1")
    options: dict[str, Any] = {}
    transparency = picture.info.get("transparency") if mode in _MODES_WITH_TRANSPARENT_COLOUR else None
    if transparency is not None and not _is_valid_transparency(transparency, mode):
        raise ValueError(
            f"the PIL image has info['transparency'] = {repr(transparency)[:60]}, which is not a valid colour for mode"
            f" {mode}: delete that entry, or send the file that the image was opened from"
        )
    try:
        image: Any = _rotate_by_exif(picture)
        if mode.startswith("I"):
            image = image.convert("I")  # Convert via I: other conversions from 16 bits clip to 8.
            lowest, highest = image.getextrema()
            if lowest < 0 or highest > 65535:
                raise ValueError(f"its values are {lowest}..{highest}, rescale them to 0..65535")
            image = image.convert("I;16")
            options = {} if transparency is None else {"transparency": operator.index(transparency)}
        elif mode == "P":  # PNG would change pixels that point beyond the palette.
            image = image.convert("RGBA" if getattr(image, "has_transparency_data", True) else "RGB")
        else:
            image = image.convert("RGBA" if transparency is not None else _PNG_MODES.get(mode, "RGB"))
        image.info = {}
        file = io.BytesIO()
        image.save(file, format="PNG", compress_level=1, **options)
    except Exception as error:  # PIL raises almost anything.
        raise ValueError(f"the PIL image of mode {mode} cannot be written as PNG: {error}") from error
    return file.getvalue()


def _is_valid_transparency(value: Any, mode: str) -> bool:
    """Return whether a PIL image's `transparency` is valid for its mode: a colour, or the alpha of a palette."""
    if mode == "P" and isinstance(value, bytes):
        return len(value) <= 256
    values = value if isinstance(value, tuple | list) else (value,)
    try:
        numbers = [operator.index(number) for number in values]
    except TypeError:
        return False
    maximum = 65535 if mode.startswith("I") else 255
    return len(numbers) == (3 if mode == "RGB" else 1) and all(0 <= number <= maximum for number in numbers)


def _rotate_by_exif(picture: Image) -> Image:
    """Return a PIL image rotated according to its EXIF orientation; unchanged if its EXIF data cannot be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # PIL raises almost anything for damaged EXIF data.
        return picture
