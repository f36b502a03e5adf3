"""JPEG on the GPU: what goes there, what is left to Pillow, and nothing of it seen from outside but the engine's name.

No GPU is needed: torchvision's decoder for the CPU stands in for nvJPEG, of which only the pixels differ.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from handlers import nvjpeg
from handlers.bundle import Limits
from handlers.files import Budget
from handlers.images import Preprocessing, decode, normalise, stack, stack_on
from handlers.networks.cifar import Cifar
from handlers.nvjpeg import JpegDecoder
from handlers.resizing import resize, resize_anywhere
from handlers.service import Service
from handlers.vision import RGB
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, cells, make_service
from tests.handlers.test_engines import load
from tests.pictures import colours, npy, png, saved

CPU = torch.device("cpu")
SIZE = (32, 32)


class Stand:
    """Decodes in nvJPEG's place; refuses what it cannot decode, and the whole call with it.

    Attributes:
        calls: Files in each call.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, files: list[Tensor], device: torch.device) -> list[Tensor]:
        self.calls.append(len(files))
        return [torch.ops.image.decode_jpeg(file, RGB, False) for file in files]


def photograph(seed: int = 0, height: int = 300, width: int = 400) -> Image.Image:
    soft = Image.fromarray(colours(seed, height // 16, width // 16))
    return soft.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int = 0, **options: Any) -> bytes:
    return saved(photograph(seed), "JPEG", quality=90, **options)


def decoded(decoder: JpegDecoder, *files: bytes, **limits: Any) -> dict[int, np.ndarray[Any, Any]]:
    given: dict[str, Any] = {"max_bytes": 2**24, "max_pixels": 2**24, "budget": Budget(2**26)} | limits
    return decoder.decode(files, **given)


@pytest.fixture
def stand() -> Stand:
    return Stand()


@pytest.fixture
def decoder(stand: Stand) -> JpegDecoder:
    return JpegDecoder(CPU, SIZE, decode=stand)


@pytest.mark.parametrize("size", [SIZE, None])
def test_pictures_are_decoded_together_and_brought_to_the_networks_size(stand: Stand, size: Any) -> None:
    files = [jpeg(0), jpeg(1, subsampling="4:4:4")]
    found = decoded(JpegDecoder(CPU, size, decode=stand), *files)
    assert stand.calls == [2]
    for place, file in enumerate(files):
        [expected] = decode(file, Preprocessing(3, *(size or (None, None))))
        assert found[place].dtype == np.uint8
        assert found[place].shape == expected.shape
        assert np.abs(found[place].astype(int) - expected).max() <= (1 if size else 0)


EXIF = Image.Exif()
EXIF[0x0112] = 6
LEFT_ALONE = {
    "png": png(colours(0, 300, 400)),
    "array": npy(colours(0, 300, 400)),
    "webp": saved(photograph(), "WEBP"),
    "small": saved(photograph(0, 200, 200), "JPEG"),
    "grey": saved(photograph().convert("L"), "JPEG"),
    "cmyk": saved(photograph().convert("CMYK"), "JPEG"),
    "progressive": jpeg(progressive=True),
    "turned": jpeg(exif=EXIF),
    "stored as RGB": jpeg(keep_rgb=True, subsampling="4:4:4"),
    "cut off": jpeg()[:-2000],
    "several scans": jpeg()[:-2] + b"\xff\xda\x00\x08\x01" + b"\xff\xd9",
    "empty": b"",
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_whatever_is_no_plain_colour_photograph_is_left_to_pillow(
    decoder: JpegDecoder, stand: Stand, kind: str
) -> None:
    assert decoded(decoder, LEFT_ALONE[kind]) == {}
    assert list(decoded(decoder, LEFT_ALONE[kind], jpeg())) == [1]
    assert stand.calls == [1]


def test_a_photograph_that_says_it_is_upright_is_decoded(decoder: JpegDecoder) -> None:
    upright = Image.Exif()
    upright[0x0112] = 1
    assert list(decoded(decoder, jpeg(exif=upright))) == [0]


def test_what_the_limits_forbid_is_left_to_be_refused(decoder: JpegDecoder) -> None:
    pixels = 300 * 400
    assert decoded(decoder, jpeg(), max_bytes=len(jpeg()) - 1) == {}
    assert decoded(decoder, jpeg(), max_pixels=pixels - 1) == {}
    budget = Budget(2 * pixels + 1)
    assert list(decoded(decoder, jpeg(0), jpeg(1), jpeg(2), budget=budget)) == [0, 1]
    assert budget.left == 1


def test_large_pictures_are_decoded_a_few_at_a_time(
    decoder: JpegDecoder, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvjpeg, "_PIXELS_AT_ONCE", 2 * 300 * 400)
    assert list(decoded(decoder, *[jpeg(seed) for seed in range(5)])) == [0, 1, 2, 3, 4]
    assert stand.calls == [2, 2, 1]


def spoilt() -> bytes:
    """Return a file that looks whole from outside and has a table that no decoder takes."""
    file = bytearray(jpeg())
    at = file.index(b"\xff\xc4") + 5
    file[at : at + 16] = b"\xff" * 16
    return bytes(file)


def test_a_file_that_it_refuses_costs_the_others_nothing(
    decoder: JpegDecoder, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    budget = Budget(2**26)
    with caplog.at_level(logging.WARNING):
        found = decoded(decoder, jpeg(0), spoilt(), jpeg(2), budget=budget)
        assert decoded(decoder, spoilt()) == {}
    assert stand.calls == [3, 1, 1, 1, 1]
    assert list(found) == [0, 2]
    for place in found:
        assert np.array_equal(found[place], decoded(decoder, jpeg(place))[0])
    assert budget.left == 2**26 - 2 * 300 * 400
    assert len(caplog.records) == 1, "a caller who sends such files would fill the log"


@pytest.fixture(scope="module")
def services() -> tuple[Service, Service]:
    """One that decodes with Pillow alone, and one that decodes on what it takes for a GPU."""
    torch.manual_seed(0)
    network = Cifar()
    limits = Limits(max_image_pixels=10**6, max_reply_bytes=50_000_000)
    made = [
        make_service(network, CIFAR_INPUT, CIFAR_CLASSES, limits=limits, jpegs=jpegs)
        for jpegs in (None, JpegDecoder(CPU, SIZE, decode=Stand()))
    ]
    return made[0], made[1]


class TestServed:
    def test_every_picture_gets_its_own_answer_in_its_place(self, services: tuple[Service, Service]) -> None:
        pictures = [jpeg(0), png(colours(1)), spoilt(), saved(photograph(2, 1200, 1000), "JPEG"), b"no", jpeg(3)]
        message = wire.PredictRequest(pictures=pictures, layers=["all"], top_k=0)
        expected, found = (ask_message(service, message).results for service in services)
        assert [result.error.code for result in found] == ["", "", "bad_image", "image_too_large", "bad_image", ""]
        assert [result.error for result in found] == [result.error for result in expected]
        for place in (0, 1, 5):
            for one, other in zip(found[place].maps, expected[place].maps, strict=True):
                assert np.abs(cells(one) - cells(other)).max() <= 0.02 * np.abs(cells(other)).max()

    def test_too_many_pictures_are_refused_wherever_they_were_decoded(self, services: tuple[Service, Service]) -> None:
        many = npy(np.stack([colours(seed) for seed in range(64)]))
        for service in services:
            reply = ask_message(service, wire.PredictRequest(pictures=[many, jpeg()]))
            assert reply.error.code == "too_many_images"

    def test_what_is_explained_is_what_was_scored(self, services: tuple[Service, Service]) -> None:
        asked = wire.Explain(method="picture", picture=True)
        [result] = ask_message(services[1], wire.PredictRequest(pictures=[jpeg()], explain=asked)).results
        expected = decoded(JpegDecoder(CPU, SIZE, decode=Stand()), jpeg())[0]
        steps = np.frombuffer(result.explanation.picture.data, np.uint8).reshape(3, 32, 32)
        assert np.array_equal(steps, expected.transpose(2, 0, 1))


class TestProof:
    def test_it_is_passed_by_what_gives_pillows_pixels(
        self, decoder: JpegDecoder, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            decoder.prove()
        assert ["4:4:4" in caplog.text, "4:2:0" in caplog.text] == [True, True]

    @pytest.mark.parametrize("size", [SIZE, None])
    def test_other_pixels_do_not(self, size: Any) -> None:
        def swapped(files: list[Tensor], device: torch.device) -> list[Tensor]:
            return [picture.flip(0) for picture in Stand()(files, device)]

        with pytest.raises(RuntimeError, match=r"4:4:4 file are \d+\.\d levels from Pillow's"):
            JpegDecoder(CPU, size, decode=swapped).prove()

    def test_an_error_does_not(self) -> None:
        def broken(files: list[Tensor], device: torch.device) -> list[Tensor]:
            raise RuntimeError("not compiled with nvJPEG support")

        with pytest.raises(RuntimeError, match="asked for and fails: not compiled with nvJPEG support"):
            JpegDecoder(CPU, SIZE, decode=broken).prove()

    def test_colour_repeated_where_pillow_interpolates_is_near_enough(self) -> None:
        """As nvJPEG does with 4:2:0: here every 2×2 cells of a plane are one."""

        def repeated(files: list[Tensor], device: torch.device) -> list[Tensor]:
            return [
                picture[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
                for picture in Stand()(files, device)
            ]

        JpegDecoder(CPU, SIZE, decode=repeated).prove()

    def test_without_a_gpu_it_is_refused(self, tmp_path: Any) -> None:
        with pytest.raises(RuntimeError, match="this worker has none; ask for --jpeg cpu"):
            load("cifar", tmp_path, "auto", CONVSCOPE_JPEG="gpu")

    def test_a_network_that_takes_grey_is_served_as_ever(self, tmp_path: Any) -> None:
        reply = ask_message(load("edges", tmp_path, "torch", CONVSCOPE_JPEG="gpu"), wire.PredictRequest(describe=True))
        assert reply.engine == f"torch-{torch.__version__.partition('+')[0]}"


def test_resizing_by_floats_is_resizing_by_bytes_but_for_one_level() -> None:
    for shape in ((64, 48), (20, 30), (32, 32), (300, 200)):
        picture = colours(0, *shape)
        found = resize_anywhere(torch.from_numpy(picture).permute(2, 0, 1), SIZE)
        assert found.dtype == torch.uint8
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - resize(picture, SIZE)).max() <= 1


class TestSentToAGpu:
    @pytest.fixture(autouse=True)
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Let what is sent to a GPU stay here."""
        calls: list[int] = []

        def send(pictures: Any, device: torch.device) -> Tensor:
            calls.append(len(pictures))
            return torch.from_numpy(np.stack(pictures))

        monkeypatch.setattr("handlers.images._send", send)
        return calls

    def test_bytes_become_there_what_they_become_here(self, sent: list[int]) -> None:
        pictures = [colours(seed) for seed in range(3)]
        found = stack_on(torch.device("cuda:0"), pictures, CIFAR_INPUT)
        assert isinstance(found, Tensor)
        assert found.is_contiguous()
        assert np.array_equal(found.numpy(), stack(pictures, CIFAR_INPUT))
        assert sent == [3]

    def test_floats_are_made_ready_here(self, sent: list[int]) -> None:
        pictures: list[Any] = [colours(0), colours(1) / np.float32(255)]
        found = stack_on(torch.device("cuda:0"), pictures, CIFAR_INPUT)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, stack(pictures, CIFAR_INPUT))
        assert np.array_equal(stack_on(CPU, pictures[:1], CIFAR_INPUT), stack(pictures[:1], CIFAR_INPUT))
        assert sent == []

    def test_a_network_without_statistics_gets_the_scale_alone(self) -> None:
        images = torch.from_numpy(colours()).permute(2, 0, 1)[None]
        assert torch.equal(normalise(images, Preprocessing(3, None, None)), images / 255)
