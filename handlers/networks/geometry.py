"""Where the maps come from: each published layer's shape, receptive field, stride and parameters.

The network is traced and run once on an empty picture, and every operation says what it does to the rectangle of input
pixels that a cell answers to (`fields`). Axes: `N` batch, `C` channels, `H, W` picture pixels, `h, w` map cells.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from handlers.networks.fields import CONSTANT, Answer, Field, follow
from handlers.vision import NodePathTracer, ops

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding)
# What torchvision's feature extraction traces with unless told otherwise: the node names depend on it.
_LEAVES = [part for part in vars(ops).values() if inspect.isclass(part) and issubclass(part, nn.Module)]


@dataclass(frozen=True)
class LayerGeometry:
    """Where the cells of one layer's map lie in the picture.

    Attributes:
        shape: Of the map, (C, h, w); of a layer that has no map, its shape without the batch.
        stride: Input pixels from one cell to the next, (y, x); None where not defined (as are the two below).
        receptive_field: Input pixels that one cell answers to, (height, width): the rectangle that bounds them.
        receptive_field_start: The first input pixel of cell (0, 0), (y, x); negative: padding.
        parameters: Of the convolution, or other operation with weights, that makes the map.
    """

    shape: tuple[int, ...]
    stride: tuple[int, int] | None
    receptive_field: tuple[int, int] | None
    receptive_field_start: tuple[int, int] | None
    parameters: int


def layer_geometry(
    model: nn.Module, layers: Mapping[str, str], picture_shape: tuple[int, int, int]
) -> dict[str, LayerGeometry]:
    """Say where each published map's cells lie in the picture.

    The model is run in evaluation mode and comes back in the modes it had.

    Args:
        model: The network. One that cannot be traced gets shapes and parameters, and None for the rest.
        layers: Public name to node name of `torchvision.models.feature_extraction`, or to module path for a network
            that cannot be traced.
        picture_shape: (C, H, W) of the picture to run it on.

    Returns:
        Geometry by public name, in the order of the forward pass.

    Raises:
        ValueError: A layer is bound to a node that is not there, or whose output is not one tensor.
    """
    weight = next(model.parameters(), torch.empty(0))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    images = torch.zeros(1, *picture_shape, device=weight.device, dtype=dtype)
    with _evaluating(model), torch.no_grad():
        try:
            tracer = NodePathTracer(autowrap_modules=(math, ops), leaf_modules=_LEAVES)
            graph = tracer.trace(model)
        except Exception:  # Tracing runs the network's own Python, which may raise anything.
            found = _run_with_hooks(model, layers, images)
        else:
            names = {node.name: path for node, path in tracer.node_to_qualname.items()}
            _check(layers, names.values())
            walk = _Walk(fx.GraphModule(tracer.root, graph))
            walk.run(images)
            found = {names[node]: step for node, step in walk.steps.items() if node in names}
    _check(layers, found)
    order = list(found)
    by_position = sorted(layers.items(), key=lambda item: order.index(item[1]))
    return {name: _describe(found[node]) for name, node in by_position}


@dataclass(frozen=True)
class _Step:
    """One operation's result: its shape, its field, and the parameters of the weighted operation behind it."""

    shape: tuple[int, ...]
    field: Answer
    parameters: int


def _describe(step: _Step) -> LayerGeometry:
    field = step.field if isinstance(step.field, Field) else None
    return LayerGeometry(
        shape=step.shape,
        stride=field.stride if field else None,
        receptive_field=field.size if field else None,
        receptive_field_start=field.start if field else None,
        parameters=step.parameters,
    )


class _Walk(fx.Interpreter):
    """Runs a traced network and keeps, for every node by name, the step it made."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.steps: dict[str, _Step] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor) and node.op != "output":
            self.steps[node.name] = _Step(tuple(result.shape[1:]), self._field(node, result), self._parameters(node))
        return result

    def _inputs(self, node: fx.Node) -> list[_Step]:
        return [self.steps[source.name] for source in node.all_input_nodes if source.name in self.steps]

    def _field(self, node: fx.Node, result: Tensor) -> Answer:
        if node.op == "placeholder":
            return Field()
        if node.op == "get_attr":
            return CONSTANT
        if any(source.name not in self.steps and not self._is_number(source) for source in node.all_input_nodes):
            return None
        inputs = self._inputs(node)
        operation = self.fetch_attr(str(node.target)) if node.op == "call_module" else node.target
        field = follow(operation, *self.fetch_args_kwargs_from_env(node), [step.field for step in inputs])
        # Cells that were folded, broadcast or gathered are no longer where the rules say.
        moved = isinstance(field, Field) and (result.ndim != 4 or not self._aligned(node, inputs))
        return None if moved else field

    def _is_number(self, source: fx.Node) -> bool:
        return isinstance(self.env[source], int | float | torch.Size | torch.dtype | torch.device)

    @staticmethod
    def _aligned(node: fx.Node, inputs: list[_Step]) -> bool:
        """Whether all inputs that hold pixels are maps of one size."""
        return len({step.shape[1:] for step in inputs if step.field is not CONSTANT}) == 1

    def _parameters(self, node: fx.Node) -> int:
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        weighted = [part for part in module.modules() if isinstance(part, _WEIGHTED)] if module else []
        if weighted:
            return _count(weighted[-1])
        inputs = self._inputs(node)
        if node.op == "get_attr":
            value = self.fetch_attr(str(node.target))
            return value.numel() if isinstance(value, nn.Parameter) else 0
        own = sum(step.parameters for step in inputs if step.field is CONSTANT)
        moving = [step for step in inputs if step.field is not CONSTANT]
        if own and getattr(node.target, "__name__", "").startswith(("conv", "linear")):
            return own
        return moving[0].parameters if moving else own


def _run_with_hooks(model: nn.Module, layers: Mapping[str, str], images: Tensor) -> dict[str, _Step]:
    """Run a network that cannot be traced, with a hook on every module; the hooks are gone afterwards."""
    modules = {name: module for name, module in model.named_modules() if name}
    _check(layers, modules)
    found: dict[str, _Step] = {}
    parameters = 0

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal parameters
            if isinstance(module, _WEIGHTED):
                parameters = _count(module)
            if isinstance(output, Tensor):
                found[name] = _Step(tuple(output.shape[1:]), None, parameters)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _check(layers: Mapping[str, str], nodes: Any) -> None:
    present = list(nodes)
    for name, node in layers.items():
        if node not in present:
            raise ValueError(f"layer {name!r} is bound to {node!r}; the network has {', '.join(present)}")
