"""Containers: finds the parts of a PNG, JPEG or WebP file that decide its pixels.

Each reader walks a file once, part by part (a chunk or a segment), in time linear in its size, and keeps the parts that
decide pixels and the EXIF orientation. Everything else is skipped: text, profiles, thumbnails, later frames; colour
profiles and frames are noted. Pillow's own readers interpret these parts too, some in quadratic time or with a log
line for each part. A file that ends early is rejected here. Decoding is done elsewhere. Sizes are (H, W) in pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from handlers.api.errors import BadImage

Bytes = bytes | bytearray | memoryview

ACCEPTED = "a PNG, JPEG or WebP file, or a .npy array"

MOST_PARTS = 65_536
"""Chunks or segments of a file. Encoders write a few hundred for the largest pictures."""

MOST_SCANS = 64
"""Scans of a JPEG: thirty bytes can make a scan go over all of its pixels. Encoders write ten or so."""

BASELINE, EXTENDED, LOSSLESS = 0xC0, 0xC1, 0xC3  # Markers of a JPEG's frame, Huffman-coded; two are sequential.

_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")
_HEADER = struct.Struct(">IIBBBBB")
_DECIDING = (b"IDAT", b"IHDR", b"IEND", b"PLTE", b"tRNS", b"eXIf")
_FRAMES_OF_PNG = struct.Struct(">I")

# As libjpeg finds the next marker: whatever precedes it is skipped, and restart markers have no content.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END, _SCAN, _EXIF, _PROFILE = 0xD9, 0xDA, 0xE1, 0xE2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN = (BASELINE, EXTENDED, 0xC2, LOSSLESS)  # 0xC2 is progressive.
_SEGMENTS = frozenset(range(0xC0, 0xFF)) - set(range(0xD0, 0xDA))  # Markers that a length follows.
_LENGTH = struct.Struct(">H")
_FRAME = struct.Struct(">BHHB")

_LITTLE = struct.Struct("<I")
_LITTLE_CHUNK = struct.Struct("<4sI")
_ANIMATED, _WITH_EXIF, _ALPHA, _WITH_PROFILE = 0x02, 0x08, 0x10, 0x20  # Flags of VP8X.

_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # By EXIF's number of the type.

_SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))  # As in profiles of version 2 and 4.
_MOST_OF_PROFILE = 4096  # Bytes that are read: the description comes early.
_SPACES = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")  # Chunks of a PNG that define its colour space.
_GAMMA_OF_SRGB = (45455,)
_PRIMARIES_OF_SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # Primaries and white: x and y of each.
_CODES_OF_SRGB = b"\x01\x0d"  # H.273's codes: primaries and transfer.


class Png(NamedTuple):
    """A PNG's parts.

    Attributes:
        size: (H, W).
        depth: Bits per sample.
        colour: Colour type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
        interlaced: Whether the picture is interlaced (Adam7).
        palette: Three bytes per colour; empty if absent.
        transparency: Content of tRNS; empty if absent.
        pixels: The zlib stream of rows.
        orientation: EXIF orientation, 1 to 8.
        has_profile: Whether there is a colour profile, or another description of colours, other than of sRGB.
        is_animated: Whether there are several frames.
    """

    size: tuple[int, int]
    depth: int
    colour: int
    interlaced: bool
    palette: bytes
    transparency: bytes
    pixels: bytes
    orientation: int
    has_profile: bool
    is_animated: bool


class Jpeg(NamedTuple):
    """A JPEG's parts.

    Attributes:
        size: (H, W).
        channels: Components of the frame.
        frame: The frame's marker: `BASELINE`, `EXTENDED` or another.
        scans: Number of scans.
        orientation: EXIF orientation, 1 to 8.
        file: The whole file.
        end: Position of the end marker.
        has_profile: Whether there is a colour profile, other than of sRGB.
    """

    size: tuple[int, int]
    channels: int
    frame: int
    scans: int
    orientation: int
    file: Bytes
    end: int
    has_profile: bool


class Webp(NamedTuple):
    """A WebP's parts.

    Attributes:
        size: (H, W).
        orientation: EXIF orientation, 1 to 8.
        file: A WebP file of the picture alone, or of an animation's first frame.
        has_profile: Whether there is a colour profile, other than of sRGB.
        is_animated: Whether there are several frames.
    """

    size: tuple[int, int]
    orientation: int
    file: bytes
    has_profile: bool = False
    is_animated: bool = False


def read(data: Bytes) -> Png | Jpeg | Webp:
    """Find a file's parts.

    Args:
        data: The file; its first bytes identify the format.

    Raises:
        BadImage: The file is of another format, damaged, ends early, or has too many parts.
    """
    head = bytes(data[:12])
    reader: Callable[[Bytes], Png | Jpeg | Webp]
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        name, reader = "PNG", _read_png
    elif head.startswith(b"\xff\xd8\xff"):
        name, reader = "JPEG", _read_jpeg
    elif head[:4] == b"RIFF" and head[8:] == b"WEBP":
        name, reader = "WEBP", _read_webp
    else:
        raise BadImage(f"the first bytes are not those of a picture; send {ACCEPTED}")
    try:
        return reader(data)
    except (struct.error, IndexError) as err:  # The reader went beyond the end.
        raise damaged(name) from err


def damaged(name: str) -> BadImage:
    """Return the error of a file that cannot be read or decoded."""
    return BadImage(f"the {name} file is truncated or damaged")


def _read_png(data: Bytes) -> Png:
    """Walk a PNG's chunks."""
    if data[12:16] != b"IHDR":
        raise damaged("PNG")
    view = memoryview(data)
    at, previous, palette, transparency = 8, b"", b"", b""
    exif: Bytes | None = None
    pixels: list[memoryview] = []
    foreign: dict[bytes, bool] = {}
    frames = 1
    for _ in range(MOST_PARTS):
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + 8 + length
        if kind in _DECIDING:
            if zlib.crc32(view[at + 4 : end]) != _CRC.unpack_from(data, end)[0]:
                raise damaged("PNG")
            content = view[at + 8 : end]
            if kind == b"IDAT":
                if pixels and previous != b"IDAT":
                    raise damaged("PNG")
                pixels.append(content)
            elif kind == b"IEND":
                break
            elif kind == b"IHDR":
                if previous:
                    raise damaged("PNG")
                header = _HEADER.unpack(content)
            elif kind == b"eXIf":
                exif = content if exif is None else exif
            elif kind == b"PLTE" and not pixels:
                palette = bytes(content)
            elif kind == b"tRNS" and not pixels:
                transparency = bytes(content)
        elif kind in _SPACES and not pixels:
            foreign[kind] = _is_foreign_space(kind, bytes(view[at + 8 : min(end, at + 8 + _MOST_OF_PROFILE)]))
        elif kind == b"acTL" and not pixels and length >= _FRAMES_OF_PNG.size:
            [frames] = _FRAMES_OF_PNG.unpack_from(data, at + 8)
        at, previous = end + 4, kind
    else:
        raise _too_many("PNG", "chunks", MOST_PARTS)
    width, height, depth, colour, compression, filtering, interlace = header
    if compression or filtering or interlace > 1 or not width * height:
        raise damaged("PNG")
    stream, orientation = b"".join(pixels), _read_orientation(exif)
    deciding = next((kind for kind in _SPACES[:3] if kind in foreign), None)  # Overrides the rest; the last two add up.
    has_profile = any(foreign.values()) if deciding is None else foreign[deciding]
    return Png(
        (height, width),
        depth,
        colour,
        interlace == 1,
        palette,
        transparency,
        stream,
        orientation,
        has_profile,
        frames > 1,
    )


def _read_jpeg(data: Bytes) -> Jpeg:
    """Walk a JPEG's segments, as libjpeg does: bytes between a segment and the next marker are skipped."""
    at, scans, frame, width, height, channels = 2, 0, 0, 0, 0, 0
    missing = set[int]()  # Channels without a scan so far.
    exif: Bytes | None = None
    has_profile = False
    for _ in range(MOST_PARTS):
        kind = data[at + 1] if data[at] == 0xFF else 0
        at += 2
        if kind not in _SEGMENTS:
            found = _MARKER.search(data, at - 2)
            if found is None:
                raise damaged("JPEG")
            at = found.end()
            kind = data[at - 1]
            if kind == _END:
                break
        [length] = _LENGTH.unpack_from(data, at)
        if kind == _SCAN:
            scans += 1
            if scans > MOST_SCANS:
                raise _too_many("JPEG", "scans", MOST_SCANS)
            missing.difference_update(data[at + 3 : at + length - 3 : 2])
        elif kind in _FRAMES:
            if frame:
                raise damaged("JPEG")
            frame = kind
            if kind not in _HUFFMAN:  # With arithmetic coding a byte can hold any amount of work.
                raise BadImage("the JPEG file is arithmetic-coded or hierarchical; save it as baseline or progressive")
            bits, height, width, channels = _FRAME.unpack_from(data, at + 2)
            if bits != 8:
                raise BadImage(f"the JPEG file has {bits} bits a sample; only 8 are supported")
            missing.update(data[at + 8 : at + length : 3])
        elif kind == _EXIF:
            if exif is None and not scans and data[at + 2 : at + 8] == b"Exif\0\0":
                exif = data[at + 8 : at + length]
        elif kind == _PROFILE:
            if not scans and data[at + 2 : at + 15] == b"ICC_PROFILE\0\x01":  # The first piece.
                has_profile = _is_foreign(bytes(data[at + 16 : at + min(length, _MOST_OF_PROFILE)]))
        elif kind not in _SEGMENTS:
            raise damaged("JPEG")
        at += length if length > 2 else 2
    else:
        raise _too_many("JPEG", "segments", MOST_PARTS)
    if missing or not frame or not width * height:
        raise damaged("JPEG")
    return Jpeg((height, width), channels, frame, scans, _read_orientation(exif), data, at - 2, has_profile)


def _read_webp(data: Bytes) -> Webp:
    """Walk a WebP's chunks."""
    view = memoryview(data)
    at, size, flags = 12, (0, 0), 0
    exif: Bytes | None = None
    limit = 8 + _LITTLE.unpack_from(data, 4)[0]
    if limit > len(data):
        raise damaged("WEBP")
    wanted: set[bytes] = set()
    kept: list[bytes] = []
    has_profile, frames = False, 0
    for number in range(MOST_PARTS + 1):
        if at + 8 > limit:
            break
        kind, length = _LITTLE_CHUNK.unpack_from(data, at)
        content = view[at + 8 : at + 8 + length]
        at += 8 + length
        if at > limit:
            raise damaged("WEBP")
        at += length & 1
        frames += kind == b"ANMF"
        if number == 0:
            size = _read_canvas(kind, content)
            if kind != b"VP8X":
                return Webp(size, 1, _write_webp([_write_chunk(kind, content)]))
            flags = content[0]
            wanted = {b"ANIM", b"ANMF"} if flags & _ANIMATED else {b"ALPH", b"VP8 ", b"VP8L"}
            kept.append(_write_chunk(kind, bytes([flags & (_ANIMATED | _ALPHA)]) + content[1:10]))
        elif kind in wanted:
            kept.append(_write_chunk(kind, content))
            wanted = wanted - {kind} if kind in (b"ANIM", b"ALPH") else set()
        elif kind == b"EXIF" and flags & _WITH_EXIF:
            exif = content if exif is None else exif
        elif kind == b"ICCP" and flags & _WITH_PROFILE:
            has_profile = _is_foreign(bytes(content[:_MOST_OF_PROFILE]))
    else:
        raise _too_many("WEBP", "chunks", MOST_PARTS)
    is_animated = frames > 1 and bool(flags & _ANIMATED)
    return Webp(size, _read_orientation(exif), _write_webp(kept), has_profile, is_animated)


def _read_canvas(kind: bytes, content: Bytes) -> tuple[int, int]:
    """Return (H, W) from the first chunk of a WebP."""
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        [bits] = _LITTLE.unpack_from(content, 1)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 6))
    else:
        raise damaged("WEBP")
    return height, width


def _write_chunk(kind: bytes, content: Bytes) -> bytes:
    return b"".join((kind, _LITTLE.pack(len(content)), content, b"\0" * (len(content) & 1)))


def _write_webp(chunks: list[bytes]) -> bytes:
    body = b"".join((b"WEBP", *chunks))
    return b"".join((b"RIFF", _LITTLE.pack(len(body)), body))


def _read_orientation(record: Bytes | None) -> int:
    """Return the orientation in an EXIF record, 1 to 8; 1 (upright) if none can be read."""
    if record is None:
        return 1
    if record[:6] == b"Exif\0\0":
        record = record[6:]
    order = {b"II": "<", b"MM": ">"}.get(bytes(record[:2]))
    if order is None:
        return 1
    try:
        [start] = struct.unpack_from(order + "I", record, 4)
        [count] = struct.unpack_from(order + "H", record, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", record, entry)
            if tag == _ORIENTATION and kind in _INTEGERS and values == 1:
                [orientation] = struct.unpack_from(order + _INTEGERS[kind], record, entry + 8)
                return orientation if 1 <= orientation <= 8 else 1
    except struct.error:
        pass
    return 1


def _is_foreign_space(kind: bytes, content: bytes) -> bool:
    """Return whether a chunk of a PNG describes another colour space than sRGB."""
    if kind == b"iCCP":
        return _is_foreign(_inflate_profile(content))
    if kind == b"cICP":
        return content[:2] != _CODES_OF_SRGB
    expected = {b"gAMA": _GAMMA_OF_SRGB, b"cHRM": _PRIMARIES_OF_SRGB}.get(kind, ())
    if len(content) != 4 * len(expected):
        return False
    found = struct.unpack(f">{len(expected)}I", content)
    return any(abs(one - own) > own / 20 for one, own in zip(found, expected, strict=True))


def _inflate_profile(content: bytes) -> bytes:
    """Return the beginning of a PNG's profile, with its name; a byte says how it is compressed."""
    name, _, compressed = content.partition(b"\0")
    try:
        return name + zlib.decompressobj().decompress(compressed[1:], _MOST_OF_PROFILE)
    except zlib.error:
        return name


def _is_foreign(profile: bytes) -> bool:
    """Return whether a colour profile is of another space than sRGB, judging by its name."""
    return not any(name in profile for name in _SRGB)


def _too_many(name: str, parts: str, most: int) -> BadImage:
    return BadImage(f"the {name} file has more than {most:,} {parts}; save it anew")
