"""Filters: their peaks in frequency, their pictures, and `convscope filters`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from convscope._cli import main
from convscope_lens.filters import draw_filters, draw_spectra, frequencies, peaks, spectra
from PIL import Image

from handlers.networks import Edges
from tests.client.served import address, cifar, networks

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


def test_spectra_are_the_fourier_sum_by_hand():
    weights = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    result, steps = spectra(weights), frequencies(32)
    assert result.shape == (2, 3, 32, 32)
    y, x = np.mgrid[:3, :3]
    for row, column in [(0, 0), (16, 16), (20, 3)]:
        by_hand = np.abs((weights[1, 2] * np.exp(-2j * np.pi * (steps[row] * y + steps[column] * x))).sum())
        assert result[1, 2, row, column] == pytest.approx(by_hand)
    assert (steps[0], steps[16]) == (-0.5, 0)


def test_filters_are_drawn_in_colour_for_three_channels_and_apart_for_others():
    weights = np.zeros((2, 3, 3, 3), np.float32)
    weights[1, 0] = 2  # Red.
    figure = draw_filters(weights, title="x")
    grey, red = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.array_equal(grey, np.full((3, 3, 3), 0.5))
    assert np.array_equal(red[0, 0], [1, 0.5, 0.5])
    blue_first = draw_filters(weights, title="x", bgr=True).axes[1].images[0].get_array()
    assert np.array_equal(blue_first[0, 0], [0.5, 0.5, 1])
    assert [axes.get_title() for axes in draw_filters(weights[:, :2], title="x").axes] == [
        "0, 0",
        "0, 1",
        "1, 0",
        "1, 1",
    ]
    spectrum = draw_spectra(weights, title="x").axes[1].images[0]
    assert spectrum.get_extent() == [-0.515625, 0.484375, 0.484375, -0.515625]


@pytest.mark.parametrize("address", ["rest"], indirect=True)  # Pictures take seconds to draw.
def test_the_command_shows_peaks_and_saves_pictures(capsys, address, tmp_path):
    assert main(["filters", "cifar", "--save", str(tmp_path / "new"), "--url", address]) == 0
    lines = capsys.readouterr().out.splitlines()
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
