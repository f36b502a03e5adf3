"""A layer's stated geometry is the truth: the pixels with a gradient are exactly the pixels stated."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from archiver.geometry import layer_geometry
from archiver.operations import Operation
from handlers.networks import NETWORKS


class Residual(nn.Module):
    """Two branches of different kernels, added; a shortcut; functional pools."""

    def __init__(self):
        super().__init__()
        self.small = nn.Conv2d(3, 4, 3, padding=1)
        self.large = nn.Conv2d(3, 4, 5, padding=2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        maps = functional.relu(self.norm(self.small(images) + self.large(images)) * 0.5)
        maps = functional.avg_pool2d(maps, 2)
        maps = self.last(maps)
        pooled = functional.adaptive_avg_pool2d(maps, 1)
        return self.head(pooled.flatten(1))


class Branching(nn.Module):
    """Cannot be traced: what it does depends on a pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(2, 3)

    def forward(self, images):
        maps = self.relu(self.conv(images))
        if images.sum() > 1e9:
            maps = -maps
        return self.fc(maps.mean((2, 3)))


STACKS = {
    "plain": nn.Sequential(nn.Conv2d(1, 1, 3)),
    "padded": nn.Sequential(nn.Conv2d(1, 1, 5, padding=2), nn.Conv2d(1, 1, 3, padding=1)),
    "uneven": nn.Sequential(nn.Conv2d(1, 1, (3, 5), stride=(1, 2), padding=(1, 0)), nn.Conv2d(1, 1, (1, 3))),
    "same": nn.Sequential(nn.Conv2d(1, 1, 4, padding="same"), nn.Conv2d(1, 1, 3, padding="valid")),
    "pooled": nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, padding=1)),
    "overlapping pool": nn.Sequential(nn.Conv2d(1, 1, 3, stride=2), nn.AvgPool2d(3, stride=2, padding=1)),
    "dilated": nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 2, dilation=3, stride=2)),
    "normalised": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Conv2d(2, 1, 2, stride=2)),
}


def reached(model, node, shape, cell, dtype=torch.float64):
    """Return which pixels (H, W) have a part in a cell: those with a gradient."""
    return reached_by(model, {node: cell}, shape, dtype)[node]


def reached_by(model, cells, shape, dtype=torch.float64):
    """Return the same of a cell of each of several nodes, from one pass."""
    images = torch.rand(1, *shape, dtype=dtype, requires_grad=True)
    maps = create_feature_extractor(model.to(dtype).eval(), {node: node for node in cells})(images)
    found = {}
    for node, (row, column) in cells.items():
        [gradient] = torch.autograd.grad(maps[node][0, :, row, column].abs().sum(), images, retain_graph=True)
        found[node] = gradient[0].abs().sum(0) > 0
    return found


def middle(geometry):
    """Return a cell in the middle of a map."""
    return geometry.shape[1] // 2, geometry.shape[2] // 2


def stated(geometry, cell, size):
    """Return the same pixels (H, W) as the geometry states them."""
    pixels = torch.zeros(size, dtype=torch.bool)
    corners = zip(geometry.receptive_field_start, cell, geometry.stride, geometry.receptive_field, strict=True)
    rows, columns = (slice(max(0, first + i * step), first + i * step + length) for first, i, step, length in corners)
    pixels[rows, columns] = True
    return pixels


def box(pixels):
    """Return the rectangle that bounds some pixels, as pixels."""
    rows, columns = (torch.nonzero(pixels.any(axis)).flatten() for axis in (1, 0))
    filled = torch.zeros_like(pixels)
    filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled


def plain(geometry):
    """Return what a geometry says of its map, and the parameters of its operations."""
    field = (geometry.stride, geometry.receptive_field, geometry.receptive_field_start)
    return geometry.shape, *field, geometry.parameters


def positive(model):
    """Make every weight positive, so that no gradient can vanish or cancel."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.1, 1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def averaging(model):
    """Put averages where the model takes maxima, whose gradient reaches one of their inputs only."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MaxPool2d):
            owner, _, attribute = name.rpartition(".")
            pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
            setattr(model.get_submodule(owner), attribute, pool)
    return model


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("step", [0, 1], ids=["centre", "beside"])
def test_the_pixels_with_a_gradient_are_exactly_those_stated(name, step):
    model = positive(STACKS[name])
    node = str(len(model) - 1)
    geometry = layer_geometry(model.float(), {"last": node}, (1, 31, 33))["last"]
    cell = (geometry.shape[1] // 2 + step, geometry.shape[2] // 2 + step)
    found = reached(model, node, (1, 31, 33), cell)
    if name == "dilated":
        assert not torch.equal(found, box(found)), "dilation leaves holes; what is stated bounds them"
        found = box(found)
    assert torch.equal(found, stated(geometry, cell, (31, 33)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "flat"])
def test_the_served_networks_state_exactly_the_pixels_with_a_gradient(name):
    network = NETWORKS[name]
    shape = tuple(size or 9 for size in network.pictures)
    if name == "deep":
        shape = (3, 104, 104)  # Its late cells answer to more than 32×32: let them lie inside the picture.
    model = network() if name == "edges" else positive(network())
    geometries = layer_geometry(model, network.layers, shape)
    cells = {network.layers[public]: middle(geometry) for public, geometry in geometries.items()}
    all_found = reached_by(averaging(model), cells, shape)
    for public, geometry in geometries.items():
        node = network.layers[public]
        found = box(all_found[node]) if name == "edges" else all_found[node]  # The middle row of its kernel is zero.
        assert torch.equal(found, stated(geometry, cells[node], shape[1:])), public
        assert found.sum() == geometry.receptive_field[0] * geometry.receptive_field[1], "some of it lies outside"


# The last stage answers to 435 pixels: five times the work for two more blocks of the same kind.
RESNET18 = {"conv1": "relu", "pool": "maxpool"} | {
    f"block{2 * stage + block - 1}": f"layer{stage}.{block}.relu_1" for stage in (1, 2, 3) for block in (0, 1)
}


def shrunk(model):
    """Make every weight positive, and each operation an average at most, so that no number overflows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.uniform_(module.weight, 0.5, 1)
            module.weight.data /= module.weight[0].numel()
    return model


def test_resnet18_states_exactly_the_pixels_with_a_gradient():
    model = shrunk(torchvision.models.resnet18(weights=None))
    geometries = layer_geometry(model, RESNET18, (3, 232, 232))
    assert geometries.keys() == RESNET18.keys()
    cells = {RESNET18[name]: middle(geometry) for name, geometry in geometries.items()}
    all_found = reached_by(averaging(model), cells, (3, 232, 232), torch.float32)
    for name, geometry in geometries.items():
        found = all_found[RESNET18[name]]
        assert torch.equal(found, stated(geometry, cells[RESNET18[name]], (232, 232))), name
        assert found.sum() == geometry.receptive_field[0] ** 2, "some of it lies outside"


def test_convnext_states_exactly_the_pixels_with_a_gradient():
    """Its blocks turn their maps' axes, normalise each cell's channels and mix them with linear layers."""
    model = shrunk(torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=0.0))
    layers = {"conv1": "features.0", "block1": "features.1.0.add", "block4": "features.3.0.add"}
    geometries = layer_geometry(model, layers, (3, 200, 200))
    cells = {layers[name]: middle(geometry) for name, geometry in geometries.items()}
    all_found = reached_by(model, cells, (3, 200, 200))
    for name, geometry in geometries.items():
        assert torch.equal(all_found[layers[name]], stated(geometry, cells[layers[name]], (200, 200))), name


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        ("edges", (1, 5, 5), {"conv1": ((1, 5, 5), (1, 1), (3, 3), (-1, -1), 10)}),
        ("digits", (1, 28, 28), {"conv1": ((16, 26, 26), (1, 1), (3, 3), (0, 0), 160)}),
        (
            "simple",
            (3, 32, 32),
            {
                "conv1": ((6, 32, 32), (1, 1), (3, 3), (-1, -1), 168),
                "conv2": ((12, 16, 16), (2, 2), (8, 8), (-3, -3), 660),
            },
        ),
        (
            "cifar",
            (3, 32, 32),
            {
                "conv1": ((16, 32, 32), (1, 1), (3, 3), (-1, -1), 448),
                "conv2": ((32, 16, 16), (2, 2), (8, 8), (-3, -3), 4640),
            },
        ),
        (
            "flat",
            (3, 32, 32),
            {
                "fc1": ((28, 1, 1), None, None, None, 86_044),
                "fc2": ((28, 1, 1), None, None, None, 812),
            },
        ),
        (
            "deep",
            (3, 32, 32),
            {
                "block1": ((32, 32, 32), (1, 1), (3, 3), (-1, -1), 864),
                "block2": ((64, 32, 32), (1, 1), (5, 5), (-2, -2), 18_432),
                "block3": ((64, 16, 16), (2, 2), (14, 14), (-6, -6), 2 * 36_864),
                "block4": ((192, 16, 16), (2, 2), (18, 18), (-8, -8), 110_592),
                "block5": ((192, 8, 8), (4, 4), (36, 36), (-16, -16), 2 * 331_776),
                "block6": ((256, 8, 8), (4, 4), (44, 44), (-20, -20), 442_368),
                "block7": ((256, 4, 4), (8, 8), (80, 80), (-36, -36), 2 * 589_824),
            },
        ),
    ],
)
def test_the_served_networks_geometry_by_hand(network, shape, expected):
    found = layer_geometry(NETWORKS[network](), NETWORKS[network].layers, shape)
    assert {name: plain(geometry) for name, geometry in found.items()} == expected


def test_added_branches_answer_to_the_larger_and_global_stages_to_no_patch():
    model = positive(Residual())
    layers = {"last": "last", "sum": "add", "scores": "head", "pooled": "adaptive_avg_pool2d", "half": "avg_pool2d"}
    found = layer_geometry(model, layers, (3, 20, 20))
    assert list(found) == ["sum", "half", "last", "pooled", "scores"]
    assert plain(found["sum"]) == ((4, 20, 20), (1, 1), (5, 5), (-2, -2), 3 * 4 * (9 + 25) + 8)
    assert found["half"].receptive_field == (6, 6)
    assert plain(found["last"]) == ((4, 4, 4), (4, 4), (10, 10), (-2, -2), 4 * 4 * 9)
    assert plain(found["pooled"]) == ((4, 1, 1), None, None, None, 4 * 4 * 9)
    assert plain(found["scores"]) == ((2,), None, None, None, 4 * 2 + 2)
    last = reached(model, "last", (3, 20, 20), (2, 2))
    assert torch.equal(last, stated(found["last"], (2, 2), (20, 20)))


def test_a_residual_network_of_torchvision_has_the_fields_its_papers_give():
    model = torchvision.models.resnet18(weights=None)
    layers = {"stem": "relu", "pool": "maxpool", "layer2": "layer2.1.relu_1", "layer4": "layer4.1.relu_1"}
    found = layer_geometry(model, layers, (3, 64, 64))
    assert {name: (geometry.receptive_field, geometry.stride) for name, geometry in found.items()} == {
        "stem": ((7, 7), (2, 2)),
        "pool": ((11, 11), (4, 4)),
        "layer2": ((99, 99), (8, 8)),
        "layer4": ((435, 435), (32, 32)),
    }


def test_blocks_that_torchvision_does_not_take_apart_are_followed_inside():
    model = torchvision.models.mobilenet_v2(weights=None)
    found = layer_geometry(model, {"first": "features.0", "last": "features.18"}, (3, 64, 64))
    assert plain(found["first"]) == ((32, 32, 32), (2, 2), (3, 3), (-1, -1), 3 * 32 * 9)
    assert found["last"].receptive_field == (491, 491)


def test_channel_attention_answers_to_all_pixels_and_makes_no_map():
    model = torchvision.models.mobilenet_v3_small(weights=None)
    layers = {"before": "features.1.block.0", "gated": "features.1.block.1", "after": "features.1.block.2"}
    found = layer_geometry(model, layers, (3, 64, 64))
    assert found["before"].receptive_field == (7, 7)
    assert found["gated"].receptive_field is None
    assert found["gated"].operation == found["before"].operation
    assert found["gated"].operation.output_shape == found["gated"].shape == (16, 16, 16)
    assert found["after"].receptive_field is None
    assert found["after"].shape == (16, 16, 16)


class Gated(nn.Module):
    """Channel attention that is traced, behind a pool."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)

    def forward(self, images):
        maps = functional.max_pool2d(self.conv(images), 2)
        gate = self.excite(self.squeeze(maps.mean((2, 3), keepdim=True)).relu())
        return maps * gate.sigmoid()


def test_a_gate_makes_no_map():
    found = layer_geometry(Gated(), {"conv": "conv", "gate": "sigmoid", "gated": "mul"}, (3, 12, 12))
    assert found["gate"].operation.output_shape == (4, 1, 1)
    assert found["gated"].shape == (4, 5, 5)
    assert found["gated"].operation == found["conv"].operation


def test_a_network_that_cannot_be_traced_gets_shapes_and_parameters_but_no_patch():
    model = Branching()
    found = layer_geometry(model, {"scores": "fc", "map": "relu"}, (1, 8, 9))
    assert {name: plain(geometry) for name, geometry in found.items()} == {
        "map": ((2, 6, 7), None, None, None, 20),
        "scores": ((3,), None, None, None, 9),
    }
    assert found["map"].operation == Operation("Conv2d", (1, 8, 9), (2, 6, 7), 20, (3, 3), (1, 1), (0, 0), (1, 1), 1)
    assert list(found) == ["map", "scores"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model", [Residual(), Branching()], ids=["traced", "not traced"])
def test_the_modes_of_every_module_come_back_also_after_a_failure(model):
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="channels"):
        layer_geometry(model, {}, (2, 8, 8))
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model", [Residual(), Branching()], ids=["traced", "not traced"])
def test_an_unknown_node_is_refused_with_the_names_there_are(model):
    with pytest.raises(ValueError, match=r"'conv9' is bound to 'nowhere'; the network has .*relu"):
        layer_geometry(model, {"conv9": "nowhere"}, (3, 20, 20))
