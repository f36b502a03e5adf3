"""Files: from a PNG, JPEG or WebP file to upright pixels of a network's channels.

Pillow fixes what a picture decodes to; `plain` is a shorter way to the same decoders where there is one. Axes: `C`
channels, `H, W` picture pixels.
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from handlers import plain
from handlers.errors import BadImage, ImageTooLarge, WrongChannels

# The limit on pixels is per model and checked below before a pixel is decoded, so Pillow's own would only warn twice.
Image.MAX_IMAGE_PIXELS = None

ACCEPTED = "a PNG, JPEG or WebP file, or a .npy array"

_GREY_16_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# Each scan of a JPEG may go over all of its pixels, in thirty bytes; encoders write ten or so. Its header is one of
# these, of one to four channels, or the file is refused; nothing like it comes within a scan.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_MOST_SCANS = 64


class Budget:
    """Pixels that may still be decoded: what a file costs goes by them, and a request may hold many.

    Args:
        pixels: Of all pictures together.
    """

    def __init__(self, pixels: int) -> None:
        self._all = self._left = pixels

    @property
    def left(self) -> int:
        """Pixels not taken yet."""
        return self._left

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


def decode_file(
    data: bytes | bytearray | memoryview, channels: int, *, max_pixels: int, budget: Budget | None = None
) -> NDArray[np.uint8]:
    """Decode an upright picture of 1 or 3 channels.

    Args:
        data: The file's content; the first bytes say of which format.
        channels: C; the picture is converted to grey or RGB.
        max_pixels: Largest accepted H·W, counted before anything is decoded.
        budget: Of pixels, for this picture and others; None for no such limit.

    Returns:
        (H, W, C), uint8.

    Raises:
        BadImage: None of the formats, or damaged.
        ImageTooLarge: More pixels than allowed, or than `budget` has.
        WrongChannels: C is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise WrongChannels(f"encoded pictures are grey or RGB, this network takes {channels} channels; send an array")
    name = _sniff(data)
    if name == "JPEG" and count_scans(data) > _MOST_SCANS:
        raise BadImage(f"the JPEG file has more than {_MOST_SCANS} scans; save it anew")
    image = _decode_plain(data, name, max_pixels, budget)
    if image is not None:
        return _to_array(image, channels)
    if name == "PNG" and data[12:16] == b"IHDR" and len(data) >= 24:  # Pillow tells no size before pixel data.
        width, height = struct.unpack(">II", data[16:24])
        check_pixels(height, width, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            check_pixels(image.height, image.width, max_pixels, budget)
            image.load()
            return _to_array(_upright(image), channels)
    except ImageTooLarge:
        raise
    except Exception as err:  # Pillow raises nearly anything on a damaged file; its texts hold addresses, so use ours.
        raise BadImage(f"the {name} file is truncated or damaged") from err


def count_scans(data: bytes | bytearray | memoryview) -> int:
    """Return how many scans a JPEG has."""
    return len(_SCAN.findall(data))


def check_pixels(height: int, width: int, max_pixels: int, budget: Budget | None = None) -> None:
    """Refuse a picture of too many pixels.

    Raises:
        ImageTooLarge: It has more than `max_pixels`, or than `budget` has.
    """
    if height * width > max_pixels:
        raise ImageTooLarge(f"the picture has {width:,}×{height:,} pixels; at most {max_pixels:,} are accepted")
    if budget is not None:
        budget.take(height * width)


def _sniff(data: bytes | bytearray | memoryview) -> str:
    """Return Pillow's name of the format that the first bytes announce."""
    head = bytes(data[:12])
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "WEBP"
    raise BadImage(f"the first bytes are not those of a picture; send {ACCEPTED}")


def _decode_plain(
    data: bytes | bytearray | memoryview, name: str, max_pixels: int, budget: Budget | None
) -> Image.Image | None:
    """Return the picture of a plain file, None of any other."""
    file = plain.read_png(data) if name == "PNG" else plain.read_jpeg(data) if name == "JPEG" else None
    if file is None:
        return None
    check_pixels(*file.size, max_pixels, budget)
    return file.decode()


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF orientation says; one without a readable orientation stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF beside good pixels: every viewer shows such a picture, unturned.
        return image


def _to_array(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Bring any Pillow mode to (H, W, C) uint8: transparency over white, 16-bit grey scaled to 8 bit."""
    if image.mode in _GREY_16_BIT:  # Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image.convert("I")).clip(0, 65535)
        cells = ((grey + 128) // 257).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            cells[grey == image.info["transparency"]] = 255
        image = Image.fromarray(cells)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    mode = "L" if channels == 1 else "RGB"
    cells = np.frombuffer((image if image.mode == mode else image.convert(mode)).tobytes(), np.uint8)
    return cells.reshape(image.height, image.width, channels)
