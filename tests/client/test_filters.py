"""Filters through the client: the same on both transports and both clients, in frequency, and on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from convscope import AsyncClient, BadRequest, Client, ProtocolError, UnknownLayer
from convscope._cli import main
from convscope._reply import read_filters
from convscope._wire import convscope_pb2 as wire
from convscope_lens._filters_figure import draw_kernels, draw_spectra
from convscope_lens.filters import frequencies, peaks, spectra
from PIL import Image

from handlers.images import Preprocessing
from handlers.networks import Cifar, Edges, Flat
from tests.client.served import serving
from tests.client.stand_in import StandIn, encode_tensor
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service


@pytest.fixture(scope="module")
def cifar() -> Cifar:
    torch.manual_seed(0)
    return Cifar()


@pytest.fixture(scope="module")
def networks(cifar: Cifar) -> Iterator[StandIn]:
    services = {
        "cifar": make_service(cifar, CIFAR_INPUT, CIFAR_CLASSES),
        "flat": make_service(Flat(), CIFAR_INPUT, CIFAR_CLASSES),
        "edges": make_service(Edges(), Preprocessing(1, None, None), ()),
    }
    with serving(services) as stand_in:
        yield stand_in


@pytest.fixture(params=["rest", "grpc"])
def address(request: pytest.FixtureRequest, networks: StandIn) -> str:
    return networks.rest_url if request.param == "rest" else networks.grpc_url


def test_both_clients_fetch_the_very_weights(address, cifar):
    async def fetch():
        async with AsyncClient(address) as client:
            return await client.filters("cifar", "conv2")

    with Client(address) as client:
        found = client.filters("cifar", "conv2")
    assert np.array_equal(found, cifar.conv2.weight.detach().numpy())
    assert not found.flags.writeable
    assert np.array_equal(found, asyncio.run(fetch()))


def test_what_has_no_filters_is_an_error_with_the_requests_id(address):
    with Client(address) as client:
        with pytest.raises(BadRequest, match="fc1 is not made by a two-dimensional convolution") as caught:
            client.filters("flat", "fc1", request_id="order-7")
        assert caught.value.request_id == "order-7"
        with pytest.raises(UnknownLayer):
            client.filters("cifar", "nose")
        with pytest.raises(TypeError, match="one layer"):
            client.filters("cifar", ["conv1"])
        with pytest.raises(ValueError, match="empty"):
            client.filters("cifar", "")


@pytest.mark.parametrize(
    "reply", [wire.PredictReply(), wire.PredictReply(filters=encode_tensor(np.ones((2, 3), np.float32), 0))]
)
def test_a_reply_without_kernels_breaks_the_contract(reply):
    with pytest.raises(ProtocolError, match="filters"):
        read_filters(reply)


def test_an_edge_detector_lets_no_even_area_through_and_peaks_across_its_edge():
    [peak] = peaks(Edges().conv1.weight.numpy())
    assert peak.mean_gain == pytest.approx(0, abs=1e-6)
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
    assert peak.gain == peak.mean_gain == pytest.approx(1)


def test_spectra_are_the_fourier_sum_by_hand():
    kernels = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    found, steps = spectra(kernels), frequencies(32)
    assert found.shape == (2, 3, 32, 32)
    y, x = np.mgrid[:3, :3]
    for row, column in [(0, 0), (16, 16), (20, 3)]:
        by_hand = np.abs((kernels[1, 2] * np.exp(-2j * np.pi * (steps[row] * y + steps[column] * x))).sum())
        assert found[1, 2, row, column] == pytest.approx(by_hand)
    assert (steps[0], steps[16]) == (-0.5, 0)


def test_kernels_are_drawn_in_colour_for_three_channels_and_apart_for_others():
    kernels = np.zeros((2, 3, 3, 3), np.float32)
    kernels[1, 0] = 2  # Red.
    figure = draw_kernels(kernels, title="x")
    grey, red = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.array_equal(grey, np.full((3, 3, 3), 0.5))
    assert np.array_equal(red[0, 0], [1, 0.5, 0.5])
    assert [axes.get_title() for axes in draw_kernels(kernels[:, :2], title="x").axes] == [
        "0, 0",
        "0, 1",
        "1, 0",
        "1, 1",
    ]
    spectrum = draw_spectra(kernels, title="x").axes[1].images[0]
    assert spectrum.get_extent() == [-0.515625, 0.484375, 0.484375, -0.515625]


def test_the_command_shows_peaks_and_saves_pictures(capsys, address, tmp_path):
    assert main(["filters", "cifar", "--save", str(tmp_path / "new"), "--url", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cifar, conv1: 16×3×3×3 kernels"
    assert lines[2].split("  ")[0] == "filter"
    assert len([line for line in lines if line.strip()[:1].isdigit()]) == 16
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "cifar-conv1-kernels.png",
        "cifar-conv1-spectra.png",
    }
    for path in (tmp_path / "new").iterdir():
        with Image.open(path) as figure:
            assert min(figure.size) > 200


def test_the_command_answers_in_json(capsys, address, cifar):
    assert main(["filters", "cifar", "--layer", "conv2", "--json", "--url", address]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["layer"], values["shape"], len(values["peaks"])) == ("conv2", [32, 16, 3, 3], 32)
    assert np.array_equal(np.float32(values["kernels"]), cifar.conv2.weight.detach().numpy())


def test_a_layer_without_filters_ends_the_command_with_one(capsys, address):
    assert main(["filters", "flat", "--url", address]) == 1
    assert "convscope: bad_request: the map of fc1" in capsys.readouterr().err
