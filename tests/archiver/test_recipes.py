"""Recipes: pictures become what torchvision's presets and timm's transforms make of them, whatever their shape."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from archiver.__main__ import main
from archiver.arguments import parse
from archiver.packing import ArchiveError
from archiver.recipes import timm_preprocessing
from handlers import loading
from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_message, cells, make_service
from tests.pictures import photograph, png, saved
from tests.thorough import variants

SIZES = variants([(375, 500), (97, 61), (40, 300)], [(500, 333), (301, 777), (224, 224)])
RANDOM = ("--random-weights", "0", "--layers", "auto")


def levels(transformed: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """Return the levels of 255, (H, W, C), behind a library's normalised tensor."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return np.asarray(((transformed * std + mean) * 255).round().permute(1, 2, 0)).astype(int)


def recipe(*options: str) -> Preprocessing:
    found = parse([*options, *RANDOM], "").preprocessing
    assert isinstance(found, Preprocessing)
    return found


class TestTorchvision:
    @pytest.mark.parametrize(
        "weights",
        [
            models.ResNet50_Weights.IMAGENET1K_V1,  # 256, 224, bilinear
            models.ResNet50_Weights.IMAGENET1K_V2,  # 232
            models.EfficientNet_B0_Weights.IMAGENET1K_V1,  # 256, 224, bicubic
            models.Inception_V3_Weights.IMAGENET1K_V1,  # 342, 299
            models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,  # 384, 384, bicubic
            models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,  # 236, 224
        ],
    )
    def test_pictures_are_those_of_the_preset(self, weights: Any) -> None:
        name = str(weights.meta.get("name") or type(weights).__name__.removesuffix("_Weights").lower())
        own = ["--torchvision", name, "--state-dict", Path(weights.url).name, "--layers", "auto"]
        preprocessing = parse(own, "").preprocessing
        assert (preprocessing.mean, preprocessing.std) == (tuple(weights.transforms().mean), (0.229, 0.224, 0.225))
        for number, size in enumerate(SIZES):
            picture = photograph(*size, number)
            expected = levels(weights.transforms()(Image.fromarray(picture)), preprocessing)
            [found] = decode(png(picture), preprocessing)
            assert np.array_equal(found, expected), size

    def test_a_jpeg_is_turned_before_it_is_cropped(self) -> None:
        preprocessing, exif = recipe("--torchvision", "resnet18"), Image.Exif()
        exif[0x0112] = 6  # To be turned by a quarter to the right.
        file = saved(Image.fromarray(photograph(300, 500)), "JPEG", quality=95, exif=exif)
        upright = Image.open(io.BytesIO(file)).transpose(Image.Transpose.ROTATE_270)
        expected = levels(models.ResNet18_Weights.DEFAULT.transforms()(upright), preprocessing)
        assert np.array_equal(decode(file, preprocessing)[0], expected)

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_without_antialiasing_they_are_those_of_its_tensors(self, interpolation: str) -> None:
        own = ("--torchvision", "resnet18", "--interpolation", interpolation, "--no-antialias")
        preprocessing = recipe(*own)
        preset = ImageClassification(
            crop_size=224, resize_size=256, interpolation=InterpolationMode(interpolation), antialias=False
        )
        for size in SIZES[:4]:
            picture = photograph(*size)
            expected = levels(preset(torch.from_numpy(picture).permute(2, 0, 1)), preprocessing)
            assert np.array_equal(decode(png(picture), preprocessing)[0], expected), size

    def test_a_grey_network_sees_what_the_preset_makes_of_a_grey_picture(self) -> None:
        preprocessing = Preprocessing(1, 224, 224, (0.5,), (0.25,), resize=(256,))
        preset = ImageClassification(crop_size=224, resize_size=256, mean=(0.5,), std=(0.25,))
        grey = Image.fromarray(photograph(333, 500)).convert("L")
        expected = ((preset(grey)[0] * 0.25 + 0.5) * 255).round().numpy()
        [found] = decode(saved(grey, "PNG"), preprocessing)
        assert np.array_equal(found[:, :, 0], expected)


class TestTimm:
    @pytest.mark.parametrize(
        "name",
        [
            "resnet10t.c3_in1k",  # bilinear, 0.95
            "convnext_atto.d2_in1k",  # bicubic, 0.875
            "vit_tiny_patch16_224.augreg_in21k_ft_in1k",  # bicubic, 0.9, mean 0.5
            "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k",  # squash, 1.0
            "deepseek_vit_412m.deepseek_v4_1_flash",  # border
            "volo_d4_448.sail_in1k",  # 1.15: less than the network takes, padded
            "vit_base_patch16_sapiens2.fb",  # 1024×768
        ],
    )
    def test_pictures_are_those_of_its_transform(self, name: str) -> None:
        config = timm.data.resolve_data_config({"in_chans": 3}, timm.get_pretrained_cfg(name).to_dict())
        transform, preprocessing = create_transform(**config, is_training=False), timm_preprocessing(name)
        assert preprocessing.size == tuple(config["input_size"][1:])
        assert (preprocessing.mean, preprocessing.std) == (tuple(config["mean"]), tuple(config["std"]))
        for number, size in enumerate(SIZES):
            picture = photograph(*size, number)
            expected = levels(transform(Image.fromarray(picture)), preprocessing)
            assert np.array_equal(decode(png(picture), preprocessing)[0], expected), size

    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    @pytest.mark.parametrize("size", variants([(160, 288)], [(224, 224)]))
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
    def test_every_mode_and_filter_is_known(self, mode: str, size: tuple[int, int], interpolation: str) -> None:
        facts = {"crop_mode": mode, "crop_pct": 0.9, "interpolation": interpolation, "mean": (0.4, 0.5, 0.6)}
        arguments = {"pretrained_cfg_overlay": {**facts, "input_size": (3, *size)}}
        preprocessing = timm_preprocessing("resnet10t", arguments)
        transform = create_transform(size, **facts, std=preprocessing.std)
        for shape in SIZES[::2]:
            picture = photograph(*shape)
            expected = levels(transform(Image.fromarray(picture)), preprocessing)
            assert np.array_equal(decode(png(picture), preprocessing)[0], expected), shape

    def test_a_network_has_the_same_recipe_however_it_is_named(self) -> None:
        own = ["--arch", "timm:create_model", "--name", "own", "--arguments", '{"model_name": "test_resnet.r160_in1k"}']
        assert recipe(*own) == timm_preprocessing("test_resnet.r160_in1k")
        assert recipe("--arch", "timm.models.resnet:resnet10t", "--name", "own") == timm_preprocessing("resnet10t")

    def test_its_arguments_count(self) -> None:
        size = {"img_size": 128}
        assert timm_preprocessing("vit_tiny_patch16_224", size).size == (128, 128)
        assert timm_preprocessing("vit_tiny_patch16_224", size).resize == (142,)
        grey = timm_preprocessing("vit_tiny_patch16_224", {"in_chans": 1})
        assert (grey.channels, grey.mean, grey.std) == (1, (0.5,), (0.5,))
        with pytest.raises(ArchiveError, match="3 channels for resnet10t, and this network takes 1: give --mean"):
            timm_preprocessing("resnet10t", {"in_chans": 1})
        given = {"in_chans": 1, "mean": (0.4,), "std": (0.2,)}
        assert timm_preprocessing("resnet10t", given).mean == (0.4,)

    @pytest.mark.parametrize("name", ["resnet_eighteen", "hf-hub:someone/something", "resnet10t.not_its_weights"])
    def test_what_it_does_not_have_is_refused(self, name: str) -> None:
        with pytest.raises(ArchiveError, match="timm has no"):
            timm_preprocessing(name)


class TestScores:
    """Networks of random weights: a level of rounding moves a logit by less than a thousandth of the logits' spread.

    So where the six best classes are further apart than twice that, the five best must be the same.
    """

    NOISE = 0.001

    def networks(self) -> list[tuple[nn.Module, Preprocessing, Any]]:
        torch.manual_seed(0)
        wide = models.resnet18(weights=None)
        small = timm.create_model("resnet10t", pretrained=False)
        config = resolve_model_data_config(small)
        return [
            (wide, recipe("--torchvision", "resnet18"), models.ResNet18_Weights.DEFAULT.transforms()),
            (small, timm_preprocessing("resnet10t"), create_transform(**config)),
        ]

    def test_the_five_best_are_those_of_the_librarys_pictures(self) -> None:
        compared = 0
        for network, preprocessing, transform in self.networks():
            service = make_service(network, preprocessing, tuple(map(str, range(1000))), layers={"first": "bn1"})
            for number, size in enumerate(SIZES[:2]):
                picture = photograph(*size, number)
                with torch.inference_mode():
                    expected = network(transform(Image.fromarray(picture))[None])[0].numpy()
                top = ask_message(service, wire.PredictRequest(pictures=[png(picture)], top_k=0)).results[0].top
                found = np.zeros(1000, np.float32)
                found[[score.index for score in top]] = [score.logit for score in top]
                noise = self.NOISE * expected.std()
                assert np.abs(found - expected).max() < noise
                best = np.argsort(-expected)[:6]
                if -np.diff(expected[best]).max() > 2 * noise:
                    assert [score.index for score in top[:5]] == best[:5].tolist()
                    compared += 1
        assert compared


class TestCommandLine:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ([], {"resize": (232,), "height": 224, "width": 224, "interpolation": "bilinear"}),
            (["--preprocessing", "torchvision"], {"resize": (232,)}),
            (["--preprocessing", "squash"], {"resize": (), "height": 224, "mean": (0.485, 0.456, 0.406)}),
            (["--preprocessing", "squash", "--interpolation", "bicubic"], {"resize": (), "interpolation": "bicubic"}),
            (["--resize", "256"], {"resize": (256,), "height": 224}),
            (["--crop", "200"], {"resize": (232,), "height": 200, "width": 200}),
            (["--resize", "256x300", "--crop", "224x256"], {"resize": (256, 300), "height": 224, "width": 256}),
            (["--size", "112x112"], {"resize": (116,), "height": 112}),
            (["--size", "112x168"], {"resize": (116, 174), "fit": "cover", "height": 112, "width": 168}),
            (["--size", "any"], {"resize": (), "height": None}),
            (["--size", "any", "--resize", "256"], {"resize": (256,), "height": None}),
            (["--interpolation", "bicubic", "--no-antialias", "--bgr"], {"antialias": False, "bgr": True}),
        ],
    )
    def test_options_change_the_published_recipe(self, options: list[str], expected: dict[str, Any]) -> None:
        found = recipe("--torchvision", "resnet50", *options)
        assert {name: getattr(found, name) for name in expected} == expected

    def test_a_network_of_ones_own_is_squashed_unless_a_recipe_is_given(self) -> None:
        own = ("--arch", "net.py:Net", "--name", "own")
        assert recipe(*own, "--size", "64x48") == Preprocessing(3, 64, 48)
        assert recipe(*own, "--resize", "256", "--crop", "224") == Preprocessing(3, 224, 224, resize=(256,))

    def test_a_librarys_network_has_its_recipe_however_it_is_named(self) -> None:
        own = ("--arch", "torchvision.models:resnet18", "--name", "own")
        assert recipe(*own) == recipe("--torchvision", "resnet18")
        assert recipe(*own, "--preprocessing", "squash").resize == ()
        assert recipe("--arch", "torchvision.ops:Permute", "--name", "own") == Preprocessing(3, 224, 224)

    @pytest.mark.parametrize(
        ("file", "options", "words"),
        [
            ("renamed.pth", (), "preprocessing and labels of IMAGENET1K_V2"),
            ("renamed.pth", ("--arguments", '{"num_classes": 2}'), "taken: preprocessing of IMAGENET1K_V2"),
            ("resnet50-0676ba61.pth", (), ""),
            ("renamed.pth", ("--preprocessing", "torchvision"), ""),
            ("renamed.pth", ("--resize", "256"), ""),
        ],
    )
    def test_weights_by_another_name_than_the_published_are_told_as_what_they_are_taken(
        self, file: str, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        parse(["--torchvision", "resnet50", "--state-dict", f"some/{file}", "--layers", "auto", *options], "")
        said = capsys.readouterr().err
        assert words in said
        assert bool(said) == bool(words)

    def test_nothing_is_told_where_all_weights_have_one_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        parse(["--torchvision", "resnet18", "--state-dict", "renamed.pth", "--layers", "auto"], "")
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--crop", "64"], "give --resize too, such as --resize 64; or --size 64x64"),
            (["--crop", "64", "--size", "64x64"], "give one of them"),
            (["--resize", "200"], "--resize 224 --crop 224x224"),
            (["--resize", "64x64", "--size", "any"], "must be the network's too"),
            (["--size", "any", "--interpolation", "bicubic"], "alone does not resize"),
            (["--preprocessing", "torchvision"], "torchvision publishes no recipe for this network"),
            (["--preprocessing", "timm"], "timm publishes no recipe for this network"),
            (["--preprocessing", "squash", "--resize", "256"], "cannot be combined with --resize or --crop"),
            (["--std", "0.2,0.2,0.2"], "give --mean and --std together"),
            (["--mean", "0.2,0.2,0.2"], "give --mean and --std together"),
            (["--mean", "0.5", "--std", "0.5"], "need 3 values each (one a channel), none of --std 0; got 1 and 1"),
            (["--channels", "0"], "--channels: channels must be positive"),
            (["--ema"], "it goes with --state-dict"),
            (["--resize", "256", "--interpolation", "lanczos", "--no-antialias"], "can do without antialiasing"),
            (["--bgr", "--channels", "1"], "an order of 3 channels, not of 1"),
            (["--resize", "0"], "neither a number of pixels"),
            (["--resize", "99999"], "more than 16,000,000 pixels"),
        ],
    )
    def test_a_contradiction_is_refused(
        self, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            recipe("--arch", "net.py:Net", "--name", "own", *options)
        assert words in " ".join(capsys.readouterr().err.split())

    def test_an_archive_serves_its_recipe(
        self, net_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = ["--arch", f"{net_file}:Net", "--name", "own", "--store", str(tmp_path), "--random-weights", "0"]
        taking = ["--resize", "36", "--crop", "32x24", "--interpolation", "bicubic", "--bgr", "--layers", "c=conv"]
        taking += ["--mean", "0.1,0.2,0.3", "--std", "1,1,0.5"]
        assert main([*own, *taking]) == 0
        said = capsys.readouterr().out
        resized = "pictures: resized to 36 on the shorter side, bicubic, then the middle 32x24"
        assert f"{resized}; blue first; mean 0.1,0.2,0.3, std 1,1,0.5\n" in said
        ZipFile(tmp_path / "own.mar").extractall(tmp_path / "unpacked")
        monkeypatch.syspath_prepend(tmp_path / "unpacked")
        service = loading.load(
            tmp_path / "unpacked", model="own", version="1.0", config={}, batch_size=1, gpu=None, settings=Settings()
        )
        card = ask_message(service, wire.PredictRequest(describe=True)).card.input
        assert (list(card.resize), card.interpolation, card.bgr) == ([36], "bicubic", True)
        request, picture = wire.PredictRequest(pictures=[png(photograph(72, 90))]), photograph(72, 90)
        request.explain.method, request.explain.picture = "picture", True
        found = ask_message(service, request).results[0].explanation
        whole = Image.fromarray(picture).resize((45, 36), Image.Resampling.BICUBIC)
        expected = np.asarray(whole)[2:34, 10:34].transpose(2, 0, 1)
        assert np.array_equal(np.frombuffer(found.picture.data, np.uint8).reshape(3, 32, 24), expected)


def test_a_blue_first_network_gets_blue_first_and_shows_its_pictures_in_colour() -> None:
    """The network hands on what it gets, and its score weighs red, green and blue in its own order."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)
            self.head = nn.Linear(3, 1)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
                self.head.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(images).mean((2, 3)))  # type: ignore[no-any-return]

    preprocessing = Preprocessing(3, 8, 8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), bgr=True)
    service = make_service(Through(), preprocessing, ("only",), layers={"c": "conv"})
    picture = photograph(8, 8)
    request = wire.PredictRequest(pictures=[png(picture)], layers=["c"])
    request.explain.method, request.explain.picture = "input_gradient", True
    result = ask_message(service, request).results[0]
    expected = picture.transpose(2, 0, 1)[::-1] / 255 - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    assert cells(result.maps[0]) == pytest.approx(expected, abs=1e-6)
    shown = np.frombuffer(result.explanation.picture.data, np.uint8).reshape(3, 8, 8)
    assert np.array_equal(shown, picture.transpose(2, 0, 1))
    heat = np.frombuffer(result.explanation.heat.data, np.float32).reshape(3, 64).sum(axis=1)
    assert heat == pytest.approx([3, 2, 1])  # Red, green, blue, as the picture.
