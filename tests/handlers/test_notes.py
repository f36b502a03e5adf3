"""Notes: a reply says how a picture was converted where that changes what is seen, and nothing where it does not."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from handlers.images.decoding import open_file
from handlers.images.preprocessing import CONTAIN, Preprocessing
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.containers import write_png
from tests.handlers.support import ask_json, ask_message, ask_rest
from tests.pictures import colours, npy, png, saved

COLOUR, GREY = Preprocessing(3, None, None), Preprocessing(1, None, None)
RGB = Image.fromarray(colours())
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
OTHER = bytes(128) + b"Adobe RGB (1998)" + bytes(99)


def with_alpha(mode: str, alpha: int) -> bytes:
    image = RGB.convert(mode)
    image.putalpha(alpha)
    return saved(image, "PNG")


def palette(**options: Any) -> bytes:
    return saved(RGB.quantize(16), "PNG", **options)


def conversions() -> Iterator[Any]:
    grey, sixteen = colours()[:, :, 0], colours()[:, :, 0].astype(np.uint16) * 257
    wide, clear = np.random.default_rng(0).integers(0, 2**16, (32, 32, 4), np.uint16), RGB.copy()
    clear.putalpha(100)
    frames = {"save_all": True, "append_images": [Image.fromarray(colours(1))], "duration": 10}
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, data, to_colour, to_grey in (
        ("RGB", png(colours()), (), ("RGB to grey",)),
        ("grey", png(grey), ("grey to RGB",), ()),
        ("grey of one bit", saved(RGB.convert("1"), "PNG"), ("grey to RGB",), ()),
        ("grey of 16 bits", png(sixteen), ("16 bits to 8", "grey to RGB"), ("16 bits to 8",)),
        ("a palette", palette(), (), ("RGB to grey",)),
        ("a palette with a clear colour", palette(transparency=3), ("transparency to white",), None),
        ("opaque RGBA", with_alpha("RGB", 255), (), ("RGB to grey",)),
        ("RGBA", with_alpha("RGB", 254), ("transparency to white",), ("transparency to white", "RGB to grey")),
        ("grey with alpha", with_alpha("L", 0), ("transparency to white", "grey to RGB"), ("transparency to white",)),
        (
            "a colour that is clear",
            png(colours(), transparency=tuple(colours()[3, 4].tolist())),
            ("transparency to white",),
            ("transparency to white", "RGB to grey"),
        ),
        ("a grey JPEG", saved(RGB.convert("L"), "JPEG"), ("grey to RGB",), ()),
        ("a JPEG", saved(RGB, "JPEG"), (), ("RGB to grey",)),
        ("a JPEG of CMYK", saved(RGB.convert("CMYK"), "JPEG"), ("CMYK to RGB",), ("CMYK to grey",)),
        ("a JPEG on its side", saved(RGB, "JPEG", exif=turned), ("turned upright",), ("RGB to grey", "turned upright")),
        ("a PNG on its side", saved(RGB, "PNG", exif=turned), ("turned upright",), ("RGB to grey", "turned upright")),
        ("a WebP on its side", saved(RGB, "WEBP", exif=turned), ("turned upright",), ("RGB to grey", "turned upright")),
        ("RGB of 16 bits", write_png(wide[..., :3], 16, 2), ("16 bits to 8",), ("16 bits to 8", "RGB to grey")),
        ("RGBA of 16 bits", write_png(wide, 16, 6), ("16 bits to 8", "transparency to white"), None),
        (
            "grey of 16 bits with alpha",
            write_png(wide[..., :2], 16, 4),
            ("16 bits to 8", "transparency to white", "grey to RGB"),
            ("16 bits to 8", "transparency to white"),
        ),
        ("a WebP", saved(RGB, "WEBP"), (), ("RGB to grey",)),
        ("a WebP with alpha", saved(clear, "WEBP"), ("transparency to white",), None),
        ("an animated PNG", saved(RGB, "PNG", **frames), ("first frame only",), None),
        ("an animated WebP", saved(RGB, "WEBP", **frames), ("first frame only",), None),
    ):
        for preprocessing, expected in ((COLOUR, to_colour), (GREY, to_grey)):
            if expected is not None:
                yield pytest.param(data, preprocessing, expected, id=f"{name}, {preprocessing.channels}")


def notes_of(data: bytes, preprocessing: Preprocessing) -> list[tuple[str, ...]]:
    encoded = open_file(data, preprocessing)
    encoded.decode()
    return encoded.notes


@pytest.mark.parametrize(("data", "preprocessing", "expected"), [*conversions()])
def test_what_decoding_does_to_a_file(data: bytes, preprocessing: Preprocessing, expected: tuple[str, ...]) -> None:
    assert notes_of(data, preprocessing) == [expected]


def test_a_colour_that_is_nowhere_in_the_picture_makes_nothing_clear() -> None:
    grey = np.full((4, 4), 7, np.uint8)
    assert notes_of(png(grey, transparency=8), GREY) == [()]
    assert notes_of(png(grey, transparency=7), GREY) == [("transparency to white",)]


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "expected"), [(SRGB, ()), (OTHER, ("colour profile ignored",)), (b"", ())], ids=["sRGB", "other", "no"]
)
def test_a_profile_of_another_colour_space_is_ignored(name: str, profile: bytes, expected: tuple[str, ...]) -> None:
    assert notes_of(saved(RGB, name, icc_profile=profile or None), COLOUR) == [expected]


def test_a_profile_of_a_png_that_cannot_be_inflated_is_one() -> None:
    data = png(colours(), icc_profile=OTHER)
    at = data.index(b"iCCP") + len(b"iCCPICC Profile\0\0")
    assert notes_of(data[:at] + b"\xff\xff" + data[at + 2 :], COLOUR) == [("colour profile ignored",)]


SRGB_COLOURS = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_COLOURS = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "is_noted"),
    [
        ({b"gAMA": struct.pack(">I", 45455), b"cHRM": SRGB_COLOURS}, False),
        ({b"gAMA": struct.pack(">I", 100000)}, True),
        ({b"cHRM": ADOBE_COLOURS, b"gAMA": struct.pack(">I", 45455)}, True),
        ({b"gAMA": struct.pack(">I", 100000), b"sRGB": b"\0"}, False),
        ({b"sRGB": b"\0", b"cICP": bytes([9, 16, 0, 1])}, True),
        ({b"cICP": bytes([1, 13, 0, 1]), b"gAMA": struct.pack(">I", 100000)}, False),
        ({b"gAMA": b"", b"cHRM": b"short"}, False),
    ],
)
def test_a_png_may_describe_its_colours_by_numbers(chunks: dict[bytes, bytes], is_noted: bool) -> None:
    data = write_png(colours(), 8, 2, before=[*chunks.items()])
    assert notes_of(data, COLOUR) == [("colour profile ignored",) if is_noted else ()]


@pytest.mark.parametrize(
    ("size", "recipe", "expected"),
    [
        ((32, 32), {}, ()),
        ((96, 96), {}, ()),
        ((64, 32), {}, ("aspect ratio changed",)),
        ((48, 48), {"resize": (40,)}, ("cropped",)),
        ((64, 32), {"resize": (32, 32), "fit": CONTAIN}, ("padded",)),
        ((64, 32), {"resize": (40, 40)}, ("aspect ratio changed", "cropped")),
    ],
)
def test_what_the_recipe_does_to_files_and_arrays(
    size: tuple[int, int], recipe: dict[str, Any], expected: tuple[str, ...]
) -> None:
    preprocessing = Preprocessing(3, 32, 32, **recipe)
    pictures = np.stack([colours(seed, *size) for seed in range(2)])
    assert notes_of(png(pictures[0]), preprocessing) == [expected]
    assert notes_of(npy(pictures), preprocessing) == [expected] * 2


def test_an_array_that_is_the_networks_input_already_is_not_cropped() -> None:
    preprocessing = Preprocessing(3, 32, 32, resize=(40,))
    assert notes_of(npy(colours()), preprocessing) == [("cropped",)]
    assert notes_of(npy(colours().astype(np.float32)), preprocessing) == [()]


def test_each_picture_has_its_own_notes_in_every_format(service: Pipeline) -> None:
    pictures = [png(colours()), b"torn", png(colours()[:, :, 0]), npy(colours(0, 40, 20)[np.newaxis].repeat(2, 0))]
    expected = [[], [], ["grey to RGB"], ["aspect ratio changed"], ["aspect ratio changed"]]
    reply = ask_message(service, wire.PredictRequest(pictures=pictures))
    assert [list(result.notes) for result in reply.results] == expected
    assert [result.HasField("error") for result in reply.results] == [False, True, False, False, False]
    row = {"data": pictures}
    results = ask_json(service, row, Content_Type="multipart/form-data")["results"]
    assert [result.get("notes", []) for result in results] == expected
    assert ["notes" in result for result in results] == [False, False, True, True, True]
    arrays = np.load(
        io.BytesIO(ask_rest(service, row, Content_Type="multipart/form-data", Accept="application/x-npz").body)
    )
    assert [result.get("notes", []) for result in json.loads(str(arrays["reply"]))["results"]] == expected


def test_notes_stand_beside_an_explanation_and_what_edits_change(service: Pipeline) -> None:
    grey = [png(colours()[:, :, 0])]
    asked = wire.PredictRequest(pictures=grey, explain=wire.Explain(method="picture"))
    [explained] = ask_message(service, asked).results
    assert (explained.HasField("explanation"), list(explained.notes)) == (True, ["grey to RGB"])
    edit = wire.Edit(layer="conv1", operation="zero")
    [edited] = ask_message(service, wire.PredictRequest(pictures=grey, edits=[edit], compare=True)).results
    assert (edited.HasField("change"), list(edited.notes)) == (True, ["grey to RGB"])
