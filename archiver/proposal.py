"""Proposals: which maps of a network are worth publishing, under which names.

The traced graph is cut where all data passes through a single node. Between two such nodes lies a convolution with its
norm and activation (`conv1`, `conv2`, ...), or a block of several with its own branches (`block1`, ...); its map is
taken after the last activation and before any pool. A network that cannot be traced is read off its modules, in the
order in which they ran. Axes: `N` batch, `C` channels, `h, w` map cells.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from archiver.geometry import LayerGeometry, layer_geometry
from archiver.receptive_fields import is_pointwise
from archiver.survey import Survey
from handlers.network.engines.torch_engine import trace
from handlers.network.layouts import TOKENS, parse

MANY = 10
"""More maps than this are thinned out in the choice: the first, and the last one of each size; of many patches of one
size some between, and the last but one."""


@dataclass(frozen=True)
class Proposal:
    """One map that could be published.

    Attributes:
        name: The public name it would have.
        node: Node of the network.
        geometry: Geometry of its cells.
        chosen: Whether `--layers auto` takes it.
    """

    name: str
    node: str
    geometry: LayerGeometry
    chosen: bool


def propose(network: nn.Module, found: Survey, picture_shape: tuple[int, int, int]) -> list[Proposal]:
    """Return the maps worth publishing, in the order of the forward pass.

    Args:
        network: The network, in evaluation mode, on the CPU.
        found: Results of one forward pass.
        picture_shape: (C, H, W).
    """
    usable = [node for node in found.shapes if node not in found.overwritten]
    geometry = layer_geometry(network, {node: node for node in usable}, picture_shape, found.layouts)
    maps = {node: layer for node, layer in geometry.items() if _is_map(layer)}
    units = list(_units_of_graph(network, maps) if found.traced else _units_of_modules(network, found, maps))
    chosen = _choose([maps[node] for node, _ in units])
    counts = {"conv": 0, "block": 0}
    proposals = []
    for position, (node, kind) in enumerate(units):
        counts[kind] += 1
        proposals.append(Proposal(f"{kind}{counts[kind]}", node, maps[node], position in chosen))
    return proposals


def table(proposals: Iterable[Proposal]) -> str:
    """Return proposals as lines, the chosen ones marked with `*`."""
    rows = [("  name", "node", "shape", "stride", "sees", "parameters")]
    for one in proposals:
        mark = "* " if one.chosen else "  "
        shape, stride, sees = map(_product, (one.geometry.shape, one.geometry.stride, one.geometry.receptive_field))
        parameters = one.geometry.operation.parameters if one.geometry.operation else 0
        rows.append((mark + one.name, one.node, shape, stride, sees, f"{parameters:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _product(numbers: tuple[int, ...] | None) -> str:
    return "×".join(map(str, numbers)) if numbers else "–"


def _is_map(layer: LayerGeometry) -> bool:
    """Return whether a layer still has places: a map pooled to a single cell covers all pixels and has none."""
    _, height, width = layer.shape
    return height * width > 1 or layer.receptive_field is not None


def _choose(layers: list[LayerGeometry]) -> set[int]:
    if len(layers) <= MANY:
        return set(range(len(layers)))
    positions: dict[tuple[int, ...], list[int]] = {}
    for position, layer in enumerate(layers):
        positions.setdefault(layer.shape[1:], []).append(position)
    chosen = {0, *(alike[-1] for alike in positions.values())}
    for alike in positions.values():
        tokens = [position for position in alike if parse(layers[position].layout).kind == TOKENS]
        # Their size never changes, and in the last layer the classes may depend on the class token alone.
        chosen |= {tokens[len(tokens) * part // 4] for part in range(1, 4) if len(tokens) > MANY} | {*tokens[-2:-1]}
    return chosen


def _units_of_graph(network: nn.Module, maps: Mapping[str, LayerGeometry]) -> Iterator[tuple[str, str]]:
    """Return the node that ends each convolution or block, and which of the two it is."""
    graph, names = trace(network)
    nodes = _narrows(graph)
    blocks = _blocks(network, [names.get(node.name, "") for node, _ in nodes])
    current: tuple[str, str] | None = None  # The last node of the unit being read.
    made_by = None
    for node, is_alone in nodes:
        name = names.get(node.name, "")
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        layer = maps.get(name)
        if block and name != blocks[block]:
            continue
        operation = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        is_new = layer is not None and layer.operation is not None and layer.operation is not made_by
        if is_new and layer is not None:
            if current:
                yield current
            current, made_by = (name, "conv" if is_alone and not block else "block"), layer.operation
        elif current and layer is not None and is_alone and _goes_on(operation):
            current = name, current[1]
        elif current:
            yield current
            current = None
    if current:
        yield current


def _narrows(graph: fx.GraphModule) -> list[tuple[fx.Node, bool]]:
    """Return the nodes that all data passes, in order, and whether each follows directly on the one before."""
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    flowing: set[fx.Node] = set()  # Nodes whose value is computed from the picture.
    picture = next(node for node in order if node.op == "placeholder")  # Other inputs have defaults.
    for node in order:
        if node is picture or (flowing.intersection(node.all_input_nodes) and not _is_number(node)):
            flowing.add(node)
    (output,) = (node for node in order if node.op == "output")
    needed: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [source for source in node.all_input_nodes if source in flowing]
    nodes = [node for node in order if node in needed and node in flowing and node.op != "output"]
    narrows = []
    reach = 0  # The last position at which a value made before this node is used.
    alone = 0  # Nodes since the last narrow.
    for node in nodes:
        alone += 1
        if reach <= order[node]:
            narrows.append((node, alone == 1))
            alone = 0
        reach = max([reach, *(order[user] for user in node.users if user in needed)])
    return narrows


def _is_number(node: fx.Node) -> bool:
    """Return whether a node only returns a size."""
    return (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.op == "call_function" and node.target is getattr
    )


def _blocks(network: nn.Module, narrows: list[str]) -> dict[str, str]:
    """Return the modules that are blocks, each with its last node.

    A block is the smallest module with a forward pass of its own that makes several weighted operations of which all
    data leaves through one node, and that either is not the only one of its kind or has branches.
    """
    kinds = [type(module) for module in network.modules()]
    blocks: dict[str, str] = {}
    for name, module in reversed(list(network.named_modules())):  # Inner ones before those around them.
        inside = [node for node in narrows if node.startswith(f"{name}.")]
        if not name or not inside or not _is_own(module) or any(inner.startswith(f"{name}.") for inner in blocks):
            continue
        if _weighted(module) > 1 and (kinds.count(type(module)) > 1 or len(inside) < _weighted(module)):
            blocks[name] = inside[-1]
    return blocks


def _units_of_modules(
    network: nn.Module, found: Survey, maps: Mapping[str, LayerGeometry]
) -> Iterator[tuple[str, str]]:
    """Return the units of a network that cannot be traced, from the modules that ran."""
    modules = dict(network.named_modules())
    kinds = [type(module) for module in modules.values()]
    blocks = [
        name
        for name in maps
        if _is_own(modules[name]) and _weighted(modules[name]) > 1 and kinds.count(type(modules[name])) > 1
    ]
    current: tuple[str, str] | None = None
    made_by = None
    for name in found.shapes:  # In the order in which they finished: a block after its contents.
        module = modules[name]
        is_block = name in blocks
        if any(name.startswith(f"{block}.") for block in blocks) or (next(module.children(), None) and not is_block):
            continue
        layer = maps.get(name)
        if layer is not None and layer.operation is not None and layer.operation is not made_by:
            if current:
                yield current
            current, made_by = (name, "block" if is_block else "conv"), layer.operation
        elif current and layer is not None and _goes_on(module):
            current = name, current[1]
        elif current:
            yield current
            current = None
    if current:
        yield current


def _goes_on(operation: Any) -> bool:
    """Return whether an operation after a convolution belongs to it: a norm or an activation."""
    return is_pointwise(operation) and not isinstance(operation, nn.modules.dropout._DropoutNd)


def _is_own(module: nn.Module) -> bool:
    """Return whether a module has a forward pass of its own, and is not one of torch's containers."""
    forward = inspect.getattr_static(type(module), "forward", None)  # A scripted module's cannot be read off its type.
    return next(module.children(), None) is not None and forward is not nn.Sequential.forward


def _weighted(module: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.conv._ConvNd | nn.Linear) for part in module.modules())
