"""Filters: the kernels behind a layer, in every format, and what has none."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from handlers.api.errors import BadRequest
from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.networks import Cifar, Deep, Digits, Flat
from handlers.outputs import filters
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import (
    CIFAR_CLASSES,
    CIFAR_INPUT,
    ask_json,
    ask_message,
    ask_rest,
    make_archive,
    make_service,
)


class Functional(nn.Module):
    """Convolves without a module, and pools what a second branch adds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3, 3, 5))
        self.other = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.last = nn.ConvTranspose2d(6, 2, 2)

    def forward(self, images):
        maps = functional.conv2d(images, self.weight, padding=(1, 2)).relu() + self.other(images)
        return self.last(self.grouped(functional.max_pool2d(maps, 2)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()

    def forward(self, images):
        maps = self.relu(self.conv(images))
        return -maps if images.sum() > 1e9 else maps


def kernels(network, node):
    """Return the filters of a node, found as a service finds them."""
    recipe = Preprocessing(1, 28, 28) if isinstance(network, Digits) else Preprocessing(3, 32, 32)
    return filters.kernels(make_archive(network, recipe, (), layers={"seen": node}), "seen")


@pytest.mark.parametrize(
    ("network", "layer", "convolution"),
    [
        (Cifar(), "conv1", "conv1"),
        (Cifar(), "conv2", "conv2"),
        (Digits(), "conv1", "conv1"),
    ],
)
def test_a_layers_filters_are_its_convolutions_weights(network, layer, convolution):
    found = kernels(network, network.layers[layer])
    assert found.dtype == np.float32
    assert np.array_equal(found, network.get_submodule(convolution).weight.detach().numpy())


def test_filters_of_functions_groups_and_pools_are_found_too():
    network = Functional()
    assert np.array_equal(kernels(network, "relu"), network.weight.detach().numpy())
    assert np.array_equal(kernels(network, "max_pool2d"), network.weight.detach().numpy())
    assert kernels(network, "grouped").shape == (6, 2, 3, 3)


@pytest.mark.parametrize(("network", "node"), [(Functional(), "last"), (Flat(), "cell1")])
def test_what_is_not_made_by_a_convolution_has_no_filters(network, node):
    with pytest.raises(BadRequest, match="the map of seen is not made by a two-dimensional convolution"):
        kernels(network, node)


@pytest.mark.parametrize("node", ["conv", "relu"])
def test_a_network_that_cannot_be_traced_has_those_of_the_last_convolution_that_ran(node):
    network = Branching()
    assert np.array_equal(kernels(network, node), network.conv.weight.detach().numpy())


def test_filters_are_those_of_the_operation_that_the_card_names_also_at_joins():
    network = Deep().eval()
    archive = make_archive(network, CIFAR_INPUT, ())
    for name, layer in archive.described.layers.items():
        found = filters.kernels(archive, name)  # Of the two that a block adds, the one with more operations behind it.
        assert np.array_equal(found, network.get_submodule(name).conv.weight.detach())
        channels = layer.facts["input_shape"][0] // layer.facts["groups"]
        assert found.shape == (layer.shape[0], channels, *layer.facts["kernel"])


class Computed(nn.Module):
    """Convolves with what is no entry of its state dict."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3, 3, 3))
        self.normal = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))

    def forward(self, images):
        return self.normal(functional.conv2d(images, self.weight.transpose(0, 1)))


def test_kernels_that_the_network_computes_are_those_that_it_convolves_with():
    network = Computed().eval()
    assert np.array_equal(kernels(network, "conv2d"), network.weight.detach().transpose(0, 1).numpy())
    assert np.array_equal(kernels(network, "normal"), network.normal.weight.detach().numpy())


def test_looking_for_filters_leaves_the_network_as_it_was():
    network = Deep().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kernels(network, network.layers["block7"])
    assert not any(module.training or module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_filters_travel_as_protobuf(service, network):
    reply = ask_message(service, wire.PredictRequest(filters="conv2", request_id="mine"))
    assert not reply.results
    assert not reply.HasField("error")
    assert (reply.model, reply.engine, reply.request_id) == ("cifar", "torch-test", "mine")
    assert (reply.filters.dtype, list(reply.filters.shape)) == (wire.FLOAT32, [32, 16, 3, 3])
    assert reply.filters.data == network.conv2.weight.detach().numpy().tobytes()


@pytest.mark.parametrize("accept", ["application/json", "image/png"])
def test_filters_travel_as_json_for_png_too(service, network, accept):
    row = {"body": {"filters": "conv1"}}
    values = ask_json(service, row, content_type="application/json", accept=accept)
    assert set(values) == {"model", "version", "engine", "device", "scores", "request_id", "filters"}
    assert values["filters"]["shape"] == [16, 3, 3, 3]
    cells = np.frombuffer(base64.b64decode(values["filters"]["data"]), "<f4").reshape(16, 3, 3, 3)
    assert np.array_equal(cells, network.conv1.weight.detach().numpy())


def test_filters_travel_as_npz_and_can_be_asked_for_in_a_form(service, network):
    row = {"filters": bytearray(b"conv1"), "accept": bytearray(b"application/x-npz")}
    answer = ask_rest(service, row, content_type="multipart/form-data; boundary=x")
    assert (answer.status, answer.media_type) == (200, "application/x-npz")
    with np.load(io.BytesIO(answer.body)) as arrays:
        assert np.array_equal(arrays["conv1"], network.conv1.weight.detach().numpy())
        assert json.loads(str(arrays["reply"]))["model"] == "cifar"


@pytest.mark.parametrize(
    ("asked", "code"),
    [("nose", "unknown_layer"), ("all", "bad_request"), (["conv1"], "bad_request"), (7, "bad_request")],
)
def test_filters_are_those_of_one_published_layer(service, asked, code):
    answer = ask_rest(service, {"body": {"filters": asked}}, content_type="application/json")
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["code"] == code


def test_a_fully_connected_layer_has_no_filters():
    service = make_service(Flat(), CIFAR_INPUT, CIFAR_CLASSES)
    assert ask_message(service, wire.PredictRequest(filters="fc1")).error.code == "bad_request"


def test_filters_that_torchserve_could_not_send_are_refused():
    small = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, limits=Limits(max_reply_bytes=1000))
    assert ask_message(small, wire.PredictRequest(filters="conv2")).error.code == "reply_too_large"
