"""Filters: their peaks in frequency, their pictures, and `convscope filters`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from convscope._cli import main
from convscope_lens.filters import draw_filters, draw_spectra, drawn_kernels, frequencies, peaks, spectra
from PIL import Image

from handlers.networks import Edges
from tests.client.served import address, cifar, networks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["address", "cifar", "networks"]


def test_an_edge_detector_lets_no_even_area_through_and_peaks_across_its_edge():
    [peak] = peaks(Edges().conv1.weight.numpy())
    assert peak.dc_gain == pytest.approx(0, abs=1e-6)
    assert peak.orientation == 90  # Level edges: the brightness changes upwards.
    assert peak.frequency == 0.25  # 2 sin(2πv) is largest at a quarter.
    assert peak.gain == pytest.approx(6, rel=1e-6)


@pytest.mark.parametrize(
    ("cycles", "degrees"), [((0, 0.25), 0), ((-0.25, 0.25), 45), ((0.25, 0.25), 135), ((0, 0.5), 0)]
)
def test_a_grating_peaks_at_its_own_frequency_and_orientation(cycles, degrees):
    y, x = np.mgrid[:16, :16]
    grating = np.cos(2 * np.pi * (cycles[0] * y + cycles[1] * x))[None, None].astype(np.float32)
    [peak] = peaks(grating)
    assert peak.frequency == pytest.approx(np.hypot(*cycles))
    assert peak.orientation == pytest.approx(degrees)


def test_a_blur_peaks_at_zero_and_has_no_orientation():
    [peak] = peaks(np.full((1, 1, 3, 3), 1 / 9, np.float32))
    assert (peak.frequency, peak.orientation) == (0, None)
    assert peak.gain == peak.dc_gain == pytest.approx(1)


def test_a_filter_is_judged_over_all_its_input_channels():
    weights = np.zeros((1, 3, 3, 3), np.float32)
    weights[0, 0, 0], weights[0, 0, 2] = -1, 1  # An edge in red, which lets no even area through,
    weights[0, 1], weights[0, 2] = 1, -1  # and a contrast of green with blue, which does.
    [peak] = peaks(weights)
    assert peak.frequency == 0
    assert peak.dc_gain == peak.gain == pytest.approx(np.hypot(9, 9))
    weights[0, 1:] = weights[0, 0]
    [peak] = peaks(weights)
    assert (peak.gain, peak.dc_gain) == (pytest.approx(6 * np.sqrt(3)), pytest.approx(0, abs=1e-6))


def test_spectra_are_the_fourier_sum_by_hand():
    weights = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    result, steps = spectra(weights), frequencies(32)
    assert result.shape == (2, 3, 32, 32)
    y, x = np.mgrid[:3, :3]
    for row, column in [(0, 0), (16, 16), (20, 3)]:
        by_hand = np.abs((weights[1, 2] * np.exp(-2j * np.pi * (steps[row] * y + steps[column] * x))).sum())
        assert result[1, 2, row, column] == pytest.approx(by_hand)
    assert (steps[0], steps[16]) == (-0.5, 0)


def tiles(figure: Figure) -> dict[str, NDArray[np.float64]]:
    """Return the picture of each tile by its name; a name stands above its tile's top left corner."""
    [axes] = figure.axes
    picture = np.asarray(axes.images[0].get_array()) / 255
    starts = {text.get_text(): (int(text.get_position()[1]) + 2, int(text.get_position()[0])) for text in axes.texts}
    return {name: picture[top : top + 48, left : left + 48] for name, (top, left) in starts.items()}


def test_filters_are_drawn_in_colour_for_three_channels_and_apart_for_others():
    weights = np.zeros((2, 3, 3, 3), np.float32)
    weights[1, 0] = 2  # Red.
    drawn = tiles(draw_filters(weights, title="x"))
    assert np.allclose(drawn["0"], 0.5, atol=1 / 255)
    assert np.allclose(drawn["1"], [1, 0.5, 0.5], atol=1 / 255)
    blue_first = tiles(draw_filters(weights, title="x", bgr=True))
    assert np.allclose(blue_first["1"], [0.5, 0.5, 1], atol=1 / 255)
    apart = tiles(draw_filters(weights[:, :2], title="x"))
    assert list(apart) == ["0, 0", "0, 1", "1, 0", "1, 1"]
    red, white = apart["1, 0"][0, 0], apart["0, 0"][0, 0]
    assert red[0] > red[2] + 0.2
    assert white.min() > 0.95
    assert list(tiles(draw_filters(weights[:, :1], title="x"))) == ["0", "1"]


def test_spectra_are_drawn_with_frequency_zero_in_the_middle():
    weights = np.full((1, 1, 3, 3), 1 / 9, np.float32)
    spectrum = tiles(draw_spectra(weights, title="x"))["0"][..., 0]
    row, column = np.argwhere(spectrum == 1).min(axis=0)
    assert (row, column) == (32, 32)  # Each of the 32×32 values is two pixels wide.
    assert spectrum[0, 0] < 0.2


def test_of_many_kernels_those_with_the_largest_norm_are_drawn_and_it_is_said():
    weights = np.full((256, 256, 3, 3), 1e-3, np.float32)
    weights[::17, ::17] = 1
    drawn = drawn_kernels(weights)
    expected = list(range(0, 256, 17))
    assert drawn.kernels == [(index, expected) for index in expected]
    assert drawn.text == (
        "the 16 filters with the largest norm of 256, and of each the 16 input channels with the largest norm of 256"
    )
    figure = draw_filters(weights, title="x")
    assert len(figure.axes[0].texts) == 256
    assert figure.get_suptitle() == f"x: {drawn.text}"
    assert drawn_kernels(weights[:300, :1]).text == "all filters"
    assert drawn_kernels(weights[:2, :64]).text == "all filters"
    one = drawn_kernels(weights[:1, :].repeat(2, axis=1))
    assert len(one.kernels[0][1]) == 256
    colour = drawn_kernels(weights.reshape(-1, 3, 3)[:3000].reshape(1000, 3, 3, 3))
    assert (len(colour.kernels), colour.text) == (256, "the 256 filters with the largest norm of 1000")


def test_peaks_do_not_depend_on_how_many_filters_are_computed_together():
    weights = np.random.default_rng(0).normal(size=(40, 300, 3, 3)).astype(np.float32)
    together = peaks(weights)
    assert together == [dataclasses.replace(peaks(weights[[index]])[0], filter=index) for index in range(40)]
    assert together[7].gain == pytest.approx(np.sqrt(np.square(spectra(weights[[7]])).sum(axis=1)).max())


@pytest.mark.parametrize("address", ["rest"], indirect=True)
def test_the_command_shows_peaks_and_saves_pictures(capsys, address, tmp_path):
    assert main(["filters", "cifar", "--save", str(tmp_path / "new"), "--url", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("-filters.png and -spectra.png: all filters")
    assert lines[0] == "cifar, conv1: 16×3×3×3 filters"
    assert lines[2].split("  ")[0] == "filter"
    assert len([line for line in lines if line.strip()[:1].isdigit()]) == 16
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "cifar-conv1-filters.png",
        "cifar-conv1-spectra.png",
    }
    for path in (tmp_path / "new").iterdir():
        with Image.open(path) as figure:
            assert min(figure.size) > 200


def test_the_command_prints_json(capsys, address, cifar):
    assert main(["filters", "cifar", "--layer", "conv2", "--json", "--url", address]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["layer"], values["shape"], len(values["peaks"])) == ("conv2", [32, 16, 3, 3], 32)
    assert np.array_equal(np.float32(values["filters"]), cifar.conv2.weight.detach().numpy())


def test_a_layer_without_filters_ends_the_command_with_one(capsys, address):
    assert main(["filters", "flat", "--url", address]) == 1
    assert "convscope: bad_request: the map of fc1" in capsys.readouterr().err
