"""What feeds what, against networks whose graph is known."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from archiver.feeding import find_sources
from handlers.networks import NETWORKS

PICTURE = torch.zeros(1, 3, 32, 32)


def test_a_chain_is_fed_layer_by_layer_and_the_scores_by_the_last():
    network = NETWORKS["cifar"]()
    assert find_sources(network, network.layers, PICTURE) == (
        {"conv1": {"": (1, 1)}, "conv2": {"conv1": (1, 1)}},
        {"conv2": (1, 1)},
    )


def test_a_residual_block_is_fed_past_its_convolutions_too():
    network = NETWORKS["deep"]()
    found, scores = find_sources(network, network.layers, PICTURE)
    assert found == {
        "block1": {"": (1, 1)},
        "block2": {"block1": (1, 1)},
        "block3": {"block2": (0, 2)},
        "block4": {"block3": (1, 1)},
        "block5": {"block4": (0, 2)},
        "block6": {"block5": (1, 1)},
        "block7": {"block6": (0, 2)},
    }
    assert scores == {"block7": (1, 1)}


class Branches(nn.Module):
    """Two branches that meet in a concatenation; a size is read off a map, which feeds nothing."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(6, 5, 1)

    def forward(self, images):
        left, right = self.left(images), self.right(images)
        joined = self.last(torch.cat([left, right], 1))
        return {"out": joined.reshape(left.size(0), -1), "aux": right.mean((1, 2, 3))}


def test_branches_meet_and_sizes_feed_nothing():
    layers = {"left": "left", "right": "right", "joined": "last"}
    expected = {"left": {"": (1, 1)}, "right": {"": (1, 1)}, "joined": {"left": (1, 1), "right": (1, 1)}}
    assert find_sources(Branches(), layers, PICTURE, "out") == (expected, {"joined": (0, 0)})
    assert find_sources(Branches(), layers, PICTURE, "aux")[1] == {"right": (0, 0)}


def test_layers_that_are_not_published_are_passed_by():
    model = torchvision.models.resnet18(weights=None).eval()
    found, scores = find_sources(model, {"layer1": "layer1.1.relu_1", "layer2": "layer2.1.relu_1"}, PICTURE)
    assert found == {
        "layer1": {"": (1, 5)},
        "layer2": {"layer1": (1, 4)},
    }  # Its first block's shortcut is a convolution.
    assert scores == {"layer2": (3, 9)}  # Two shortcuts and the classifier, or eight convolutions and that.


class Undecided(nn.Module):
    """Cannot be traced: its path depends on the picture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, images):
        return self.conv(images) if images.sum() >= 0 else images


@pytest.mark.parametrize("layers", [{"conv": "conv"}, {}])
def test_of_a_network_that_cannot_be_traced_nothing_is_known(layers):
    assert find_sources(Undecided(), layers, PICTURE) == ({}, {})
