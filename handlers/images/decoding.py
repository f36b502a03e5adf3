"""Decoding: from the bytes of a PNG, JPEG, WebP or .npy file to pixels of a network's channels and size.

`containers` finds the parts of a file that decide its pixels; Pillow's decoders get only these parts. Axes: `N` batch,
`C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.api.errors import BadImage, ImageTooLarge, RequestError, TooManyImages, WrongChannels
from handlers.images.containers import ACCEPTED, BASELINE, EXTENDED, LOSSLESS, Bytes, Jpeg, Png, Webp, damaged, read
from handlers.images.preprocessing import (
    Box,
    Picture,
    Preprocessing,
    Scaled,
    TooLarge,
    fit,
    largest_scale,
    to_array,
)

DEFAULT_MAX_IMAGES = 64
DEFAULT_MAX_BYTES = 16 * 2**20
DEFAULT_MAX_PIXELS = 16_000_000

_NPY_MAGIC = b"\x93NUMPY"
# numpy's own reader runs Python's tokenizer and parser on the header, and may log warnings about it.
_NPY_HEADER = re.compile(
    rb"\{ ?'descr': ?'(?P<descr>[^']*)', ?'fortran_order': ?(?P<fortran_order>True|False), ?"
    rb"'shape': ?\((?P<shape>(?:\d{1,10}, ?){0,32}(?:\d{1,10})?)\),? ?\}\s*"
)
_NPY_DTYPES: dict[bytes, np.dtype[Any]] = {
    **dict.fromkeys((b"|u1", b"<u1", b">u1"), np.dtype(np.uint8)),
    b"<f4": np.dtype("<f4"),
    b">f4": np.dtype(">f4"),
}

# The limit on pixels is per model and checked below before a pixel is decoded, so Pillow's own would only warn twice.
Image.MAX_IMAGE_PIXELS = None

_TURNS = {  # By EXIF orientation.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING, _BOTTOM_UP, _RIGHT_TO_LEFT = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)  # Orientations, by what they turn.

_PNG_MODES = {  # By colour type and bits per sample: Pillow's mode, its name for the file's samples, samples per pixel.
    (0, 1): ("1", "1", 1),
    (0, 2): ("L", "L;2", 1),
    (0, 4): ("L", "L;4", 1),
    (0, 8): ("L", "L", 1),
    (0, 16): ("I;16", "I;16B", 1),
    (2, 8): ("RGB", "RGB", 3),
    (2, 16): ("RGB", "RGB;16B", 3),
    (3, 1): ("P", "P;1", 1),
    (3, 2): ("P", "P;2", 1),
    (3, 4): ("P", "P;4", 1),
    (3, 8): ("P", "P", 1),
    (4, 8): ("LA", "LA", 2),
    (4, 16): ("RGBA", "LA;16B", 2),
    (6, 8): ("RGBA", "RGBA", 4),
    (6, 16): ("RGBA", "RGBA;16B", 4),
}
_ADAM7 = (  # First row and column of each pass, and steps to the next.
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
_ZERO = (0, (0, 0), (0, 0, 0), (0, 0, 0, 0))  # A pixel of a missing row.
_PIECE = 2**16  # Bytes inflated at a time.
_JPEG_MODES = {1: ("L", "L"), 3: ("RGB", "RGB"), 4: ("CMYK", "CMYK;I")}  # Four channels are inverted, as Adobe's are.

# This replaces the end of a JPEG: before an end marker libjpeg silently fills missing data with grey; before this it
# reports that data is missing. Eight bytes of ones are as much as it reads ahead, and are no Huffman code.
_ONES = b"\xff\x00" * 8


FIRST_FRAME, NO_PROFILE, FEWER_BITS = "first frame only", "colour profile ignored", "16 bits to 8"
OVER_WHITE, TURNED = "transparency to white", "turned upright"
_GREY, _RGB, _CMYK = "grey", "RGB", "CMYK"  # Parts of a note: `grey to RGB`.

Notes = tuple[str, ...]
"""Changes to a picture that affect what is seen, in the words of proto/README.md, in this order."""


class Budget:
    """The pixels that may still be decoded for one request; decoding time is proportional to them.

    Args:
        pixels: Pixels of all pictures together.
    """

    def __init__(self, pixels: int) -> None:
        self._all = self._left = pixels

    def take(self, pixels: int) -> None:
        """Count pixels that are about to be decoded.

        Raises:
            ImageTooLarge: Fewer pixels are left.
        """
        if pixels > self._left:
            raise ImageTooLarge(
                f"the request's pictures come to more than {self._all:,} pixels; send this one in another request"
            )
        self._left -= pixels


class OpenedFile:
    """A file whose header was read and whose pixels were counted, to be decoded and resized.

    `open_file` makes these in the order of a request's files, so which file a budget rejects does not depend on timing.

    Args:
        content: The file's parts, or the pictures of an array.
        preprocessing: The network's input.
        scale: Decode a JPEG to a half, a quarter or an eighth of its size (2, 4, 8); 1 for all of it.

    Attributes:
        sizes: (H, W) of each picture as sent, upright.
        pixels: Pixels to decode; 0 for an array.
        notes: Notes of each picture, once decoded.
    """

    def __init__(
        self, content: Png | Jpeg | Webp | list[Picture], preprocessing: Preprocessing, scale: int = 1
    ) -> None:
        self._content, self._preprocessing, self._scale = content, preprocessing, scale
        self.notes: list[Notes] = []
        if isinstance(content, list):
            self.pixels, self.sizes = 0, [(picture.shape[0], picture.shape[1]) for picture in content]
        else:
            self.pixels, self.sizes = math.prod(content.size), [_upright(content)]

    def decode(self) -> list[Picture]:
        """Decode, resize and crop; any thread may do this.

        Returns:
            As for the function `decode`.

        Raises:
            BadImage: The file is damaged or incomplete, or resizing leaves nothing of the picture's shorter side.
            ImageTooLarge: The picture cannot be resized in bounded memory.
        """
        place = self._preprocessing.describe_placement
        if isinstance(self._content, list):
            pictures = list(zip(self._content, self.sizes, strict=True))
            self.notes = [place(size, is_prepared=picture.dtype == np.float32) for picture, size in pictures]
            return [self._fit(picture, size) for picture, size in pictures]
        notes: list[str] = []
        image = _decode_file(self._content, self._preprocessing.channels, self._scale, notes)
        [size] = self.sizes
        self.notes = [(*notes, *place(size))]
        if self._scale == 1:
            return [self._fit(image, size)]
        return [self._fit(image, size, Scaled(size, _box(image, self._content, self._scale)))]

    def _fit(self, picture: Picture | Image.Image, size: tuple[int, int], scaled: Scaled | None = None) -> Picture:
        """Resize and crop a picture of the given (H, W); see `fit`."""
        preprocessing = self._preprocessing
        if not preprocessing.resize and preprocessing.size in (None, size):
            return picture if isinstance(picture, np.ndarray) else to_array(picture)  # Most small ones, at once.
        try:
            return fit(picture, preprocessing, scaled)
        except TooLarge as err:
            raise _too_long(ImageTooLarge, size, err) from err
        except ValueError as err:
            raise _too_long(BadImage, size, err) from err


def decode(data: Bytes, preprocessing: Preprocessing, **options: Any) -> list[Picture]:
    """Read one file into pictures of the network's channels and size; for the arguments see `open_file`.

    Returns:
        One picture, or N of a four-dimensional array; each (H, W, C), uint8 in 0..255 or float32 on the 0..1 scale.

    Raises:
        RequestError: As for `open_file` and `OpenedFile.decode`.
    """
    return open_file(data, preprocessing, **options).decode()


def open_file(
    data: Bytes,
    preprocessing: Preprocessing,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_images: int = DEFAULT_MAX_IMAGES,
    budget: Budget | None = None,
    scaled: bool = False,
) -> OpenedFile:
    """Read a file's header, and check all that can be checked before it is decoded.

    Args:
        data: Content of a PNG, JPEG or WebP file, or of a .npy file of uint8 or float32 shaped (H, W), (H, W, C) or
            (N, H, W, C). The first bytes identify the format.
        preprocessing: The network's input.
        max_bytes: Largest accepted `data`.
        max_pixels: Largest accepted H·W, and for a network of any size also after resizing.
        max_images: Largest accepted N of an array.
        budget: Pixels left for this and other picture files, and for what resizing adds for a network of any size; None
            for no such limit.
        scaled: Decode JPEGs that are large enough to a half, a quarter or an eighth of their size, as
            `preprocessing.largest_scale` says. It is faster, and values differ by some levels from the exact ones
            (docs/decisions/0012-scaled-decoding.md).

    Raises:
        BadImage: `data` is none of these formats, damaged, empty, or holds values no picture has.
        ImageTooLarge: More bytes or pixels than allowed, or pixels than `budget` has.
        TooManyImages: An array of more than `max_images` pictures.
        WrongChannels: An array without the network's channels, or a file for a network of neither 1 nor 3.
    """
    channels = preprocessing.channels
    if not data:
        raise BadImage(f"the picture is empty; send {ACCEPTED}")
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the picture has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    if data[:6] == _NPY_MAGIC:
        pictures = _decode_array(data, channels, max_pixels=max_pixels, max_images=max_images)
        opened, item_bytes = OpenedFile(pictures, preprocessing), pictures[0].itemsize
    elif channels not in (1, 3):
        raise WrongChannels(f"encoded pictures are grey or RGB, this network takes {channels} channels; send an array")
    else:
        file = read(data)
        _check_pixels(*file.size, max_pixels, budget)
        may_scale = scaled and isinstance(file, Jpeg) and file.channels in (1, 3) and file.frame != LOSSLESS
        scale = largest_scale(_upright(file), preprocessing) if may_scale else 1
        opened, item_bytes = OpenedFile(file, preprocessing, scale), 1
    if preprocessing.size is None and preprocessing.resize:
        for size in opened.sizes:
            tall, wide = preprocessing.place(size).resized
            if tall * wide > max_pixels:
                larger = f"resized it would have {wide:,}×{tall:,} pixels, more than {max_pixels:,}"
                raise _too_long(ImageTooLarge, size, larger)
            if budget is not None:  # All inputs are held at once, and a float takes the memory of four bytes.
                budget.take(max(0, tall * wide - math.prod(size)) * item_bytes)
    return opened


def _check_pixels(height: int, width: int, max_pixels: int, budget: Budget | None = None) -> None:
    """Check the number of pixels of a picture.

    Raises:
        ImageTooLarge: The picture has more than `max_pixels`, or than `budget` has left.
    """
    if height * width > max_pixels:
        raise ImageTooLarge(f"the picture has {width:,}×{height:,} pixels; at most {max_pixels:,} are accepted")
    if budget is not None:
        budget.take(height * width)


def _too_long(kind: type[RequestError], size: tuple[int, int], why: object) -> RequestError:
    """Return the error of a picture that cannot be resized."""
    return kind(f"the picture of {size[1]:,}×{size[0]:,} pixels is too long and thin: {why}")


def _upright(file: Png | Jpeg | Webp) -> tuple[int, int]:
    """Return (H, W) of a file's picture after turning it upright."""
    height, width = file.size
    return (width, height) if file.orientation in _LYING else (height, width)


def _box(image: Image.Image, file: Png | Jpeg | Webp, scale: int) -> Box:
    """Return where the file's whole picture lies in an upright image of it that was decoded at 1/scale.

    The last row and column of blocks become a whole pixel even where the picture ends within them; turning the picture
    may bring these to the top or to the left.
    """
    height, width = (side / scale for side in _upright(file))
    top = image.height - height if file.orientation in _BOTTOM_UP else 0
    left = image.width - width if file.orientation in _RIGHT_TO_LEFT else 0
    return left, top, left + width, top + height


def _decode_file(file: Png | Jpeg | Webp, channels: int, scale: int, notes: list[str]) -> Image.Image:
    """Decode a file to an upright image of mode L or RGB, by 1 or 3 channels.

    Args:
        file: The file.
        channels: 1 or 3.
        scale: A JPEG's scale, as for `OpenedFile`.
        notes: Changes to the picture that affect what is seen are added here.

    Raises:
        BadImage: The file is damaged or incomplete.
    """
    try:
        if not isinstance(file, Jpeg) and file.is_animated:
            notes.append(FIRST_FRAME)
        if file.has_profile:
            notes.append(NO_PROFILE)
        if isinstance(file, Jpeg):
            image = _decode_jpeg(file, scale)
        else:
            image = _decode_png(file, notes) if isinstance(file, Png) else _decode_webp(file, notes)
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        colours, wanted = _colours(file), _GREY if channels == 1 else _RGB
        if colours != wanted:
            notes.append(f"{colours} to {wanted}")
        if file.orientation == 1:
            return image
        notes.append(TURNED)
        return image.transpose(_TURNS[file.orientation])
    except (RequestError, MemoryError):
        raise
    except Exception as err:  # Pillow raises nearly anything on a damaged file, and its messages hold addresses.
        raise damaged(type(file).__name__.upper()) from err


def _colours(file: Png | Jpeg | Webp) -> str:
    """Return what the colours of a file are, before they are converted."""
    if isinstance(file, Jpeg):
        return {1: _GREY, 4: _CMYK}.get(file.channels, _RGB)
    return _GREY if isinstance(file, Png) and file.colour in (0, 4) else _RGB


def _decode_jpeg(file: Jpeg, scale: int) -> Image.Image:
    """Decode a JPEG to mode L, RGB or CMYK, at 1/scale of its size, rounded up."""
    height, width = (-(-side // scale) for side in file.size)
    mode, raw = _JPEG_MODES[file.channels]
    data = file.file
    if file.scans == 1 and file.frame in (BASELINE, EXTENDED):
        data = b"".join((memoryview(data)[: file.end], _ONES))
    return Image.frombytes(mode, (width, height), data, "jpeg", raw, "", scale, 0)


def _decode_webp(file: Webp, notes: list[str]) -> Image.Image:
    """Decode a WebP to mode RGB, over white where it is transparent."""
    with Image.open(io.BytesIO(file.file), formats=["WEBP"]) as image:
        image.load()
        return _over_white(image, notes) if image.mode == "RGBA" else image


def _decode_png(file: Png, notes: list[str]) -> Image.Image:
    """Decode a PNG to mode 1, L, P or RGB, over white where it is transparent."""
    height, width = file.size
    mode, raw, channels = _PNG_MODES[file.colour, file.depth]
    image = Image.frombytes(mode, (width, height), file.pixels, "zip", raw, int(file.interlaced))
    if not _has_all_rows(file, channels * file.depth, image):
        raise BadImage("the PNG file has fewer rows than its header says")
    if file.depth == 16:
        notes.append(FEWER_BITS)
    if file.colour == 3:
        image.putpalette(_read_palette(file, notes))
    elif mode in ("LA", "RGBA"):
        return _over_white(image, notes)
    elif mode == "I;16" or file.transparency:
        return _read_samples(file, image, notes)
    return image


def _has_all_rows(file: Png, bits: int, image: Image.Image) -> bool:
    """Return whether a PNG's zlib stream holds all rows: Pillow's decoder takes its end for the picture's.

    Args:
        file: The PNG.
        bits: Bits per pixel.
        image: The decoded picture, zeros where a row is missing.
    """
    height, width = file.size
    if file.interlaced:
        sides = [(-((y - height) // down), -((x - width) // right)) for y, x, down, right in _ADAM7]
        expected = sum(rows * (1 + (columns * bits + 7) // 8) for rows, columns in sides if columns)
    elif image.getpixel((width - 1, height - 1)) not in _ZERO:
        return True  # Rows are in order, and the last is present.
    else:
        expected = height * (1 + (width * bits + 7) // 8)
        if expected > _PIECE and image.crop((0, height - 1, width, height)).tobytes().strip(b"\0"):
            return True
    stream, found = zlib.decompressobj(), 0
    for at in range(0, len(file.pixels), _PIECE):
        piece = file.pixels[at : at + _PIECE]
        while piece and found < expected and not stream.eof:
            found += len(stream.decompress(piece, _PIECE))
            piece = stream.unconsumed_tail
    return found >= expected


def _read_palette(file: Png, notes: list[str]) -> bytes:
    """Return a PNG's palette, three bytes per colour, over white where it is transparent."""
    colours = np.frombuffer(file.palette, np.uint8).reshape(1, -1, 3)
    if not colours.size:
        raise BadImage("the PNG file has no palette")
    if not file.transparency:
        return file.palette
    alpha = np.frombuffer(file.transparency, np.uint8)[: colours.shape[1]]
    table = np.full((1, colours.shape[1], 4), 255, np.uint8)
    table[..., :3] = colours
    table[0, : len(alpha), 3] = alpha
    return _over_white(Image.fromarray(table), notes).tobytes()


def _read_samples(file: Png, image: Image.Image, notes: list[str]) -> Image.Image:
    """Return a PNG of grey or RGB in mode L or RGB, white where it has the transparent colour.

    That colour is one of the file's samples, of up to 16 bits, and not of the bytes that they become.
    """
    channels = 1 if file.colour == 0 else 3
    transparent = np.frombuffer(file.transparency[: 2 * channels], ">u2") & (2**file.depth - 1)
    if transparent.size not in (0, channels):
        raise BadImage("the PNG file's tRNS chunk is too short")
    samples: list[tuple[NDArray[Any], NDArray[Any]]]  # And what of the transparent colour they are compared with.
    if image.mode == "I;16":
        grey = np.asarray(image)[..., np.newaxis]
        levels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
        samples = [(grey, transparent)]
    else:
        levels = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(*file.size, channels)
        samples = [(levels, transparent * (255 // (2**file.depth - 1)))]
        if file.depth == 16:  # The levels are the high bytes.
            low = Image.frombytes("RGB", image.size, file.pixels, "zip", "RGB;16L", int(file.interlaced))
            samples = [(levels, transparent >> 8), (np.asarray(low), transparent & 255)]
    if transparent.size:
        clear = np.full(file.size, 255, np.uint8)
        for cells, value in samples:
            for channel in range(channels):
                clear *= cells[..., channel] == value[channel]
        levels |= clear[..., np.newaxis]  # 255 where every sample is the colour's, else 0.
        if clear.any():
            notes.append(OVER_WHITE)
    return Image.fromarray(levels[..., 0] if channels == 1 else levels)


def _over_white(image: Image.Image, notes: list[str]) -> Image.Image:
    """Lay a picture with alpha over white; the result is of mode RGB."""
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        notes.append(OVER_WHITE)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _decode_array(data: Bytes, expected: int, *, max_pixels: int, max_images: int) -> list[Picture]:
    """Read a .npy file, without pickle and without a copy, into pictures of the given number of channels."""
    array = _read_npy(data)
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim == 3:
        array = array[np.newaxis]
    count, height, width, channels = array.shape
    if count > max_images:  # Before the loop below: a million pictures of one pixel are few bytes.
        raise TooManyImages(f"the array holds {count:,} pictures; at most {max_images} are accepted in a request")
    if channels != expected:
        raise WrongChannels(
            f"the array of shape {shape} has {channels} channel{'s' if channels > 1 else ''} in its last axis; "
            f"this network takes {expected}"
        )
    _check_pixels(height, width, max_pixels)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise BadImage("the array holds NaN or infinity; send finite values on the 0..1 scale")
    return list(array)


def _read_npy(data: Bytes) -> Picture:
    """View the cells of a .npy file as an array; its header is checked against the number of bytes."""
    lengths = {b"\1\0": "<8xH", b"\2\0": "<8xI"}.get(bytes(data[6:8]))  # By format version.
    header = None
    if lengths is not None and len(data) >= struct.calcsize(lengths):
        [length] = struct.unpack_from(lengths, data)
        start = struct.calcsize(lengths) + length
        header = _NPY_HEADER.fullmatch(data, start - length, start)
    if header is None or start > len(data):
        raise BadImage("the .npy header is not that of a uint8 or float32 array; write it with numpy.save")
    dtype = _NPY_DTYPES.get(header["descr"])
    if dtype is None:
        raise BadImage("the array must be uint8 (0..255) or float32 (0..1 scale)")
    shape = tuple(int(length) for length in header["shape"].split(b",") if length.strip())
    if len(shape) not in (2, 3, 4) or not all(0 < length < 2**31 for length in shape):
        raise BadImage("the array must be (H, W), (H, W, C) or (N, H, W, C), none of them 0")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise BadImage(f"the .npy header promises {expected:,} bytes of cells, {len(data) - start:,} are there")
    cells = np.frombuffer(data, dtype=dtype, offset=start)
    array = cells.reshape(shape, order="F" if header["fortran_order"] == b"True" else "C")
    picture: Picture = array.astype(dtype.newbyteorder("="), copy=False)
    return picture
