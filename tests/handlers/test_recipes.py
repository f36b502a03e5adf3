"""Recipes in the service: extreme pictures, arrays, what older archives say, and where explanations lie."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.api.errors import BadImage, ImageTooLarge
from handlers.images.decoding import Budget, decode
from handlers.images.preprocessing import FILTERS, Preprocessing, fit, normalise, to_input
from handlers.networks.cifar import Cifar
from handlers.networks.edges import Edges
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, ask_json, ask_message, make_service
from tests.pictures import npy, photograph, png
from tests.thorough import variants

RECIPE = Preprocessing(3, 224, 224, resize=(256,))


def one(data: bytes, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    [picture] = decode(data, preprocessing)
    return picture


class TestLongPictures:
    @pytest.mark.parametrize(
        ("size", "interpolation"),
        [
            *(((6, 1500), interpolation) for interpolation in FILTERS),
            ((2000, 7), "bilinear"),
            *variants([], [((2000, 7), "lanczos"), ((20_000, 70), "bilinear"), ((20_000, 70), "lanczos")]),
        ],
    )
    def test_they_are_cropped_before_they_are_resized(self, size: tuple[int, int], interpolation: str) -> None:
        """Resized they would have 16 million pixels and more; what is kept is a part of Pillow's whole picture."""
        picture = photograph(*size)
        recipe = Preprocessing(3, 224, 224, resize=(256,), interpolation=interpolation)
        (height, width), (top, left), _ = recipe.place(size)
        assert height * width > 2**21
        whole = Image.fromarray(picture).resize((width, height), FILTERS[interpolation])
        expected = np.asarray(whole.crop((left, top, left + 224, top + 224))).astype(int)
        found = np.abs(one(npy(picture), recipe) - expected)
        assert found.max() <= 2
        assert np.mean(found == 2) < 0.001
        assert np.mean(found > 0) < 0.01

    def test_floats_too(self) -> None:
        picture = photograph(6, 1500) / np.float32(255)
        recipe = Preprocessing(3, 224, 224, resize=(256,), interpolation="bicubic")
        levels = one(npy((picture * 255).round().astype(np.uint8)), recipe)
        assert np.abs(np.clip(one(npy(picture), recipe), 0, 1) * 255 - levels).max() <= 1.6

    def test_without_antialiasing_they_are_refused(self) -> None:
        recipe = Preprocessing(3, 224, 224, resize=(256,), antialias=False)
        with pytest.raises(ImageTooLarge, match=r"1,500×6 pixels is too long and thin: .* 64,000×256"):
            one(npy(photograph(6, 1500)), recipe)
        assert one(npy(photograph(60, 150)), recipe).shape == (224, 224, 3)

    def test_of_a_network_of_any_size_they_count_as_what_they_become(self) -> None:
        recipe = Preprocessing(3, None, None, resize=(256,))
        assert one(npy(photograph(100, 200)), recipe).shape == (256, 512, 3)
        with pytest.raises(ImageTooLarge, match=r"64,000×256 pixels, more than 16,000,000"):
            one(npy(photograph(6, 1500)), recipe)
        budget = Budget(256 * 512 + 100)
        decode(npy(photograph(100, 200)), recipe, budget=budget)
        with pytest.raises(ImageTooLarge, match="come to more than"):
            decode(npy(photograph(100, 200)), recipe, budget=budget)
        floats = npy(photograph(100, 200) / np.float32(255))
        decode(floats, recipe, budget=Budget(4 * 256 * 512))
        with pytest.raises(ImageTooLarge, match="come to more than"):
            decode(floats, recipe, budget=Budget(2 * 256 * 512))

    def test_of_which_nothing_would_be_left_they_are_bad(self) -> None:
        recipe = Preprocessing(3, 32, 32, resize=(32, 32), fit="contain")
        with pytest.raises(BadImage, match="nothing is left of its shorter side"):
            one(npy(photograph(1, 300)), recipe)


class TestArrays:
    def test_bytes_are_resized_and_cropped_as_the_same_picture_in_a_file(self) -> None:
        for size in ((300, 200), (224, 224), (50, 60)):
            picture = photograph(*size)
            assert np.array_equal(one(npy(picture), RECIPE), one(png(picture), RECIPE))

    def test_floats_of_the_networks_size_are_its_input_and_others_are_not(self) -> None:
        prepared = photograph(224, 224) / np.float32(255)
        assert np.array_equal(one(npy(prepared), RECIPE), prepared)
        other = photograph(300, 200) / np.float32(255)
        levels = one(npy((other * 255).round().astype(np.uint8)), RECIPE)
        assert np.abs(one(npy(other), RECIPE) * 255 - levels).max() <= 1.1

    def test_padding_is_of_its_levels_in_either_dtype(self) -> None:
        recipe = Preprocessing(3, 32, 32, resize=(16,), fill=(255, 0, 51))
        for picture, white in ((photograph(16, 16), 255), (photograph(16, 16) / np.float32(255), 1)):
            found = one(npy(picture), recipe)
            assert found[0, 0] == pytest.approx([white, 0, white / 5])
            assert np.array_equal(found[8:24, 8:24], picture)


def test_the_card_of_an_older_archive_means_what_it_meant() -> None:
    older = {"channels": 3, "height": 32, "width": 32, "mean": [], "std": []}
    read = Preprocessing.from_dict(older)
    assert read == Preprocessing(3, 32, 32)
    assert read.to_dict() == older


def test_a_recipe_survives_json() -> None:
    recipe = Preprocessing(3, 8, 8, (), (), (9, 9), "contain", (1, 2, 3), "lanczos", bgr=True)
    assert Preprocessing.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resize": (1, 2, 3)}, "length of the shorter side"),
        ({"resize": (0,)}, "length of the shorter side"),
        ({"resize": (9, 9), "height": None, "width": None}, "must be the network's too"),
        ({"resize": (9,), "fit": "cover"}, "with a height and a width"),
        ({"fill": (1, 2)}, "3 levels in 0..255"),
        ({"fill": (1, 2, 256)}, "3 levels in 0..255"),
        ({"interpolation": "area"}, "one of nearest"),
        ({"interpolation": "lanczos", "antialias": False}, "only bilinear and bicubic"),
        ({"bgr": True, "channels": 1}, "not of 1"),
        ({"std": (1, 1, 1)}, "mean and std need 3 values each .* got 0 and 3"),
        ({"mean": (1, 1, 1)}, "mean and std need 3 values each .* got 3 and 0"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing(**({"channels": 3, "height": 8, "width": 8} | values))


def test_a_blue_first_network_gets_the_same_from_arrays_and_tensors() -> None:
    recipe = Preprocessing(3, 8, 8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), bgr=True)
    picture = photograph(8, 8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
    assert np.array_equal(normalise(tensor, recipe).numpy(), to_input([picture], recipe))
    assert to_input([picture], recipe)[0, 0] == pytest.approx(picture[:, :, 2] / 255 - 0.1, abs=1e-6)


class TestExplanations:
    RECIPE = Preprocessing(3, 32, 32, resize=(36,), interpolation="bicubic")

    def ask(self, picture: bytes, recipe: Preprocessing) -> wire.Explanation:
        request = wire.PredictRequest(pictures=[picture])
        request.explain.method, request.explain.picture = "picture", True
        return ask_message(make_service(Cifar, recipe, CIFAR_CLASSES), request).results[0].explanation

    def test_they_show_what_the_network_saw_and_say_where_it_lies(self) -> None:
        picture = photograph(72, 108)
        found = self.ask(png(picture), self.RECIPE)
        shown = np.frombuffer(found.picture.data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(shown, fit(picture, self.RECIPE))
        assert list(found.original_size) == [72, 108]
        assert list(found.region) == [4, 22, 68, 86]  # Half of 72×108 is 36×54; its middle begins at (2, 11).

    @pytest.mark.parametrize(
        ("picture", "recipe", "region"),
        [
            (png(photograph(64, 96)), Preprocessing(3, 32, 32), [0, 0, 64, 96]),
            (npy(np.zeros((32, 32, 3), np.float32)), RECIPE, [0, 0, 32, 32]),
            (png(photograph(16, 32)), Preprocessing(3, 32, 32, resize=(16,)), [-8, 0, 24, 32]),
        ],
    )
    def test_the_whole_picture_and_padding_are_places_too(
        self, picture: bytes, recipe: Preprocessing, region: list[float]
    ) -> None:
        assert list(self.ask(picture, recipe).region) == region

    def test_json_says_it_too(self) -> None:
        service = make_service(Edges, Preprocessing(1, None, None), ())
        body = ask_json(service, {"data": bytearray(png(photograph(5, 9))), "explain": b"picture"})
        found = body["results"][0]["explanation"]
        assert (found["original_size"], found["region"]) == ([5, 9], [0, 0, 5, 9])
