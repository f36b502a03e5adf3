"""Geometry: each published layer's shape, receptive field, stride, and the operation that makes its map.

The network is traced and run once on an empty picture; `receptive_fields` defines what each operation does to the
rectangle of input pixels that a cell depends on.
Axes: `N` batch, `C` channels, `H, W` picture pixels, `h, w` map cells.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from archiver.operations import Operation, of_function, watched
from archiver.receptive_fields import CONSTANT, MAP_AXES, Extent, Field, follow
from handlers.network.engines.torch_engine import trace
from handlers.network.layouts import CHANNELS_FIRST, CHANNELS_LAST, map_shape, parse
from handlers.network.modules import watchable, watching
from handlers.network.outputs import OUTPUT, node_of, select

NUMBERS = (int, float, torch.Size, torch.dtype, torch.device)  # Properties of tensors in a graph, not tensors.


@dataclass(frozen=True)
class LayerGeometry:
    """Where the cells of one layer's map are in the picture.

    Attributes:
        shape: Shape of the map, (C, h, w), axes in that order; of other outputs, the shape without the batch.
        stride: Input pixels from one cell to the next, (y, x); None where not defined (as are the two below).
        receptive_field: Input pixels that one cell depends on, (height, width): the rectangle that bounds them.
        receptive_field_start: The first input pixel of cell (0, 0), (y, x); negative: padding.
        operation: The convolution or linear layer that makes the map: the last one, or, where branches meet, the last
            one of the branch with the most of them; None if there is none.
        axes: Positions of the rows and columns in the network's own tensor (N, ...); None if not known.
        layout: Layout of the network's own tensor.
        operations: All operations between the layers that feed this one, or the picture, and this layer: in a residual
            block those of its branches and of its shortcut. At least `operation`; that alone for a network that
            cannot be traced.
    """

    shape: tuple[int, ...]
    stride: tuple[int, int] | None
    receptive_field: tuple[int, int] | None
    receptive_field_start: tuple[int, int] | None
    operation: Operation | None
    axes: tuple[int, int] | None = None
    layout: str = CHANNELS_FIRST
    operations: tuple[Operation, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of the operations; weights that are used several times count once."""
        return sum({id(one.weight): one.parameters for one in self.operations}.values())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the operations, for one picture."""
        return sum(one.multiply_adds for one in self.operations)


def layer_geometry(
    model: nn.Module,
    layers: Mapping[str, str],
    picture_shape: tuple[int, int, int],
    layouts: Mapping[str, str] | None = None,
) -> dict[str, LayerGeometry]:
    """Return the geometry of each published map.

    The model is run in evaluation mode; afterwards its modes are as before.

    Args:
        model: The network. If it cannot be traced, only shapes and operations are known.
        layers: Public name to node name of `torchvision.models.feature_extraction`, or to module path for a network
            that cannot be traced, or `output:` and the name of a tensor that the network returns.
        picture_shape: (C, H, W) of the picture to run it on.
        layouts: Public name → layout, for layers that are not (N, C, h, w) in the network.

    Returns:
        Geometry by public name, in the order of the forward pass.

    Raises:
        ValueError: A layer is bound to a node that does not exist, or whose output is not one tensor.
    """
    images = blank(model, picture_shape)
    with _evaluating(model), torch.no_grad():
        try:
            graph, names = trace(model)
        except Exception:  # Tracing runs the network's own Python, which may raise anything.
            found = _run_with_hooks(model, layers, images)
        else:
            layers = {name: resolve(node, graph, names) for name, node in layers.items()}
            _check(layers, names.values())
            published = {node for node, path in names.items() if path in layers.values()}
            with watched(model) as operations:
                walk = _Walk(graph, operations, published)
                walk.run(images)
            found = {names[node]: walk.step(node) for node in walk.steps if node in names}
    _check(layers, found)
    order = list(found)
    by_position = sorted(layers.items(), key=lambda item: order.index(item[1]))
    return {name: _describe(found[node], (layouts or {}).get(name, CHANNELS_FIRST)) for name, node in by_position}


def resolve(node: str, graph: fx.GraphModule, names: Mapping[str, str]) -> str:
    """Return the node behind `output:` and the name of a returned tensor; any other node unchanged.

    Raises:
        ValueError: The network returns no such tensor.
    """
    try:
        return node_of(graph, names, node.removeprefix(OUTPUT)) if node.startswith(OUTPUT) else node
    except KeyError as err:
        raise ValueError(f"the network returns nothing by the name of {err}") from err


def blank(model: nn.Module, picture_shape: tuple[int, int, int]) -> Tensor:
    """Return an empty picture (1, C, H, W) of the model's dtype, on its device."""
    weight = next(model.parameters(), torch.empty(0))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return torch.zeros(1, *picture_shape, device=weight.device, dtype=dtype)


@dataclass(frozen=True)
class _Step:
    """One operation's result: its shape, its field, and the operation with weights behind it.

    `depth` counts nodes with such operations, one after the other. A constant, such as a weight, has the number of
    learned cells. `operations` are those since the preceding published layers.
    """

    shape: tuple[int, ...]
    field: Extent
    operation: Operation | None
    depth: int = 0
    learned: int = 0
    operations: tuple[Operation, ...] = ()


def _describe(step: _Step, layout: str) -> LayerGeometry:
    field = step.field if isinstance(step.field, Field) else None
    axes = field.axes if field else None
    kind = parse(layout).kind
    rows_and_columns = {CHANNELS_FIRST: MAP_AXES, CHANNELS_LAST: (1, 2)}.get(kind)  # For maps only.
    if axes != rows_and_columns:
        field = None
    return LayerGeometry(
        shape=step.shape if kind == CHANNELS_FIRST else map_shape(step.shape, layout),
        stride=field.stride if field else None,
        receptive_field=field.size if field else None,
        receptive_field_start=field.start if field else None,
        operation=step.operation,
        axes=axes,
        layout=layout,
        operations=step.operations or tuple(filter(None, [step.operation])),
    )


class _Walk(fx.Interpreter):
    """Runs a traced network and keeps a step for every node, by name."""

    def __init__(self, module: fx.GraphModule, operations: list[Operation], published: Container[str]) -> None:
        super().__init__(module)
        self._operations = operations  # Operations of modules, as they run; those of functions are added.
        self._published = published
        self._since: dict[str, frozenset[int]] = {}  # By node, the operations since the preceding published layers.
        self.steps: dict[str, _Step] = {}

    def step(self, node: str) -> _Step:
        """Return a node's step with all of its operations."""
        operations = tuple(self._operations[index] for index in sorted(self._since[node]))
        return replace(self.steps[node], operations=operations)

    def run_node(self, node: fx.Node) -> Any:
        before = len(self._operations)
        result = super().run_node(node)
        if isinstance(result, Tensor) and node.op != "output":
            shape, field = tuple(result.shape[1:]), self._field(node, result)
            inputs = self._inputs(node)
            called = self._function(node, result)
            self._operations += [called] if called else []
            ran = self._operations[before:]  # Several, where tracing does not look into the module.
            depth = max((step.depth for step in inputs), default=0) + bool(ran)
            # A gate (one number a channel, broadcast over a map) does not make the map, however deep it is.
            alike = [step for step in inputs if step.shape == shape]
            deepest = max(alike or inputs, key=lambda step: step.depth, default=None)
            operation = deepest.operation if deepest else None
            fitting = [one for one in ran if one.output_shape == shape]
            if ran and (fitting or not alike):
                operation = (fitting or ran)[-1]
            self.steps[node.name] = _Step(shape, field, operation, depth, self._learned(node))
        if not isinstance(result, NUMBERS):
            passed = [source.name for source in node.all_input_nodes if source.name not in self._published]
            own = frozenset(range(before, len(self._operations)))
            self._since[node.name] = own.union(*(self._since.get(name, ()) for name in passed))
        return result

    def _inputs(self, node: fx.Node) -> list[_Step]:
        return [self.steps[source.name] for source in node.all_input_nodes if source.name in self.steps]

    def _field(self, node: fx.Node, result: Tensor) -> Extent:
        if node.op == "placeholder":
            return Field()
        if node.op == "get_attr":
            return CONSTANT
        if any(source.name not in self.steps and not self._is_number(source) for source in node.all_input_nodes):
            return None
        inputs = self._inputs(node)
        operation = self.fetch_attr(str(node.target)) if node.op == "call_module" else node.target
        field = follow(operation, *self.fetch_args_kwargs_from_env(node), [step.field for step in inputs])
        # After folding, broadcasting or gathering, cells are no longer where the rules expect them.
        moved = isinstance(field, Field) and (result.ndim != 4 or not self._aligned(node, inputs))
        return None if moved else field

    def _is_number(self, source: fx.Node) -> bool:
        return isinstance(self.env[source], NUMBERS)

    @staticmethod
    def _aligned(node: fx.Node, inputs: list[_Step]) -> bool:
        """Return whether all inputs that hold pixels are maps of one size."""
        return len({step.shape[1:] for step in inputs if step.field is not CONSTANT}) == 1

    def _function(self, node: fx.Node, result: Tensor) -> Operation | None:
        if node.op != "call_function":
            return None
        weights = sum(step.learned for step in self._inputs(node))
        return of_function(node.target, *self.fetch_args_kwargs_from_env(node), result, weights)

    def _learned(self, node: fx.Node) -> int:
        if node.op == "get_attr":
            value = self.fetch_attr(str(node.target))
            return value.numel() if isinstance(value, nn.Parameter) else 0
        inputs = self._inputs(node)
        return sum(step.learned for step in inputs) if all(step.field is CONSTANT for step in inputs) else 0


def _run_with_hooks(model: nn.Module, layers: Mapping[str, str], images: Tensor) -> dict[str, _Step]:
    """Run a network that cannot be traced, with a hook on every module."""
    modules = watchable(model)
    _check({name: node for name, node in layers.items() if not node.startswith(OUTPUT)}, modules)
    found: dict[str, _Step] = {}

    with watched(model) as operations:

        def keep(name: str, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = _Step(tuple(output.shape[1:]), None, operations[-1] if operations else None)

        with watching(modules, keep):
            returned = model(images)
    for node in layers.values():
        if node.startswith(OUTPUT):
            found[node] = _Step(tuple(select(returned, node.removeprefix(OUTPUT)).shape[1:]), None, None)
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and restore its mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check(layers: Mapping[str, str], nodes: Any) -> None:
    present = list(nodes)
    for name, node in layers.items():
        if node not in present:
            raise ValueError(f"layer {name!r} is bound to {node!r}; the network has {', '.join(present)}")
