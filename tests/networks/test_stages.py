"""Every stage of every network has the shape its document gives, and the documents' facts about sizes hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from handlers.networks import NETWORKS, Cifar, Deep, Digits, Edges, Flat, Simple, architecture
from tests.thorough import tries

STAGES = {
    "digits": {"conv1": (16, 26, 26), "pool1": (16, 13, 13), "flatten": (2704,), "fc": (10,)},
    "simple": {
        "conv1": (6, 32, 32),
        "relu1": (6, 32, 32),
        "pool1": (6, 16, 16),
        "conv2": (12, 16, 16),
        "relu2": (12, 16, 16),
        "pool2": (12, 8, 8),
        "flatten": (12 * 8 * 8,),
        "fc1": (120,),
        "relu3": (120,),
        "fc2": (10,),
    },
    "cifar": {
        "conv1": (16, 32, 32),
        "relu1": (16, 32, 32),
        "pool1": (16, 16, 16),
        "conv2": (32, 16, 16),
        "flatten": (8192,),
        "fc": (10,),
    },
    "flat": {
        "flatten": (3072,),
        "fc1": (28,),
        "relu1": (28,),
        "cell1": (28, 1, 1),
        "fc2": (28,),
        "relu2": (28,),
        "cell2": (28, 1, 1),
        "fc3": (10,),
    },
    "deep": {
        "block1": (32, 32, 32),
        "block2": (64, 32, 32),
        "pool2": (64, 16, 16),
        "block3": (64, 16, 16),
        "block4": (192, 16, 16),
        "pool4": (192, 8, 8),
        "block5": (192, 8, 8),
        "block6": (256, 8, 8),
        "pool6": (256, 4, 4),
        "block7": (256, 4, 4),
        "mean": (256, 1, 1),
        "flatten": (256,),
        "fc": (10,),
    },
}
PICTURE = [
    [0, 0, 0, 0, 0],
    [0, 1, 1, 1, 0],
    [0, 1, 0, 1, 0],
    [0, 1, 1, 1, 0],
    [0, 0, 0, 0, 0],
]
EDGES = [
    [1, 2, 3, 2, 1],
    [1, 1, 2, 1, 1],
    [0, 0, 0, 0, 0],
    [-1, -1, -2, -1, -1],
    [-1, -2, -3, -2, -1],
]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_the_documents_shape_in_the_documents_order(name):
    model = NETWORKS[name]()
    seen = {}
    for part, module in model.named_children():
        module.register_forward_hook(lambda _module, _inputs, output, part=part: seen.update({part: output.shape[1:]}))
    model(torch.zeros(2, *model.pictures))
    assert [(part, tuple(shape)) for part, shape in seen.items()] == list(STAGES[name].items())


def test_edges_gives_exactly_the_documents_map():
    image = torch.tensor(PICTURE, dtype=torch.float32)[None, None]
    assert Edges()(image)[0, 0].tolist() == EDGES


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (28, 31)])
def test_edges_takes_any_size_and_keeps_it(size):
    assert Edges()(torch.rand(3, 1, *size)).shape == (3, 1, *size)


def test_edges_has_nothing_to_train():
    assert not any(parameter.requires_grad for parameter in Edges().parameters())


@pytest.mark.parametrize("network", [Digits, Simple, Cifar, Flat, Deep])
def test_the_number_of_classes_can_be_chosen(network):
    assert network(classes=3)(torch.zeros(1, *network.pictures)).shape == (1, 3)


@pytest.mark.parametrize(("network", "channels"), [(Digits, 3), (Simple, 1), (Cifar, 1), (Deep, 1), (Edges, 3)])
def test_wrong_channels_are_an_error_that_says_so(network, channels):
    height, width = network.pictures[1:] if network.pictures[1] else (5, 5)
    with pytest.raises(RuntimeError, match=rf"to have {network.pictures[0]} channels, but got {channels} channels"):
        network()(torch.zeros(1, channels, height, width))


def test_the_published_maps_are_the_documents():
    assert {name: dict(network.layers) for name, network in NETWORKS.items()} == {
        "edges": {"conv1": "conv1"},
        "digits": {"conv1": "conv1"},
        "simple": {"conv1": "relu1", "conv2": "relu2"},
        "cifar": {"conv1": "relu1", "conv2": "conv2"},
        "flat": {"fc1": "cell1", "fc2": "cell2"},
        "deep": {f"block{number}": f"block{number}.relu" for number in range(1, 8)},
    }


def test_flat_has_about_as_many_parameters_as_its_twin():
    flat, cifar = (sum(value.numel() for value in network().parameters()) for network in (Flat, Cifar))
    assert (flat, cifar) == (87_146, 87_018)


def test_flat_learns_pictures_of_shuffled_pixels_exactly_as_it_learns_pictures():
    torch.manual_seed(0)
    order, images, labels = torch.randperm(32 * 32), torch.randn(24, 3, 32, 32), torch.arange(24) % 10
    plain, shuffled = Flat(), Flat()
    shuffled.load_state_dict(plain.state_dict())
    with torch.no_grad():  # The same first weights, each at its own pixel: as likely a start as any other.
        shuffled.fc1.weight.copy_(plain.fc1.weight.view(28, 3, -1)[:, :, order].flatten(1))
    moved = images.flatten(2)[:, :, order].view_as(images)
    for network, pictures in ((plain, images), (shuffled, moved)):
        adam = torch.optim.Adam(network.parameters(), lr=0.002)
        for _ in range(20):
            adam.zero_grad()
            nn.functional.cross_entropy(network(pictures), labels).backward()
            adam.step()
    torch.testing.assert_close(shuffled(moved), plain(images), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain(moved), plain(images), rtol=0.1, atol=0.1)


def test_deeps_published_maps_are_its_blocks_outputs_and_never_negative():
    torch.manual_seed(0)
    model, images = Deep().eval(), torch.randn(2, 3, 32, 32)
    outputs = {}
    for name in model.layers:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, out, name=name: outputs.update({name: out})
        )
    maps = create_feature_extractor(model, {node: name for name, node in model.layers.items()})(images)
    model(images)
    assert list(maps) == list(outputs) == [f"block{number}" for number in range(1, 8)]
    for name, value in maps.items():
        assert torch.equal(value, outputs[name])
        assert value.min() >= 0 < value.max()


def test_deeps_scores_are_a_sum_over_the_last_maps_cells_so_class_activation_maps_are_exact():
    torch.manual_seed(0)
    model, images = Deep().eval(), torch.randn(2, 3, 32, 32)
    last = create_feature_extractor(model, {model.layers["block7"]: "map"})(images)["map"]
    activation = torch.einsum("kc,nchw->nkhw", model.fc.weight, last)
    torch.testing.assert_close(activation.mean((2, 3)) + model.fc.bias, model(images))


def test_an_architecture_names_where_the_network_is_imported_from():
    assert architecture(Cifar) == "handlers.networks.cifar:Cifar"


@pytest.mark.parametrize(
    ("conv", "size", "expected"),
    [
        pytest.param(nn.Conv2d(1, 1, 3), 28, 26, id="3x3 without padding on 28"),
        pytest.param(nn.Conv2d(1, 1, 3), 5, 3, id="3x3 without padding on 5"),
        pytest.param(nn.Conv2d(3, 6, 5), 32, 28, id="Conv2d(3, 6, 5) on 32"),
        pytest.param(nn.Conv2d(1, 1, 5, padding=2), 28, 28, id="5x5 keeps 28 with padding 2"),
        pytest.param(nn.Conv2d(3, 16, 3, stride=2, padding=3), 28, 16, id="stride 2, padding 3 on 28"),
    ],
)
def test_the_documents_sizes(conv, size, expected):
    maps = conv(torch.zeros(1, conv.in_channels, size, size))
    assert maps.shape == (1, conv.out_channels, expected, expected)


@settings(deadline=None, max_examples=tries(25, 60))
@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
)
def test_the_documents_formula_gives_torchs_output_size(size, kernel, stride, padding, dilation):
    expected = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    conv = nn.Conv2d(1, 1, kernel, stride=stride, padding=padding, dilation=dilation)
    image = torch.zeros(1, 1, size, size)
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        with pytest.raises(RuntimeError, match="can't be greater than actual input size"):
            conv(image)
    else:
        assert conv(image).shape[-2:] == (expected, expected)
