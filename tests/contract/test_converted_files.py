"""Pictures that the client converts have the notes of the same picture in a file that the service converts."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import AsyncClient, Client, encode_pictures
from convscope.testing import FakeTransport, Request, explanation, prediction
from PIL import Image

from handlers.images.decoding import open_file
from handlers.images.preprocessing import Preprocessing
from tests.containers import exif, write_png, write_tiff
from tests.handlers.test_notes import OTHER, RGB, SRGB
from tests.pictures import colours, saved

GREY, PALETTE, CMYK = RGB.convert("L"), RGB.quantize(16), RGB.convert("CMYK")
RAMP = Image.fromarray(np.arange(1024).astype(np.uint8).reshape(32, 32))
SIXTEEN = colours().astype(np.uint16) * 257
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(colours(1))]}
ANIMATED = saved(PALETTE, "GIF", **FRAMES)
ON_ITS_SIDE = {"exif": b"Exif\0\0" + exif(6)}
TURNED_TIFF = saved(RGB, "TIFF", tiffinfo={274: 6})


def respond(request: Request, channels: int = 3) -> list[Any]:
    """Answer with the notes of the service for a network of so many channels."""
    if request.method == "explain":
        return [explanation(np.ones((1, 2, 2)), label="cat") for _ in request.pictures]
    results = []
    for file in request.pictures:
        opened = open_file(file, Preprocessing(channels, None, None))
        opened.decode()
        results.append(prediction({"cat": 1.0}, notes=opened.notes[0]))
    return results


def notes_of(picture: Any, channels: int = 3) -> tuple[str, ...]:
    """Return the notes that a caller gets."""
    with Client("http://fake", transport=FakeTransport(lambda request: respond(request, channels))) as client:
        result: tuple[str, ...] = client.predict(picture, model="cifar").notes
        return result


def with_alpha(alpha: int) -> Image.Image:
    image = RGB.copy()
    image.putalpha(alpha)
    return image


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def in_both(name: str, image: Image.Image, **options: Any) -> tuple[bytes, bytes]:
    """Return the image as a file of the named format, and as PNG."""
    return saved(image, name, **options), saved(image, "PNG", **options)


def kinds() -> Iterator[Any]:
    photograph = saved(RGB, "JPEG", icc_profile=OTHER, **ON_ITS_SIDE)
    grey_sixteen, clear = Image.fromarray(SIXTEEN[..., 0]), with_alpha(0)
    first, profile, bits, white = "first frame only", "colour profile ignored", "16 bits to 8", "transparency to white"
    colour, grey, turned = "grey to RGB", "RGB to grey", "turned upright"
    for name, converted, same, to_colour_network, to_grey_network in (
        ("an animated GIF", ANIMATED, saved(RGB, "PNG", **FRAMES), [first], [first, grey]),
        ("a TIFF of two pages", *in_both("TIFF", RGB, **FRAMES), [first], [first, grey]),
        ("a GIF", *in_both("GIF", PALETTE), [], [grey]),
        ("a GIF with a clear colour", *in_both("GIF", PALETTE, transparency=3), [white], [white, grey]),
        ("a GIF of all greys", *in_both("GIF", RAMP), [colour], []),
        ("a BMP", *in_both("BMP", RGB), [], [grey]),
        ("a BMP with a palette", *in_both("BMP", PALETTE), [], [grey]),
        ("a BMP of all greys", *in_both("BMP", RAMP), [colour], []),
        ("a BMP of one bit", *in_both("BMP", GREY.convert("1")), [colour], []),
        ("a TIFF with alpha", *in_both("TIFF", with_alpha(254)), [white], [white, grey]),
        ("a TIFF with opaque alpha", *in_both("TIFF", with_alpha(255)), [], [grey]),
        ("a grey TIFF of 16 bits", *in_both("TIFF", grey_sixteen), [bits, colour], [bits]),
        ("a TIFF of 16 bits", write_tiff(SIXTEEN), write_png(SIXTEEN, 16, 2), [bits], [bits, grey]),
        ("a TIFF of CMYK", saved(CMYK, "TIFF"), saved(CMYK, "JPEG"), ["CMYK to RGB"], ["CMYK to grey"]),
        ("a TIFF on its side", TURNED_TIFF, saved(RGB, "PNG", **ON_ITS_SIDE), [turned], [grey, turned]),
        ("a TIFF with a profile", *in_both("TIFF", RGB, icc_profile=OTHER), [profile], [profile, grey]),
        ("a TIFF of sRGB", *in_both("TIFF", RGB, icc_profile=SRGB), [], [grey]),
        ("an image of a JPEG", opened(photograph), photograph, [profile, turned], [profile, grey, turned]),
        ("an image of CMYK", CMYK, saved(CMYK, "JPEG"), ["CMYK to RGB"], ["CMYK to grey"]),
        ("an image with alpha", clear, saved(clear, "PNG"), [white], [white, grey]),
        ("an image of 16 bits", grey_sixteen, saved(grey_sixteen, "PNG"), [bits, colour], [bits]),
    ):
        for channels, expected in ((3, to_colour_network), (1, to_grey_network)):
            yield pytest.param(converted, same, channels, tuple(expected), id=f"{name}, {channels}")


@pytest.mark.parametrize(("converted", "same", "channels", "expected"), [*kinds()])
def test_a_kind_of_picture(converted: Any, same: bytes, channels: int, expected: tuple[str, ...]):
    assert notes_of(converted, channels) == expected
    assert notes_of(same, channels) == expected


def test_notes_of_client_and_service_stand_in_the_contracts_order():
    pages = {"save_all": True, "append_images": [CMYK], "icc_profile": OTHER, "tiffinfo": {274: 6}}
    all_ = ("first frame only", "colour profile ignored", "CMYK to grey", "turned upright")
    assert notes_of(saved(CMYK, "TIFF", **pages), 1) == all_
    answer = prediction({"cat": 1.0}, notes=("RGB to grey", "aspect ratio changed", "padded", "a later note"))
    with Client("http://fake", transport=FakeTransport(answer)) as client:
        notes = client.predict(saved(CMYK, "TIFF", **pages), model="cifar").notes
    assert notes == (*all_, "aspect ratio changed", "padded", "a later note")


def test_an_image_is_the_frame_that_the_caller_chose():
    image = opened(ANIMATED)
    image.seek(1)
    chosen = np.asarray(image.convert("RGB"))
    [file] = encode_pictures(image).files
    assert np.array_equal(np.asarray(opened(file).convert("RGB")), chosen)
    assert notes_of(image) == notes_of(opened(ANIMATED)) == ()


def test_a_damaged_second_frame_does_no_harm():
    second = ANIMATED.rindex(b"\x21\xf9\x04")  # Its graphic control extension.
    [whole] = encode_pictures(ANIMATED).files
    for end in range(second, second + 30):
        assert encode_pictures(ANIMATED[:end]).files == [whole]


def test_a_tiff_of_floats_is_rejected_with_the_remedy():
    with pytest.raises(ValueError, match=r"the TIFF file cannot be read: .*mode F.*numpy\.asarray"):
        notes_of(saved(Image.fromarray(np.ones((4, 5), np.float32)), "TIFF"))


def test_however_it_is_sent(tmp_path: Path):
    path = tmp_path / "cat.gif"
    path.write_bytes(ANIMATED)
    expected = [("first frame only",), ()]
    pair = [ANIMATED, saved(PALETTE, "GIF")]

    async def ask() -> None:
        async with AsyncClient("http://fake", transport=FakeTransport(respond)) as client:
            assert [one.notes for one in await client.predict(pair, model="cifar")] == expected
            assert [one.notes async for one in client.predict_many(pair, model="cifar")] == expected
            assert [one.notes for one in await client.explain(pair, model="cifar")] == expected

    asyncio.run(ask())
    with Client("http://fake", transport=FakeTransport(respond)) as client:
        assert [one.notes for one in client.predict(pair, model="cifar")] == expected
        assert [one.notes for one in client.predict_many(pair, model="cifar", batch=2)] == expected
        assert [one.notes for one in client.explain(pair, model="cifar")] == expected
        [file] = encode_pictures(path).files  # As the commands read pictures before they send them.
        for picture in (path, io.BytesIO(ANIMATED), bytearray(ANIMATED), file, encode_pictures(file).files[0]):
            assert client.predict(picture, model="cifar").notes == expected[0]
