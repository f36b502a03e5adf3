"""Plain files: PNG and JPEG that leave nothing to interpret, straight to Pillow's decoders, at half the time.

What a picture decodes to is fixed by Pillow (`files`). For a small picture most of Pillow's time goes to reading what a
file says besides its pixels. This module looks at the structure itself, takes a file of 8 bits, grey, RGB or RGBA,
without palette, transparent colour, orientation or anything unusual, and hands the pixels' bytes to the same decoder
that Pillow would. Every other file is left to Pillow, and every damaged one, so that an error is always Pillow's.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

Bytes = bytes | bytearray | memoryview

_PNG_MODES = {0: "L", 2: "RGB", 6: "RGBA"}  # By colour type.
_PNG_SIZES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}  # Chunks that change no pixel, and their bytes.
_MAX_TEXT_BYTES = 4096

_JPEG_MODES = {1: "L", 3: "RGB"}  # By number of channels.
_FRAMES = (0xC0, 0xC1, 0xC2)  # Baseline, extended, progressive; all Huffman-coded.
_SCAN = 0xDA
# Application segments 0 and 14 (JFIF, Adobe), tables, restart interval, comment. Not 1: EXIF may turn the picture.
_SEGMENTS = (0xE0, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE)
_END_OF_IMAGE = b"\xff\xd9"


class Plain:
    """A plain file, not decoded yet.

    Attributes:
        size: (H, W) in pixels.
        mode: Pillow's name for what it decodes to: `L`, `RGB` or `RGBA`.
        is_baseline: Whether it is a baseline JPEG.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mode: str,
        pixels: Bytes,
        decoder: tuple[str, ...],
        *,
        is_baseline: bool = False,
    ) -> None:
        self.size, self.mode, self.is_baseline = size, mode, is_baseline
        self._pixels = pixels
        self._decoder = decoder

    def decode(self) -> Image.Image | None:
        """Return the picture in mode L, RGB or RGBA; None where Pillow is to say what is wrong with it."""
        height, width = self.size
        try:
            return Image.frombytes(self.mode, (width, height), self._pixels, *self._decoder)
        except (ValueError, OSError):
            return None


def read_png(data: Bytes) -> Plain | None:
    """Look at a PNG; None if it is not plain.

    Checksums of the chunks before the pixels are checked, as Pillow does; those of the pixels are not, as it does not.
    """
    if len(data) < 33 or data[8:16] != b"\x00\x00\x00\x0dIHDR" or not _is_whole(data, 8, 13):
        return None
    width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if (depth, compression, filtering, interlace) != (8, 0, 0, 0) or colour not in _PNG_MODES or not height * width:
        return None
    at, pixels = 33, list[Bytes]()
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND" and pixels:
            mode = _PNG_MODES[colour]
            return Plain((height, width), mode, b"".join(pixels), ("zip", mode))
        if kind == b"IDAT":
            pixels.append(data[at + 8 : at + 8 + length])
        elif pixels or not _is_harmless(data, at, length, kind):
            return None
        at += 12 + length
    return None


def read_jpeg(data: Bytes) -> Plain | None:
    """Look at a JPEG; None if it is not plain."""
    at, size, mode, is_baseline = 2, None, "", False
    while at + 10 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if kind == _SCAN:
            whole = size is not None and data[-2:] == _END_OF_IMAGE
            return Plain(size, mode, data, ("jpeg", mode, ""), is_baseline=is_baseline) if whole and size else None
        if kind in _FRAMES:
            depth, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if size is not None or depth != 8 or channels not in _JPEG_MODES or not height * width:
                return None
            size, mode, is_baseline = (height, width), _JPEG_MODES[channels], kind == _FRAMES[0]
        elif kind not in _SEGMENTS:
            return None
        at += 2 + length
    return None


def _is_harmless(data: Bytes, at: int, length: int, kind: bytes) -> bool:
    """Tell whether the chunk at `at` is whole and changes no pixel."""
    if kind == b"tEXt" and length <= _MAX_TEXT_BYTES:  # Under such a keyword EXIF or XMP may turn the picture.
        keyword = bytes(data[at + 8 : at + 8 + length]).partition(b"\0")[0].lower()
        return b"exif" not in keyword and b"xmp" not in keyword and _is_whole(data, at, length)
    return _PNG_SIZES.get(kind) == length and _is_whole(data, at, length)


def _is_whole(data: Bytes, at: int, length: int) -> bool:
    end = at + 8 + length
    return end + 4 <= len(data) and zlib.crc32(data[at + 4 : end]) == struct.unpack_from(">I", data, end)[0]
