"""Pictures of every kind: the right thing, or a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from handlers.api.errors import BadImage, ImageTooLarge, RequestError, TooManyImages, WrongChannels
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing, normalise, to_input, to_input_on
from tests.containers import chunk, npy_header, png_header
from tests.handlers.support import CIFAR_INPUT
from tests.pictures import colours, npy, png, saved

ANY_COLOUR = Preprocessing(3, None, None)
ANY_GREY = Preprocessing(1, None, None)


def one(data: bytes, preprocessing: Preprocessing = ANY_COLOUR) -> np.ndarray[Any, Any]:
    [picture] = decode(data, preprocessing)
    return picture


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 48), (7, 5), (300, 200), (1, 1), (2, 900), (31, 32)])
def test_a_picture_is_resized_to_the_network(size: tuple[int, int], channels: int) -> None:
    array = colours(0, *size)
    seen = Image.fromarray(array).convert("RGB" if channels == 3 else "L")
    expected = np.asarray(seen.resize((32, 32), Image.Resampling.BILINEAR)).reshape(32, 32, channels)
    picture = one(png(np.asarray(seen)), Preprocessing(channels, 32, 32))
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - expected).max() <= 1
    assert np.mean(picture != expected) < 0.1


@pytest.mark.parametrize(("height", "width"), [(90_000, 2), (2, 90_000)])
def test_a_long_picture_is_resized_as_any_other(height: int, width: int) -> None:
    array = colours(0, height, width)
    expected = np.asarray(Image.fromarray(array).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.abs(one(npy(array), Preprocessing(3, 224, 224)).astype(int) - expected).max() <= 1
    floats = one(npy(array / np.float32(255)), Preprocessing(3, 224, 224))
    assert np.abs(floats * 255 - expected).max() <= 1


def test_an_array_of_any_channels_is_resized_each_like_a_picture_of_its_own() -> None:
    array = np.concatenate([colours(seed, 64, 48) for seed in range(2)], axis=2)
    six, three = (one(npy(array[:, :, :count]), Preprocessing(count, 32, 32)) for count in (6, 3))
    assert six.shape == (32, 32, 6)
    assert np.abs(six[:, :, :3].astype(int) - three).max() <= 1


def test_an_array_is_resized_as_the_same_picture_in_a_file() -> None:
    array = colours(height=64, width=48)
    assert np.array_equal(one(npy(array), CIFAR_INPUT), one(png(array), CIFAR_INPUT))


def test_a_float_array_is_resized_without_leaving_its_scale() -> None:
    array = colours(0, 64, 48) / np.float32(255)
    picture = one(npy(array), CIFAR_INPUT)
    assert picture.dtype == np.float32
    channels = [
        Image.fromarray(array[:, :, channel]).resize((32, 32), Image.Resampling.BILINEAR) for channel in range(3)
    ]
    assert np.allclose(picture, np.stack(channels, axis=2), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (3, 5, 4, 1)])
def test_arrays_of_two_three_and_four_axes_are_pictures(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    pictures = decode(npy(array), ANY_GREY)
    assert np.array_equal(np.stack(pictures).reshape(shape), array)


def test_an_array_in_fortran_order_is_read_right() -> None:
    array = np.asfortranarray(colours(height=3, width=5))
    assert np.array_equal(one(npy(array)), array)


def test_a_big_endian_array_is_read_right() -> None:
    array = np.linspace(0, 1, 12, dtype=">f4").reshape(2, 2, 3)
    picture = one(npy(array))
    assert picture.dtype == np.float32
    assert np.array_equal(picture, array.astype(np.float32))


@pytest.mark.parametrize(
    "text",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 3), }",
        b"{'descr': '<u1', 'fortran_order': False, 'shape': (1, 2, 3), }    \n",
        b"{'descr':'|u1','fortran_order':False,'shape':(1,2,3)}\n",
        b"{'descr': '|u1', 'fortran_order': True, 'shape': (1, 2, 3), }\n",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_the_header_of_an_array_is_read_as_others_write_it(text: bytes, version: int) -> None:
    expected = np.arange(6).reshape((1, 2, 3), order="F" if b"True" in text else "C")
    for kind in (bytes, bytearray, memoryview):
        assert np.array_equal(one(kind(npy_header(text, version) + bytes(range(6)))), expected)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{'descr': '|u1', 'fortran_order': False}",
        b"{'descr': '|u1', 'fortran_order': 0, 'shape': (1, 2, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1 2, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 3), 'more': 1}",
        b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1, 2, 3), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 3), }",
        b"{'descr': '<f2', 'fortran_order': False, 'shape': (1, 1, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"1, " * 33 + b"), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 2, 3), }",
    ],
)
def test_any_other_header_of_an_array_is_a_bad_image(text: bytes) -> None:
    with pytest.raises(BadImage, match=r"uint8|numpy\.save"):
        one(npy_header(text) + bytes(6))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"", BadImage, id="empty"),
        pytest.param(b"hello, this is text\n", BadImage, id="text"),
        pytest.param(saved(Image.fromarray(colours()), "JPEG")[:400], BadImage, id="truncated JPEG"),
        pytest.param(png(colours())[:200], BadImage, id="truncated PNG"),
        pytest.param(
            png_header(50_000, 50_000) + chunk(b"IDAT") + chunk(b"IEND"),
            ImageTooLarge,
            id="PNG header of 50,000×50,000",
        ),
        pytest.param(saved(Image.fromarray(colours()), "GIF"), BadImage, id="GIF"),
        pytest.param(saved(Image.fromarray(colours()), "TIFF"), BadImage, id="TIFF"),
        pytest.param(npy(np.zeros((0, 4, 3), np.uint8)), BadImage, id="array without a cell"),
        pytest.param(npy(np.zeros(4, np.uint8)), BadImage, id="array of one axis"),
        pytest.param(npy(np.zeros((4, 4, 3))), BadImage, id="float64 array"),
        pytest.param(npy(np.full((4, 4, 3), np.nan, np.float32)), BadImage, id="array of NaN"),
        pytest.param(npy(np.zeros((4, 4, 1), np.uint8)), WrongChannels, id="array of one channel"),
        pytest.param(npy(np.zeros((4, 4), np.uint8)), WrongChannels, id="array of no channel axis"),
        pytest.param(npy(np.zeros((4, 4, 4), np.uint8)), WrongChannels, id="array of four channels"),
        pytest.param(npy(np.zeros((4, 4, 3), np.uint8))[:-1], BadImage, id="array cut short"),
        pytest.param(npy(np.zeros((4, 4, 3), np.uint8))[:20], BadImage, id="array header cut short"),
        pytest.param(npy(np.array([[{}]], dtype=object), allow_pickle=True), BadImage, id="pickled array"),
        pytest.param(npy(np.zeros((65, 1, 1, 3), np.uint8)), TooManyImages, id="array of 65 pictures"),
        pytest.param(npy(np.zeros((5000, 4000, 3), np.uint8))[:128] + bytes(10), BadImage, id="array header that lies"),
    ],
)
def test_what_is_no_picture_gets_its_error(data: bytes, error: type[RequestError]) -> None:
    with pytest.raises(error) as caught:
        decode(data, ANY_COLOUR)
    assert "0x" not in caught.value.message


def test_bytes_and_pixels_have_limits() -> None:
    data = png(colours())
    with pytest.raises(ImageTooLarge, match="bytes"):
        decode(data, ANY_COLOUR, max_bytes=len(data) - 1)
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(data, ANY_COLOUR, max_pixels=32 * 32 - 1)
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(npy(colours()), ANY_COLOUR, max_pixels=32 * 32 - 1)
    assert len(decode(data, ANY_COLOUR, max_bytes=len(data), max_pixels=32 * 32)) == 1


def test_a_network_of_two_channels_takes_arrays_only() -> None:
    two = Preprocessing(2, None, None)
    assert one(npy(np.zeros((3, 3, 2), np.uint8)), two).shape == (3, 3, 2)
    with pytest.raises(WrongChannels, match="send an array"):
        decode(png(colours()), two)


def test_uint8_and_float_pictures_stack_to_the_same() -> None:
    array = colours()
    both = to_input([array, array.astype(np.float32) / 255], CIFAR_INPUT)
    assert np.array_equal(both[0], both[1])
    assert np.array_equal(both[:1], to_input([array], CIFAR_INPUT))


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(CIFAR_INPUT.to_dict()) == CIFAR_INPUT
    assert Preprocessing.from_dict(ANY_GREY.to_dict()) == ANY_GREY


@pytest.mark.parametrize(
    "values", [(0, 32, 32), (3, 32, None), (3, 32, 32, (0.5,), (0.5,)), (1, 32, 32, (0.5,), (0.0,))]
)
def test_preprocessing_that_contradicts_itself_is_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"must|need"):
        Preprocessing(*values)


class TestSentToAGpu:
    @pytest.fixture(autouse=True)
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Let what is sent to a GPU stay here."""
        calls: list[int] = []

        def send(pictures: Any, device: torch.device) -> Tensor:
            calls.append(len(pictures))
            return torch.from_numpy(np.stack(pictures))

        monkeypatch.setattr("handlers.images.preprocessing._send", send)
        return calls

    def test_bytes_become_there_what_they_become_here(self, sent: list[int]) -> None:
        pictures = [colours(seed) for seed in range(3)]
        found = to_input_on("cuda:0", pictures, CIFAR_INPUT)
        assert isinstance(found, Tensor)
        assert found.is_contiguous()
        assert np.array_equal(found.numpy(), to_input(pictures, CIFAR_INPUT))
        assert sent == [3]

    def test_floats_are_made_ready_here(self, sent: list[int]) -> None:
        pictures: list[Any] = [colours(0), colours(1) / np.float32(255)]
        found = to_input_on("cuda:0", pictures, CIFAR_INPUT)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, to_input(pictures, CIFAR_INPUT))
        assert np.array_equal(to_input_on("cpu", pictures[:1], CIFAR_INPUT), to_input(pictures[:1], CIFAR_INPUT))
        assert sent == []

    def test_a_network_without_statistics_gets_the_scale_alone(self) -> None:
        images = torch.from_numpy(colours()).permute(2, 0, 1)[None]
        assert torch.equal(normalise(images, Preprocessing(3, None, None)), images / 255)
