"""Large pictures: resized as Pillow does by hand, decoded in parallel, and decoded at a part of their size."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from handlers.api.errors import BadImage, ImageTooLarge
from handlers.api.limits import Limits
from handlers.images.decoding import Budget, decode, open_file
from handlers.images.preprocessing import FILTERS, Preprocessing, largest_scale
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.containers import exif, segment, split_jpeg
from tests.handlers.support import ask_message, make_service, unpack
from tests.handlers.test_decoding import LOSSLESS
from tests.pictures import photograph, png, saved
from tests.thorough import tries, variants

ROOT = Path(__file__).parents[2]
RECIPE = Preprocessing(3, 56, 56, resize=(64,))
SCALED = ("bilinear", "bicubic", "lanczos")


def one(data: bytes, preprocessing: Preprocessing, **options: Any) -> NDArray[np.int_]:
    [picture] = decode(data, preprocessing, **options)
    assert picture.dtype == np.uint8
    return picture.astype(int)


def difference(data: bytes, preprocessing: Preprocessing) -> NDArray[np.int_]:
    """Return by how many levels scaled decoding changes the network's input."""
    return np.abs(one(data, preprocessing, scaled=True) - one(data, preprocessing))


def soft(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Return a picture without edges, which scaling hardly changes.

    Misplaced by the part of a pixel it would differ by 10 levels, and by more than one on average.
    """
    small = Image.fromarray(photograph(height // 16 + 1, width // 16 + 1))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return saved(image, "JPEG", **{"quality": 90, **options})


def turned(data: bytes, orientation: int) -> bytes:
    first, *others = split_jpeg(data)
    return first + segment(0xE1, b"Exif\0\0" + exif(orientation)) + b"".join(others)


@cache  # Making one takes longer than decoding it.
def large_file(height: int = 1024, width: int = 1365, seed: int = 0) -> bytes:
    return jpeg(Image.fromarray(photograph(height, width, seed)))


class TestByARecipe:
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    @pytest.mark.parametrize("interpolation", FILTERS)
    def test_a_file_becomes_what_pillow_makes_of_it(self, interpolation: str, mode: str) -> None:
        channels = len(mode)
        recipe = Preprocessing(channels, 56, 56, resize=(64,), interpolation=interpolation)
        image = Image.fromarray(photograph(150, 203)).convert(mode)
        for data in (turned(jpeg(image), 6), saved(image, "PNG"), saved(image, "WEBP", lossless=True)):
            with Image.open(io.BytesIO(data)) as file:
                upright = ImageOps.exif_transpose(file).convert(mode)
            size = (64, int(64 * upright.height / upright.width))
            if upright.width > upright.height:
                size = (int(64 * upright.width / upright.height), 64)
            left, top = round((size[0] - 56) / 2), round((size[1] - 56) / 2)
            expected = upright.resize(size, FILTERS[interpolation]).crop((left, top, left + 56, top + 56))
            assert np.array_equal(one(data, recipe), np.asarray(expected).reshape(56, 56, channels))


class TestScaledDecoding:
    @pytest.mark.parametrize("interpolation", SCALED)
    @pytest.mark.parametrize(
        ("options", "mode"),
        [
            ({"subsampling": 0}, "RGB"),
            ({"subsampling": 1}, "RGB"),
            ({"subsampling": 2}, "RGB"),
            ({"progressive": True, "quality": 98}, "RGB"),
            ({"quality": 75, "restart_marker_rows": 1}, "RGB"),
            ({"keep_rgb": True, "subsampling": 0}, "RGB"),
            ({}, "L"),
        ],
    )
    def test_keeps_every_pixel_in_its_place(self, interpolation: str, options: dict[str, Any], mode: str) -> None:
        for size in ((513, 700), (1030, 611), (271, 389)):
            data = jpeg(soft(*size, mode), **options)
            for recipe in (
                Preprocessing(3, 56, 56, resize=(64,), interpolation=interpolation),
                Preprocessing(1, 32, 32, resize=(32, 32), fit="cover", interpolation=interpolation),
                Preprocessing(3, 48, 48, interpolation=interpolation),
            ):
                assert largest_scale(size, recipe) > 1
                found = difference(data, recipe)
                # Of 4:2:2 libjpeg decodes the colours at half of the scaled width.
                most, mean = (8, 1.0) if options.get("subsampling") == 1 else (4, 0.75)
                assert found.max() <= most
                assert found.mean() < mean

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turns_what_the_file_says(self, orientation: int) -> None:
        for size in ((517, 701), (702, 519)):  # The last pixel is there in part only, wherever turning brings it.
            data = turned(jpeg(soft(*size)), orientation)
            upright = size if orientation < 5 else size[::-1]
            assert open_file(data, RECIPE, scaled=True).sizes == [upright]
            found = difference(data, RECIPE)
            assert found.max() <= 4
            assert found.mean() < 0.75

    @pytest.mark.parametrize("interpolation", SCALED)
    def test_changes_photographs_by_less_than_a_level_on_average(self, interpolation: str) -> None:
        """Edges that are sharp to the pixel change by more, which is why it is off unless asked for."""
        recipe = Preprocessing(3, 56, 56, resize=(64,), interpolation=interpolation)
        for seed, size in enumerate(((256, 341), (384, 512), (600, 800), (1200, 1600))):
            assert difference(large_file(*size, seed), recipe).mean() < 1

    @pytest.mark.parametrize(
        ("preprocessing", "scale"),
        [
            (Preprocessing(3, 56, 56, resize=(64,)), 8),
            (Preprocessing(3, 60, 60, resize=(65,)), 4),
            (Preprocessing(3, 128, 128), 4),
            (Preprocessing(3, 256, 256, resize=(256,)), 2),
            (Preprocessing(3, 256, 256, resize=(257,)), 1),
            (Preprocessing(3, 56, 56, resize=(64,), interpolation="nearest"), 1),
            (Preprocessing(3, 56, 56, resize=(64,), interpolation="box"), 1),
            (Preprocessing(3, 56, 56, resize=(64,), interpolation="hamming"), 1),
            (Preprocessing(3, 56, 56, resize=(64,), antialias=False), 1),
            (Preprocessing(3, None, None), 1),
            (Preprocessing(3, None, None, resize=(64,)), 1),
        ],
    )
    def test_leaves_twice_of_what_is_needed_or_the_whole(self, preprocessing: Preprocessing, scale: int) -> None:
        assert largest_scale((1024, 1365), preprocessing) == scale
        assert largest_scale((1365, 1024), preprocessing) == scale
        assert bool(difference(large_file(), preprocessing).any()) == (scale > 1)

    def test_leaves_other_files_alone(self) -> None:
        picture = Image.fromarray(photograph(500, 600))
        for data in (saved(picture, "PNG"), saved(picture, "WEBP"), jpeg(picture.convert("CMYK"))):
            assert not difference(data, RECIPE).any()
        assert not difference(LOSSLESS, Preprocessing(1, 2, 2)).any()

    def test_is_off_unless_asked_for(self) -> None:
        data = jpeg(Image.fromarray(photograph(500, 600)))
        exact = np.asarray(Image.open(io.BytesIO(data)).resize((48, 48), Image.Resampling.BICUBIC))
        assert np.array_equal(one(data, Preprocessing(3, 48, 48, interpolation="bicubic")), exact)

    def test_counts_the_pixels_of_the_file(self) -> None:
        data = jpeg(soft(600, 800))
        with pytest.raises(ImageTooLarge, match="800×600"):
            decode(data, RECIPE, max_pixels=600 * 800 - 1, scaled=True)
        budget = Budget(600 * 800 * 2 - 1)
        decode(data, RECIPE, budget=budget, scaled=True)
        with pytest.raises(ImageTooLarge, match="come to more than"):
            decode(data, RECIPE, budget=budget, scaled=True)

    @pytest.mark.parametrize("side", [4, 8, 16], ids=["1/8", "1/4", "1/2"])
    @pytest.mark.parametrize(
        ("mode", "options"),
        [
            ("RGB", {}),
            ("RGB", {"progressive": True}),
            ("RGB", {"restart_marker_rows": 1}),
            *variants([("L", {})], [("RGB", {"subsampling": 0}), ("L", {"progressive": True})]),
        ],
    )
    def test_rejects_exactly_the_files_that_whole_decoding_rejects(
        self, mode: str, options: dict[str, Any], side: int
    ) -> None:
        """Cut anywhere, also with an end marker after the cut, and with bytes changed."""
        preprocessing = Preprocessing(3, side, side)
        assert largest_scale((64, 80), preprocessing) == 64 // side // 2
        data = jpeg(Image.fromarray(photograph(64, 80)).convert(mode), quality=60, **options)
        random = np.random.default_rng(side)
        step = tries(41, 3)
        files = [data[:end] for end in range(3, len(data), step)]
        files += [data[:end] + b"\xff\xd9" for end in range(300, len(data), step)]
        for _ in range(tries(40, 300)):
            changed = bytearray(data)
            changed[random.integers(2, len(data))] = random.integers(256)
            files.append(bytes(changed))
        rejected = [self.is_rejected(file, preprocessing, scaled=True) for file in files]
        assert rejected == [self.is_rejected(file, preprocessing, scaled=False) for file in files]
        assert all(rejected[: (len(data) - 3) // step])
        assert not all(rejected)

    @staticmethod
    def is_rejected(file: bytes, preprocessing: Preprocessing, *, scaled: bool) -> bool:
        try:
            decode(file, preprocessing, scaled=scaled)
        except (BadImage, ImageTooLarge):
            return True
        return False


def service(threads: int, **options: Any) -> Pipeline:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8, 8), torch.nn.Flatten(), torch.nn.Linear(98, 3))
    limits = Limits(max_image_pixels=options.pop("max_image_pixels", 10**6), max_reply_bytes=10**6)
    classes = ("a", "b", "c")
    return make_service(network, RECIPE, classes, layers={"conv1": "0"}, limits=limits, threads=threads, **options)


LARGE = [jpeg(Image.fromarray(photograph(400, 500, seed))) for seed in range(6)]


DECODE = """
import sys, threading
from pathlib import Path
from handlers import loading
from handlers.settings import Settings

folder = Path(sys.argv[1])
settings = Settings.from_environment({"CONVSCOPE_THREADS": "2"})
service = loading.load(folder, model="cifar", version="1.0", config={}, batch_size=1, gpu=None, settings=settings)
[response] = service.respond([{"request": (folder / "request").read_bytes()}], [{}], ["one"])
assert response.status == 200
assert any(thread.name.startswith("decode") for thread in threading.enumerate())
"""


class TestSeveralAtATime:
    def test_give_the_same_results_in_the_same_order(self) -> None:
        pictures = [*LARGE, LARGE[0][:5000], png(photograph(30, 40)), b"text", LARGE[2], LARGE[1][:-1]]
        messages = [
            wire.PredictRequest(pictures=pictures, layers=["conv1"]),
            wire.PredictRequest(pictures=pictures[:1], layers=["conv1"]),
            wire.PredictRequest(pictures=[]),
            wire.PredictRequest(pictures=pictures[::-1], layers=["conv1"]),
        ]
        batch = [{"request": message.SerializeToString()} for message in messages]
        ids = [str(number) for number in range(4)]
        expected, found = (
            [response.body for response in service(threads).respond(batch, [{}] * 4, ids)] for threads in (1, 3)
        )
        assert found == expected
        replies = [wire.PredictReply.FromString(body) for body in found]
        codes = [result.error.code for result in replies[0].results]
        assert codes == [""] * 6 + ["bad_image", "", "bad_image", "", "bad_image"]
        assert [result.error.code for result in replies[3].results] == codes[::-1]
        assert replies[2].error.code == "bad_request"

    def test_exceed_the_requests_pixels_with_the_same_picture_every_time(self) -> None:
        asked = wire.PredictRequest(pictures=LARGE * 2)
        several = service(4, max_image_pixels=200_000)  # Ten of 400×500 a request.
        for _ in range(5):
            codes = [result.error.code for result in ask_message(several, asked).results]
            assert codes == [""] * 10 + ["image_too_large"] * 2

    def test_take_no_longer_than_the_handler(self) -> None:
        timing = ask_message(service(4), wire.PredictRequest(pictures=LARGE, timing=True)).timing
        stages = timing.read_s + timing.decode_s + timing.preprocess_s + timing.forward_s + timing.encode_s
        assert 0 < timing.decode_s < stages <= timing.handler_s

    def test_only_of_large_pictures_and_only_so_many(self) -> None:
        before = set(threading.enumerate())
        several = service(2)
        for pictures, most in (([png(photograph(64, 64))] * 9, 0), (LARGE[:1] * 1, 0), (LARGE, 2)):
            assert not ask_message(several, wire.PredictRequest(pictures=pictures)).error.code
            assert len(set(threading.enumerate()) - before) <= most
        assert set(threading.enumerate()) - before

    def test_that_cannot_be_read_for_want_of_threads_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", fail)
        assert ask_message(service(2), wire.PredictRequest(pictures=LARGE)).error.code == "internal"

    def test_do_not_keep_the_process_from_ending(self, tmp_path: Path) -> None:
        (unpack("cifar", tmp_path) / "request").write_bytes(wire.PredictRequest(pictures=LARGE).SerializeToString())
        subprocess.run([sys.executable, "-c", DECODE, tmp_path], cwd=ROOT, check=True, timeout=300)
