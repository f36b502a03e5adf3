"""Encodes the pictures that callers pass (paths, files, bytes, PIL images, arrays, tensors) as files for a request.

Files that the service reads are not decoded here; the service validates them. PIL is used for its own images and for
GIF, BMP and TIFF files. torch is never imported.
"""

from __future__ import annotations

import io
import math
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

# The mode in which a PIL image is written; the 16-bit ones and P are handled below, and any other becomes RGB.
_PNG_MODES = {"1": "1", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}
_MODES_WITH_TRANSPARENT_COLOUR = ("1", "L", "P", "RGB", "I", "I;16", "I;16B", "I;16L", "I;16N")

# First bytes of the formats that the service does not read.
_CONVERTED = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"}

# Notes of what the client does to a picture; proto/README.md lists all. Those of the service are added to them.
_FIRST_FRAME, _NO_PROFILE, _FEWER_BITS = "first frame only", "colour profile ignored", "16 bits to 8"
_CMYK_TO_RGB, _TURNED = "CMYK to RGB", "turned upright"
_ORDER = {_FIRST_FRAME: 0, _NO_PROFILE: 1, _FEWER_BITS: 2, "transparency to white": 3, _TURNED: 5}  # 4: colours.

_BITS_PER_SAMPLE = 258  # TIFF's tag.
_SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))  # Names of sRGB in a colour profile, as the service looks for them.
_PROFILE_BYTES = 4096  # In which it does.

_LOWEST, _HIGHEST = -1.0, 2.0  # Range of a float32 picture. Resizing and noise leave 0..1, but not by this much.


class BinaryFile(Protocol):
    """A file opened in binary mode, or `io.BytesIO`; read from its position to its end."""

    def read(self) -> bytes:
        """Return the content."""


class Tensor(Protocol):
    """A torch tensor."""

    def detach(self) -> Any:
        """Return the tensor without its graph."""


# A picture that is not an array or tensor: one of these may be several pictures.
EncodablePicture: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | Image"
Picture: TypeAlias = "EncodablePicture | NDArray[Any] | Tensor"


class ConvertedFile(bytes):
    """A PNG file that the client made of a picture in another form.

    Attributes:
        notes: What that changed of what is seen, in words of proto/README.md.
    """

    notes: tuple[str, ...] = ()

    def merge_notes(self, received: Iterable[str]) -> tuple[str, ...]:
        """Return these notes and the service's of this file, as the service would note them of the picture itself."""
        notes = dict.fromkeys((*self.notes, *received))
        if notes.keys() >= {_CMYK_TO_RGB, "RGB to grey"}:
            del notes[_CMYK_TO_RGB], notes["RGB to grey"]
            notes["CMYK to grey"] = None
        return tuple(sorted(notes, key=lambda note: _ORDER.get(note, 4 if " to " in note else 6)))


class EncodedPictures(NamedTuple):
    """Picture files in order, and whether the caller passed several pictures."""

    files: list[bytes]
    is_list: bool


def encode_pictures(pictures: Picture | Iterable[Picture]) -> EncodedPictures:
    """Encode one picture or several as picture files.

    Args:
        pictures: A picture, or an iterable of them. A picture is a path, the bytes of a file, an open binary file, a
            PIL image, an array (H, W) or (H, W, C), uint8 0..255 or float32 0..1, or such a torch tensor, (H, W) or
            (C, H, W). An array (N, H, W, C), a .npy file of one, or a tensor (N, C, H, W) is N pictures.

    Returns:
        One file per picture, and whether `pictures` may be several. A file that had to be converted keeps the notes of
        that (`ConvertedFile`), also when it is sent later.

    Raises:
        OSError: A path cannot be read.
        TypeError: An argument is not a picture.
        ValueError: An array does not have the shape, dtype or range of a picture, a PIL image cannot be written as PNG,
            an open file is at its end, or a GIF, BMP or TIFF file cannot be read with Pillow.
    """
    if _is_single(pictures) or isinstance(pictures, np.ndarray) or _is_tensor(pictures):
        return _encode(pictures)
    if not isinstance(pictures, Iterable) or isinstance(pictures, Mapping):  # Iterating a mapping yields keys.
        raise TypeError(_not_a_picture(pictures))
    return EncodedPictures([file for picture in pictures for file in _encode(picture).files], is_list=True)


def is_one_picture(value: object) -> bool:
    """Return whether a value is a single picture rather than an iterable of pictures."""
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return bool(value.ndim < 4)
    return _is_single(value)


def _is_single(value: object) -> bool:
    """Return whether a value is a picture that cannot be several; iterating a file would yield lines."""
    return (
        isinstance(value, str | bytes | bytearray | memoryview | os.PathLike)
        or hasattr(value, "read")
        or _is_pil(value)
    )


def _is_pil(value: object) -> bool:
    """Return whether a value is a PIL image. If it is one, PIL has been imported."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _is_tensor(value: object) -> TypeGuard[Any]:
    """Return whether a value is a torch tensor. If it is one, torch has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _encode(picture: Any) -> EncodedPictures:
    """Encode one argument, which may be an array of several pictures."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return _encode_file(_as_bytes(picture))
    if isinstance(picture, np.ndarray):
        return _encode_array(_checked_range(picture))
    if isinstance(picture, str | os.PathLike):
        return _encode_file(Path(picture).read_bytes())
    if _is_pil(picture):
        return EncodedPictures([_encode_pil(picture)], is_list=False)
    if _is_tensor(picture):
        return _encode_array(_checked_range(_tensor_array(picture)))
    if hasattr(picture, "read"):
        return _encode_file(_read_open_file(picture))
    raise TypeError(_not_a_picture(picture))


def _not_a_picture(value: object) -> str:
    name = f"{type(value).__module__}.{type(value).__name__}"
    return f"expected a path, bytes, an open binary file, a PIL image, a numpy array or a torch tensor, not {name}"


def _read_open_file(file: BinaryFile) -> bytes:
    """Read an open file to its end; raise TypeError if it is open as text, ValueError if nothing is left."""
    data = file.read()
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError("the file must be open in binary mode: open(path, 'rb')")
    if not len(data):
        raise ValueError("the open file is at its end; call .seek(0) to read it again")
    return _as_bytes(data)


def _as_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Return data as bytes; a `ConvertedFile` as it is."""
    return data if isinstance(data, bytes) else bytes(data)


def _tensor_array(tensor: Any) -> NDArray[Any]:
    """Return a torch tensor (H, W), (C, H, W) or (N, C, H, W) as an array (H, W), (H, W, C) or (N, H, W, C)."""
    if tensor.ndim not in (2, 3, 4) or (tensor.ndim > 2 and tensor.shape[-3] > 4):
        raise ValueError(
            f"picture tensors must be (H, W), (C, H, W) or (N, C, H, W), not {tuple(tensor.shape)};"
            " send (H, W, C) as an array: tensor.numpy()"
        )
    if not any(str(tensor.dtype) == f"torch.{name}" for name in ("uint8", "float32")):
        raise ValueError(
            f"picture tensors must be uint8 (0..255) or float32 (0..1), not {tensor.dtype}; convert with .byte() or"
            " .float() (values are not rescaled)"
        )
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array if array.ndim == 2 else np.moveaxis(array, -3, -1)


def _checked_range(array: NDArray[Any]) -> NDArray[Any]:
    """Return a float32 array of pictures; raise ValueError if its values cannot be on the scale 0..1.

    Files are not checked, so the bytes of a .npy file send any values.
    """
    if array.dtype.newbyteorder("=") == np.float32 and array.size:
        lowest, highest = (float(extreme.reduce(np.asarray(array), axis=None)) for extreme in (np.fmin, np.fmax))
        if lowest < _LOWEST or highest > _HIGHEST:
            remedy = "divide by 255, or send uint8" if lowest >= 0 else "undo the normalisation, which the service does"
            raise ValueError(
                f"float32 pictures must be 0..1, and these values are {lowest:.4g}..{highest:.4g}: {remedy}"
            )
    return array


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
    """Return a file as it is; a .npy file of several pictures as one file per picture; GIF, BMP and TIFF as PNG."""
    array = _read_4d_npy(data) if data.startswith(np.lib.format.MAGIC_PREFIX) else None
    if array is not None:
        return _encode_array(array)
    for first_bytes, name in _CONVERTED.items():
        if data.startswith(first_bytes):
            data = _convert(data, name)
    return EncodedPictures([data], is_list=False)


def _convert(data: bytes, name: str) -> ConvertedFile:
    """Return the first picture of a GIF, BMP or TIFF file as PNG.

    Raises:
        ValueError: Pillow is not installed, or cannot read the file.
    """
    try:
        from PIL import Image
    except ImportError as error:
        message = f"the service does not read {name}; to have it converted: pip install 'convscope[pictures]'"
        raise ValueError(message) from error
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as picture:
            file = _encode_pil(picture)
            bits = max(getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))  # For a TIFF; Pillow keeps 8 of RGB.
            is_animated = False
            with suppress(Exception):  # The second frame may be damaged.
                is_animated = getattr(picture, "is_animated", False)
            done = {_FIRST_FRAME: is_animated, _FEWER_BITS: bits > 8 and not picture.mode.startswith("I")}
            file.notes += _those_done(done)
            return file
    except Exception as error:  # PIL raises almost anything.
        raise ValueError(f"the {name} file cannot be read: {error.__cause__ or error}") from error


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


def _those_done(notes: Mapping[str, bool]) -> tuple[str, ...]:
    return tuple(note for note, is_done in notes.items() if is_done)


def _encode_pil(picture: Image) -> ConvertedFile:
    """Encode the pixels of a PIL image, of its current frame, as PNG, rotated according to EXIF.

    Other metadata is dropped.

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
        image, is_turned = _rotate_by_exif(picture)
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
    converted = ConvertedFile(file.getvalue())
    profile = picture.info.get("icc_profile")
    is_foreign = isinstance(profile, bytes) and not any(name in profile[:_PROFILE_BYTES] for name in _SRGB)
    converted.notes = _those_done({_NO_PROFILE: is_foreign, _CMYK_TO_RGB: mode == "CMYK", _TURNED: is_turned})
    return converted


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


def _rotate_by_exif(picture: Image) -> tuple[Any, bool]:
    """Return a PIL image rotated according to its EXIF orientation, and whether that changed it.

    It is returned unchanged if its EXIF data cannot be read.
    """
    from PIL import ExifTags, ImageOps

    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)  # Before it is loaded, which turns a TIFF.
        return ImageOps.exif_transpose(picture), orientation in range(2, 9)
    except Exception:  # PIL raises almost anything for damaged EXIF data.
        return picture, False
