"""The short way to Pillow's decoders gives Pillow's pixels and Pillow's errors, whatever the file."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from handlers import files, plain
from handlers.errors import RequestError
from tests.pictures import colours, png, saved

MAX_PIXELS = 10**6


def by_pillow(data: bytes, channels: int) -> np.ndarray[Any, Any] | str:
    """Decode as if no file were plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_decode_plain", lambda *_: None)
        return either(data, channels)


def either(data: bytes, channels: int) -> np.ndarray[Any, Any] | str:
    try:
        return files.decode_file(data, channels, max_pixels=MAX_PIXELS)
    except RequestError as error:
        return error.code


def same(one: np.ndarray[Any, Any] | str, other: np.ndarray[Any, Any] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return np.array_equal(one, other)


def is_plain(data: bytes) -> bool:
    return (plain.read_png(data) if data[:4] == b"\x89PNG" else plain.read_jpeg(data)) is not None


def smooth(height: int, width: int, channels: int) -> np.ndarray[Any, Any]:
    """Return colours that a JPEG compresses as it does a photograph's, (H, W) or (H, W, C)."""
    rough = Image.fromarray(colours(height * width, height // 8 + 2, width // 8 + 2))
    array = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC))
    alpha = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width, 1)
    return {1: array[:, :, 0], 3: array, 4: np.concatenate([array, alpha], axis=2)}[channels]


def jpegs() -> Iterator[Any]:
    """JPEG of every kind that is plain."""
    for height, width in ((1, 1), (7, 13), (32, 32), (64, 40), (375, 500)):
        for channels in (1, 3):
            image = Image.fromarray(smooth(height, width, channels))
            for options in (
                {"quality": 90},
                {"quality": 30, "progressive": True},
                {"quality": 100, "subsampling": 0, "optimize": True},
                {"quality": 75, "subsampling": 1, "restart_marker_rows": 1},
                {"quality": 5, "comment": "a comment", "dpi": (72, 72)},
            ):
                name = f"{height}×{width}×{channels} {options}"
                yield pytest.param(saved(image, "JPEG", **options), id=name)


def pngs() -> Iterator[Any]:
    """PNG of every kind that is plain."""
    described = PngImagePlugin.PngInfo()
    described.add_text("Software", "a test")
    for height, width in ((1, 1), (7, 13), (32, 32), (375, 500)):
        for channels in (1, 3, 4):
            image = Image.fromarray(smooth(height, width, channels))
            for options in ({}, {"compress_level": 0}, {"optimize": True}, {"dpi": (72, 72), "pnginfo": described}):
                yield pytest.param(saved(image, "PNG", **options), id=f"{height}×{width}×{channels} {list(options)}")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("data", [*jpegs(), *pngs()])
def test_a_plain_file_has_pillows_pixels(data: bytes, channels: int) -> None:
    assert is_plain(data)
    assert same(either(data, channels), by_pillow(data, channels))


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG with one chunk more, before its pixels."""
    whole = png(colours(height=6, width=9))
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return whole[:33] + struct.pack(">I", len(content)) + kind + content + checksum + whole[33:]


def turned(name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(colours(height=16, width=32)), name, exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(turned("PNG"), id="turned PNG"),
        pytest.param(turned("JPEG"), id="turned JPEG"),
        pytest.param(with_chunk(b"tEXt", b"exif\0II*\0"), id="EXIF as text"),
        pytest.param(with_chunk(b"tEXt", b"Raw profile type exif\0\n"), id="EXIF as a raw profile"),
        pytest.param(with_chunk(b"tEXt", b"XML:com.adobe.xmp\0<x/>"), id="XMP as text"),
        pytest.param(with_chunk(b"tRNS", b"\0\1\0\2\0\3"), id="transparent colour"),
        pytest.param(with_chunk(b"gAMA", b"\0"), id="short chunk"),
        pytest.param(with_chunk(b"pHYs", b"\0" * 9)[:-99], id="cut short"),
        pytest.param(with_chunk(b"pHYs", b"\0" * 9).replace(b"pHYs\0", b"pHYs\1"), id="checksum of a chunk"),
        pytest.param(saved(Image.fromarray(colours()).quantize(16), "PNG"), id="palette"),
        pytest.param(png(np.arange(64, dtype=np.uint16).reshape(8, 8)), id="16 bits"),
        pytest.param(saved(Image.fromarray(colours()).convert("1"), "PNG"), id="1 bit"),
        pytest.param(saved(Image.fromarray(colours()).convert("LA"), "PNG"), id="grey with alpha"),
        pytest.param(saved(Image.fromarray(colours()).convert("CMYK"), "JPEG"), id="CMYK"),
        pytest.param(saved(Image.fromarray(colours()), "JPEG")[:-2], id="JPEG without its end"),
    ],
)
def test_what_needs_interpreting_is_left_to_pillow(data: bytes) -> None:
    assert not is_plain(data)
    assert same(either(data, 3), by_pillow(data, 3))


_SEEDS = [
    saved(Image.fromarray(smooth(17, 23, 3)), "JPEG", quality=80),
    saved(Image.fromarray(smooth(17, 23, 3)), "JPEG", quality=80, progressive=True),
    saved(Image.fromarray(smooth(17, 23, 1)), "JPEG", quality=80),
    *(saved(Image.fromarray(smooth(17, 23, channels)), "PNG") for channels in (1, 3, 4)),
]


def announced(data: bytes) -> list[int]:
    """Return the pixels of whatever looks like the header of a frame of JPEG, or like PNG's."""
    jpeg = re.findall(rb"\xff[\xc0-\xc2]..\x08(..)(..)", data, re.DOTALL)
    png = re.findall(rb"IHDR(....)(....)", data, re.DOTALL)
    return [int.from_bytes(height) * int.from_bytes(width) for height, width in jpeg + png]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_damage_gives_what_pillow_gives(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(_SEEDS)))
    places = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))
    for position, byte in data.draw(st.lists(places, max_size=6)):
        whole[position] = byte
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    damaged = bytes(whole[:cut]) + data.draw(st.sampled_from([b"", b"\xff\xd9", b"more"]))
    for channels in (1, 3):
        one, other = either(damaged, channels), by_pillow(damaged, channels)
        if f"{one}, {other}" == "image_too_large, bad_image":  # It may be both, and Pillow stops at the damage.
            assert max(announced(damaged), default=0) > MAX_PIXELS
        else:
            assert same(one, other)


def test_of_what_is_too_large_and_damaged_a_plain_file_is_refused_for_its_size() -> None:
    damaged = _SEEDS[0].replace(b"\xff\xdb\x00C\x01", b"\xff\xdb\x00C\x10")  # A table of another kind, cut short.
    assert (either(damaged, 3), by_pillow(damaged, 3)) == ("bad_image", "bad_image")
    damaged = damaged.replace(b"\xff\xc0\x00\x11\x08\x00", b"\xff\xc0\x00\x11\x08\xaa")  # 43,537 rows.
    assert (either(damaged, 3), by_pillow(damaged, 3)) == ("image_too_large", "bad_image")
    assert [announced(file) for file in (_SEEDS[0], _SEEDS[3], damaged)] == [[17 * 23], [17 * 23], [0xAA11 * 23]]
