"""Probes of real networks: what theory says of shifts, turns, borders and blur is what they measure."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from convscope import Client, UnknownLayer
from convscope._cli import main
from convscope_lens import probes
from convscope_lens.probes import _detail, _images
from convscope_lens.probes._session import ProbeSession
from PIL import Image
from torch import nn

from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.networks import Cifar, Edges, Flat, Simple
from tests.client.served import serving
from tests.client.stand_in import StandIn
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service

ROUNDING = 1e-5


class Round(nn.Module):
    """A kernel that looks the same in every quarter turn, and scores of the picture's mean."""

    layers: ClassVar = {"conv1": "conv"}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="zeros")
        ring = torch.tensor([[1.0, 2, 1], [2, -3, 2], [1, 2, 1]])
        self.conv.weight.data = torch.rand(4, 3, 1, 1) * ring

    def forward(self, images):
        return self.conv(images).mean((2, 3))


class Wide(nn.Module):
    """A kernel of half the picture's side without padding: a small map of cells one pixel apart."""

    layers: ClassVar = {"only": "only"}

    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(3, 2, 21)

    def forward(self, images):
        return self.only(images).mean((2, 3))


class Turning(nn.Module):
    """One kernel in its four quarter turns: what a channel finds upright, its neighbour finds in the turned picture."""

    layers: ClassVar = {"only": "only"}

    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        kernel = torch.rand(3, 3, 3) - 0.5
        self.only.weight.data = torch.stack([torch.rot90(kernel, turns, (1, 2)) for turns in range(4)])

    def forward(self, images):
        return self.only(images).mean((2, 3))


class Strided(nn.Module):
    """A strided convolution without padding and one behind it."""

    layers: ClassVar = {"first": "first", "second": "second"}

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)

    def forward(self, images):
        return self.second(self.first(images)).mean((2, 3))


@pytest.fixture(scope="module")
def networks() -> Iterator[StandIn]:
    torch.manual_seed(0)
    made = {"cifar": Cifar(), "simple": Simple(), "flat": Flat()}
    services = {name: make_service(network, CIFAR_INPUT, CIFAR_CLASSES) for name, network in made.items()}
    services["edges"] = make_service(Edges, Preprocessing(1, None, None), ())
    services["round"] = make_service(Round(), CIFAR_INPUT, CIFAR_CLASSES[:4])
    services["strided"] = make_service(Strided(), CIFAR_INPUT, CIFAR_CLASSES[:5])
    services["turning"] = make_service(Turning(), CIFAR_INPUT, CIFAR_CLASSES[:4])
    services["wide"] = make_service(Wide(), CIFAR_INPUT, CIFAR_CLASSES[:2])
    services["narrow"] = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, limits=Limits(max_images=5))
    with serving(services) as stand_in:
        yield stand_in


@pytest.fixture
def client(networks: StandIn) -> Iterator[Client]:
    """A client over one transport: what is measured does not depend on it (tests/client/test_congruence.py)."""
    networks.requests.clear()
    with Client(networks.grpc_url) as client:
        yield client


def noise(count: int = 2, channels: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((count, 32, 32, channels), np.float32))


@pytest.mark.parametrize(
    ("model", "layer", "channels"), [("edges", "conv1", 1), ("cifar", "conv1", 3), ("simple", "conv1", 3)]
)
def test_layers_of_stride_one_follow_every_shift_exactly_away_from_the_border(client, model, layer, channels):
    result = probes.shift(client, noise(channels=channels), model=model)
    assert result.steps.tolist() == list(range(1, 9))
    assert result.measures["interior"][layer].max() < ROUNDING
    assert result.measures["whole"][layer].min() > 0.01  # The border and what came in do make a difference.


@pytest.mark.parametrize("model", ["cifar", "simple"])
def test_behind_a_pool_of_two_even_shifts_are_followed_exactly_and_odd_ones_are_not(client, model):
    error = probes.shift(client, noise(), model=model, layers="conv2").measures["interior"]["conv2"]
    assert error[1::2].max() < ROUNDING
    assert error[::2].min() > 0.05


def test_strides_multiply_and_only_their_multiples_are_followed_exactly(client):
    errors = probes.shift(client, noise(), model="strided").measures["interior"]
    exact = {name: [step for step, value in enumerate(error, 1) if value < ROUNDING] for name, error in errors.items()}
    assert exact == {"first": [2, 4, 6, 8], "second": [4, 8]}


def test_a_shift_error_is_what_its_formula_says(client):
    [picture] = noise(1)
    result = probes.shift(client, picture, model="cifar", shifts=[2], layers="conv1", pairs=0)
    down, right = np.roll(picture, 2, 0), np.roll(picture, 2, 1)
    down[:2], right[:, :2] = picture[[2, 1]], picture[:, [2, 1]]
    before, *after = (
        prediction.maps["conv1"] for prediction in client.predict([picture, down, right], model="cifar", layers="all")
    )
    wrong = np.square(after[0][:, 2:] - before[:, :-2]).sum() + np.square(after[1][:, :, 2:] - before[:, :, :-2]).sum()
    right_sum = np.square(before[:, :-2]).sum() + np.square(before[:, :, :-2]).sum()
    assert result.measures["whole"]["conv1"][0] == pytest.approx(np.sqrt(wrong / right_sum), rel=1e-5)


def test_a_fully_connected_network_has_no_interior_and_is_compared_with_itself_unshifted(client):
    result = probes.shift(client, noise(), model="flat", shifts=[1, 2])
    assert np.isnan(result.measures["interior"]["fc1"]).all()
    assert (result.measures["whole"]["fc1"] > 0.01).all()


def test_shift_consistency_counts_pairs_of_one_class(client, networks):
    picture = np.full((32, 32, 3), 0.25, np.float32)
    still = probes.shift(client, [picture] * 3, model="cifar", shifts=[1], pairs=4).totals
    assert still == {"shift_consistency": 1.0, "pairs": 12, "max_shift_px": 2}  # One colour is the same, moved or not.
    networks.requests.clear()
    [moving] = noise(1)
    result = probes.shift(client, moving, model="flat", shifts=[1], pairs=20, max_shift=9, seed=3).totals
    tops = {}
    for number, move in enumerate(np.random.default_rng(3).integers(-9, 10, (40, 2)).tolist()):
        tops[number] = client.predict(_images.shift_picture(moving, *move), model="flat").top[0].index
    assert result["shift_consistency"] == np.mean([tops[number] == tops[number + 1] for number in range(0, 40, 2)])
    assert 0 < result["shift_consistency"] < 1
    assert result == probes.shift(client, moving, model="flat", shifts=[1], pairs=20, max_shift=9, seed=3).totals


def test_agreement_and_probability_are_those_of_the_unshifted_pictures_class(client):
    [picture] = noise(1)
    scores = probes.rotate(client, picture, model="flat", angles=[0, 90]).scores
    before, turned = client.predict([picture, np.rot90(picture)], model="flat", top_k=0)
    selected = before.top[0].index
    assert scores["agreement"].tolist() == [1, turned.top[0].index == selected]
    [probability] = [score.probability for score in turned.top if score.index == selected]
    assert scores["probability"].tolist() == pytest.approx([before.top[0].probability, probability])


def test_a_round_kernel_turns_with_its_picture_and_another_does_not(client):
    options = {"angles": [0, 90, 180, 270, 45], "layers": "conv1"}
    followed = probes.rotate(client, noise(), model="round", **options).measures["distance"]
    assert followed["conv1"][:4].max() < ROUNDING
    assert followed["conv1"][4] > 0.1  # Noise does not survive reading between pixels, and says so:
    assert followed["picture"][4] > 0.1
    assert followed["picture"][:4].max() < ROUNDING
    other = probes.rotate(client, noise(), model="cifar", **options).measures["distance"]["conv1"]
    assert other[0] < ROUNDING
    assert other[1:].min() > 0.1


def test_a_map_that_turns_with_other_channels_follows_once_they_are_mixed(client):
    pictures = noise(8)
    result = probes.rotate(client, pictures, model="turning", angles=[0, 90])
    assert result.measures["distance"]["only"][1] > 0.5  # Channel by channel it fails, as a perfect network would.
    assert result.measures["mixed"]["only"].max() < 0.01
    assert result.baselines["mixed"]["only"].min() > 0.3  # The same fit does not make unrelated pictures alike.
    assert result.totals["fitted_pictures"] == 4
    other = probes.rotate(client, pictures, model="cifar", angles=[90], layers="conv1")
    assert 0.1 < other.measures["mixed"]["conv1"][0] < other.measures["distance"]["conv1"][0]
    assert np.isnan(probes.rotate(client, pictures[0], model="cifar", angles=[90]).measures["mixed"]["conv1"]).all()


def test_a_distance_stands_beside_that_of_another_picture(client):
    pictures = noise(2)
    result = probes.shift(client, pictures, model="cifar", shifts=[2], layers="conv1", pairs=0)
    maps = [prediction.maps["conv1"] for prediction in client.predict(pictures, model="cifar", layers="conv1")]
    by_hand = []
    for picture, other in zip(pictures, maps[::-1], strict=True):
        moved = [_images.shift_picture(picture, 2, 0), _images.shift_picture(picture, 0, 2)]
        down, right = (each.maps["conv1"] for each in client.predict(moved, model="cifar", layers="conv1"))
        wrong = np.square(down[:, 2:] - other[:, :-2]).sum() + np.square(right[:, :, 2:] - other[:, :, :-2]).sum()
        by_hand.append(np.sqrt(wrong / (np.square(other[:, :-2]).sum() + np.square(other[:, :, :-2]).sum())))
    [baseline] = result.baselines["whole"]["conv1"]  # Of the second against the first, in an order drawn at random.
    assert min(abs(baseline - each) for each in by_hand) < 1e-5
    assert result.baseline_names["whole"] == "another picture"
    alone = probes.shift(client, pictures[0], model="cifar", shifts=[2], layers="conv1", pairs=0)
    assert np.isnan(alone.baselines["whole"]["conv1"]).all()
    assert np.isnan(alone.intervals["whole"]["conv1"]).all()


def test_intervals_are_those_of_another_sample_of_pictures(client):
    result = probes.blur(client, noise(40), model="cifar", sigmas=[0.6], layers="none")
    assert result.measures == {}
    share, count = result.scores["agreement"][0], result.picture_count
    [[low, high]] = result.intervals["scores"]["agreement"]
    assert 0 < share < 1
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(share * (1 - share) / count), rel=0.25)
    assert f"{share:.3f} ±" in result.format_table()


def test_chance_is_what_answers_dealt_out_at_random_would_agree(client):
    pictures = noise(6)
    result = probes.rotate(client, pictures, model="flat", angles=[90], layers="none")
    before = [each.top[0].index for each in client.predict(pictures, model="flat")]
    turned = client.predict([np.rot90(picture).copy() for picture in pictures], model="flat", top_k=0)
    after = [each.top[0].index for each in turned]
    dealt = np.mean([[one == other for other in after] for one in before])
    assert result.baselines["scores"]["agreement"] == pytest.approx([dealt])
    probabilities = [{score.index: score.probability for score in each.top} for each in turned]
    dealt = np.mean([[other[one] for other in probabilities] for one in before])
    assert result.baselines["scores"]["probability"] == pytest.approx([dealt])


def test_folders_named_as_classes_give_an_accuracy_and_its_paired_change(client, tmp_path):
    labels = [CIFAR_CLASSES[number % 3] for number in range(9)]
    pixels = [(255 * image).astype(np.uint8) for image in noise(9)]
    for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / label / f"{number}.png")
    result = probes.rotate(client, tmp_path, model="flat", angles=[180], layers="none")
    before = client.predict(pixels, model="flat")
    after = client.predict([np.rot90(image, 2).copy() for image in pixels], model="flat")
    correct = [
        np.mean([one.top[0].label == label for one, label in zip(answers, labels, strict=True)])
        for answers in (before, after)
    ]
    assert result.totals["accuracy_unchanged"] == pytest.approx(correct[0])
    assert result.scores["accuracy"] == pytest.approx([correct[1]])
    assert result.scores["accuracy_change"] == pytest.approx([correct[1] - correct[0]])
    (tmp_path / "unnamed.png").write_bytes((tmp_path / labels[0] / "0.png").read_bytes())
    assert "accuracy" not in probes.rotate(client, tmp_path, model="flat", angles=[180], layers="none").scores


def test_two_models_are_compared_picture_by_picture(client):
    options = {"sigmas": [0.6], "layers": "none"}
    cifar, flat = (probes.blur(client, noise(40), model=model, **options) for model in ("cifar", "flat"))
    difference = cifar.minus(flat)
    assert difference.model == "cifar 1.0 − flat"
    assert difference.scores["agreement"] == pytest.approx(cifar.scores["agreement"] - flat.scores["agreement"])
    [[low, high]] = difference.intervals["scores"]["agreement"]
    assert low < difference.scores["agreement"][0] < high
    same = cifar.minus(cifar)  # Were both resampled apart, the interval would be wide.
    assert not np.any(same.intervals["scores"]["agreement"])
    with pytest.raises(ValueError, match="the same pictures and steps"):
        cifar.minus(probes.blur(client, noise(40), model="flat", sigmas=[1], layers="none"))


def test_pooled_maps_are_compared_in_place(client):
    pictures = noise(3)
    result = probes.pool(client, pictures, model="cifar", layers="conv1", windows=[1, 4, 64])
    before = client.predict(pictures, model="cifar", layers="conv1")
    moved = [_images.shift_picture(picture, 0, 1) for picture in pictures]
    after = client.predict(moved, model="cifar", layers="conv1")
    for measure, reduced in (("maximum", np.max), ("average", np.mean)):
        was, now = (
            np.stack([reduced(each.maps["conv1"].reshape(16, 8, 4, 8, 4), axis=(2, 4)) for each in answers])
            for answers in (before, after)
        )
        by_hand = np.sqrt(np.square(now - was).sum() / np.square(was).sum())
        assert result.measures[measure]["conv1"][1] == pytest.approx(by_hand, rel=1e-5)
        assert result.measures[measure]["conv1"][1] < result.baselines[measure]["conv1"][1]
        assert np.isnan(result.measures[measure]["conv1"][2])  # The map has 32×32 cells.
    assert result.scores == {}


def test_a_scaled_map_is_compared_where_its_place_is_still_in_the_picture(client):
    smooth = _images.blur_picture(noise(1)[0], 4)
    result = probes.scale(client, smooth, model="round", factors=[1, 1.2]).measures["distance"]
    assert result["picture"][0] == result["conv1"][0] == 0
    assert 0 < result["picture"][1] < 0.01
    assert result["conv1"][1] > result["picture"][1]


def test_the_border_is_felt_as_far_as_receptive_fields_reach_over_it(client):
    result = probes.border(client, noise(), model="cifar").measures
    for measure in ("constant", "shifted"):
        assert result[measure]["conv1"][0] > 0.01  # 3×3, padded by one: the outermost cells.
        assert result[measure]["conv1"][1:].max() < ROUNDING
        assert result[measure]["conv2"][:2].min() > 0.001  # 8×8 from pixel -3 on: the first two.
        assert np.nanmax(result[measure]["conv2"][2:]) < ROUNDING
    assert np.isnan(result["constant"]["conv2"][8])  # 16 cells have eight rings.


def test_without_padding_there_is_no_border(client):
    result = probes.border(client, noise(), model="strided", layers="first")
    assert np.nanmax(result.measures["constant"]["first"]) < ROUNDING
    assert np.nanmax(result.measures["shifted"]["first"]) < ROUNDING
    assert set(result.totals) == {"agreement", "probability"}


def test_an_object_on_its_own_background_is_the_picture_itself_in_the_centre(client, tmp_path):
    for number, image in enumerate(noise(4)):
        image[:4], image[-4:], image[:, :4], image[:, -4:] = 0, 0, 0, 0
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "cat" / f"{number}.png")
    totals = probes.border(client, tmp_path, model="flat", margin=4, background=0).totals
    assert totals["accuracy_unchanged"] == totals["accuracy_centre"]
    assert totals["accuracy_change"] == pytest.approx(totals["accuracy_corner"] - totals["accuracy_centre"])
    cut = probes.border(client, noise(4), model="flat").totals
    assert "accuracy_centre" not in cut
    with pytest.raises(ValueError, match="leaves nothing of a picture"):
        probes.border(client, noise(1), model="flat", margin=16)


def test_a_map_that_is_small_against_the_move_is_compared_as_far_as_it_goes(client):
    result = probes.border(client, noise(), model="wide").measures["shifted"]["only"]  # 12×12 cells, moved by 8.
    assert result[:4].max() < ROUNDING
    assert np.isnan(result[4:]).all()


def test_blur_takes_energy_as_the_gaussian_does(client):
    stripes = np.zeros((32, 32, 3), np.float32)
    stripes[:, :, :] = 0.5 + 0.4 * np.cos(2 * np.pi * np.arange(32) / 8)[None, :, None]
    result = probes.blur(client, stripes, model="round", sigmas=[0, 1, 2])
    assert result.measures["energy"]["picture"][0] == result.measures["energy"]["conv1"][0] == 1
    amplitude = np.exp(-2 * (np.pi * np.array([1, 2]) / 8) ** 2)  # The Gaussian's own Fourier transform.
    assert result.measures["energy"]["picture"][1:] == pytest.approx(amplitude**2, abs=0.03)
    assert (np.diff(result.measures["energy"]["conv1"]) < 0).all()


def test_cells_that_see_one_block_only_cannot_know_of_the_others(client):
    result = probes.shuffle(client, noise(), model="cifar", blocks=[4, 16])
    inside = result.measures["interior"]
    assert inside["conv1"].max() < ROUNDING
    assert inside["conv2"][1] < ROUNDING
    assert np.isnan(inside["conv2"][0])  # 8×8 pixels are in no block of 4.
    assert result.measures["interior_share"]["conv1"] == pytest.approx([(2 / 4) ** 2, (14 / 16) ** 2])
    assert result.measures["interior_share"]["conv2"] == pytest.approx([0, (4 / 8) ** 2])
    assert min(curve.min() for curve in result.measures["whole"].values()) > 0.01  # The others do.


def test_no_block_stays_where_it_was():
    rng = np.random.default_rng(0)
    for block in (4, 8, 16):
        home = np.stack(np.divmod(np.arange((32 // block) ** 2), 32 // block), axis=-1).reshape(32 // block, -1, 2)
        for _ in range(50):
            order = _detail.BlockPermutation.random(block, (32, 32, 3), rng)
            assert not (order.sources == home).all(axis=-1).any()


def test_seams_have_a_grid_as_their_control(client):
    [picture] = noise(1)
    lined = _detail.draw_grid(picture, 8)
    assert np.array_equal(lined[9:16, 9:16], picture[9:16, 9:16])
    assert np.allclose(lined[8], picture.mean((0, 1)))
    assert np.allclose(lined[:, 24], picture.mean((0, 1)))
    pictures = noise(10)
    scores = probes.shuffle(client, pictures, model="flat", blocks=[1, 8, 32], layers="none").scores
    before = [each.top[0].index for each in client.predict(pictures, model="flat")]
    gridded = client.predict([_detail.draw_grid(each, 8) for each in pictures], model="flat")
    agreed = np.mean([one == other.top[0].index for one, other in zip(before, gridded, strict=True)])
    assert scores["grid_agreement"].tolist() == pytest.approx([np.nan, agreed, 1], nan_ok=True)
    assert scores["grid_shuffled_agreement"][2] == 1  # One block: neither seams nor another order.


def test_a_picture_of_one_block_stays_as_it_was(client):
    result = probes.shuffle(client, noise(), model="strided", blocks=[32])
    assert result.scores["agreement"].tolist() == [1]
    assert max(curve.max() for curve in result.measures["whole"].values()) < ROUNDING


def test_what_is_left_over_beside_whole_blocks_stays_where_it_was():
    [picture] = noise(1)
    orders = [_detail.BlockPermutation.random(block, picture.shape, np.random.default_rng(0)) for block in (12, 40)]
    cut, uncut = (order.apply(picture) for order in orders)
    assert np.array_equal(cut[24:], picture[24:])
    assert np.array_equal(cut[:, 24:], picture[:, 24:])
    blocks = {picture[y : y + 12, x : x + 12].tobytes() for y in (0, 12) for x in (0, 12)}
    assert {cut[y : y + 12, x : x + 12].tobytes() for y in (0, 12) for x in (0, 12)} == blocks
    assert not np.array_equal(cut, picture)
    assert np.array_equal(uncut, picture)


def test_an_unpadded_map_is_followed_too_where_it_has_cells(client):
    result = probes.shuffle(client, noise(), model="strided", blocks=[4, 8, 16])
    assert result.measures["interior"]["first"].max() < ROUNDING
    assert np.nanmax(result.measures["interior"]["second"]) < ROUNDING
    assert probes.shuffle(client, noise(), model="flat", blocks=[1]).measures["whole"]["fc1"][0] > 0.01


def test_a_probe_is_few_requests_none_larger_than_the_model_takes(client, networks):
    probes.shift(client, noise(3), model="cifar", pairs=0)
    assert [len(request.pictures) for *_, request in networks.requests] == [0, 51]  # The card, then 3 · (1 + 8 · 2).
    networks.requests.clear()
    few = probes.blur(client, noise(3), model="narrow")
    assert [len(request.pictures) for *_, request in networks.requests] == [0, 5, 5, 5, 5, 4]
    assert np.array_equal(
        few.measures["energy"]["picture"], probes.blur(client, noise(3), model="cifar").measures["energy"]["picture"]
    )


def test_a_network_without_classes_has_no_scores(client):
    result = probes.shift(client, noise(1, channels=1), model="edges", shifts=[1])
    assert (result.scores, result.totals) == ({}, {})
    assert "scores" not in result.format_table()


def test_json_says_all_and_null_where_nothing_is_defined(client):
    result = probes.shift(client, noise(), model="flat", shifts=[1, 2])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["measures"]["interior"]["fc1"] == [None, None]
    assert values["measures"]["whole"]["fc1"] == result.measures["whole"]["fc1"].tolist()
    assert values["intervals"]["whole"]["fc1"] == result.intervals["whole"]["fc1"].tolist()
    assert values["baselines"]["scores"]["agreement"] == result.baselines["scores"]["agreement"].tolist()
    assert values["baseline_names"] == dict.fromkeys(("interior", "whole"), "another picture") | dict.fromkeys(
        ("scores", "totals"), "chance"
    )
    assert (values["probe"], values["model"], values["picture_count"], values["steps"]) == ("shift", "flat", 2, [1, 2])


def test_json_has_no_word_for_infinity():
    curve = np.array([1.0, np.inf, np.nan])  # What is result against a map of zeros is infinitely far off.
    result = probes.ProbeResult(
        "blur", "m", "1", 1, "px", np.arange(3.0), {}, {"energy": {"conv1": curve}}, {"far": np.inf}
    )
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["measures"]["energy"]["conv1"] == [1, None, None]
    assert values["totals"] == {"far": None}


def test_a_result_shows_its_tables_in_a_notebook():
    curve = np.array([1.0, 2.0, 3.0])
    result = probes.ProbeResult("blur", "<m>", "1", 1, "px", np.arange(3.0), {}, {"energy": {"conv1": curve}})
    html = result._repr_html_()
    assert html.startswith("<pre>blur: &lt;m&gt; 1, 1 picture\n\nenergy\npx  conv1\n")
    assert html.endswith("</pre>")


@pytest.mark.parametrize("kind", probes.__all__[1:])
def test_every_probe_has_a_table_with_a_row_a_step_and_a_figure(client, kind):
    result = getattr(probes, kind)(client, noise(1), model="cifar")
    header, *rows = result.format_table().split("\n\n")[-2 if result.totals else -1].splitlines()[1:]
    assert header.split()[-1] == "conv2"
    assert len(rows) == len(result.steps)
    figure = result.figure()
    assert len(figure.axes) == len(result.measures) + bool(result.scores)
    assert all(axes.lines for axes in figure.axes)
    joined = {line.get_linestyle() for axes in figure.axes for line in axes.lines if line.get_marker() in "osD^vP*X"}
    assert joined == ({"-"} if kind in ("rotate", "scale", "blur") else {"None"})  # Nothing is between two whole steps.


def test_what_cannot_be_used_is_said_before_anything_is_measured(client, tmp_path):
    with pytest.raises(UnknownLayer, match="cifar has no layer 'nose'; layers: conv1, conv2"):
        probes.blur(client, noise(), model="cifar", layers="nose")
    with pytest.raises(ValueError, match="no picture found"):
        probes.blur(client, tmp_path, model="cifar")
    with pytest.raises(ValueError, match="input is 32×32 with 3 channels; this array is 8×8 with 3"):
        probes.blur(client, np.zeros((8, 8, 3), np.uint8), model="cifar")
    with pytest.raises(ValueError, match="cannot be shifted by 32"):
        probes.shift(client, noise(), model="cifar", shifts=[32])
    with pytest.raises(ValueError, match="not \\(32, 32, 3\\) float64"):
        probes.blur(client, np.zeros((32, 32, 3)), model="cifar")
    for call in (
        lambda: probes.shift(client, noise(), model="cifar", shifts=[0]),
        lambda: probes.scale(client, noise(), model="cifar", factors=[0]),
        lambda: probes.rotate(client, noise(), model="cifar", angles=[]),
        lambda: probes.border(client, noise(), model="cifar", rings=0),
        lambda: probes.blur(client, noise(), model="cifar", sigmas=[-1]),
        lambda: probes.shuffle(client, noise(), model="cifar", blocks=[0]),
        lambda: probes.pool(client, noise(), model="cifar", windows=[0]),
        lambda: probes.pool(client, noise(), model="cifar", layers="none"),
        lambda: probes.border(client, noise(), model="cifar", background=2),
    ):
        with pytest.raises(ValueError):
            call()


def test_turning_is_numpys_quarter_turn_and_keeps_whole_pixels():
    [image] = noise(1)
    pixels = _images.Grid((0, 0), (1, 1), (32, 32))
    for quarter in range(4):
        points = _images.transform_points(pixels.points(), (15.5, 15.5), -90 * quarter, 1)
        assert np.array_equal(_images.interpolate(image, points), np.rot90(image, quarter))


def test_moving_and_blurring_continue_a_picture_as_numpys_reflection():
    [image] = noise(1)
    padded = np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect")
    assert np.array_equal(_images.shift_picture(image, 3, -4), padded[2:34, 9:41])
    assert np.array_equal(_images.blur_picture(image, 0), image)
    assert _images.blur_picture(np.ones((8, 8, 1), np.float32), 3) == pytest.approx(np.ones((8, 8, 1)), abs=1e-6)


def test_folders_are_read_in_order_and_some_may_be_chosen_by_seed(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.PNG", "deep/c.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    result = _images.list_pictures(tmp_path, limit=None, seed=0)
    assert result == [str(tmp_path / name) for name in ("a.PNG", "b.png", "deep/c.jpg")]
    assert len({tuple(_images.list_pictures(tmp_path, limit=2, seed=seed)) for seed in range(20)}) > 1
    assert _images.list_pictures(tmp_path, limit=2, seed=5) == _images.list_pictures(tmp_path, limit=2, seed=5)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_file_is_read_as_the_service_reads_it(client, mode, tmp_path):
    pixels = (255 * noise(1, channels=4)[0]).astype(np.uint8)
    Image.fromarray(pixels).resize((50, 40)).convert(mode).save(tmp_path / "seen.png")
    session = ProbeSession(
        client, [tmp_path / "seen.png"], model="cifar", version=None, layers="conv1", limit=None, seed=0
    )
    [(_, [by_array])] = session.predict_copies(lambda picture: [picture])
    by_file = client.predict(tmp_path / "seen.png", model="cifar", layers="conv1")
    assert np.array_equal(by_array.maps["conv1"], by_file.maps["conv1"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, image in enumerate(noise(2)):
        Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_the_command_prints_a_table_and_saves_figure_and_numbers(capsys, networks, folder, tmp_path_factory):
    arguments = ["probe", "shift", str(folder), "--model", "cifar", "--steps", "1,2", "--layers", "conv2"]
    saved = tmp_path_factory.mktemp("out") / "new" / "probes"
    assert main([*arguments, "--save", str(saved), "--url", networks.grpc_url]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("shift: cifar 1.0, 2 pictures\n")
    assert "shift consistency: " in printed
    assert {path.name for path in saved.iterdir()} == {"shift-cifar.png", "shift-cifar.json"}
    with Image.open(saved / "shift-cifar.png") as figure:
        assert figure.size[0] > 400
    assert main([*arguments, "--json", "--url", networks.rest_url]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads((saved / "shift-cifar.json").read_text())
    assert list(values["measures"]["interior"]) == ["conv2"]


def test_the_command_compares_two_models(capsys, networks, folder):
    arguments = ["probe", "blur", str(folder), "--model", "cifar", "--against", "flat", "--layers", "none"]
    assert main([*arguments, "--steps", "1", "--url", networks.grpc_url]) == 0
    printed = capsys.readouterr().out
    positions = [
        printed.index(f"blur: {model}, 2 pictures") for model in ("cifar 1.0", "flat 1.0", "cifar 1.0 − flat 1.0")
    ]
    assert positions == sorted(positions)
    assert main([*arguments, "--steps", "1", "--json", "--url", networks.grpc_url]) == 0
    values = json.loads(capsys.readouterr().out)
    agreement = [each["scores"]["agreement"][0] for each in (values, values["against"], values["difference"])]
    assert agreement[0] - agreement[1] == pytest.approx(agreement[2])


def test_the_border_takes_a_margin_and_a_background(capsys, networks, folder):
    arguments = ["probe", "border", str(folder), "--model", "cifar", "--margin", "4", "--background", "0"]
    assert main([*arguments, "--url", networks.rest_url]) == 0
    assert "on a background of 0, in the centre and in the corner" in capsys.readouterr().out


def test_a_probe_reads_standard_input_and_checks_that_it_can_save(capsys, networks, folder, monkeypatch):
    command = ["probe", "blur", "--model", "cifar", "--steps", "0,1", "--json", "--url", networks.rest_url]
    [name] = [path for path in folder.iterdir() if path.name.startswith("0")]
    printed = []
    for source in (str(name), "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(name.read_bytes())))
        assert main([*command[:2], source, *command[2:]]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    sent = len(networks.requests)
    assert main([*command[:2], str(name), *command[2:], "--save", f"{name}/out"]) == 1
    assert "cannot write to" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert len(networks.requests) == sent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["blur", "--model", "cifar", "--layers", "nose"], "'nose'"),
    ],
)
def test_a_command_that_cannot_be_run_says_why_and_ends_with_one(capsys, networks, folder, arguments, words):
    kind, *options = arguments
    assert main(["probe", kind, str(folder), *options, "--url", networks.rest_url]) == 1
    assert words in capsys.readouterr().err
    assert main(["probe", kind, str(folder / "gone.png"), "--model", "cifar", "--url", networks.rest_url]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "bad_image"),
        (b"PK\x05\x06" + bytes(18), "bad_image"),  # An empty ZIP file, which numpy.load reads as .npz.
        (b"\x93NUMPY\x01\x00\x04\x00(((\n", "damaged"),
    ],
)
def test_a_npy_file_that_is_none_is_an_error_in_a_line(capsys, networks, tmp_path, content, words):
    (tmp_path / "picture.npy").write_bytes(content)
    arguments = [str(tmp_path / "picture.npy"), "--model", "cifar", "--url", networks.rest_url]
    assert main(["probe", "blur", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shift", "cat.png", "--steps", "0.5"], "--steps of shift must be whole pixels"),
        (["border", "cat.png", "--steps", "1"], "--steps does nothing with border"),
        (["blur", "cat.png", "--margin", "4"], "--margin does nothing with blur"),
        (["pool", "cat.png", "--steps", "0.5"], "--steps of pool must be whole cells"),
        (["border", "cat.png", "--background", "2"], "expected a number from 0 to 1, not '2'"),
        (["blur", "cat.png", "--limit", "0"], "argument --limit: must be a whole number of at least 1, not '0'"),
        (["blur", "-", "-"], "- can be given once"),
        (["wobble", "cat.png"], "invalid choice: 'wobble'"),
        (["shift", "cat.png", "--steps", "inf"], "expected numbers such as 1,2,4, not 'inf'"),
        (["blur", "cat.png", "--steps", "1,nan"], "expected numbers such as"),
        (["blur", "cat.png", "--steps", ","], "expected numbers such as"),
        (["blur", "cat.png", "--layers", ","], "expected a comma-separated list such as A,B"),
    ],
)
def test_a_probe_that_is_not_understood_ends_with_two(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["probe", *arguments, "--model", "cifar"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_layer_that_goes_while_probing_is_an_error_not_a_number(client, monkeypatch):
    real = client.model_card("cifar")
    strange = type(real)(
        **{**vars(real), "layers": (type(real.layers[0])(**{**vars(real.layers[0]), "name": "gone"}),)}
    )
    monkeypatch.setattr(client, "model_card", lambda *_, **__: strange)
    with pytest.raises(UnknownLayer):
        probes.blur(client, noise(), model="cifar")
