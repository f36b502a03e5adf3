"""Files decode to Pillow's pixels, or to what their samples say where Pillow is wrong; incomplete ones are rejected."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from handlers.api.errors import BadImage, ImageTooLarge, RequestError
from handlers.images.containers import MOST_PARTS
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from tests.containers import (
    chunk,
    exif,
    frame,
    join_png,
    join_riff,
    png_header,
    png_rows,
    riff_chunk,
    segment,
    split_jpeg,
    split_png,
    split_riff,
    vp8x,
    write_png,
)
from tests.hostile import PNG_DEPTHS, PNG_SAMPLES, mutate, soft, valid
from tests.pictures import colours, png, saved
from tests.thorough import tries

MAX_PIXELS = 10**6

LAST_PIXELS = 2 * 16 * 16 + 2 * 16 * 2
"""Of a JPEG that may be missing: two units of it, and what is smoothed beside them."""

LOSSLESS = base64.b64decode(  # Written by libjpeg-turbo: 8×8, grey, frame SOF3.
    "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALCAAIAAgBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAgUI/9oACAEBAAEAAM/tttuw2227DbbbsNttuw2227Db"
    "bbsNttuw222//9k="
)


def decoded(data: bytes, channels: int = 3) -> NDArray[np.uint8]:
    [picture] = decode(data, Preprocessing(channels, None, None), max_pixels=MAX_PIXELS)
    assert picture.dtype == np.uint8
    return picture.astype(np.uint8, copy=False)


def by_pillow(data: bytes, channels: int = 3) -> NDArray[np.uint8]:
    """Decode as Pillow's documentation says to."""
    with Image.open(io.BytesIO(data)) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode == "I;16":
        return np.rint(np.asarray(image) / 257).astype(np.uint8)[..., np.newaxis].repeat(channels, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


def soft_image(height: int, width: int, mode: str) -> Image.Image:
    return soft(np.random.default_rng(height * width), height, width, mode)


def ends(data: bytes, first: int, last: int | None = None) -> Iterator[int]:
    """Yield where to cut a file: anywhere near its end, elsewhere at some places (all with `make thorough`)."""
    last = len(data) if last is None else last
    yield from range(first, last - 20, tries(7, 1))
    yield from range(max(first, last - 20), last)


class TestPillowsPixels:
    @staticmethod
    def jpegs() -> Iterator[Any]:
        for mode in ("L", "RGB", "CMYK"):
            for options in (
                {},
                {"quality": 30, "progressive": True},
                {"quality": 100, "subsampling": 0, "optimize": True},
                {"subsampling": 1, "restart_marker_rows": 1},
                {"subsampling": 2, "restart_marker_blocks": 1},
                {"quality": 5, "comment": "a comment", "dpi": (72, 72), "icc_profile": bytes(99)},
                {"keep_rgb": True, "subsampling": 0},
            ):
                yield pytest.param(mode, "JPEG", options, id=f"JPEG {mode} {options}")

    @staticmethod
    def pngs() -> Iterator[Any]:
        text = PngImagePlugin.PngInfo()
        text.add_text("Software", "a test")
        text.add_text("Comment", "compressed", zip=True)
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            for options in ({}, {"compress_level": 0}, {"optimize": True}, {"dpi": (72, 72), "pnginfo": text}):
                yield pytest.param(mode, "PNG", options, id=f"PNG {mode} {list(options)}")
        yield pytest.param("P", "PNG", {"transparency": bytes(range(0, 256, 40))}, id="PNG P with alpha")
        yield pytest.param("RGB", "PNG", {"transparency": (0, 0, 0)}, id="PNG RGB with a transparent colour")

    @staticmethod
    def webps() -> Iterator[Any]:
        for mode in ("RGB", "RGBA"):
            for options in ({}, {"lossless": True}, {"quality": 5, "alpha_quality": 30}, {"icc_profile": bytes(99)}):
                yield pytest.param(mode, "WEBP", options, id=f"WebP {mode} {options}")

    @pytest.mark.parametrize(("mode", "name", "options"), [*jpegs(), *pngs(), *webps()])
    def test_of_whole_files(self, mode: str, name: str, options: dict[str, Any]) -> None:
        for height, width in ((1, 1), (1, 9), (9, 1), (7, 13), (32, 32), (64, 40), (130, 200)):
            data = saved(soft_image(height, width, mode), name, **options)
            for channels in (1, 3):
                assert np.array_equal(decoded(data, channels), by_pillow(data, channels)), (height, width)

    @pytest.mark.parametrize("kind", [bytearray, memoryview])
    @pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
    def test_of_any_kind_of_bytes(self, name: str, kind: type) -> None:
        data = saved(soft_image(20, 30, "RGB"), name, exif=b"Exif\0\0" + exif(6))
        assert np.array_equal(decoded(kind(data)), by_pillow(data))

    @pytest.mark.parametrize("name", ["PNG", "WEBP"])
    def test_of_an_animation_are_those_of_its_first_frame(self, name: str) -> None:
        frames = [Image.fromarray(colours(seed)) for seed in range(3)]
        data = saved(frames[0], name, save_all=True, append_images=frames[1:], duration=10, lossless=True)
        assert np.array_equal(decoded(data), colours(0))

    def test_of_an_animation_that_has_a_picture_beside_it_are_the_pictures(self) -> None:
        frames = [Image.fromarray(colours(seed)) for seed in range(3)]
        data = saved(frames[0], "PNG", save_all=True, default_image=True, append_images=frames[1:])
        assert np.array_equal(decoded(data), colours(0))

    def test_of_random_valid_files(self) -> None:
        random = np.random.default_rng(0)
        for number in range(tries(200, 400)):
            name, data = valid(random)
            if name in ("jpeg", "webp", "pillow's png"):
                assert np.array_equal(decoded(data), by_pillow(data)), number

    def test_of_damaged_files_if_both_find_any(self) -> None:
        compared = 0
        for seed in range(tries(150, 300)):
            random = np.random.default_rng(seed)
            name, data = valid(random)
            if name not in ("jpeg", "webp"):  # Of a PNG's parts other ones count.
                continue
            damaged = mutate(random, data)
            try:
                found = decoded(damaged)
            except RequestError:
                continue
            try:
                expected = by_pillow(damaged)
            except Exception:  # It looks at more of the file.
                continue
            compared += 1
            assert found.shape == expected.shape, seed
            assert (found != expected).any(axis=2).sum() <= (LAST_PIXELS if name == "jpeg" else 0), seed
        assert compared > 10


class TestJpeg:
    def test_of_twelve_bits_is_rejected_with_the_reason(self) -> None:
        data = saved(soft_image(8, 8, "RGB"), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
        with pytest.raises(BadImage, match="12 bits a sample; only 8"):
            decoded(data)

    def test_of_lossless_coding_is_decoded(self) -> None:
        assert np.array_equal(decoded(LOSSLESS, 1).ravel(), np.arange(64) * 3)

    @pytest.mark.parametrize("marker", [0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF])
    def test_of_arithmetic_coding_or_a_hierarchy_is_rejected_with_the_reason(self, marker: int) -> None:
        whole = saved(soft_image(40, 50, "RGB"), "JPEG")
        with pytest.raises(BadImage, match="arithmetic-coded or hierarchical"):
            decoded(whole.replace(b"\xff\xc0\0\x11", bytes([0xFF, marker, 0, 0x11])))

    def test_with_bytes_between_its_segments_is_decoded(self) -> None:
        first, *others = split_jpeg(saved(soft_image(20, 30, "RGB"), "JPEG", progressive=True))
        expected = decoded(first + b"".join(others))
        for between in (b"\xff\xff\xff", b"\0", b"\xff\0junk", b"\xff\xd0"):
            assert np.array_equal(decoded(first + b"\xff" + between.join(others)), expected)

    def test_what_looks_like_a_part_within_another_is_none(self) -> None:
        thumbnail = saved(Image.new("L", (8, 8)), "JPEG")
        first, *others = split_jpeg(saved(soft_image(20, 30, "RGB"), "JPEG"))
        data = first + segment(0xE1, b"Exif\0\0" + exif(1) + thumbnail) + segment(0xFE, b"\xff\xd9") + b"".join(others)
        assert np.array_equal(decoded(data), decoded(first + b"".join(others)))
        assert np.array_equal(decoded(data + b"more after its end\xff\xda"), decoded(data))

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    @pytest.mark.parametrize(
        "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 1}]
    )
    def test_cut_anywhere_is_incomplete(self, mode: str, options: dict[str, Any]) -> None:
        data = saved(soft_image(40, 50, mode), "JPEG", quality=40, **options)
        decoded(data)
        for end in ends(data, 3):
            with pytest.raises(BadImage, match="truncated or damaged"):
                decoded(data[:end])

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    @pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"subsampling": 0, "optimize": True}])
    def test_that_ends_within_its_pixels_is_incomplete(self, mode: str, options: dict[str, Any]) -> None:
        data = saved(soft_image(64, 80, mode), "JPEG", quality=90, **options)
        whole = decoded(data)
        scan = split_jpeg(data)[-2]
        start = len(data) - 2 - len(scan) + 2 + int.from_bytes(scan[2:4])
        off = []
        for end in ends(data, start, len(data) - 2):
            if data[end - 1] == 0xFF:
                continue
            try:
                off.append(int((decoded(data[:end] + b"\xff\xd9") != whole).any(axis=2).sum()))
            except BadImage:
                continue
        assert max(off, default=0) <= LAST_PIXELS

    def test_without_a_scan_of_each_channel_is_incomplete(self) -> None:
        parts = split_jpeg(saved(soft_image(16, 16, "RGB"), "JPEG", progressive=True))
        scan = next(part for part in parts if part[1] == 0xDA)
        one = segment(0xDA, b"\1\1\0\0\0\0")
        with pytest.raises(BadImage):
            decoded(b"".join(one if part is scan else part for part in parts if part is scan or part[1] != 0xDA))

    def test_with_an_end_before_its_picture_is_none(self) -> None:
        first, *others = split_jpeg(saved(soft_image(16, 16, "RGB"), "JPEG"))
        tables = [part for part in others if part[1] in (0xDB, 0xC4)]
        with pytest.raises(BadImage):
            decoded(first + b"".join(tables) + b"\xff\xd9" + first + b"".join(others))


class TestPng:
    @staticmethod
    def expected(
        samples: NDArray[np.integer], depth: int, colour: int, palette: bytes = b"", clear: bytes = b""
    ) -> NDArray[np.float64]:
        """Return what a PNG's samples mean over white, 0 to 255."""
        top = 2**depth - 1
        if colour == 3:
            table = np.full((256, 4), 255.0)
            table[: len(palette) // 3, :3] = np.frombuffer(palette, np.uint8).reshape(-1, 3)
            table[: len(clear), 3] = np.frombuffer(clear, np.uint8)
            rgba = table[samples[..., 0]]
        else:
            values = samples / top * 255
            rgb = values[..., :3] if colour in (2, 6) else values[..., :1].repeat(3, axis=2)
            alpha = values[..., -1:] if colour in (4, 6) else np.full((*samples.shape[:2], 1), 255.0)
            if clear:
                alpha[(samples == (np.frombuffer(clear, ">u2") & top)).all(axis=2)] = 0
            rgba = np.concatenate([rgb, alpha], axis=2)
        alpha = rgba[..., 3:] / 255
        return np.asarray(rgba[..., :3] * alpha + 255 * (1 - alpha))

    @pytest.mark.parametrize("has_clear", [False, True], ids=["opaque", "tRNS"])
    @pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
    @pytest.mark.parametrize(("colour", "depth"), PNG_DEPTHS)
    def test_has_the_pixels_that_its_samples_say(
        self, colour: int, depth: int, interlaced: bool, has_clear: bool
    ) -> None:
        random = np.random.default_rng(depth)
        for height, width in ((1, 1), (5, 3), (8, 8), (17, 33), (1, 9), (9, 1)):
            samples = random.integers(0, 2**depth, (height, width, PNG_SAMPLES[colour]))
            before, palette, clear = [], b"", b""
            if colour == 3:
                palette = random.bytes(3 * 2**depth)
                before.append((b"PLTE", palette))
            if has_clear:
                if colour in (0, 2):
                    samples[-1, -1] = samples[0, 0] ^ 1  # Nearly that colour: another one all the same.
                clear = random.bytes(2**depth) if colour == 3 else samples[0, 0].astype(">u2").tobytes()
                before.append((b"tRNS", clear))
            data = write_png(samples, depth, colour, interlaced=interlaced, before=before)
            expected = self.expected(samples, depth, colour, palette, b"" if colour in (4, 6) else clear)
            most = 2 if depth == 16 and colour in (4, 6) else 1  # Of 16 bits colour and alpha keep eight.
            assert np.abs(decoded(data).astype(float) - expected).max() <= most + 1e-9
            assert decoded(data, 1).shape == (height, width, 1)

    def test_a_transparent_colour_is_compared_by_the_bits_that_a_sample_has(self) -> None:
        samples = np.array([[[1], [2], [3]]])
        data = write_png(samples, 2, 0, before=[(b"tRNS", b"\xff\xfe")])
        assert decoded(data, 1).ravel().tolist() == [85, 255, 255]

    @pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
    @pytest.mark.parametrize(("colour", "depth"), PNG_DEPTHS)
    def test_of_fewer_rows_is_incomplete(self, colour: int, depth: int, interlaced: bool) -> None:
        shape = (6, 7, PNG_SAMPLES[colour])
        for samples in (np.zeros(shape, int), np.random.default_rng(0).integers(0, 2**depth, shape)):
            before = [(b"PLTE", bytes(3 * 2**depth))] if colour == 3 else []
            rows = len(list(png_rows(samples, depth, interlaced=interlaced)))
            decoded(write_png(samples, depth, colour, interlaced=interlaced, before=before, rows=rows))
            for fewer in range(rows):
                data = write_png(samples, depth, colour, interlaced=interlaced, before=before, rows=fewer)
                with pytest.raises(BadImage):
                    decoded(data)

    @pytest.mark.parametrize("last", [0, 1], ids=["black", "not black"])
    def test_a_large_one_of_fewer_rows_is_incomplete(self, last: int) -> None:
        samples = np.ones((400, 100, 3), int)
        samples[-1] = 0
        samples[-1, 5] = last
        assert decoded(write_png(samples, 8, 2)).sum() == samples.sum()
        with pytest.raises(BadImage, match="fewer rows"):
            decoded(write_png(samples, 8, 2, rows=399))

    def test_cut_anywhere_is_incomplete(self) -> None:
        for piece in (8192, 20):
            data = write_png(colours(0, 8, 8), 8, 2, piece=piece, before=[(b"tEXt", b"a\0b")])
            for end in range(8, len(data)):
                with pytest.raises(BadImage):
                    decoded(data[:end])
            assert np.array_equal(decoded(data + b"more"), colours(0, 8, 8))

    @pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"])
    def test_whose_parts_were_altered_is_damaged(self, kind: bytes) -> None:
        before = [(b"PLTE", bytes(6)), (b"tRNS", bytes(2)), (b"eXIf", exif(1)), (b"tEXt", b"a\0b")]
        data = write_png(np.ones((4, 4, 1), int), 1, 3, before=before)
        altered = bytearray(data)
        altered[altered.index(kind) + 4] ^= 1
        with pytest.raises(BadImage):
            decoded(bytes(altered))
        altered = bytearray(data)
        altered[altered.index(b"tEXt") + 4] ^= 1  # Which decides no pixel.
        assert np.array_equal(decoded(bytes(altered)), decoded(data))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(png_header(4, 4, 8, 3) + chunk(b"IDAT") + chunk(b"IEND"), id="no palette"),
            pytest.param(png_header(4, 4, 4, 2) + chunk(b"IDAT") + chunk(b"IEND"), id="no such depth"),
            pytest.param(png_header(4, 0) + chunk(b"IDAT") + chunk(b"IEND"), id="no rows"),
            pytest.param(png_header(4, 4) + chunk(b"IEND"), id="no pixels"),
            pytest.param(png_header(4, 4) + png_header(4, 4)[8:] + chunk(b"IEND"), id="two headers"),
            pytest.param(png(colours())[:8] + png(colours())[33:], id="no header"),
            pytest.param(write_png(colours(0, 4, 4), 8, 2, before=[(b"tRNS", b"\0\1")]), id="short tRNS"),
            pytest.param(
                write_png(colours(0, 4, 4)[..., :1], 8, 3, before=[(b"PLTE", bytes(769 * 3))]), id="long palette"
            ),
            pytest.param(
                join_png(
                    part
                    for one in split_png(write_png(colours(0, 9, 9), 8, 2, piece=100))
                    for part in (one, (b"tEXt", b""))
                ),
                id="pixels in two places",
            ),
        ],
    )
    def test_that_contradicts_itself_is_damaged(self, data: bytes) -> None:
        with pytest.raises(BadImage):
            decoded(data)


class TestWebp:
    @pytest.mark.parametrize("options", [{}, {"lossless": True}, {"quality": 30, "method": 0}])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_cut_anywhere_is_incomplete(self, mode: str, options: dict[str, Any]) -> None:
        data = saved(soft_image(20, 30, mode), "WEBP", **options)
        for end in ends(data, 12):
            with pytest.raises(BadImage):
                decoded(data[:end])
        assert np.array_equal(decoded(data + b"more"), decoded(data))

    @pytest.mark.parametrize("lossless", [False, True])
    def test_whose_pixels_end_early_is_incomplete(self, lossless: bool) -> None:
        whole = saved(soft_image(40, 60, "RGB"), "WEBP", lossless=lossless, quality=90)
        [(kind, content)] = split_riff(whole)
        for end in ends(content, 0):
            try:
                found = decoded(join_riff([(kind, content[:end])]))
            except BadImage:
                continue
            assert len(content) - end <= 4  # libwebp reads bits beyond its end as 0.
            assert (found != decoded(whole)).any(axis=2).sum() <= 1

    def test_of_a_canvas_that_is_not_its_pictures_is_damaged(self) -> None:
        [picture] = split_riff(saved(soft_image(16, 16, "RGB"), "WEBP"))
        for side in (8, 17):
            with pytest.raises(BadImage):
                decoded(join_riff([vp8x(side, side), picture]))
        with pytest.raises(BadImage):
            decoded(join_riff([vp8x(8, 8, 2), (b"ANIM", bytes(6)), frame(picture, 16, 16)]))

    def test_of_a_huge_canvas_is_too_large_before_it_is_decoded(self) -> None:
        with pytest.raises(ImageTooLarge):
            decoded(join_riff([vp8x(2**24, 2**24), (b"VP8 ", bytes(20))]))


class TestOrientation:
    @staticmethod
    def file(name: str, record: bytes) -> bytes:
        """Return a lossless file, or a JPEG, with an EXIF record."""
        image = soft_image(16, 32, "RGB")
        if name == "PNG":
            parts = split_png(saved(image, "PNG"))
            return join_png([parts[0], (b"eXIf", record), *parts[1:]])
        if name == "WEBP":
            return join_riff([vp8x(32, 16, 0x08), *split_riff(saved(image, "WEBP", lossless=True)), (b"EXIF", record)])
        first, *others = split_jpeg(saved(image, "JPEG"))
        return first + segment(0xE1, b"Exif\0\0" + record) + b"".join(others)

    FORMATS = pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])

    @FORMATS
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_is_followed(self, name: str, order: str, orientation: int) -> None:
        data = self.file(name, exif(orientation, order))
        assert np.array_equal(decoded(data), by_pillow(data))
        turned = 5 <= orientation <= 8
        assert decoded(data).shape == ((32, 16, 3) if turned else (16, 32, 3))

    @FORMATS
    @pytest.mark.parametrize(
        "record",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"Exif\0\0" + exif(6), id="named twice"),
            pytest.param(exif(6)[:8] + b"\xff\xff" + exif(6)[10:], id="more entries than there are"),
            pytest.param(exif(6)[:-6], id="cut off"),
            pytest.param(exif(6)[:4] + b"\xff\xff\xff\xff", id="directory beyond the end"),
            pytest.param(exif(6, entries=[b"\xff" * 12] * 50), id="senseless entries before it"),
            pytest.param(exif(6).replace(b"\x12\1\3\0", b"\x12\1\4\0"), id="a long number"),
            pytest.param(exif(6).replace(b"\x12\1\3\0", b"\x12\1\2\0"), id="a text"),
            pytest.param(b"II*\0" + bytes(100), id="directory at the start"),
            pytest.param(b"nothing like it" * 9, id="text"),
        ],
    )
    def test_is_read_as_far_as_can_be(self, name: str, record: bytes, caplog: pytest.LogCaptureFixture) -> None:
        found = decoded(self.file(name, record))
        upright, turned = decoded(self.file(name, exif(1))), decoded(self.file(name, exif(6)))
        assert np.array_equal(found, upright) or np.array_equal(found, turned)
        assert not caplog.records

    def test_of_a_png_may_come_after_its_pixels(self) -> None:
        *others, end = split_png(png(colours(0, 16, 32)))
        assert decoded(join_png([*others, (b"eXIf", exif(6)), end])).shape == (32, 16, 3)

    def test_of_a_jpeg_is_that_of_its_first_record(self) -> None:
        first, *others = split_jpeg(self.file("JPEG", exif(6)))
        later = segment(0xE1, b"Exif\0\0" + exif(3))
        assert decoded(first + others[0] + later + b"".join(others[1:])).shape == (32, 16, 3)
        assert decoded(first + later + b"".join(others)).shape == (16, 32, 3)

    def test_is_not_taken_from_texts(self) -> None:
        parts = split_png(png(colours(0, 16, 32)))
        xmp = b'<x tiff:Orientation="6"/>'
        raw = b"\nexif\n      %d\n%s\n" % (len(exif(6)) + 6, (b"Exif\0\0" + exif(6)).hex().encode())
        for text in (
            (b"tEXt", b"XML:com.adobe.xmp\0" + xmp),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            (b"tEXt", b"Raw profile type exif\0" + raw),
            (b"tEXt", b"exif\0" + exif(6)),
        ):
            assert decoded(join_png([parts[0], text, *parts[1:]])).shape == (16, 32, 3)


class TestParts:
    @pytest.mark.parametrize("count", [MOST_PARTS, MOST_PARTS + 1])
    @pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
    def test_as_many_as_are_allowed_and_no_more(self, name: str, count: int) -> None:
        image = Image.new("RGB", (4, 4))
        if name == "PNG":
            parts = split_png(saved(image, "PNG"))
            data = join_png([parts[0], *[(b"tEXt", b"")] * (count - len(parts)), *parts[1:]])
        elif name == "JPEG":
            first, *others = split_jpeg(saved(image, "JPEG"))
            data = first + segment(0xFE, b"") * (count - len(others)) + b"".join(others)
        else:
            file = join_riff([vp8x(4, 4), *split_riff(saved(image, "WEBP"))])
            body = file[8:] + riff_chunk(b"ABCD", b"") * (count - 2)
            data = b"RIFF" + struct.pack("<I", len(body)) + body
        if count == MOST_PARTS:
            assert decoded(data).shape == (4, 4, 3)
        else:
            with pytest.raises(BadImage, match="more than 65,536"):
                decoded(data)
