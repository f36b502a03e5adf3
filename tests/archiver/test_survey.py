"""One watched forward pass: which maps there are, and which of them stay what they were."""

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

from archiver.packing import ArchiveError
from archiver.survey import MAX_BATCH, batch_size, check_layers, check_scores, listing, survey
from tests.thorough import variants

PICTURE = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Two convolutions and what a subclass does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 2)

    def between(self, images: Tensor) -> Tensor:
        return self.act(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.between(self.first(images))).mean((2, 3)))


class FunctionalInPlace(Small):
    def between(self, images: Tensor) -> Tensor:
        return functional.relu(images, inplace=True)


class InPlaceThroughAView(Small):
    def between(self, images: Tensor) -> Tensor:
        images.flatten(1).mul_(1.0)  # The same values afterwards: only the counter of writes tells.
        return images


class BehindTheCounter(Small):
    def between(self, images: Tensor) -> Tensor:
        images.data.mul_(2.0)
        return images


class Weighted(Small):
    """With weights in the shape of a map, as ConvNeXt's scales and the positions of a transformer are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.position = nn.Parameter(torch.ones(4, 16, 16))

    def between(self, images: Tensor) -> Tensor:
        return images * self.scale + self.position.unsqueeze(0)


class Residual(Small):
    def between(self, images: Tensor) -> Tensor:
        out = self.act(images)
        out += images
        return out


class Untraceable(Small):
    def between(self, images: Tensor) -> Tensor:
        if images.mean() > 100:  # A branch on a value: no graph has one.
            return images
        return self.act(images)


class UntraceableInPlace(Untraceable):
    def between(self, images: Tensor) -> Tensor:
        out = super().between(images)
        out += 1
        return out


def look(network: nn.Module, picture: Tensor = PICTURE):
    return survey(network.eval(), picture)


def test_every_node_that_makes_a_map_is_found_with_its_shape() -> None:
    found = look(Small())
    assert found.shapes == {"first": (4, 16, 16), "act": (4, 16, 16), "second": (5, 14, 14)}
    assert found.traced
    assert "fc" in found.nodes


def test_an_in_place_module_is_made_to_write_elsewhere_so_the_map_before_it_can_be_published() -> None:
    found = look(Small())
    assert found.overwritten == {}
    assert check_layers(found, {"before": "first"}) == {"before": (4, 16, 16)}


def test_a_map_that_a_functional_in_place_activation_overwrites_is_refused_and_the_node_to_publish_named() -> None:
    found = look(FunctionalInPlace())
    with pytest.raises(ArchiveError, match=r"'first' is overwritten in place .* by 'relu'; publish that node instead"):
        check_layers(found, {"conv1": "first"})
    assert check_layers(found, {"conv1": "relu"}) == {"conv1": (4, 16, 16)}


def test_an_in_place_operation_through_a_view_is_noticed_even_where_no_value_changes() -> None:
    assert look(InPlaceThroughAView()).overwritten == {"first": "mul_"}


def test_a_write_behind_the_counter_of_a_network_run_by_hooks_is_noticed_by_comparing() -> None:
    class Both(BehindTheCounter, Untraceable):
        def between(self, images: Tensor) -> Tensor:
            return Untraceable.between(self, BehindTheCounter.between(self, images))

    found = look(Both())
    assert not found.traced
    assert "first" in found.overwritten


def test_tracing_makes_a_residual_addition_write_to_new_memory() -> None:
    found = look(Residual())
    assert found.overwritten == {}
    assert check_layers(found, {"a": "act", "b": "add"}) == {"a": (4, 16, 16), "b": (4, 16, 16)}


def test_a_network_that_cannot_be_traced_publishes_its_modules() -> None:
    found = look(Untraceable())
    assert not found.traced
    assert found.nodes == ["first", "act", "second", "fc"]
    assert found.shapes == {"first": (4, 16, 16), "act": (4, 16, 16), "second": (5, 14, 14)}
    assert check_layers(found, {"x": "act"}) == {"x": (4, 16, 16)}


def test_a_network_that_cannot_be_traced_stays_in_evaluation_mode() -> None:
    network = nn.Sequential(Untraceable(), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not look(network).traced
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("several", [False, True])
def test_a_graph_that_computes_something_else_is_refused(several: bool) -> None:
    class Two(Small):
        def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            scores = super().forward(images)
            other = scores + isinstance(images, fx.Proxy)
            return (scores, other) if several else other

    with pytest.raises(ArchiveError, match="the traced graph does not compute what the network computes; is there a"):
        look(Two())


def test_a_constant_among_what_is_returned_comes_from_no_node() -> None:
    class Two(Small):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones(1, 2), super().forward(images)

    assert list(look(Two()).returned) == ["output:0", "output:1"]


def test_an_addition_in_place_in_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ArchiveError, match="'act' is overwritten in place"):
        check_layers(look(UntraceableInPlace()), {"x": "act"})


def test_hooks_are_gone_after_the_survey() -> None:
    network = Untraceable()
    look(network)
    assert not any(module._forward_hooks for module in network.modules())


def test_an_unknown_node_is_refused_with_the_nodes_there_are() -> None:
    with pytest.raises(ArchiveError, match=r"no node 'conv9'(.|\n)*second  5×14×14"):
        check_layers(look(Small()), {"conv1": "conv9"})


def test_a_node_that_makes_no_map_is_refused() -> None:
    with pytest.raises(ArchiveError, match=r"'fc' makes no map \(1, C, h, w\) of the picture"):
        check_layers(look(Small()), {"scores": "fc"})


def test_a_node_that_makes_tokens_is_refused_with_what_makes_a_map_of_them() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images).flatten(2).transpose(1, 2)

    found = survey(Patches().eval(), torch.rand(1, 3, 8, 12))
    with pytest.raises(ArchiveError, match=r"of the picture but \(1, 6, 8\); if these are tokens .*--tokens HxW\+N"):
        check_layers(found, {"tokens": "transpose"})


def test_weights_in_the_shape_of_a_map_are_none() -> None:
    found = survey(Weighted().eval(), PICTURE)
    assert list(found.shapes) == ["first", "mul", "add", "second"]
    with pytest.raises(ArchiveError, match="'scale' makes no map"):
        check_layers(found, {"scale": "scale"})


def test_without_layers_the_candidates_are_listed() -> None:
    found = look(FunctionalInPlace())
    with pytest.raises(ArchiveError, match="say which layers to publish") as refused:
        check_layers(found, {})
    assert listing(found) in str(refused.value)
    assert "  relu  4×16×16" in listing(found)
    assert "  first" not in listing(found), "a map that is overwritten is no candidate"


def test_a_network_that_fails_on_the_picture_says_what_it_was_given() -> None:
    with pytest.raises(ArchiveError, match=r"shape \(1, 16, 16\)(.|\n)*--channels"):
        look(Small(), torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("name", variants(["resnet18", "mobilenet_v3_small"], ["alexnet", "densenet121"]))
def test_torchvisions_networks_can_be_surveyed(name: str) -> None:
    network = torchvision.models.get_model(name, weights=None, num_classes=4)
    found = look(network, torch.rand(1, 3, 64, 64))
    check_scores(found, 4)
    assert found.traced
    assert len(found.shapes) > 4


def test_the_number_of_scores_must_be_the_number_of_classes() -> None:
    found = look(Small())
    check_scores(found, 2)
    check_scores(found, 0)
    with pytest.raises(ArchiveError, match=r"shape \(1, 2\); 3 classes need \(1, 3\)"):
        check_scores(found, 3)


def test_scores_that_are_not_finite_are_refused() -> None:
    network = Small()
    nn.init.constant_(network.fc.weight, float("nan"))
    with pytest.raises(ArchiveError, match="not finite"):
        check_scores(look(network), 2)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        pytest.param({"conv1": (16, 26, 26)}, MAX_BATCH, id="digits"),
        pytest.param({"conv1": (6, 32, 32), "conv2": (12, 16, 16)}, MAX_BATCH, id="simple"),
        pytest.param({"conv1": (16, 32, 32), "conv2": (32, 16, 16)}, 7, id="cifar"),
        pytest.param({"conv1": (64, 112, 112)}, 1, id="one large map"),
    ],
)
def test_a_batch_of_replies_stays_under_a_megabyte(shapes: dict[str, tuple[int, int, int]], expected: int) -> None:
    assert batch_size(shapes, any_size=False) == expected


def test_a_network_of_any_size_is_never_batched_since_its_replies_have_no_bound() -> None:
    assert batch_size({"conv1": (1, 32, 32)}, any_size=True) == 1
