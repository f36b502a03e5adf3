"""What is proposed for publishing: the ends of convolutions and blocks, under names a person would give."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from archiver.proposal import MANY, Proposal, propose, table
from archiver.survey import survey
from handlers.networks import NETWORKS
from tests.thorough import variants


def proposed(network: nn.Module, *picture: int) -> list[Proposal]:
    shape = picture or (3, 64, 64)
    network.eval()
    return propose(network, survey(network, torch.rand(1, *shape)), (shape[0], shape[1], shape[2]))


def nodes(proposals: Sequence[Proposal]) -> dict[str, str]:
    return {one.name: one.node for one in proposals}


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"flat"}))
def test_for_our_own_networks_it_is_what_they_publish(name: str) -> None:
    channels, height, width = NETWORKS[name].pictures
    found = proposed(NETWORKS[name](), channels, height or 32, width or 32)
    assert list(nodes(found).values()) == list(NETWORKS[name].layers.values())
    assert all(one.chosen for one in found)


def test_of_a_network_without_a_convolution_nothing_is_proposed() -> None:
    assert not proposed(NETWORKS["flat"](), *NETWORKS["flat"].pictures)


@pytest.mark.parametrize(
    ("name", "expected"),
    variants(
        [
            (
                "resnet18",
                {"conv1": "relu"}
                | {
                    f"block{2 * layer - 1 + half}": f"layer{layer}.{half}.relu_1"
                    for layer in range(1, 5)
                    for half in (0, 1)
                },
            ),
            (
                "mobilenet_v3_small",
                {"conv1": "features.0", "block1": "features.1.block.2", "block3": "features.3.add"}
                | {"block8": "features.8.add", "conv2": "features.12"},
            ),
            (
                "convnext_tiny",
                {"conv1": "features.0", "block3": "features.1.2.add", "block6": "features.3.2.add"}
                | {"block15": "features.5.8.add", "block18": "features.7.2.add"},
            ),
            (
                "squeezenet1_0",
                {"conv1": "features.1", "conv2": "classifier.2"}
                | {f"block{n}": f"features.{place}.cat" for n, place in enumerate((3, 4, 5, 7, 8, 9, 10, 12), 1)},
            ),
        ],
        [("vgg11", {f"conv{n}": f"features.{place}" for n, place in enumerate((1, 4, 7, 9, 12, 14, 17, 19), 1)})],
    ),
)
def test_of_torchvisions_networks_the_ends_of_blocks_are_chosen(name: str, expected: dict[str, str]) -> None:
    found = proposed(torchvision.models.get_model(name, weights=None))
    assert nodes([one for one in found if one.chosen]) == expected


@pytest.fixture(scope="module")
def of_resnet50() -> list[Proposal]:
    return proposed(torchvision.models.resnet50(weights=None))


def test_of_many_the_first_and_the_last_of_each_size_are_chosen(of_resnet50: list[Proposal]) -> None:
    found = of_resnet50
    assert len(found) == 17 > MANY
    sizes = [one.geometry.shape[1:] for one in found if one.chosen]
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    assert [one.name for one in found if one.chosen] == ["conv1", "block3", "block7", "block13", "block16"]


class Wrapped(nn.Module):
    """All of it inside one module of one's own, with functions instead of modules."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.two = nn.Conv2d(4, 4, 3, padding=1)
            self.mix = nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            maps = functional.max_pool2d(functional.relu(self.norm(self.one(images))), 2)
            maps = functional.relu(self.two(maps) + maps)
            return functional.dropout(self.mix(maps).sigmoid(), 0.5, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]  # Asking for a size is no way around a layer.
        return self.fc(self.encoder(images).mean((2, 3)).reshape(batch, 4))


def test_a_wrapper_is_opened_and_functions_are_followed() -> None:
    found = nodes(proposed(Wrapped()))
    assert found == {"conv1": "encoder.relu", "block1": "encoder.relu_1", "conv2": "encoder.dropout"}


def test_what_was_pooled_to_one_cell_is_not_proposed() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten())
    )
    assert nodes(proposed(network)) == {"conv1": "1"}


def test_a_map_that_is_overwritten_later_is_not_proposed() -> None:
    class Overwriting(Wrapped.Encoder):
        def forward(self, images: Tensor) -> Tensor:
            return functional.relu(self.one(images), inplace=True)

    assert nodes(proposed(Overwriting())) == {"conv1": "relu"}


def test_the_table_shows_shapes_strides_and_receptive_fields_and_marks_the_choice(of_resnet50: list[Proposal]) -> None:
    lines = [line.split() for line in table(of_resnet50).splitlines()]
    assert lines[0] == ["name", "node", "shape", "stride", "sees", "parameters"]
    assert lines[1] == ["*", "conv1", "relu", "64×32×32", "2×2", "7×7", "9,408"]
    assert lines[2] == ["block1", "layer1.0.relu_2", "256×16×16", "4×4", "19×19", "16,384"]
