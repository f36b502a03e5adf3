"""Pictures made to harm the service: valid, damaged, and costly ones of every format.

`HEAVY` holds the costly ones by name: each is made as large as the service's limits allow, or a part of that. `endless`
yields files for ever: valid ones with random options, their parts dropped, repeated, swapped and damaged, and small
costly ones. A file depends on the seed alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image

from handlers.images.decoding import DEFAULT_MAX_BYTES, DEFAULT_MAX_PIXELS
from tests.containers import (
    chunk,
    exif,
    frame,
    join_png,
    join_riff,
    npy_header,
    png_header,
    riff_chunk,
    segment,
    split_jpeg,
    split_png,
    split_riff,
    vp8x,
    write_png,
)
from tests.pictures import npy, saved

Random = np.random.Generator

PNG_DEPTHS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16)]
PNG_DEPTHS += [(6, 8), (6, 16)]  # Colour type and bits a sample: all that there are.
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


# Valid files.


def soft(random: Random, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Return soft random colours, as a photograph has them."""
    rough = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 4), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def _valid_png(random: Random, height: int, width: int) -> bytes:
    colour, depth = PNG_DEPTHS[random.integers(len(PNG_DEPTHS))]
    samples = random.integers(0, 2**depth, (height, width, PNG_SAMPLES[colour]))
    before = []
    if colour == 3:
        before.append((b"PLTE", random.bytes(3 * 2**depth)))
    if random.random() < 0.5 and colour in (0, 2, 3):
        content = random.bytes(2**depth) if colour == 3 else samples[0, 0].astype(">u2").tobytes()
        before.append((b"tRNS", content))
    if random.random() < 0.3:
        before.append((b"eXIf", exif(int(random.integers(0, 10)))))
    if random.random() < 0.3:
        before += [(b"tEXt", b"Comment\0hello"), (b"pHYs", bytes(9)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(999)))]
    return write_png(
        samples,
        depth,
        colour,
        interlaced=bool(random.random() < 0.4),
        before=before,
        piece=int(random.choice([1, 50, 8192])),
    )


def _valid_pillow(random: Random, height: int, width: int) -> bytes:
    mode = str(random.choice(["1", "L", "LA", "P", "RGB", "RGBA"]))
    frames = [soft(random, height, width, mode) for _ in range(random.integers(1, 4))]
    several = {"save_all": True, "append_images": frames[1:], "duration": 20} if len(frames) > 1 else {}
    return saved(frames[0], "PNG", **several)


def _valid_jpeg(random: Random, height: int, width: int) -> bytes:
    mode = str(random.choice(["L", "RGB", "RGB", "CMYK"]))
    options: dict[str, Any] = {
        "quality": int(random.integers(1, 101)),
        "subsampling": int(random.integers(0, 3)) if mode == "RGB" else 0,
        "progressive": bool(random.random() < 0.4),
        "optimize": bool(random.random() < 0.4),
    }
    if random.random() < 0.3:
        options["restart_marker_blocks"] = int(random.integers(1, 5))
    if random.random() < 0.3:
        options["exif"] = b"Exif\0\0" + exif(int(random.integers(0, 10)), str(random.choice(["<", ">"])))
    if random.random() < 0.3:
        options |= {"comment": b"\xff\xda\0\x08", "icc_profile": random.bytes(99), "dpi": (72, 72)}
    return saved(soft(random, height, width, mode), "JPEG", **options)


def _valid_webp(random: Random, height: int, width: int) -> bytes:
    mode = str(random.choice(["RGB", "RGBA"]))
    frames = [soft(random, height, width, mode) for _ in range(random.integers(1, 4))]
    options: dict[str, Any] = {"lossless": bool(random.random() < 0.5), "quality": int(random.integers(1, 101))}
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:], "duration": 20}
    if random.random() < 0.3:
        options["exif"] = b"Exif\0\0" + exif(int(random.integers(0, 10)))
    return saved(frames[0], "WEBP", **options)


def _valid_npy(random: Random, height: int, width: int) -> bytes:
    dtype = str(random.choice(["u1", "<f4", ">f4", "<f8", "<i8", "?"]))
    shape = (int(random.integers(1, 4)), height, width, 3)[int(random.integers(0, 2)) :]
    array = random.integers(0, 256, shape).astype(dtype)
    return npy(np.asfortranarray(array) if random.random() < 0.3 else array)


_VALID = {
    "png": _valid_png,
    "pillow's png": _valid_pillow,
    "jpeg": _valid_jpeg,
    "webp": _valid_webp,
    "npy": _valid_npy,
}


def valid(random: Random) -> tuple[str, bytes]:
    """Return a small file that is whole, though the service may not take its kind."""
    name = str(random.choice(list(_VALID)))
    height, width = (int(side) for side in random.integers(1, 70, 2))
    return name, _VALID[name](random, height, width)


# Damage.


def mutate(random: Random, data: bytes) -> bytes:
    """Damage a file: its parts, whose checksums and lengths stay right, or its bytes, or both."""
    if random.random() < 0.7:
        data = _mutate_parts(random, data)
    if random.random() < 0.5:
        data = _mutate_bytes(random, data)
    return data


def _mutate_bytes(random: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.integers(1, 9)):
        if damaged:
            damaged[random.integers(len(damaged))] = random.choice([0, 1, 127, 128, 255, random.integers(256)])
    if random.random() < 0.3:
        del damaged[random.integers(len(damaged) + 1) :]
    if random.random() < 0.2:
        at = random.integers(len(damaged) + 1)
        damaged[at:at] = random.bytes(int(random.integers(1, 40)))
    return bytes(damaged)


def _mutate_parts(random: Random, data: bytes) -> bytes:
    if data.startswith(b"\x89PNG"):
        return join_png(_shuffle(random, split_png(data), lambda: (_kind(random, _PNG_KINDS), _noise(random))))
    if data.startswith(b"RIFF"):
        return join_riff(_shuffle(random, split_riff(data), lambda: (_kind(random, _WEBP_KINDS), _noise(random))))
    if data.startswith(b"\xff\xd8"):
        return b"".join(
            part if isinstance(part, bytes) else segment(int(part[0][0]), part[1])
            for part in _shuffle(random, split_jpeg(data), lambda: (random.bytes(1), _noise(random)))
        )
    return data


_PNG_KINDS = [
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"eXIf",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"iCCP",
    b"acTL",
    b"fcTL",
]
_PNG_KINDS += [b"fdAT", b"gAMA", b"cHRM", b"sRGB", b"ABCD"]
_WEBP_KINDS = [b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP", b"XMP ", b"ABCD"]


def _kind(random: Random, kinds: list[bytes]) -> bytes:
    return kinds[random.integers(len(kinds))]


def _noise(random: Random) -> bytes:
    noises = (b"", b"\0", exif(), b"Exif\0\0" + exif(), random.bytes(int(random.integers(0, 50))))
    return noises[random.integers(len(noises))]


def _shuffle(random: Random, parts: list[Any], new: Callable[[], Any]) -> list[Any]:
    """Drop, repeat, swap, insert and damage parts."""
    parts = list(parts)
    for _ in range(random.integers(1, 4)):
        at, other = (int(place) for place in random.integers(0, max(len(parts), 1), 2))
        what = random.integers(5)
        if not parts or what == 0:
            parts.insert(at, new())
        elif what == 1:
            del parts[at]
        elif what == 2:
            parts[at:at] = [parts[at]] * int(random.integers(1, 80))
        elif what == 3:
            parts[at], parts[other] = parts[other], parts[at]
        elif isinstance(parts[at], bytes):
            parts[at] = _mutate_bytes(random, parts[at])
        else:
            parts[at] = (parts[at][0], _mutate_bytes(random, parts[at][1]))
    return parts


# Costly files: `scale` is how much of the service's limits on bytes and pixels they use.


def _repeated(part: bytes, before: bytes, after: bytes, scale: float) -> bytes:
    """Return a file that is filled up with a part."""
    room = int(scale * DEFAULT_MAX_BYTES) - len(before) - len(after) - 8
    return before + part * max(room // len(part), 1) + after


def _side(scale: float) -> int:
    return max(isqrt(int(scale * DEFAULT_MAX_PIXELS)), 8)


@cache
def _small_jpeg() -> list[bytes]:
    return split_jpeg(saved(soft(np.random.default_rng(0), 16, 16), "JPEG"))


def _jpeg_of(part: bytes, scale: float) -> bytes:
    """Return a JPEG with a segment before its frame, again and again."""
    first, *others = _small_jpeg()
    return _repeated(part, first, b"".join(others), scale)


def _png_of(part: bytes, scale: float, *, after: bool = False) -> bytes:
    """Return a PNG with a chunk before or after its pixels, again and again."""
    whole = write_png(np.zeros((4, 4, 3), int), 8, 2)
    at = len(whole) - 12 if after else 33
    return _repeated(part, whole[:at], whole[at:], scale)


def _webp_of(part: bytes, scale: float) -> bytes:
    """Return a still, extended WebP with a chunk after its picture, again and again."""
    file = join_riff([vp8x(16, 16, 0x08), *split_riff(saved(soft(np.random.default_rng(0), 16, 16), "WEBP"))])
    whole = _repeated(part, file, b"", scale)
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]


def _oversized_tags(count: int) -> bytes:
    """Return an EXIF record of tags each of which promises more bytes than are there."""
    return exif(6, "<", [struct.pack("<HHII", 0x8000 + number % 2**15, 2, 2**31, 8) for number in range(count)])


def _jpeg_of_tags(scale: float) -> bytes:
    record = _oversized_tags(min(int(scale * DEFAULT_MAX_BYTES) // 12, 65_000))
    pieces = [segment(0xE1, b"Exif\0\0" + record[at : at + 65_000]) for at in range(0, len(record), 65_000)]
    first, *others = _small_jpeg()
    return b"".join([first, *pieces, *others])


@cache
def _large_jpeg(side: int, mode: str, **options: Any) -> list[bytes]:
    return split_jpeg(saved(soft(np.random.default_rng(0), side, side, mode), "JPEG", quality=50, **options))


def _jpeg_of_scans(mode: str, which: int, scale: float, *, count: int = 64) -> bytes:
    """Return a progressive JPEG one of whose scans is repeated until there are so many, or the file is full."""
    parts = _large_jpeg(_side(scale), mode, progressive=True, subsampling=0)
    scans = [part for part in parts if part[1] == 0xDA]
    repeated = scans[which]
    room = int(scale * DEFAULT_MAX_BYTES) + 2**16 - sum(map(len, parts))
    times = max(min(count - len(scans), room // len(repeated)), 0)
    return b"".join(parts[:-1]) + repeated * times + parts[-1]


def _bare_jpeg(scale: float, *, progressive: bool = False, restarts: bool = False) -> bytes:
    """Return a JPEG that says how large it is and has no pixels, or only restart markers."""
    side = _side(scale)
    parts = split_jpeg(saved(Image.new("RGB", (16, 16)), "JPEG", progressive=progressive))
    filling = b"\xff\xd0" * (int(scale * DEFAULT_MAX_BYTES) // 2 - 1000) if restarts else b""
    for place, part in enumerate(parts):
        if part[1] in (0xC0, 0xC2):
            parts[place] = part[:5] + struct.pack(">HH", side, side) + part[9:]
        elif part[1] == 0xDA:
            parts[place] = part[: 2 + int.from_bytes(part[2:4])] + filling
            filling = b""
    return b"".join([parts[0], segment(0xDD, b"\0\1"), *parts[1:]] if restarts else parts)


def _lossless_jpeg(scale: float) -> bytes:
    """Return a lossless JPEG (frame SOF3) of 64 scans without pixels."""
    side = _side(scale)
    frame = struct.pack(">BHHB", 8, side, side, 4) + b"".join(bytes([channel, 0x11, 0]) for channel in range(4))
    table = segment(0xC4, bytes([0, 1] + [0] * 15 + [0]))
    scans = [segment(0xDA, bytes([1, number % 4, 0, 1, 0, 0])) for number in range(64)]
    return b"".join([b"\xff\xd8", segment(0xC3, frame), table, *scans, b"\xff\xd9"])


def _thin_jpeg(scale: float, *, tall: bool) -> bytes:
    longest = min(int(scale * DEFAULT_MAX_PIXELS), 65_500)
    size = (1, longest) if tall else (longest, 1)
    return saved(Image.new("RGB", size), "JPEG", subsampling=2)


def _png_of_rows(
    scale: float, depth: int, colour: int, *, height: int = 0, kind: int = 0, interlaced: bool = False, more: int = 0
) -> bytes:
    """Return a large PNG of zeros, which is small as a file.

    Args:
        scale: Of the limit on pixels.
        depth: Bits a sample.
        colour: Colour type.
        height: Rows; 0 for a square.
        kind: Filter of its rows.
        interlaced: Whether by Adam7.
        more: Rows that the stream has beyond the picture's.
    """
    pixels = int(scale * DEFAULT_MAX_PIXELS)
    height = min(height or isqrt(pixels), pixels)
    width = pixels // height
    row = bytes([kind]) + bytes((width * PNG_SAMPLES[colour] * depth + 7) // 8)
    rows = 2 * height if interlaced else height + more  # No pass has more bytes a row, and all together fewer rows.
    press = zlib.compressobj(6)
    pieces = [press.compress(row * min(1000, rows - start)) for start in range(0, rows, 1000)]
    stream = b"".join(pieces) + press.flush()
    palette = chunk(b"PLTE", bytes(range(3 * 2 ** min(depth, 6)))) if colour == 3 else b""
    clear = chunk(b"tRNS", {0: bytes(2), 2: bytes(6), 3: bytes(range(2 ** min(depth, 6)))}.get(colour, b""))
    head = png_header(width, height, depth, colour, int(interlaced)) + palette + (clear if colour < 4 else b"")
    return (
        head + b"".join(chunk(b"IDAT", stream[at : at + 2**16]) for at in range(0, len(stream), 2**16)) + chunk(b"IEND")
    )


def _huge_canvas(scale: float) -> bytes:
    """Return an animation whose first frame covers one pixel of a large canvas."""
    [picture] = split_riff(saved(Image.new("RGB", (1, 1)), "WEBP"))[:1]
    side = _side(scale)
    return join_riff([vp8x(side, side, 0x12), (b"ANIM", bytes(6)), frame(picture, 1, 1)])


def _webp_of_frames(scale: float) -> bytes:
    [picture] = split_riff(saved(Image.new("RGB", (16, 16)), "WEBP", quality=1))[:1]
    count = (int(scale * DEFAULT_MAX_BYTES) - 100) // len(riff_chunk(*frame(picture, 16, 16)))
    return join_riff([vp8x(16, 16, 0x02), (b"ANIM", bytes(6)), *[frame(picture, 16, 16)] * count])


def _webp_of_groups(scale: float) -> bytes:
    """Return a lossless WebP with as many groups of Huffman codes as the format allows, 10 KB of memory each."""
    side = isqrt(int(scale * 2**20)) // 4 * 4 + 4 * (scale < 0.001)
    groups = min((side // 4) ** 2, 65_536)
    even, steep = [8] * 256, [1, 2, 3] + [8] * 32
    while len(steep) < 256:  # The more lengths, the larger the tables that are made for them.
        deepest = max(length for length in steep if length < 15)
        steep.remove(deepest)
        steep += [deepest + 1] * 2
    steep.sort()
    head = _bits(0x2F, 8) + _bits(side - 1, 14) + _bits(side - 1, 14) + [0] * 4  # No alpha, version 0.
    head += [0, 0, 1]  # No transform, no cache of colours; each block of pixels names its group.
    head += [0, 0, 0, 0]  # Blocks are 4×4 pixels. Their groups are a picture, without a cache:
    head += _code(even, 280) + _code(even, 256) + _bits(1, 4) * 3  # of green and red, eight bits each.
    numbers = (np.arange((side // 4) ** 2) % groups).astype("<u2").view(np.uint8)
    group = _code(steep, 280) + _code(steep, 256) * 3 + _bits(1, 4)
    pixels = np.zeros(4 * side * side, np.uint8)
    bits = np.concatenate([head, np.unpackbits(numbers), np.tile(np.array(group, np.uint8), groups), pixels]).astype(
        np.uint8
    )
    return join_riff([(b"VP8L", np.packbits(bits, bitorder="little").tobytes())])


def _bits(value: int, count: int) -> list[int]:
    """Return bits as WebP has them, the lowest first."""
    return [(value >> place) & 1 for place in range(count)]


def _code(lengths: list[int], symbols: int) -> list[int]:
    """Return the bits that describe a Huffman code: its lengths, and 0 for further symbols."""
    written: list[list[int]] = []  # A length, or 16: repeat the last, or 18: repeat 0; then bits that say how often.
    for length, run in [(length, lengths.count(length)) for length in sorted(set(lengths))]:
        written.append([length])
        while run > 3:
            written.append([16, *_bits(min(run - 1, 6) - 3, 2)])
            run -= min(run - 1, 6)
        written += [[length]] * (run - 1)
    while symbols - len(lengths) > 10:
        written.append([18, *_bits(min(symbols - len(lengths), 138) - 11, 7)])
        symbols -= min(symbols - len(lengths), 138)
    used = sorted({symbol for symbol, *_ in written})
    long = (len(used) - 1).bit_length()
    short = 2**long - len(used)  # So many have a bit less.
    codes, code = {}, 0
    for place, symbol in enumerate(used):
        count = long - 1 if place < short else long
        codes[symbol] = [(code >> bit) & 1 for bit in range(count - 1, -1, -1)]
        code = (code + 1) << (1 if place == short - 1 else 0)
    bits = [0, *_bits(15, 4)]
    for symbol in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15):
        bits += _bits(len(codes.get(symbol, ())), 3)
    return [*bits, 0, *(bit for symbol, *more in written for bit in (*codes[symbol], *more))]


def _npy_text(text: bytes, scale: float, *, version: int = 2) -> bytes:
    """Return a .npy file whose header is filled up with a text."""
    most = int(scale * DEFAULT_MAX_BYTES) - 100 if version == 2 else 65_535
    return npy_header(text * (most // len(text)), version) + bytes(48)


def _npy_thin(scale: float, *, dtype: type, tall: bool) -> bytes:
    long = int(scale * DEFAULT_MAX_BYTES) // (3 * np.dtype(dtype).itemsize) - 100
    return npy(np.zeros((long, 1, 3) if tall else (1, long, 3), dtype))


_TEXT = zlib.compress(bytes(900_000))
_ANIMATED = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 4, 4, 0, 0, 1, 1, 0, 0)) + chunk(b"fdAT", bytes(8))

HEAVY: dict[str, Callable[[float], bytes]] = {
    "jpeg: EXIF segments": partial(_jpeg_of, segment(0xE1, b"Exif\0\0" + bytes(10))),
    "jpeg: large EXIF segments": partial(_jpeg_of, segment(0xE1, b"Exif\0\0" + _oversized_tags(5000))),
    "jpeg: EXIF tags": _jpeg_of_tags,
    "jpeg: XMP segments": partial(_jpeg_of, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")),
    "jpeg: profile segments": partial(_jpeg_of, segment(0xE2, b"ICC_PROFILE\0\1\xff")),
    "jpeg: Photoshop segments": partial(_jpeg_of, segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000)),
    "jpeg: comments": partial(_jpeg_of, segment(0xFE, b"")),
    "jpeg: quantisation tables": partial(_jpeg_of, segment(0xDB, b"\0" + bytes([1]) * 64)),
    "jpeg: Huffman tables": partial(_jpeg_of, segment(0xC4, b"\0" + bytes([0, 1] + [0] * 14) + b"\0")),
    "jpeg: restart intervals": partial(_jpeg_of, segment(0xDD, b"\0\0")),
    "jpeg: fill bytes": partial(_jpeg_of, b"\xff"),
    "jpeg: junk": partial(_jpeg_of, b"\0"),
    "jpeg: escaped bytes": partial(_jpeg_of, b"\xff\0"),
    "jpeg: restart markers": partial(_jpeg_of, b"\xff\xd0"),
    "jpeg: empty scans": lambda scale: _repeated(
        b"\xff\xda\0\x08\1\1\0\0\x3f\0", b"".join(_small_jpeg()[:-1]), b"\xff\xd9", scale
    ),
    "jpeg: 64 scans, first": partial(_jpeg_of_scans, "CMYK", 0),
    "jpeg: 64 scans, middle": partial(_jpeg_of_scans, "RGB", 6),
    "jpeg: 64 scans, refining": partial(_jpeg_of_scans, "CMYK", 13),
    "jpeg: 64 scans, last but one": partial(_jpeg_of_scans, "CMYK", -2),
    "jpeg: 64 scans, last": partial(_jpeg_of_scans, "CMYK", -1),
    "jpeg: 65 scans": partial(_jpeg_of_scans, "RGB", 4, count=65),
    "jpeg: no pixels": _bare_jpeg,
    "jpeg: no pixels, progressive": partial(_bare_jpeg, progressive=True),
    "jpeg: 64 scans, lossless": _lossless_jpeg,
    "jpeg: nothing but restarts": partial(_bare_jpeg, restarts=True),
    "jpeg: tall": partial(_thin_jpeg, tall=True),
    "jpeg: wide": partial(_thin_jpeg, tall=False),
    "jpeg: large": lambda scale: b"".join(_large_jpeg(_side(scale), "CMYK")),
    "png: empty texts": partial(_png_of, chunk(b"tEXt")),
    "png: texts": partial(_png_of, chunk(b"tEXt", b"a\0" + b"b" * 900)),
    "png: compressed texts": partial(_png_of, chunk(b"zTXt", b"a\0\0" + _TEXT)),
    "png: international texts": partial(_png_of, chunk(b"iTXt", b"a\0\1\0\0\0" + _TEXT)),
    "png: profiles": partial(_png_of, chunk(b"iCCP", b"a\0\0" + _TEXT)),
    "png: EXIF chunks": partial(_png_of, chunk(b"eXIf", exif())),
    "png: EXIF tags": partial(_png_of, chunk(b"eXIf", _oversized_tags(65_000))),
    "png: EXIF tags after the pixels": partial(_png_of, chunk(b"eXIf", _oversized_tags(65_000)), after=True),
    "png: palettes": partial(_png_of, chunk(b"PLTE", bytes(768))),
    "png: transparent colours": partial(_png_of, chunk(b"tRNS", bytes(6))),
    "png: frames": partial(_png_of, _ANIMATED, after=True),
    "png: animations": partial(_png_of, chunk(b"acTL", struct.pack(">II", 2**31, 0))),
    "png: private chunks": partial(_png_of, chunk(b"abCd")),
    "png: empty IDAT": partial(_png_of, chunk(b"IDAT")),
    "png: IDAT of a byte": lambda scale: write_png(
        np.random.default_rng(0).integers(0, 256, (1000, int(400 * scale) + 1, 3)), 8, 2, piece=1
    ),
    "png: no pixels": lambda scale: png_header(_side(scale), _side(scale)) + chunk(b"IDAT") + chunk(b"IEND"),
    "png: 16-bit RGBA": lambda scale: _png_of_rows(scale, 16, 6, kind=4),
    "png: 16-bit RGB, transparent": lambda scale: _png_of_rows(scale, 16, 2, kind=3),
    "png: RGB, transparent": lambda scale: _png_of_rows(scale, 8, 2),
    "png: 16-bit grey, transparent": lambda scale: _png_of_rows(scale, 16, 0),
    "png: 1-bit grey, transparent": lambda scale: _png_of_rows(scale, 1, 0),
    "png: palette, transparent": lambda scale: _png_of_rows(scale, 8, 3),
    "png: interlaced RGBA": lambda scale: _png_of_rows(scale, 8, 6, interlaced=True),
    "png: interlaced 1-bit": lambda scale: _png_of_rows(scale, 1, 0, interlaced=True),
    "png: tall": lambda scale: _png_of_rows(scale, 8, 2, height=DEFAULT_MAX_PIXELS),
    "png: tall and grey": lambda scale: _png_of_rows(scale, 8, 0, height=DEFAULT_MAX_PIXELS),
    "png: tall and interlaced": lambda scale: _png_of_rows(scale, 8, 2, height=DEFAULT_MAX_PIXELS, interlaced=True),
    "png: wide": lambda scale: _png_of_rows(scale, 8, 2, height=1),
    "png: more rows than it says": lambda scale: _png_of_rows(scale, 8, 2, more=int(100_000 * scale)),
    "png: fewer rows than it says": lambda scale: _png_of_rows(scale, 8, 2, more=-1),
    "webp: unknown chunks": partial(_webp_of, riff_chunk(b"ABCD", b"")),
    "webp: EXIF chunks": partial(_webp_of, riff_chunk(b"EXIF", exif())),
    "webp: EXIF tags": partial(_webp_of, riff_chunk(b"EXIF", _oversized_tags(65_000))),
    "webp: pictures": lambda scale: _webp_of(
        riff_chunk(*split_riff(saved(Image.new("RGB", (16, 16)), "WEBP"))[0]), scale
    ),
    "webp: frames": _webp_of_frames,
    "webp: huge canvas": _huge_canvas,
    "webp: canvas beyond the limit": lambda scale: join_riff([vp8x(2**24, 2**24), (b"VP8 ", bytes(20))]),
    "webp: Huffman groups": _webp_of_groups,
    "webp: large": lambda scale: saved(Image.new("RGBA", (_side(scale),) * 2), "WEBP", lossless=True, quality=0),
    "webp: large and lossy": lambda scale: saved(Image.new("RGBA", (_side(scale),) * 2), "WEBP", method=0),
    "npy: parentheses": partial(_npy_text, b"("),
    "npy: closed parentheses": lambda scale: npy_header(b"(" * 9000 + b")" * 9000),
    "npy: minus signs": partial(_npy_text, b"-"),
    "npy: backslashes": partial(_npy_text, b"'\\d'\n"),
    "npy: digits": partial(_npy_text, b"9"),
    "npy: spaces": partial(_npy_text, b" "),
    "npy: spaces, short": partial(_npy_text, b" ", version=1),
    "npy: blank shape": partial(_npy_text, b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b" " * 60_000),
    "npy: many sides": lambda scale: npy_header(
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"1, " * 20_000 + b"), }\n"
    ),
    "npy: long number": lambda scale: npy_header(
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 60_000 + b",), }\n"
    ),
    "npy: header that lies": lambda scale: npy_header(b"{", 2)[:8] + b"\xff\xff\xff\xff" + bytes(100),
    "npy: tall": partial(_npy_thin, dtype=np.uint8, tall=True),
    "npy: wide": partial(_npy_thin, dtype=np.uint8, tall=False),
    "npy: tall float": partial(_npy_thin, dtype=np.float32, tall=True),
    "npy: wide float": partial(_npy_thin, dtype=np.float32, tall=False),
}


def endless(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield files and what they are, for ever; most are small."""
    random = np.random.default_rng(seed)
    while True:
        what = random.random()
        if what < 0.1:
            name = str(random.choice(list(HEAVY)))
            yield name, HEAVY[name](float(random.choice([0.0001, 0.001, 0.005])))
            continue
        name, data = valid(random)
        if what < 0.3:
            yield f"valid {name}", data
        else:
            yield f"damaged {name}", mutate(random, data)
