"""Turning what a caller holds - paths, bytes, PIL images, arrays - into the picture files a request carries.

It does not decode encoded pictures: what a file's bytes mean is the service's business. PIL is never imported, its
images are known by their methods.
"""

from __future__ import annotations

import io
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

_NPY_MAGIC = b"\x93NUMPY"
# What a PIL image is written as, by its mode; the 16-bit ones and P are below, and any other becomes RGB.
_PNG_MODES = {"1": "1", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}
_TRANSPARENT = ("1", "L", "P", "RGB", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Modes with a transparent colour.
_TURNS: dict[object, int] = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # PIL's transpositions, by EXIF orientation.


@runtime_checkable
class PillowImage(Protocol):
    """A `PIL.Image.Image`, as far as this module uses it."""

    @property
    def mode(self) -> str:
        """PIL's name for the kind of pixels."""

    def convert(self, mode: str) -> PillowImage:
        """Return the picture with pixels of another kind."""

    def getexif(self) -> Any:
        """Return the EXIF record, which may be empty."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Write the picture as a file."""


OnePicture: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | PillowImage
Picture: TypeAlias = OnePicture | NDArray[Any]


class EncodedPictures(NamedTuple):
    """Picture files in order, and whether the caller asked for a list."""

    files: list[bytes]
    many: bool


def encode_pictures(pictures: Picture | Iterable[Picture]) -> EncodedPictures:
    """Turn one picture or several into picture files.

    Args:
        pictures: A picture, or an iterable of them. A picture is a path, the bytes of a file, a PIL image, or an array
            (H, W) or (H, W, C), uint8 0..255 or float32 0..1. An array (N, H, W, C), or a .npy file of one, is N
            pictures.

    Returns:
        One file a picture, and whether there could be several.

    Raises:
        OSError: A path cannot be read.
        TypeError: Something is no picture.
        ValueError: An array has a shape or dtype that is no picture's, or a PIL image cannot be written as PNG.
    """
    # Whether something is a PIL image is asked last, and not of a list: Python 3.11 takes 20 µs to find out.
    if not isinstance(pictures, (list, tuple)):
        if isinstance(pictures, (bytes, bytearray, memoryview, np.ndarray, str, os.PathLike, PillowImage)):
            return _encode(pictures)
        # A file yields lines and a mapping its keys, neither of which anybody means.
        if not isinstance(pictures, Iterable) or isinstance(pictures, Mapping) or hasattr(pictures, "read"):
            raise TypeError(_not_a_picture(pictures))
    return EncodedPictures([file for picture in pictures for file in _encode(picture).files], many=True)


def _encode(picture: Picture) -> EncodedPictures:
    """Turn one thing, which may be an array of several pictures, into picture files."""
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _split_npy(bytes(picture))
    if isinstance(picture, np.ndarray):
        return _encode_array(picture)
    if isinstance(picture, str | os.PathLike):
        return _split_npy(Path(picture).read_bytes())
    if isinstance(picture, PillowImage):
        return EncodedPictures([_encode_pillow(picture)], many=False)
    raise TypeError(_not_a_picture(picture))


def _not_a_picture(thing: object) -> str:
    return (
        f"a picture is a path, bytes, a PIL image or a numpy array, not {type(thing).__module__}.{type(thing).__name__}"
    )


def _encode_array(array: NDArray[Any]) -> EncodedPictures:
    """Write an array as .npy, one file for each picture in it.

    Args:
        array: (H, W), (H, W, C) or (N, H, W, C), uint8 or float32 of any byte order.

    Returns:
        One file, or N.

    Raises:
        ValueError: Another shape or dtype, or masked cells.
    """
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError("some cells of the array are masked: fill them with .filled(value)")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.float32):
        raise ValueError(
            f"an array of pictures is uint8 (0..255) or float32 (0..1), not {array.dtype}:"
            " use .astype(), which does not rescale"
        )
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(f"an array of pictures is (H, W), (H, W, C) or (N, H, W, C), not {array.shape}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if array.ndim < 4:
        return EncodedPictures([_write_npy(array)], many=False)
    return EncodedPictures([_write_npy(picture) for picture in array], many=True)


def _write_npy(array: NDArray[Any]) -> bytes:
    """Return an array as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def _split_npy(data: bytes) -> EncodedPictures:
    """Return a file as it is, unless it is a .npy file of several pictures: then one file for each."""
    array = _read_several(data) if data.startswith(_NPY_MAGIC) else None
    return EncodedPictures([data], many=False) if array is None else _encode_array(array)


def _read_several(data: bytes) -> NDArray[Any] | None:
    """View the cells of a .npy file as an array; None where it is not, whole and readable, one of several pictures.

    What is wrong with any other the service says, of that picture alone.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception:  # Python's own tokenizer and parser are at work there, and raise what they please.
        return None
    sizes = len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)  # No bool is one.
    picture = sizes and dtype.newbyteorder("=") in (np.uint8, np.float32)
    if not picture or len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        return None
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _encode_pillow(picture: PillowImage) -> bytes:
    """Write a PIL image as PNG: its pixels, turned upright, and nothing else of what it carries.

    Raises:
        ValueError: It has no pixels that PNG can hold; says what to do.
    """
    image: Any = picture
    mode = picture.mode
    if mode == "F":
        raise ValueError("a PIL image of mode F has no range: send numpy.asarray(picture) as float32 in 0..1")
    options: dict[str, Any] = {}
    clear = image.info.get("transparency") if mode in _TRANSPARENT else None
    if clear is not None and not _is_colour(clear, mode):
        raise ValueError(
            f"the PIL image of mode {mode} has info['transparency'] = {repr(clear)[:60]}, which is no colour of that"
            " mode: delete that entry, or send the file that the image was opened from"
        )
    try:
        turn = _turn(image)
        if mode.startswith("I"):
            image = image.convert("I")  # The other modes of 16 bits are clipped to 8 on any direct way.
            lowest, highest = image.getextrema()
            if lowest < 0 or highest > 65535:
                raise ValueError(f"its values are {lowest}..{highest}, rescale them to 0..65535")
            image = image.convert("I;16")
            options = {} if clear is None else {"transparency": operator.index(clear)}
        elif mode == "P":  # Written as one, a pixel beyond its palette's end would come out as another.
            image = image.convert("RGBA" if getattr(image, "has_transparency_data", True) else "RGB")
        else:
            image = image.convert("RGBA" if clear is not None else _PNG_MODES.get(mode, "RGB"))
        image.info = {}
        if turn is not None:
            image = image.transpose(turn)
        file = io.BytesIO()
        image.save(file, format="PNG", compress_level=1, **options)
    except Exception as error:  # PIL raises nearly anything.
        raise ValueError(f"the PIL image of mode {mode} cannot be written as PNG: {error}") from error
    return file.getvalue()


def _is_colour(value: Any, mode: str) -> bool:
    """Tell whether a PIL image's `transparency` means something in its mode: a colour, or the alpha of a palette."""
    if mode == "P" and isinstance(value, bytes):
        return len(value) <= 256
    values = value if isinstance(value, tuple | list) else (value,)
    try:
        numbers = [operator.index(number) for number in values]
    except TypeError:
        return False
    most = 65535 if mode.startswith("I") else 255
    return len(numbers) == (3 if mode == "RGB" else 1) and all(0 <= number <= most for number in numbers)


def _turn(image: Any) -> int | None:
    """Return what turns a PIL image upright, None if nothing has to or its EXIF record cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # PIL raises nearly anything on a damaged record.
        return None
