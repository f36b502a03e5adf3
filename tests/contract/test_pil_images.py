"""PIL images: each mode arrives as its pixels or is refused with the reason, and nothing else of it is sent."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import AsyncClient, Client, encode_pictures
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from tests.client.conftest import clean_environment, stand_in, url
from tests.containers import exif, split_png
from tests.pictures import colours, saved

__all__ = ["clean_environment", "stand_in", "url"]

RGB = colours(0, 6, 7)
GREY = RGB[..., 0]
ALPHA = RGB[..., 1]
WIDE = RGB[..., 0].astype(np.uint16) * 256 + RGB[..., 1]
OVER_WHITE = (RGB * (ALPHA[..., None] / 255) + 255 - ALPHA[..., None].astype(float)).round()


def arrived(image: Image.Image, channels: int = 3) -> np.ndarray:
    """Return what the service sees of an image."""
    [file] = encode_pictures(image).files
    return decoded(file, channels).squeeze().astype(int)


def decoded(file: bytes, channels: int = 3) -> np.ndarray:
    [picture] = decode(file, Preprocessing(channels, None, None), max_pixels=10**6)
    return picture


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


def raw(mode: str, array: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (7, 6), np.ascontiguousarray(array).tobytes())


def palette(mode: str = "RGB", entries: int = 256) -> Image.Image:
    """Return an image whose colours are those of a palette."""
    image = raw("P", GREY)
    image.putpalette(np.random.default_rng(1).bytes(entries * len(mode)), mode)
    return image


def looked_up(image: Image.Image, entries: int = 256) -> np.ndarray:
    table = np.zeros((256, 3), int)
    table[:entries] = np.frombuffer(np.random.default_rng(1).bytes(entries * 3), np.uint8).reshape(-1, 3)
    return table[GREY]


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(ALPHA))
    return image


def lab() -> Image.Image:
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(Image.fromarray(RGB), transform)


MODES: dict[str, tuple[Callable[[], Image.Image], np.ndarray, int]] = {  # Made how, what arrives, how nearly.
    "1": (lambda: Image.fromarray(GREY > 100), grey((GREY > 100) * 255), 0),
    "L": (lambda: raw("L", GREY), grey(GREY), 0),
    "LA": (lambda: raw("LA", np.stack([GREY, ALPHA], 2)), grey(OVER_WHITE[..., 0]), 1),
    "La": (lambda: raw("LA", np.stack([GREY, ALPHA], 2)).convert("La"), grey(OVER_WHITE[..., 0]), 2),
    "P": (palette, looked_up(palette()), 0),
    "P of 10 colours": (lambda: palette(entries=10), looked_up(palette(), 10), 0),
    "P of none": (lambda: raw("P", GREY), grey(GREY) * 0, 0),
    "PA": (lambda: with_alpha(Image.fromarray(RGB).quantize(256)), OVER_WHITE, 1),
    "RGB": (lambda: raw("RGB", RGB), RGB, 0),
    "RGBA": (lambda: raw("RGBA", np.dstack([RGB, ALPHA])), OVER_WHITE, 1),
    "RGBa": (lambda: raw("RGBA", np.dstack([RGB, ALPHA])).convert("RGBa"), OVER_WHITE, 2),
    "RGBX": (lambda: raw("RGBX", np.dstack([RGB, ALPHA])), RGB, 0),
    "CMYK": (lambda: raw("CMYK", np.dstack([255 - RGB, 0 * ALPHA])), RGB, 0),
    "YCbCr": (lambda: Image.fromarray(RGB).convert("YCbCr"), RGB, 3),
    "HSV": (lambda: Image.fromarray(RGB).convert("HSV"), RGB, 8),
    "LAB": (lab, RGB, 20),
    "I": (lambda: Image.fromarray(WIDE.astype(np.int32)), grey(WIDE / 257), 1),
    "I;16": (lambda: raw("I;16", WIDE.astype("<u2")), grey(WIDE / 257), 1),
    "I;16L": (lambda: raw("I;16L", WIDE.astype("<u2")), grey(WIDE / 257), 1),
    "I;16B": (lambda: raw("I;16B", WIDE.astype(">u2")), grey(WIDE / 257), 1),
    "I;16N": (lambda: raw("I;16N", WIDE.astype("=u2")), grey(WIDE / 257), 1),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_arrives_as_its_pixels(name: str):
    make, expected, most = MODES[name]
    image = make()
    assert image.mode == name.split()[0]
    assert np.abs(arrived(image) - expected).max() <= most


def test_every_mode_of_pil_is_tried_here():
    assert set(Image.MODES) <= {name.split()[0] for name in MODES} | {"F"}


def test_a_mode_without_a_range_is_rejected():
    with pytest.raises(ValueError, match=r"mode F.*numpy\.asarray"):
        encode_pictures(Image.new("F", (5, 4)))


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_values_beyond_sixteen_bits_are_rejected(values: list[int]):
    with pytest.raises(ValueError, match=r"rescale them to 0\.\.65535"):
        encode_pictures(Image.fromarray(np.array([values], np.int32)))


def test_all_values_of_sixteen_bits_are_sent_as_they_are():
    values = np.array([[0, 1, 65535]], np.int32)
    [file] = encode_pictures(Image.fromarray(values)).files
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), values)


def test_an_image_without_pixels_is_rejected():
    with pytest.raises(ValueError, match=r"mode RGB cannot be written as PNG: .*empty"):
        encode_pictures(Image.new("RGB", (0, 5)))


def test_an_image_of_a_damaged_file_is_rejected():
    file = Image.open(io.BytesIO(saved(Image.fromarray(colours()), "JPEG")[:-300]))
    with pytest.raises(ValueError, match="truncated"):
        encode_pictures(file)


class TestTransparency:
    @pytest.mark.parametrize(
        ("image", "value", "is_clear"),
        [
            (MODES["1"][0], 255, GREY > 100),
            (MODES["L"][0], int(GREY[0, 0]), GREY[0, 0] == GREY),
            (MODES["L"][0], np.uint8(GREY[0, 0]), GREY[0, 0] == GREY),
            (MODES["RGB"][0], tuple(RGB[0, 0].tolist()), (RGB[0, 0] == RGB).all(axis=2)),
            (MODES["RGB"][0], RGB[0, 0].tolist(), (RGB[0, 0] == RGB).all(axis=2)),
            (MODES["P"][0], int(GREY[0, 0]), GREY[0, 0] == GREY),
            (MODES["P"][0], bytes(100), GREY < 100),
            (MODES["I;16"][0], int(WIDE[0, 0]), WIDE[0, 0] == WIDE),
            (MODES["I;16B"][0], int(WIDE[0, 0]), WIDE[0, 0] == WIDE),
            (MODES["I"][0], int(WIDE[0, 0]), WIDE[0, 0] == WIDE),
        ],
    )
    def test_is_white(self, image: Callable[[], Image.Image], value: Any, is_clear: np.ndarray):
        opaque, result = arrived(image()), image()
        result.info["transparency"] = value
        expected = np.where(is_clear[..., None], 255, opaque)
        assert np.array_equal(arrived(result), expected)
        assert result.info == {"transparency": value}

    def test_of_a_palette_itself_counts(self):
        image = palette("RGBA")
        table = np.frombuffer(np.random.default_rng(1).bytes(256 * 4), np.uint8).reshape(-1, 4)[GREY].astype(float)
        alpha = table[..., 3:] / 255
        assert np.abs(arrived(image) - (table[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1

    @pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK", "YCbCr"])
    def test_of_a_mode_that_has_none_says_nothing(self, mode: str):
        image = MODES[mode][0]()
        image.info["transparency"] = 7
        assert np.array_equal(arrived(image), arrived(MODES[mode][0]()))

    @pytest.mark.parametrize(
        ("mode", "value"),
        [
            ("1", b"\0"),
            ("L", b"abc"),
            ("L", (1, 2, 3)),
            ("L", 1000),
            ("L", -1),
            ("L", 3.5),
            ("P", 300),
            ("P", bytes(300)),
            ("P", "white"),
            ("RGB", 5),
            ("RGB", (1, 2)),
            ("RGB", (1000, 2000, 3000)),
            ("RGB", b"\1\2\3"),
            ("I;16", 65536),
            ("I;16", object()),
        ],
    )
    def test_that_is_not_a_colour_is_rejected(self, mode: str, value: object):
        image = MODES[mode][0]()
        image.info["transparency"] = value
        with pytest.raises(
            ValueError, match=rf"info\['transparency'\] = .* not a valid colour for mode {mode}: delete that entry"
        ):
            encode_pictures(image)


INFO = {
    "icc_profile": 5,
    "dpi": "many",
    "gamma": object(),
    "exif": b"Exif\0\0nothing like it",
    "xmp": 7,
    "pnginfo": 3,
    "duration": None,
    "comment": b"\xff" * 10**5,
    "Raw profile type exif": "no hexadecimal",
}


class TestMetadata:
    @pytest.mark.parametrize("name", INFO)
    def test_is_not_sent(self, name: str):
        image = Image.fromarray(RGB)
        image.info[name] = INFO[name]
        assert np.array_equal(arrived(image), RGB)
        assert {kind for kind, _ in split_png(encode_pictures(image).files[0])} == {b"IHDR", b"IDAT", b"IEND"}

    @pytest.mark.parametrize(
        "value",
        [object(), -1, 2**40, "text", (1, "two"), [None], float("nan"), {1: 2}, TiffImagePlugin.IFDRational(1, 0)],
    )
    def test_in_an_exif_record_that_cannot_be_written_does_no_harm(self, value: object):
        for tag in (0x0110, 0x011A, 0x8769, 0x0111, 0x9999):
            image = Image.fromarray(RGB)
            image.getexif()[tag] = value
            image.getexif()[0x0112] = 3
            assert np.array_equal(arrived(image), RGB[::-1, ::-1])

    @pytest.mark.parametrize("value", [0, 9, -3, "up", None, (1, 2), [6], b"\6"])
    def test_in_an_orientation_that_is_none_leaves_the_image_as_it_is(self, value: object):
        image = Image.fromarray(RGB)
        image.getexif()[0x0112] = value
        assert np.array_equal(arrived(image), RGB)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_but_the_orientation_is_followed(self, mode: str, orientation: int):
        image = MODES[mode][0]()
        expected = arrived(ImageOps.exif_transpose(_turned(MODES[mode][0](), orientation)))
        image.getexif()[0x0112] = orientation
        assert np.array_equal(arrived(image), expected)
        assert image.getexif()[0x0112] == orientation

    def test_of_a_file_that_was_opened_too(self):
        file = saved(Image.fromarray(colours(0, 16, 32)), "JPEG", exif=b"Exif\0\0" + exif(6))
        [sent] = encode_pictures(Image.open(io.BytesIO(file))).files
        assert np.array_equal(decoded(sent), decoded(file))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_in_predict_many_an_image_that_cannot_be_sent_fails_alone(kind: type, batch: int, url: str):
    pictures = [b"one", Image.new("F", (4, 4)), b"two", np.zeros((4, 4), bool), b"three"]

    async def ask() -> list[convscope.Prediction]:
        async with AsyncClient(url) as client:
            return [result async for result in client.predict_many(pictures, model="cifar", batch=batch)]

    if kind is AsyncClient:
        result = asyncio.run(ask())
    else:
        with Client(url) as client:
            result = list(client.predict_many(pictures, model="cifar", batch=batch))
    assert [one.error is None for one in result] == [True, False, True, False, True]
    for failed, reason in ((result[1], "mode F"), (result[3], "not bool")):
        assert isinstance(failed.error, convscope.BadImage)
        assert reason in failed.error.message
        with pytest.raises(convscope.BadImage, match=reason):
            failed.top  # noqa: B018


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_in_predict_many_a_path_that_cannot_be_read_is_the_error_of_its_item(batch: int, url: str):
    with Client(url) as client:
        result = client.predict_many([b"one", b"two", "absent.png", b"three"], model="cifar", batch=batch)
        errors = [prediction.error for prediction in result]
    assert [errors[index] for index in (0, 1, 3)] == [None, None, None]
    assert isinstance(errors[2].__cause__, FileNotFoundError)
