"""What makes a map and what it costs: by the documents' examples, by torch's own counter, by torchvision's figures."""

import math
from collections.abc import Sequence

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from archiver.geometry import layer_geometry
from archiver.operations import Operation, count_multiply_adds, watched
from handlers.networks import NETWORKS


def geometry_of(*parts: nn.Module, shape: tuple[int, int, int]):
    """Return the geometry of the last of some layers."""
    return layer_geometry(nn.Sequential(*parts), {"last": str(len(parts) - 1)}, shape)["last"]


def output_size(size: int, kernel: int, step: int, padding: int, dilation: int) -> int:
    """Return the size of a convolution's map by the documents' formula."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // step + 1


@pytest.mark.parametrize(
    ("convolution", "shape", "expected"),
    [
        pytest.param(nn.Conv2d(1, 16, 3), (1, 28, 28), (16, 26, 26), id="28 becomes 26 without padding"),
        pytest.param(nn.Conv2d(1, 1, 3), (1, 5, 5), (1, 3, 3), id="5 becomes 3 without padding"),
        pytest.param(nn.Conv2d(3, 6, 5), (3, 32, 32), (6, 28, 28), id="32 becomes 28 under a kernel of 5"),
        pytest.param(nn.Conv2d(1, 6, 5, padding=2), (1, 28, 28), (6, 28, 28), id="a padding of 2 keeps 28"),
        pytest.param(nn.Conv2d(3, 16, 3, stride=2, padding=3), (3, 28, 28), (16, 16, 16), id="28 becomes 16"),
    ],
)
def test_the_documents_examples(convolution: nn.Conv2d, shape: tuple[int, int, int], expected: Sequence[int]) -> None:
    geometry = geometry_of(convolution, shape=shape)
    assert geometry.shape == expected
    assert geometry.operation is not None
    assert (geometry.operation.input_shape, geometry.operation.output_shape) == (shape, expected)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_what_is_stated_gives_the_size_of_the_map_by_the_documents_formula(
    kernel: int, step: int, padding: int, dilation: int
) -> None:
    convolution = nn.Conv2d(2, 4, kernel, stride=step, padding=padding, dilation=dilation)
    geometry = geometry_of(convolution, shape=(2, 17, 20))
    operation = geometry.operation
    assert operation is not None
    settings = zip(operation.kernel, operation.step, operation.padding, operation.dilation, strict=True)
    assert [output_size(size, *setting) for size, setting in zip((17, 20), settings, strict=True)] == [
        *geometry.shape[1:]
    ]
    assert geometry.stride == operation.step
    assert geometry.receptive_field == (dilation * (kernel - 1) + 1,) * 2


def test_every_setting_of_a_convolution_is_stated_y_before_x() -> None:
    odd = nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2)
    assert geometry_of(odd, nn.ReLU(), shape=(4, 12, 15)).operation == Operation(
        "Conv2d", (4, 12, 15), (6, 12, 6), 6 * 2 * 15 + 6, (3, 5), (1, 2), (2, 0), (2, 1), 2
    )


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("padding", "expected"), [("same", (1, 2)), ("valid", (0, 0))])
def test_a_padding_in_words_is_stated_in_cells(padding: str, expected: tuple[int, int]) -> None:
    geometry = geometry_of(nn.Conv2d(1, 1, (4, 3), dilation=(1, 2), padding=padding), shape=(1, 9, 9))
    assert geometry.operation is not None
    assert geometry.operation.padding == expected


def test_a_fully_connected_layer_between_the_same_shapes_has_what_it_really_has() -> None:
    geometry = geometry_of(nn.Conv2d(2, 3, 3), shape=(2, 6, 7))
    dense = nn.Linear(2 * 6 * 7, 3 * 4 * 5)
    assert geometry.operation is not None
    assert geometry.operation.dense_parameters == sum(weight.numel() for weight in dense.parameters())
    assert geometry.parameters == 2 * 3 * 9 + 3


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        pytest.param(nn.Conv2d(3, 6, 3, padding=1), (3, 9, 9), id="plain"),
        pytest.param(nn.Conv2d(4, 8, (2, 3), stride=2, groups=2), (4, 9, 8), id="in groups"),
        pytest.param(nn.Conv2d(4, 4, 3, dilation=2, groups=4), (4, 9, 8), id="by channel"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 6), id="transposed"),
        pytest.param(nn.Linear(8, 5), (4, 9, 8), id="linear along the last axis"),
    ],
)
def test_the_multiply_adds_of_one_operation_are_torchs(part: nn.Module, shape: tuple[int, int, int]) -> None:
    with watched(part) as found, FlopCounterMode(display=False) as counter, torch.no_grad():
        part(torch.zeros(1, *shape))
    assert [2 * operation.multiply_adds for operation in found] == [counter.get_total_flops()]
    assert found[0].kind == type(part).__name__
    assert not part._forward_hooks


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("edges", 28 * 28 * 9),
        ("digits", 16 * 26 * 26 * 9 + 2704 * 10),
        ("simple", 6 * 32 * 32 * 27 + 12 * 16 * 16 * 54 + 768 * 120 + 120 * 10),
        ("cifar", 16 * 32 * 32 * 27 + 32 * 16 * 16 * 144 + 8192 * 10),
    ],
)
def test_the_multiply_adds_of_the_documents_networks_by_hand(name: str, by_hand: int) -> None:
    channels, height, width = NETWORKS[name].pictures
    images = torch.zeros(1, channels, height or 28, width or 28)
    assert count_multiply_adds(NETWORKS[name]().eval(), images) == by_hand


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "alexnet", "squeezenet1_0"])
def test_the_multiply_adds_of_torchvisions_networks_are_those_it_publishes_and_the_sum_of_the_operations(
    name: str,
) -> None:
    with torch.device("meta"):  # Shapes alone.
        network = torchvision.models.get_model(name, weights=None).eval()
        images = torch.zeros(1, 3, 224, 224)
    total = count_multiply_adds(network, images)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]  # In billions, rounded.
    assert total == pytest.approx(published * 1e9, abs=0.0006e9)
    with watched(network) as operations:
        network(images)
    assert total == sum(operation.multiply_adds for operation in operations)


class Bare(nn.Module):
    """Functions on parameters of its own, and a kernel that is not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(4, 3, 3, 5))
        self.matrix = nn.Parameter(torch.rand(2, 4))
        self.register_buffer("blur", torch.full((4, 1, 2, 2), 0.25))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = functional.conv2d(images, self.kernel.abs(), stride=(1, 2), padding=1)
        maps = functional.conv2d(maps.relu(), self.blur, None, 2, groups=4)
        return functional.linear(maps.mean((2, 3)), self.matrix)


def test_functions_on_bare_parameters_are_operations_too() -> None:
    found = layer_geometry(Bare(), {"conv1": "relu", "blur": "conv2d_1", "scores": "linear"}, (3, 9, 9))
    assert found["conv1"].operation == Operation("Conv2d", (3, 9, 9), (4, 9, 4), 180, (3, 5), (1, 2), (1, 1), (1, 1), 1)
    assert found["blur"].operation == Operation("Conv2d", (4, 9, 4), (4, 4, 2), 0, (2, 2), (2, 2), (0, 0), (1, 1), 4)
    assert found["scores"].operation == Operation("Linear", (4,), (2,), 8)
    total = sum(geometry.operation.multiply_adds for geometry in found.values() if geometry.operation)
    assert count_multiply_adds(Bare(), torch.zeros(1, 3, 9, 9)) == total


class Blocks(nn.Module):
    """A block with a projection in its shortcut, one that uses a convolution twice, and one of half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.projection = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images).relu()
        maps = self.grouped(self.pointwise(self.depthwise(maps)).relu()) + self.projection(maps)
        maps = maps + self.twice(self.twice(maps).relu())
        kept, changed = (maps * self.grouped.weight.mean()).chunk(2, dim=1)
        maps = torch.cat([kept, self.last(changed)], dim=1)
        return self.head(maps.mean((2, 3)))


def test_a_block_counts_the_operations_of_all_its_branches_by_hand() -> None:
    layers = {"stem": "relu", "block": "add", "again": "add_1", "split": "cat", "scores": "head"}
    found = layer_geometry(Blocks(), layers, (3, 8, 8))
    assert {name: (geometry.parameters, geometry.multiply_adds) for name, geometry in found.items()} == {
        "stem": (3 * 8 * 9 + 8, 64 * 8 * 3 * 9),
        "block": (
            8 * 9 + (8 * 12 + 12) + (12 * 4 * 9 + 12) + 8 * 12,
            16 * (8 * 9 + 12 * 8 + 12 * 4 * 9 + 12 * 8),
        ),
        "again": (12 * 12 * 9 + 12, 2 * 16 * 12 * 12 * 9),
        "split": (6 * 6 * 9 + 6, 16 * 6 * 6 * 9),
        "scores": (12 * 5 + 5, 12 * 5),
    }
    assert found["block"].operation == Operation(
        "Conv2d", (12, 4, 4), (12, 4, 4), 444, (3, 3), (1, 1), (1, 1), (1, 1), 3
    )
    total = sum(geometry.multiply_adds for geometry in found.values())
    assert count_multiply_adds(Blocks(), torch.zeros(1, 3, 8, 8)) == total
    only = layer_geometry(Blocks(), {"split": "cat"}, (3, 8, 8))["split"]
    of_the_head = 12 * 5 + 5
    assert only.parameters == sum(parameter.numel() for parameter in Blocks().parameters()) - of_the_head
    assert only.multiply_adds == total - 12 * 5


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_stages_of_a_residual_network_count_what_hooks_on_its_convolutions_do(name: str) -> None:
    network = torchvision.models.get_model(name, weights=None).eval()
    images = torch.zeros(1, 3, 64, 64)
    ends = {"resnet18": "1.relu_1 1.relu_1 1.relu_1 1.relu_1", "resnet50": "2.relu_2 3.relu_2 5.relu_2 2.relu_2"}[name]
    layers = {f"layer{number}": f"layer{number}.{end}" for number, end in enumerate(ends.split(), 1)}
    work = dict.fromkeys(layers, 0)

    def count(stage: str, module: nn.Conv2d, output: torch.Tensor) -> None:
        work[stage] += output.numel() * module.weight[0].numel()

    for path, module in network.named_modules():
        stage = path.partition(".")[0]
        if stage in layers and isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _, output, stage=stage: count(stage, module, output))
    with torch.no_grad():
        network(images)
    by_hooks = dict(work)
    found = layer_geometry(network, {"stem": "relu", **layers}, (3, 64, 64))
    for stage, expected in by_hooks.items():
        convolutions = [part for part in getattr(network, stage).modules() if isinstance(part, nn.Conv2d)]
        assert found[stage].multiply_adds == expected
        assert found[stage].parameters == sum(part.weight.numel() for part in convolutions)
    assert found["stem"].parameters == 64 * 3 * 49


def test_a_map_without_an_operation_behind_it_has_none() -> None:
    geometry = geometry_of(nn.AvgPool2d(2), shape=(3, 8, 8))
    assert (geometry.operation, geometry.parameters) == (None, 0)


def test_hooks_are_gone_after_a_failure() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))

    def fail() -> None:
        with watched(network):
            network(torch.zeros(1, 1, 8, 8))

    with pytest.raises(RuntimeError, match="channels"):
        fail()
    assert not network[0]._forward_hooks


def test_cells_times_weights_is_what_a_convolution_costs() -> None:
    operation = geometry_of(nn.Conv2d(3, 16, 3, padding=1, bias=False), shape=(3, 32, 32)).operation
    assert operation is not None
    assert operation.multiply_adds == operation.parameters * math.prod(operation.output_shape[1:])
