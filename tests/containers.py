"""Writes and takes apart PNG, JPEG, WebP and .npy files by hand, independently of the libraries that read them."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Part = tuple[bytes, bytes]
"""A chunk: its kind and its content."""

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a PNG's chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return PNG_MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def write_png(
    samples: NDArray[np.integer],
    depth: int,
    colour: int,
    *,
    interlaced: bool = False,
    before: Sequence[Part] = (),
    piece: int = 8192,
    rows: int | None = None,
) -> bytes:
    """Write a PNG whose rows use all five filters in turn.

    Args:
        samples: (H, W, samples a pixel), each below 2**depth.
        depth: Bits a sample.
        colour: Colour type.
        interlaced: Whether by Adam7.
        before: Chunks before the pixels.
        piece: Bytes of an IDAT chunk.
        rows: How many rows of filtered bytes the zlib stream holds; None for all.
    """
    height, width, _ = samples.shape
    stream = zlib.compress(b"".join(list(png_rows(samples, depth, interlaced=interlaced))[:rows]))
    pieces = [chunk(b"IDAT", stream[at : at + piece]) for at in range(0, len(stream), piece)]
    head = png_header(width, height, depth, colour, int(interlaced))
    return head + b"".join(chunk(*part) for part in before) + b"".join(pieces) + chunk(b"IEND")


def png_rows(samples: NDArray[np.integer], depth: int, *, interlaced: bool = False) -> Iterator[bytes]:
    """Yield the filtered rows of a PNG."""
    passes = [samples[y::down, x::right] for y, x, down, right in _ADAM7] if interlaced else [samples]
    for one in passes:
        if not one.size:
            continue
        packed = _pack(one, depth)
        far = max(depth * samples.shape[2] // 8, 1)  # Bytes to the pixel on the left.
        above = np.zeros(packed.shape[1], int)
        for number, row in enumerate(packed):
            left, corner = (np.concatenate([np.zeros(far, int), line])[: len(row)] for line in (row, above))
            nearest = left + above - corner
            ways = np.stack([left, above, corner])
            paeth = np.take_along_axis(ways, np.abs(ways - nearest).argmin(axis=0)[np.newaxis], axis=0)[0]
            guess = (np.zeros_like(row), left, above, (left + above) // 2, paeth)[number % 5]
            yield bytes([number % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
            above = row


def _pack(samples: NDArray[np.integer], depth: int) -> NDArray[np.int64]:
    """Return (H, bytes a row)."""
    height = samples.shape[0]
    flat = samples.reshape(height, -1).astype(np.uint32)
    if depth == 16:
        return np.frombuffer(flat.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    bits = (flat[..., np.newaxis] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1).astype(int)


def split_png(data: bytes) -> list[Part]:
    """Return the chunks of a whole PNG."""
    parts, at = list[Part](), 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def join_png(parts: Iterable[Part]) -> bytes:
    return PNG_MAGIC + b"".join(chunk(*part) for part in parts)


def write_tiff(samples: NDArray[np.integer]) -> bytes:
    """Write a TIFF of RGB, (H, W, 3), with 16 bits a sample."""
    height, width, channels = samples.shape
    pixels = samples.astype("<u2").tobytes()
    bits = 8 + len(pixels)  # Where the bits of each sample stand.
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 2, 273: 8, 277: channels, 278: height, 279: len(pixels)}
    entries = [struct.pack("<HHII", tag, *((3, 3) if tag == 258 else (4, 1)), value) for tag, value in tags.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits + 6) + pixels + struct.pack("<3H", 16, 16, 16) + directory


def segment(marker: int, content: bytes) -> bytes:
    """Return a JPEG's segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def split_jpeg(data: bytes) -> list[bytes]:
    """Return the segments of a whole JPEG; a scan is one together with its entropy-coded bytes."""
    parts, at = [data[:2]], 2
    while at < len(data):
        marker = data[at + 1]
        end = at + 2 if marker == 0xD9 else at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xDA:
            following = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]").search(data, end)
            end = len(data) if following is None else following.start()
        parts.append(data[at:end])
        at = end
    return parts


def split_riff(data: bytes) -> list[Part]:
    """Return the chunks of a whole WebP."""
    parts, at = list[Part](), 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts


def riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def join_riff(parts: Iterable[Part]) -> bytes:
    body = b"WEBP" + b"".join(riff_chunk(*part) for part in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def vp8x(width: int, height: int, flags: int = 0) -> Part:
    """Return the chunk that says what is in an extended WebP."""
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in (width, height))
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def frame(picture: Part, width: int, height: int) -> Part:
    """Return an animation's frame at the top left."""
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in (width, height))
    return b"ANMF", bytes(6) + sides + b"\x64\0\0\0" + riff_chunk(*picture)


def exif(orientation: int = 6, order: str = "<", entries: Sequence[bytes] = ()) -> bytes:
    """Return an EXIF record: a TIFF whose only directory holds `entries` and then the orientation."""
    own = struct.pack(order + "HHIHxx", 0x0112, 3, 1, orientation)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", (len(entries) + 1) % 2**16) + b"".join(entries) + own + bytes(4)


def npy_header(text: bytes, version: int = 1) -> bytes:
    """Return the beginning of a .npy file, up to its cells."""
    length = struct.pack("<H" if version == 1 else "<I", len(text) % (2**16 if version == 1 else 2**32))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text
