"""Decoding: from the bytes of a PNG, JPEG, WebP or .npy file to pixels of a network's channels and size.

`containers` finds the parts of a file that decide its pixels; Pillow's decoders get those alone. Axes: `N` batch,
`C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.api.errors import BadImage, ImageTooLarge, RequestError, TooManyImages, WrongChannels
from handlers.images.containers import ACCEPTED, BASELINE, EXTENDED, Bytes, Jpeg, Png, Webp, damaged, read
from handlers.images.preprocessing import Picture, Preprocessing, TooLarge, fit

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

_PNG_MODES = {  # By colour type and bits a sample: Pillow's mode, its name for the file's samples, samples a pixel.
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
_ZERO = (0, (0, 0), (0, 0, 0), (0, 0, 0, 0))  # A pixel of a row that is missing.
_PIECE = 2**16  # Bytes inflated at a time.
_JPEG_MODES = {1: ("L", "L"), 3: ("RGB", "RGB"), 4: ("CMYK", "CMYK;I")}  # Four channels are inverted, as Adobe's are.

# This replaces the end of a JPEG: before an end marker libjpeg silently fills missing data with grey; before this it
# reports that data is missing. Eight bytes of ones are as much as it reads ahead, and are no Huffman code.
_ONES = b"\xff\x00" * 8


class Budget:
    """The pixels that may still be decoded for one request; decoding costs time in proportion to them.

    Args:
        pixels: Of all pictures together.
    """

    def __init__(self, pixels: int) -> None:
        self._all = self._left = pixels

    def take(self, pixels: int) -> None:
        """Count pixels that are about to be decoded.

        Raises:
            ImageTooLarge: They are more than are left.
        """
        if pixels > self._left:
            raise ImageTooLarge(
                f"the request's pictures come to more than {self._all:,} pixels; send this one in another request"
            )
        self._left -= pixels


def decode(
    data: Bytes,
    preprocessing: Preprocessing,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_images: int = DEFAULT_MAX_IMAGES,
    budget: Budget | None = None,
) -> list[Picture]:
    """Read one file into pictures of the network's channels and size.

    Args:
        data: As in `decode_upright`.
        preprocessing: The network's input.
        max_bytes: Largest accepted `data`.
        max_pixels: Largest accepted H·W, counted before anything is decoded, and for a network of any size once more
            before it is resized.
        max_images: Largest accepted N of an array.
        budget: Of pixels in picture files, for this one and others, and of those that resizing adds for a network of
            any size; None for no such limit.

    Returns:
        One picture, or N of a four-dimensional array; each (H, W, C), uint8 in 0..255 or float32 on the 0..1 scale.

    Raises:
        BadImage: As `decode_upright` does, or resizing leaves nothing of the picture's shorter side.
        ImageTooLarge: More bytes or pixels than allowed, or pixels than `budget` has.
        TooManyImages: An array of more than `max_images` pictures.
        WrongChannels: An array without the network's channels.
    """
    pictures = decode_upright(
        data,
        preprocessing.channels,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_images=max_images,
        budget=budget,
    )
    return [fit_within(picture, preprocessing, max_pixels=max_pixels, budget=budget) for picture in pictures]


def decode_upright(
    data: Bytes,
    channels: int,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_images: int = DEFAULT_MAX_IMAGES,
    budget: Budget | None = None,
) -> list[Picture]:
    """Read one file into pictures of their own size.

    Args:
        data: Content of a PNG, JPEG or WebP file, or of a .npy file of uint8 or float32 shaped (H, W), (H, W, C) or
            (N, H, W, C). The first bytes say which.
        channels: C.
        max_bytes: Largest accepted `data`.
        max_pixels: Largest accepted H·W, counted before anything is decoded.
        max_images: Largest accepted N of an array.
        budget: Of pixels in picture files, for this one and others; None for no such limit.

    Returns:
        One picture, or N of a four-dimensional array; each (H, W, C), uint8 in 0..255 or float32 on the 0..1 scale.

    Raises:
        BadImage: `data` is none of these formats, damaged, empty, or holds values no picture has.
        ImageTooLarge: More bytes or pixels than allowed, or pixels than `budget` has.
        TooManyImages: An array of more than `max_images` pictures.
        WrongChannels: An array without the network's channels.
    """
    if not data:
        raise BadImage(f"the picture is empty; send {ACCEPTED}")
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the picture has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    if data[:6] == _NPY_MAGIC:
        return _decode_array(data, channels, max_pixels=max_pixels, max_images=max_images)
    return [decode_file(data, channels, max_pixels=max_pixels, budget=budget)]


def fit_within(
    picture: Picture, preprocessing: Preprocessing, *, max_pixels: int, budget: Budget | None = None
) -> Picture:
    """Resize and crop a picture for the network; see `fit`.

    Args:
        picture: (H, W, C), upright.
        preprocessing: The network's input.
        max_pixels: Most pixels for a network of any size.
        budget: Pays for the pixels that resizing adds for such a network, whose inputs are all held at once.

    Raises:
        BadImage: Nothing is left of the picture's shorter side.
        ImageTooLarge: It would become larger than allowed, or cannot be resized in bounded memory.
    """
    height, width, _ = picture.shape
    if not preprocessing.resize and preprocessing.height in (None, height) and preprocessing.width in (None, width):
        return picture  # What most small pictures need, at once.
    try:
        if preprocessing.size is None:
            tall, wide = preprocessing.place((height, width)).resized
            if tall * wide > max_pixels:
                raise TooLarge(f"resized it would have {wide:,}×{tall:,} pixels, more than {max_pixels:,}")
            if budget is not None:
                # A float takes the memory of four bytes.
                budget.take(max(0, tall * wide - height * width) * picture.itemsize)
        return fit(picture, preprocessing)
    except TooLarge as err:
        raise ImageTooLarge(f"the picture of {width:,}×{height:,} pixels is too long and thin: {err}") from err
    except ValueError as err:
        raise BadImage(f"the picture of {width:,}×{height:,} pixels is too long and thin: {err}") from err


def decode_file(data: Bytes, channels: int, *, max_pixels: int, budget: Budget | None = None) -> NDArray[np.uint8]:
    """Decode an upright picture of 1 or 3 channels.

    Args:
        data: The file's content; the first bytes say of which format.
        channels: C; the picture is converted to grey or RGB.
        max_pixels: Largest accepted H·W, counted before anything is decoded.
        budget: Of pixels, for this picture and others; None for no such limit.

    Returns:
        (H, W, C), uint8.

    Raises:
        BadImage: None of the formats, damaged or incomplete.
        ImageTooLarge: More pixels than allowed, or than `budget` has.
        WrongChannels: C is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise WrongChannels(f"encoded pictures are grey or RGB, this network takes {channels} channels; send an array")
    file = read(data)
    check_pixels(*file.size, max_pixels, budget)
    try:
        image = _DECODERS[type(file)](file)
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        if file.orientation != 1:
            image = image.transpose(_TURNS[file.orientation])
        return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, channels)
    except RequestError:
        raise
    except Exception as err:  # Pillow raises nearly anything on a damaged file, and its messages hold addresses.
        raise damaged(type(file).__name__.upper()) from err


def check_pixels(height: int, width: int, max_pixels: int, budget: Budget | None = None) -> None:
    """Check the number of pixels of a picture.

    Raises:
        ImageTooLarge: It has more than `max_pixels`, or than `budget` has.
    """
    if height * width > max_pixels:
        raise ImageTooLarge(f"the picture has {width:,}×{height:,} pixels; at most {max_pixels:,} are accepted")
    if budget is not None:
        budget.take(height * width)


def _decode_jpeg(file: Jpeg) -> Image.Image:
    """Decode a JPEG to mode L, RGB or CMYK."""
    height, width = file.size
    mode, raw = _JPEG_MODES[file.channels]
    data = file.file
    if file.scans == 1 and file.frame in (BASELINE, EXTENDED):
        data = b"".join((memoryview(data)[: file.end], _ONES))
    return Image.frombytes(mode, (width, height), data, "jpeg", raw, "")


def _decode_webp(file: Webp) -> Image.Image:
    """Decode a WebP to mode RGB, over white where it is transparent."""
    with Image.open(io.BytesIO(file.file), formats=["WEBP"]) as image:
        image.load()
        return _over_white(image) if image.mode == "RGBA" else image


def _decode_png(file: Png) -> Image.Image:
    """Decode a PNG to mode 1, L, P or RGB, over white where it is transparent."""
    height, width = file.size
    mode, raw, channels = _PNG_MODES[file.colour, file.depth]
    image = Image.frombytes(mode, (width, height), file.pixels, "zip", raw, int(file.interlaced))
    if not _has_all_rows(file, channels * file.depth, image):
        raise BadImage("the PNG file has fewer rows than its header says")
    if file.colour == 3:
        image.putpalette(_read_palette(file))
    elif mode in ("LA", "RGBA"):
        return _over_white(image)
    elif mode == "I;16" or file.transparency:
        return _read_samples(file, image)
    return image


def _has_all_rows(file: Png, bits: int, image: Image.Image) -> bool:
    """Tell whether a PNG's zlib stream holds all rows: Pillow's decoder takes its end for the picture's.

    Args:
        file: The PNG.
        bits: Of a pixel.
        image: As decoded, of zeros where a row is missing.
    """
    height, width = file.size
    if file.interlaced:
        sides = [(-((y - height) // down), -((x - width) // right)) for y, x, down, right in _ADAM7]
        expected = sum(rows * (1 + (columns * bits + 7) // 8) for rows, columns in sides if columns)
    elif image.getpixel((width - 1, height - 1)) not in _ZERO:
        return True  # Rows come in order, and the last is there.
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


def _read_palette(file: Png) -> bytes:
    """Return a PNG's palette, three bytes a colour, over white where it is transparent."""
    colours = np.frombuffer(file.palette, np.uint8).reshape(1, -1, 3)
    if not colours.size:
        raise BadImage("the PNG file has no palette")
    if not file.transparency:
        return file.palette
    alpha = np.frombuffer(file.transparency, np.uint8)[: colours.shape[1]]
    table = np.full((1, colours.shape[1], 4), 255, np.uint8)
    table[..., :3] = colours
    table[0, : len(alpha), 3] = alpha
    return _over_white(Image.fromarray(table)).tobytes()


def _read_samples(file: Png, image: Image.Image) -> Image.Image:
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
        if file.depth == 16:  # Those are the high bytes.
            low = Image.frombytes("RGB", image.size, file.pixels, "zip", "RGB;16L", int(file.interlaced))
            samples = [(levels, transparent >> 8), (np.asarray(low), transparent & 255)]
    if transparent.size:
        clear = np.full(file.size, 255, np.uint8)
        for cells, value in samples:
            for channel in range(channels):
                clear *= cells[..., channel] == value[channel]
        levels |= clear[..., np.newaxis]  # 255 where every sample is the colour's, else 0.
    return Image.fromarray(levels[..., 0] if channels == 1 else levels)


def _over_white(image: Image.Image) -> Image.Image:
    """Lay a picture with alpha over white; the result is of mode RGB."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _decode_array(data: Bytes, expected: int, *, max_pixels: int, max_images: int) -> list[Picture]:
    """Read a .npy file, without pickle and without a copy, into pictures of so many channels."""
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
    check_pixels(height, width, max_pixels)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise BadImage("the array holds NaN or infinity; send finite values on the 0..1 scale")
    return list(array)


def _read_npy(data: Bytes) -> Picture:
    """View the cells of a .npy file as an array; its header is checked against the number of bytes."""
    lengths = {b"\1\0": "<8xH", b"\2\0": "<8xI"}.get(bytes(data[6:8]))  # By version.
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


_DECODERS: dict[type, Callable[[Any], Image.Image]] = {Png: _decode_png, Jpeg: _decode_jpeg, Webp: _decode_webp}
